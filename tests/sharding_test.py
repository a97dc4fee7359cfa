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
