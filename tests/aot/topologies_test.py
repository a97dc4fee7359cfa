"""Topology names, and collective times that can be checked by hand."""

import types

import numpy as np
import pytest

from moejax.aot import topologies


@pytest.mark.parametrize(
  'name, shape, chips',
  [
    ('v5e:4x4', (4, 4), 16),
    ('v5e-16', (4, 4), 16),
    ('v5litepod-16', (4, 4), 16),  # Google Cloud's name
    ('V5P-8', (2, 2, 1), 4),
    ('v6e-8', (2, 4), 8),
    ('v5p-128', (4, 4, 4), 64),  # names of v4 and v5p count cores
    ('v4-512', (4, 8, 8), 256),
    ('v6e:16x16', (16, 16), 256),
    ('v5p:16x16x16', (16, 16, 16), 4096),
    ('v5e:1x1', (1, 1), 1),
    ('h100x8', (8,), 8),
    ('tpu7x-8', (2, 2, 1), 4),  # counts half chips
  ],
)
def test_names(name, shape, chips):
  topology = topologies.parse(name)
  assert topology.shape == shape and topology.num_chips == chips
  assert topologies.parse(str(topology)) == topology


@pytest.mark.parametrize(
  'name, cloud, image',
  [
    ('v5e:2x4', 'v5litepod-8', 'v2-alpha-tpuv5-lite'),
    ('v5p:4x4x4', 'v5p-128', 'v2-alpha-tpuv5'),
    ('v4-8', 'v4-8', 'tpu-ubuntu2204-base'),
    ('v6e-256', 'v6e-256', 'v2-alpha-tpuv6e'),
    ('v3-32', 'v3-32', 'tpu-ubuntu2204-base'),
  ],
)
def test_what_google_cloud_calls_it(name, cloud, image):
  topology = topologies.parse(name)
  assert topology.cloud_names == (cloud, image)
  assert topologies.parse(cloud) == topology == topologies.parse(str(topology))


def test_old_slices_are_not_compiled_for():
  with pytest.raises(ValueError, match='ahead of time for v4, v5e, v5p, v6e, tpu7x only'):
    topologies.devices(topologies.parse('v3-8'))


def test_an_exchange_between_nodes_of_gpus_takes_longer_than_in_one():
  assert topologies.parse('h100x8').detour == 1
  assert topologies.parse('h100x16').detour == 1 + 450 / 50 / 2  # half of it leaves the node


def test_slices():
  topology = topologies.parse('v5e:16x16', slices=4)
  assert topology.num_chips == 1024
  assert str(topology) == '4 slices of v5e:16x16'


@pytest.mark.parametrize(
  'name, slices, message',
  [
    ('v5e-17', 1, 'no such v5e; did you mean .* There are v5litepod-1, v5litepod-4, .*by shape'),
    ('v5lite-16', 1, "did you mean 'v5litepod-16'"),
    ('v7x', 1, 'unknown. Expected a size of v4, v5e'),
    ('v5e-16', 0, '--slices must be at least 1, got 0'),
    ('h100x8', 2, 'only TPUs have slices'),
  ],
)
def test_unknown_topologies(name, slices, message):
  with pytest.raises(ValueError, match=message):
    topologies.parse(name, slices)


@pytest.mark.parametrize(
  'name, message',
  [('v5e-8', r"pip install 'moejax\[tpu-aot\]'"), ('h100x8', r"pip install 'moejax\[cuda\]'")],
)
def test_a_missing_compiler(monkeypatch, name, message):
  monkeypatch.setattr(topologies.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=message):
    topologies.devices(topologies.parse(name))


def _chips(topology):
  """All chips in order of coordinates, the first dimension fastest."""
  places = np.array(list(np.ndindex(topology.shape[::-1])))[:, ::-1]
  return np.array(
    [
      types.SimpleNamespace(coords=(*map(int, place), 0)[:3], slice_index=s)
      for s in range(topology.slices)
      for place in places
    ],
    object,
  )


def _seconds(topology, kind, chips):
  return topologies.collective_seconds(topology, kind, 1e9, chips)


# Seconds for 1 GB on v5e, whose links carry 50 GB/s each way.
@pytest.mark.parametrize(
  'kind, count, seconds',
  [
    # A line of 4 without wraparound: 3/4 over one link.
    ('all-gather', 4, 0.75 / 50),
    ('reduce-scatter', 4, 0.75 / 50),
    ('all-reduce', 4, 2 * 0.75 / 50),
    # Half of the data of two chips crosses the middle.
    ('all-to-all', 4, 1 / 50),
    # A square of 4 by 4: links in two directions.
    ('all-gather', 16, 15 / 16 / 100),
    ('all-to-all', 16, 1 / 50),
    ('collective-permute', 4, 1 / 50),
  ],
)
def test_times_on_a_small_slice(kind, count, seconds):
  topology = topologies.parse('v5e-16')
  assert _seconds(topology, kind, _chips(topology)[:count]) == pytest.approx(seconds)


def test_times_on_a_torus():
  topology = topologies.parse('v5e-256')
  ring = _chips(topology)[:16]  # wraps around: both directions at once
  assert _seconds(topology, 'all-gather', ring) == pytest.approx(15 / 16 / 100)
  assert _seconds(topology, 'all-to-all', ring) == pytest.approx(16 / 4 / 100)
  # Every fourth chip of the ring shares its links with the three other groups.
  assert _seconds(topology, 'all-gather', ring[::4]) == pytest.approx(4 * 0.75 / 100)
  cube = topologies.parse('v5p-128')
  assert cube.wraps() == (True, True, True)
  assert _seconds(cube, 'all-gather', _chips(cube)) == pytest.approx(63 / 64 / (6 * 100))


def test_between_slices_every_chip_sends_its_share():
  topology = topologies.parse('v5e-4', slices=2)
  inside = 0.75 / 100  # 2 by 2
  across = 1 / 4 * 1 / 2 / 3.125
  assert _seconds(topology, 'all-gather', _chips(topology)) == pytest.approx(inside + across)
  assert _seconds(topology, 'all-reduce', _chips(topology)) == pytest.approx(2 * (inside + across))


def test_halves_of_chips():
  topology = topologies.parse('tpu7x:2x2x1')
  assert topology.num_devices == 8 and topology.chip.memory == 96 * 2**30
  halves = np.repeat(_chips(topology), 2)  # of a chip, at the same place
  # Half of the links of a chip carry 50 GB/s each; 600 are between its halves.
  assert _seconds(topology, 'all-gather', halves[:2]) == pytest.approx(0.5 / 600)
  assert _seconds(topology, 'all-gather', halves) == pytest.approx(7 / 8 / 100)
  with pytest.raises(ValueError, match='on GKE only'):
    topology.cloud_names  # noqa: B018


def test_nodes_of_gpus():
  topology = topologies.parse('h100x16')
  gpus = [types.SimpleNamespace(id=i) for i in range(16)]
  assert _seconds(topology, 'all-gather', gpus[:8]) == pytest.approx(7 / 8 / 450)
  across = 1 / 8 * 1 / 2 / 50
  assert _seconds(topology, 'all-gather', gpus) == pytest.approx(7 / 8 / 450 + across)
