"""Muon: every matrix is orthogonalized by itself, on every mesh; AdamW moves the rest."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax import model as model_lib, muon, optimizer as optimizer_lib, sharding, transition_tuning
from moejax.aot import hlo
from moejax.checkpoint import Checkpoints
from moejax.optimizer import OptimizerConfig
from moejax.parameters import name_of
from moejax.step import init_state
from tests import tiny

# Two or three matrices of every kind that layers have, by the names that layers give them.
SHAPES = {
  'stack_0': {
    '0_attention': {
      'layer': {'qkv': (2, 8, 3, 4, 6), 'kv': (2, 8, 2, 2, 6), 'out': (2, 4, 6, 8)},
    },
    '1_moe': {'layer': {'experts': {'w_in': (2, 8, 16, 12)}, 'router': (2, 16, 8)}},
    '2_mamba': {'layer': {'w_delta': (2, 3, 16), 'w_out': (2, 24, 16)}},
  }
}
QKV = ('stack_0', '0_attention', 'layer', 'qkv')
EXPERTS = ('stack_0', '1_moe', 'layer', 'experts', 'w_in')


def _gradients(seed=0):
  numbers = np.random.default_rng(seed)
  fill = lambda shape: numbers.standard_normal(shape).astype(np.float32)
  return jax.tree.map(fill, SHAPES, is_leaf=lambda shape: isinstance(shape, tuple))


def _at(tree, path):
  return functools.reduce(lambda tree, key: tree[key], path, tree)


def _updates(*gradients):
  """Of one step after the other, without rate and decay."""
  return jax.device_get(_steps(*gradients))


@jax.jit
def _steps(*gradients):
  direction, found = muon.scale_by_muon(), []
  state = direction.init(gradients[0])
  for gradient in gradients:
    updates, state = direction.update(gradient, state)
    found.append(updates)
  return found


def _orthogonalized(x):
  """The published iterations, in float64 (kellerjordan.github.io/posts/muon)."""
  x = x.astype(np.float64) / np.linalg.norm(x)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x


def test_one_matrix_as_published():
  """Two steps, of one expert of one block, and of the values among queries, keys and values."""
  first, second = _gradients(0), _gradients(1)
  got = _updates(first, second)
  slices = {EXPERTS: lambda a: a[1, 3], QKV: lambda a: a[1, :, 2].reshape(8, 24)}
  for path, of in slices.items():
    momentum, g = 0.0, None
    for gradient, update in zip((first, second), got, strict=True):
      g = of(_at(gradient, path)).astype(np.float64)
      momentum = 0.95 * momentum + g
      expected = 0.2 * math.sqrt(max(g.shape)) * _orthogonalized(g + 0.95 * momentum)
      np.testing.assert_allclose(of(_at(update, path)), expected, rtol=1e-3, atol=1e-4)
      assert 0.15 < math.sqrt((expected**2).mean()) < 0.25  # as large as AdamW's


def test_a_matrix_does_not_see_another():
  """Of another expert, another block, or queries of the same attention."""
  gradients = _gradients()
  (before,) = _updates(gradients)
  _at(gradients, EXPERTS)[1, 3] *= -2
  _at(gradients, QKV)[0, :, 1] += 1  # keys
  (after,) = _updates(gradients)
  changed = jax.tree.map(lambda a, b: np.asarray(a != b), after, before)
  experts, qkv = _at(changed, EXPERTS), _at(changed, QKV)
  assert np.argwhere(experts.any((-2, -1))).tolist() == [[1, 3]]
  assert np.argwhere(qkv.any((1, 3, 4))).tolist() == [[0, 1]]
  assert qkv[0, :, 1].any((0, 2)).all()  # all heads are one matrix
  others = [leaf for leaf in jax.tree.leaves(changed) if leaf is not experts and leaf is not qkv]
  assert not any(leaf.any() for leaf in others)


def test_an_expert_without_tokens_stays():
  gradients = _gradients()
  _at(gradients, EXPERTS)[0, 2] = 0
  (updates,) = _updates(gradients)
  experts = _at(updates, EXPERTS)
  assert not experts[0, 2].any() and experts[0, 1].all()


@pytest.mark.heavy
@pytest.mark.parametrize(
  'mesh, expected',
  [
    ((8, 1, 1, 1), 'all-gather'),
    ((1, 8, 1, 1), 'all-to-all'),
    ((2, 1, 4, 1), 'all-gather all-to-all'),
    ((1, 2, 2, 2), 'all-gather all-to-all'),
    ((1, 1, 2, 4), 'all-gather all-to-all'),
  ],
)
def test_on_a_mesh_as_on_one_device(mesh, expected):
  gradients = _gradients()
  mesh = sharding.make_mesh(sharding.MeshConfig(*mesh))
  placed = jax.device_put(gradients, sharding.state_shardings(gradients, mesh))
  direction = muon.scale_by_muon()
  with jax.set_mesh(mesh):
    update = jax.jit(lambda gradients: direction.update(gradients, direction.init(gradients))[0])
    got, program = update(placed), update.lower(placed).compile()
  alike = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), got, placed)
  assert all(jax.tree.leaves(alike))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
  jax.tree.map(close, jax.device_get(got), _updates(gradients)[0])
  # Shards move to where a matrix is orthogonalized; only what had replicas is gathered again.
  kinds = {collective.kind for collective in hlo.cost(program.as_text()).collectives}
  assert kinds == {*expected.split()}


MATRICES = {
  'shared heads': 'q kv out w_in w_out',
  'dense': 'qkv out w_in w_out',
  'mot': 'qkv out w_in w_out controller',
  'token choice': 'qkv out w_in w_out router',
  'moe in mamba': 'w_in w_gate w_select w_delta w_out router',
  'moe in mamba2': 'w_in w_gate w_bc w_delta w_out router',
}


@pytest.mark.parametrize('model', MATRICES)
def test_which_parameters_are_matrices(model):
  changes = {'blocks': tiny.DENSE, 'num_heads': 4, 'num_kv_heads': 2, 'biases': True}
  config = tiny.model_config(**tiny.MODELS.get(model, changes))
  params = jax.eval_shape(lambda: model_lib.init_params(config, jax.random.key(0)))
  leaves = jax.tree_util.tree_leaves_with_path(params)
  found = {name_of(path).split('/')[-1] for path, leaf in leaves if muon.is_matrix(path, leaf)}
  assert found == {*MATRICES[model].split()}


def test_an_undeclared_vector_is_no_matrix():
  is_matrix = lambda shape: muon.is_matrix(
    (jax.tree_util.DictKey('unknown'),), jax.ShapeDtypeStruct(shape, 'float32')
  )
  assert is_matrix((4, 8, 8)) and not is_matrix((4, 8))  # of four blocks


def _make(model, **changes):
  settings = {'name': 'muon', 'warmup_steps': 0, 'decay': 'matrices'} | changes
  return optimizer_lib.make_optimizer(OptimizerConfig(**settings), 100, model)


def test_the_rest_is_moved_by_adamw_and_matrices_decay_alike():
  model = tiny.model_config()
  params = jax.jit(lambda: model_lib.init_params(model, jax.random.key(0)))()
  keys = iter(jax.random.split(jax.random.key(1), 99))
  gradients = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)

  def update(**changes):
    optimizer = _make(model, **changes)
    return jax.jit(lambda: optimizer.update(gradients, optimizer.init(params), params)[0])()

  adamw, with_muon = update(name='adamw'), update()
  decay = jax.tree.map(jnp.subtract, with_muon, update(weight_decay=0.0))

  rate = OptimizerConfig().peak_lr

  def check(path, adamw, with_muon, decay, param):
    if muon.is_matrix(path, param):
      np.testing.assert_allclose(decay, -rate * 0.1 * param, rtol=1e-2, atol=1e-7)
      assert 0.1 < jnp.sqrt((with_muon**2).mean()) / rate < 0.4
    else:
      np.testing.assert_array_equal(with_muon, adamw)

  jax.tree_util.tree_map_with_path(check, adamw, with_muon, decay, params)


def test_the_parameterization_scales_orthogonal_updates():
  """Of four times the width: half the rate, so that a token's outputs change as much."""
  sizes = {'blocks': tiny.DENSE, 'd_ff': 48, 'parameterization': 'mup'}
  model = tiny.model_config(**sizes, base='d_model=3,d_ff=12')
  params = jax.jit(lambda: model_lib.init_params(model, jax.random.key(0)))()
  gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)

  def update(model):
    optimizer = _make(model, weight_decay=0.0)
    return jax.jit(optimizer.update)(gradients, optimizer.init(params), params)[0]['stack_0']

  got, expected = update(model), update(None)
  for layer, name in (('0_attention', 'qkv'), ('1_mlp', 'w_in'), ('1_mlp', 'w_out')):
    at = lambda updates, path=(layer, 'layer', name): _at(updates, path)
    np.testing.assert_allclose(at(got), 0.5 * at(expected), rtol=1e-5)


def test_moments_are_half_as_large_and_can_be_narrow():
  model = tiny.model_config(blocks=tiny.MOE)
  params = jax.eval_shape(lambda: model_lib.init_params(model, jax.random.key(0)))
  count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
  matrices = sum(
    math.prod(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if muon.is_matrix(path, leaf)
  )
  state = jax.eval_shape(_make(model, moment_dtype='bfloat16').init, params)
  moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
  assert count(moments) == 2 * count(params) - matrices
  assert count([m for m in moments if m.dtype == jnp.bfloat16]) == count(params)


@pytest.mark.heavy
def test_a_restored_state_goes_on_bitwise(tmp_path):
  """On a mesh that splits everything; then without moments, as transition tuning can begin."""
  model = tiny.model_config(
    vocab_size=40, d_model=16, num_heads=4, d_ff=32, mot_num_experts=8, mot_group_size=2
  )
  optimizer = _make(model)
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 2, 2, 2))
  init = lambda: init_state(model, optimizer, jax.random.key(0))
  with jax.set_mesh(mesh):
    abstract = sharding.abstract(init, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = jax.jit(
      tiny.train_step(model, optimizer),
      out_shardings=(shardings, None),
    )
    batch = sharding.place_batch(tiny.batch(rows=16), mesh)
    once, _ = step(jax.jit(init, out_shardings=shardings)(), batch)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, once, None, {})
    checkpoints.close()
    expected, _ = step(once, batch)
    got, measured = step(Checkpoints(tmp_path).restore(1, abstract, None, {}), batch)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(expected))
  assert measured['update_norm'] > 0
  moment = optax.tree.get(got['optimizer'], 'trace')['stack_1']['1_mot']['layer']['experts']['w_in']
  param = got['params']['stack_1']['1_mot']['layer']['experts']['w_in']
  assert moment.sharding == param.sharding and len({*map(str, moment.sharding.spec)}) == 3
  again = transition_tuning.fresh_moments(optimizer, got['params'], got['step'])
  assert jax.tree.structure(again) == jax.tree.structure(got['optimizer'])
