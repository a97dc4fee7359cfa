"""Which rows of a batch a process reads."""

import jax
import numpy as np
import pytest

from moejax import sharding


class _Device:
  """What a mesh needs of a device that belongs to another process."""

  platform = device_kind = 'cpu'
  client = None

  def __init__(self, number, process):
    self.id, self.process_index = number, process


def _parts(monkeypatch, sizes, processes, num_rows):
  """`process_part` of every process, for a mesh whose devices lie on these processes in order."""
  devices = np.array([_Device(i, process) for i, process in enumerate(processes)], object)
  mesh = jax.sharding.Mesh(devices.reshape(sizes), sharding.AXES)
  parts = []
  for process in range(max(processes) + 1):
    monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
    parts.append(sharding.process_part(mesh, num_rows))
  return parts


@pytest.mark.parametrize(
  'sizes, processes, rows',
  [
    ((4, 1, 1, 1), (0, 0, 1, 1), [(0, 1, 2, 3), (4, 5, 6, 7)]),
    ((2, 2, 1, 2), (0, 0, 0, 0, 1, 1, 1, 1), [(0, 1, 2, 3), (4, 5, 6, 7)]),
    # A host of 2x2 chips in rows of 4, as on a TPU.
    ((8, 1, 1, 1), (0, 0, 1, 1, 0, 0, 1, 1), [(0, 1, 4, 5), (2, 3, 6, 7)]),
    # Both halves of a tensor dimension need the same sequences.
    ((2, 1, 1, 2), (0, 1, 0, 1), [range(8), range(8)]),
    ((2, 1, 1, 2), (0, 1, 2, 3), [(0, 1, 2, 3)] * 2 + [(4, 5, 6, 7)] * 2),
  ],
)
def test_every_process_reads_the_rows_of_its_devices(monkeypatch, sizes, processes, rows):
  parts = _parts(monkeypatch, sizes, processes, 8)
  assert [part['sequences'] for part in parts] == [tuple(r) for r in rows]
  distinct = sorted({tuple(r) for r in rows})
  assert [part['part'] for part in parts] == [distinct.index(tuple(r)) for r in rows]
  assert {part['num_parts'] for part in parts} == {len(distinct)}


def test_parts_that_overlap_are_refused(monkeypatch):
  with pytest.raises(ValueError, match='are not divided evenly among 2 processes'):
    _parts(monkeypatch, (3, 1, 1, 2), (0, 0, 0, 1, 1, 1), 6)
