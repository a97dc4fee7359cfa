"""Placement: the same numbers on every mesh, and parameters that really are split."""

import functools

import jax
import numpy as np
import optax
import pytest

from moejax import sharding, step as step_lib
from moejax.sharding import mesh as mesh_lib
from tests import tiny

MESHES = {
  'data 8': (8, 1, 1, 1),
  'fsdp 8': (1, 8, 1, 1),
  'data 2, expert 4': (2, 1, 4, 1),
  'fsdp 2, expert 2, tensor 2': (1, 2, 2, 2),
}
# What every mesh divides, in passes of 16 sequences: 2 per device (4 with an axis `tensor`). Groups
# of token choice lie on one device; those of expert choice and of MoT on two.
SIZES = {'vocab_size': 40, 'd_model': 16, 'num_heads': 4, 'd_ff': 32, 'mot_num_experts': 8}
SIZES |= {'moe_expansion_rate': 4, 'moe_group_size': 2, 'moe_impl': 'rows'}
ROWS, ACCUMULATION = 32, 2
SPREAD = {'expert choice': {'moe_group_size': 4}}
SHARED_HEADS = {'blocks': tiny.DENSE, 'num_kv_heads': 2, 'qk_norm': True, 'biases': True}
MODELS = tiny.MODELS | {'shared heads': SHARED_HEADS | {'positions': 'rope', 'norm': 'rms_norm'}}


def _model_config(model, **changes):
  return tiny.model_config(**SIZES | MODELS[model] | SPREAD.get(model, {}) | changes)


def _state(config, optimizer):
  """A train state large enough that every path matters, on no device yet."""
  init = functools.partial(step_lib.init_state, config, optimizer, jax.random.key(0))
  rng = np.random.default_rng(0)
  noise = lambda leaf: (0.5 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
  return jax.tree.map(noise, jax.eval_shape(init))


def _traced(config, sizes, optimizer):
  """A step on a mesh, and its arguments."""
  step = tiny.train_step(config, optimizer, accumulation=ACCUMULATION)
  devices = jax.devices()[: int(np.prod(sizes))]
  mesh = sharding.make_mesh(sharding.MeshConfig(*sizes), devices)
  state = _state(config, optimizer)
  shardings = sharding.state_shardings(state, mesh)
  with jax.set_mesh(mesh):
    args = jax.device_put(state, shardings), sharding.place_batch(tiny.batch(rows=ROWS), mesh)
    return jax.jit(step, out_shardings=(shardings, None)).trace(*args), args


def _step(*args):
  """The state after one step on a mesh, and what the step measured."""
  traced, args = _traced(*args)
  return traced.lower().compile()(*args)


def _axes_that_split(state, mesh):
  """The axes of several devices along which some array of the state is split."""
  specs = [leaf.sharding.spec for leaf in jax.tree.leaves(state)]
  sizes = dict(zip(sharding.AXES, mesh, strict=True))
  axes = {axis for spec in specs for entry in spec for axis in mesh_lib.names(entry)}
  return {axis for axis in axes if sizes[axis] > 1}


def _assert_close(got, expected):
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=3e-6 * np.abs(expected).max())


KEEP_GRADIENTS = optax.trace(0.0)  # they are its whole state


@functools.cache
def _on_one_device(config):
  return jax.device_get(_step(config, (1, 1, 1, 1), KEEP_GRADIENTS))


# Every model on two meshes and more, of which one splits every axis; every way to reach experts on
# every mesh: MoT's groups, experts that choose, tokens that choose (also inside of Mamba).
ON_MESHES = {
  'data 8': ('mot', 'token choice', 'expert choice'),
  'fsdp 8': ('dense', 'mot', 'expert choice', 'mamba', 'moe mamba'),
  'data 2, expert 4': ('mot', 'token choice', 'expert choice', 'moe in mamba'),
  'fsdp 2, expert 2, tensor 2': tuple(MODELS),
}


@pytest.mark.heavy
@pytest.mark.parametrize('mesh, model', [(mesh, m) for mesh in MESHES for m in ON_MESHES[mesh]])
def test_results_do_not_depend_on_the_mesh(model, mesh):
  config = _model_config(model)
  state, measured = _step(config, MESHES[mesh], KEEP_GRADIENTS)
  split = {axis for axis in ('fsdp', 'expert', 'tensor') if f'{axis} ' in mesh}
  assert _axes_that_split(state, MESHES[mesh]) == split
  state, measured = jax.device_get((state, measured))
  expected_state, expected = _on_one_device(config)
  jax.tree.map(_assert_close, state, expected_state)
  jax.tree.map(_assert_close, measured, expected)
  if config.uses('moe'):
    for name in ('moe/dropped', 'moe/unrouted', 'moe/load'):
      np.testing.assert_array_equal(measured['aux'][name], expected['aux'][name])
    assert config.moe.router == 'expert_choice' or (expected['aux']['moe/dropped'] > 0).all()


@pytest.mark.heavy
@pytest.mark.parametrize('model', ['mot', 'token choice', 'expert choice', 'moe in mamba'])
def test_recomputation_can_spare_all_exchanges(model):
  counts = {}
  for remat in ('none', 'save_moe', 'full'):
    config = _model_config(model, remat=remat)
    traced, _ = _traced(config, MESHES['data 2, expert 4'], KEEP_GRADIENTS)
    counts[remat] = str(traced.jaxpr).count('all_to_all[')
  assert 0 < counts['none'] == counts['save_moe'] < counts['full']


@pytest.mark.parametrize('model', ['mot', 'token choice'])
def test_what_recomputation_keeps_on_a_mesh_is_what_was_there(model):
  config = _model_config(model, remat='save_moe')
  state, _ = _step(config, MESHES['data 2, expert 4'], KEEP_GRADIENTS)
  expected, _ = _on_one_device(_model_config(model))
  jax.tree.map(_assert_close, jax.device_get(state), expected)


def test_parameters_and_moments_are_split():
  config = tiny.model_config(**SIZES)
  optimizer = optax.adamw(1e-2)
  state, _ = _step(config, MESHES['fsdp 2, expert 2, tensor 2'], optimizer)
  experts = state['params']['stack_1']['1_mot']['layer']['experts']['w_in']
  spec = jax.sharding.PartitionSpec(None, ('expert', 'fsdp'), None, 'tensor')
  assert experts.sharding.spec == spec
  assert experts.addressable_shards[0].data.size == experts.size // 8
  moment = state['optimizer'][0].mu['stack_1']['1_mot']['layer']['experts']['w_in']
  assert moment.sharding == experts.sharding
