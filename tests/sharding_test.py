"""Placement: the same numbers on every mesh, and parameters that really are split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax import sharding, step as step_lib
from moejax.sharding import mesh as mesh_lib, rules
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


def _model_config(model, **changes):
  return tiny.model_config(**SIZES | tiny.MODELS[model] | SPREAD.get(model, {}) | changes)


def _state(config, optimizer):
  """A train state large enough that every path matters, on no device yet."""
  init = functools.partial(step_lib.init_state, config, optimizer, jax.random.key(0))
  rng = np.random.default_rng(0)
  noise = lambda leaf: (0.5 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
  return jax.tree.map(noise, jax.eval_shape(init))


def _traced(config, sizes, optimizer):
  """A step on a mesh, and its arguments."""
  step = functools.partial(
    step_lib.train_step,
    model_config=config,
    optimizer=optimizer,
    schedule=lambda step: jnp.float32(0),
    accumulation=ACCUMULATION,
    key=jax.random.key(0),
  )
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
  return traced.lower().compile(compiler_options=tiny.QUICKLY)(*args)


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


@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('model', tiny.MODELS)
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


def test_experts_too_few_for_fsdp_are_split_by_their_width():
  sizes = {'fsdp': 4, 'expert': 2, 'tensor': 1, 'data': 1}
  of_mesh = lambda *axes: int(np.prod([sizes[axis] for axis in axes]))
  P = jax.sharding.PartitionSpec
  assert rules.spec('experts/w_in', (16, 12, 5), of_mesh) == P(('expert', 'fsdp'), None, 'tensor')
  assert rules.spec('experts/w_in', (4, 12, 5), of_mesh) == P('expert', 'fsdp', 'tensor')
  assert rules.spec('experts/w_out', (4, 5, 6), of_mesh) == P('expert', 'tensor', None)


def test_a_dimension_that_does_not_divide_stays_whole():
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1, 8))
  params = {'head': jax.ShapeDtypeStruct((12, 37), 'float32')}
  spec = sharding.state_shardings(params, mesh)['head'].spec
  assert spec == jax.sharding.PartitionSpec(('fsdp', 'expert'), None)


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


@pytest.mark.parametrize(
  'shape, slices, inside, between',
  [
    ((8, 2, 4, 1), 4, [2, 2, 4, 1], [4, 1, 1, 1]),
    ((1, 8, 4, 1), 4, [1, 2, 4, 1], [1, 4, 1, 1]),
  ],
)
def test_slices_lie_along_an_outer_axis(shape, slices, inside, between):
  assert mesh_lib._by_slices(shape, slices) == (inside, between)


def test_slices_that_fit_no_axis_are_refused():
  with pytest.raises(ValueError, match='the 2 slices must divide mesh.data or mesh.fsdp'):
    mesh_lib._by_slices((1, 1, 32, 1), 2)
