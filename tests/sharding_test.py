"""Placement: the same numbers on every mesh, and parameters that really are split."""

import functools

import jax
import numpy as np
import optax
import pytest

from moejax import sharding, train
from tests import tiny

MESHES = {
  'data 8': (8, 1, 1, 1),
  'fsdp 8': (1, 8, 1, 1),
  'data 2, expert 2, tensor 2': (2, 1, 2, 2),
  'fsdp 2, tensor 3': (1, 2, 1, 3),
}
SPARSE_MESHES = {
  'data 2, expert 4': (2, 1, 4, 1),
  'fsdp 2, expert 2, tensor 2': (1, 2, 2, 2),
}


def _losses(config, sizes, steps=3):
  mesh_config = sharding.MeshConfig(*sizes)
  devices = jax.devices()[: int(np.prod(sizes))]
  mesh = sharding.make_mesh(mesh_config, devices)
  optimizer = optax.adamw(1e-2)
  with jax.set_mesh(mesh):
    init = functools.partial(train.init_state, config, optimizer, jax.random.key(0))
    shardings = sharding.state_shardings(jax.eval_shape(init), mesh)
    state = jax.jit(init, out_shardings=shardings)()
    step = functools.partial(
      train.train_step,
      model_config=config,
      optimizer=optimizer,
      schedule=lambda step: 1e-2,
      accumulation=1,
      key=jax.random.key(0),
    )
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    losses = []
    for i in range(steps):
      state, measured = step(state, sharding.place_batch(tiny.batch(seed=i), mesh))
      losses.append(float(measured['loss']))
  return losses, state


@functools.cache
def _losses_on_one_device(config):
  return _losses(config, (1, 1, 1, 1))[0]


@pytest.mark.parametrize('sizes', MESHES.values(), ids=MESHES)
def test_losses_do_not_depend_on_the_mesh(sizes):
  config = tiny.model_config()
  losses, _ = _losses(config, sizes)
  np.testing.assert_allclose(losses, _losses_on_one_device(config), rtol=1e-5)


@pytest.mark.parametrize('router', ['token choice', 'expert choice'])
@pytest.mark.parametrize('mesh', SPARSE_MESHES)
def test_routes_and_drops_do_not_depend_on_the_mesh(mesh, router):
  changes = {'moe_impl': 'rows', 'moe_expansion_rate': 4}
  changes['moe_group_size'] = 2 if router == 'token choice' else 4
  config = tiny.model_config(**tiny.MODELS[router] | changes)
  losses, _ = _losses(config, SPARSE_MESHES[mesh])
  np.testing.assert_allclose(losses, _losses_on_one_device(config), rtol=1e-5)


def test_parameters_and_moments_are_split():
  _, state = _losses(tiny.model_config(), (1, 2, 2, 2), steps=1)
  experts = state['params']['stack_1']['1_mot']['layer']['experts']['w_in']
  assert experts.sharding.spec == jax.sharding.PartitionSpec(None, 'expert', 'fsdp', 'tensor')
  assert experts.addressable_shards[0].data.size == experts.size // 8
  moment = state['optimizer'][0].mu['stack_1']['1_mot']['layer']['experts']['w_in']
  assert moment.sharding == experts.sharding


def test_a_dimension_that_does_not_divide_stays_whole():
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1, 8))
  params = {'head': jax.ShapeDtypeStruct((12, 37), 'float32')}
  spec = sharding.state_shardings(params, mesh)['head'].spec
  assert spec == jax.sharding.PartitionSpec('fsdp', None)


@pytest.mark.parametrize(
  'sizes, message',
  [
    ((3, 1, 1, 1), 'does not fit 8 devices'),
    ((-1, -1, 1, 1), 'at most one -1'),
    ((0, 1, 1, 1), 'must be positive'),
    ((-1, 3, 1, 1), 'does not fit 8 devices'),
  ],
)
def test_impossible_meshes_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(sharding.MeshConfig(*sizes))


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
  assert [part['rows'] for part in parts] == [tuple(r) for r in rows]
  distinct = sorted({tuple(r) for r in rows})
  assert [part['part'] for part in parts] == [distinct.index(tuple(r)) for r in rows]
  assert {part['num_parts'] for part in parts} == {len(distinct)}


def test_parts_that_overlap_are_refused(monkeypatch):
  with pytest.raises(ValueError, match='do not lie in equal parts on the 2 processes'):
    _parts(monkeypatch, (3, 1, 1, 2), (0, 0, 0, 1, 1, 1), 6)
