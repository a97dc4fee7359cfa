"""The Mixture-of-Tokens layer: the paper's own code reproduced, its variants against loops, what it
leaks, what it refuses, and the same numbers on every mesh."""

import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.core import jaxprs_in_params  # public only since JAX 0.9
from jax.interpreters import partial_eval

from moejax import sharding
from moejax.layers import common, mot

B, L, D, E, F, M = 6, 5, 8, 4, 7, 3
REFERENCE = pathlib.Path(__file__).parent.parent / 'reference'


def _layer(d_model=D, dtype='float32', **changes):
  fields = {'num_experts': E, 'expert_width': F, 'group_size': M}
  return mot.MixtureOfTokens(
    mot.MoTConfig(**fields | changes),
    d_model=d_model,
    d_ff=0,
    activation='relu',
    init=common.Initializer('kaiming_uniform', 1.0, jnp.dtype(dtype)),
    rngs=nnx.Rngs(0),
  )


def _params(module):
  return jax.device_get(nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def _abstract(**changes):
  """The layer without its parameters, and their shapes."""
  graph, params = nnx.split(nnx.eval_shape(lambda: _layer(**changes)))
  return graph, nnx.to_pure_dict(params)


def _random(shapes, seed=0):
  """Parameters in float64, large enough that every path matters."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda p: 1 + 0.5 * rng.standard_normal(p.shape), shapes)


def _bound(graph, params):
  return nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))


def _tokens(batch_size, length):
  positions_BL = jnp.tile(jnp.arange(length)[None], (batch_size, 1))
  return common.TokenInfo(jnp.ones((batch_size, length), jnp.int32), positions_BL)


def _x():
  return jax.random.normal(jax.random.key(1), (B, L, D))


@functools.partial(jax.jit, static_argnums=0)
def _apply(graph, params, x_BLD, tokens):
  return nnx.merge(graph, params)(x_BLD, tokens)


def _forward(x_BLD, tokens, **changes):
  return _apply(*nnx.split(_layer(**changes)), x_BLD, tokens)


def _relative_error(got, expected):
  return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()


@functools.partial(jax.jit, static_argnums=0)
def _gradients(layer, params, x_BLD, dy_BLD, *args):
  """The output of `layer(params, x_BLD, *args)` and the gradients of its projection on dy_BLD."""
  y_BLD, backward = jax.vjp(lambda params, x_BLD: layer(params, x_BLD, *args), params, x_BLD)
  return y_BLD, *backward(dy_BLD)


def _of_the_papers(graph, params, x_BLD, tokens):
  experts = {'w_in': params['lin1'], 'w_out': params['lin2']}
  return _bound(graph, {'controller': params['controller'], 'experts': experts})(x_BLD, tokens)[0]


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 2e-6), ('float64', 1e-10)])
@pytest.mark.parametrize('variant', ['basic', 'temperature', 'emit_over_experts', 'discrete'])
def test_reproduces_the_papers_code(x64, variant, dtype, tolerance):
  with np.load(REFERENCE / f'llm_random_mot_{variant}.npz') as arrays:
    reference = dict(arrays)
  config = json.loads(reference['config_json'].tobytes())
  names = ('controller', 'lin1', 'lin2')
  given = lambda name: jnp.asarray(reference[name], dtype)
  graph, _ = _abstract(
    d_model=12,
    num_experts=8,
    expert_width=6,
    group_size=4,
    temperature=config['temperature'],
    emit='softmax_over_experts' if 'emit_softmax_over_experts' in config else 'same',
    routing='discrete' if 'use_discrete_routing' in config else 'softmax',
  )
  dy_BLD = given('dy') if 'dy' in reference else jnp.ones_like(given('x'))
  y_BLD, dparams, dx_BLD = _gradients(
    functools.partial(_of_the_papers, graph),
    {n: given(f'w.{n}') for n in names},
    given('x'),
    dy_BLD,
    _tokens(*reference['x'].shape[:2]),
  )
  results = {'y': y_BLD}
  if 'dy' in reference:  # the papers' code differentiates all but the discrete routing
    results |= {'dx': dx_BLD} | {f'g.{n}': dparams[n] for n in names}
  assert {a.dtype for a in results.values()} == {jnp.dtype(dtype)}
  errors = {name: _relative_error(a, reference[name]) for name, a in results.items()}
  assert max(errors.values()) < tolerance, errors


def _soft(scores_ME, valid_M):
  return jax.nn.softmax(jnp.where(valid_M[:, None], scores_ME, -1e9), axis=0)


def _hot(scores_ME, valid_M):
  return jax.nn.one_hot(jnp.where(valid_M[:, None], scores_ME, -1e9).argmax(0), M, axis=0)


def _separate(x_MD, p, v):
  return _soft(x_MD @ p['controller'], v), _soft(x_MD @ p['emit_controller'], v)


def _learned(x_MD, p, v):
  weights_ME = _soft(x_MD @ p['controller'] / jnp.exp(p['temperature'] - 1), v)
  return weights_ME, weights_ME


def _two_temperatures(x_MD, p, v):
  scores_ME = x_MD @ p['controller']
  cold, hot = (jnp.exp(p[name] - 1)[None] for name in ('temperature', 'emit_temperature'))
  return _soft(scores_ME / cold, v), _soft(scores_ME / hot, v)


# Changes to the config, and the weights of merge and emit in one group, from its tokens x_MD, the
# parameters and which tokens are valid.
VARIANTS = {
  'same': ({}, lambda x, p, v: 2 * (_soft(x @ p['controller'], v),)),
  'softmax_over_experts': (
    {'emit': 'softmax_over_experts'},
    lambda x, p, v: (_soft(x @ p['controller'], v), jax.nn.softmax(x @ p['controller'], axis=1)),
  ),
  'raw': ({'emit': 'raw'}, lambda x, p, v: (_soft(x @ p['controller'], v), jnp.ones((M, E)))),
  'top_1': (
    {'emit': 'top_1'},
    lambda x, p, v: (_soft(x @ p['controller'], v), _hot(x @ p['controller'], v)),
  ),
  'temperature': (
    {'temperature': 0.7},
    lambda x, p, v: 2 * (_soft(x @ p['controller'] / 0.7, v),),
  ),
  'annealed': (
    {'temperature_mode': 'annealed', 'temperature': 2.0},
    lambda x, p, v: 2 * (_soft(x @ p['controller'] / (2 * p['anneal']), v),),
  ),
  'learned': ({'temperature_mode': 'learned'}, _learned),
  'learned per expert, two': (
    {'temperature_mode': 'learned_per_expert', 'separate_temperatures': True},
    _two_temperatures,
  ),
  'separate controllers': ({'separate_controllers': True}, _separate),
  'norm': ({'expert_norm': True}, lambda x, p, v: 2 * (_soft(x @ p['controller'], v),)),
  'uniform': ({'routing': 'uniform'}, lambda x, p, v: 2 * (_soft(jnp.zeros((M, E)), v),)),
  'discrete': ({'routing': 'discrete'}, lambda x, p, v: 2 * (_hot(x @ p['controller'], v),)),
  'discrete, over experts': (
    {'routing': 'discrete', 'emit': 'softmax_over_experts'},
    lambda x, p, v: (
      _hot(x @ p['controller'], v),
      jax.nn.one_hot((x @ p['controller']).argmax(axis=1), E),
    ),
  ),
}


def _norm(x_D, p):
  return common.layer_norm(x_D, p['scale'], p['bias'])


def _loop(weigh, params, x_BLD, segments_BL):
  """The definition: one group, one position, one expert after the other."""

  def of_group(x_MD, valid_M):
    merge_ME, emit_ME = weigh(x_MD, params, valid_M)
    y_MD = 0
    for e in range(E):
      mixture_D = merge_ME[:, e] @ x_MD
      if 'norm_in' in params:
        mixture_D = _norm(mixture_D, params['norm_in'])
      out_D = jax.nn.relu(mixture_D @ params['experts']['w_in'][e]) @ params['experts']['w_out'][e]
      if 'norm_out' in params:
        out_D = _norm(out_D, params['norm_out'])
      y_MD += (emit_ME[:, e] * valid_M)[:, None] * out_D[None]
    return y_MD

  by_group = lambda a: a.reshape(B // M, M, *a.shape[1:])
  of_groups = jax.vmap(jax.vmap(of_group, in_axes=1, out_axes=1))
  return of_groups(by_group(x_BLD), by_group(segments_BL > 0)).reshape(x_BLD.shape)


def _segments():
  """Some padding, and a valid token in every group."""
  segments_BL = np.ones((B, L), 'int32')
  segments_BL[1, 2:] = segments_BL[4:, 4] = 0
  return segments_BL


@pytest.mark.parametrize('name', VARIANTS)
def test_variants_are_the_loops_that_define_them(x64, name):
  changes, weigh = VARIANTS[name]
  graph, shapes = _abstract(**changes)
  params = _random(shapes)
  rng = np.random.default_rng(1)
  x_BLD, dy_BLD = rng.standard_normal((2, B, L, D))
  tokens = _tokens(B, L)._replace(segments=jnp.asarray(_segments()))
  layer = lambda params, x_BLD: _bound(graph, params)(x_BLD, tokens)[0]
  got = _gradients(layer, params, x_BLD, dy_BLD)
  loop = functools.partial(_loop, weigh)
  expected = _gradients(loop, params, x_BLD, dy_BLD, tokens.segments)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
  jax.tree.map(close, got, expected)
  moved = {
    n: np.abs(np.asarray(g)).max() > 0
    for n, g in got[1].items()
    if n != 'experts' and not isinstance(g, dict)
  }
  learnt = changes.get('routing', 'softmax') == 'softmax'
  assert all(moved.values()) if learnt else not any(moved.values())


@pytest.mark.parametrize('emit', ['same', 'softmax_over_experts', 'raw', 'top_1'])
def test_padding_never_enters_a_mixture(emit):
  segments_BL = _segments()
  segments_BL[M:, 4] = 0  # a group without any token
  graph, shapes = _abstract(emit=emit)
  params = jax.tree.map(np.float32, _random(shapes))
  tokens = _tokens(B, L)._replace(segments=jnp.asarray(segments_BL))
  layer = lambda params, x_BLD: _bound(graph, params)(x_BLD, tokens)[0]
  y_BLD, dparams, dx_BLD = _gradients(layer, params, _x(), jnp.ones((B, L, D)))
  other_BLD = jnp.where(segments_BL[..., None] > 0, _x(), 9 - _x())
  changed_BLD, *_ = _gradients(layer, params, other_BLD, jnp.ones((B, L, D)))
  assert np.array_equal(y_BLD, changed_BLD)
  for a_BLD in (y_BLD, dx_BLD):
    assert np.isfinite(a_BLD).all() and not np.any(np.asarray(a_BLD)[segments_BL == 0])
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(dparams))
  assert (np.abs(y_BLD).max(-1) > 0)[segments_BL > 0].any()


def test_an_example_is_seen_at_its_own_position_by_its_group_only():
  x_BLD = _x()
  before, _ = _forward(x_BLD, _tokens(B, L))
  after, _ = _forward(x_BLD.at[4, 2].add(1), _tokens(B, L))
  changed_BL = np.abs(after - before).max(-1) > 0
  assert np.argwhere(changed_BL).tolist() == [[3, 2], [4, 2], [5, 2]]


def test_permuting_the_examples_of_a_group_permutes_the_outputs():
  x_BLD, order = _x(), np.array([1, 2, 0, 3, 5, 4])
  straight, aux = _forward(x_BLD, _tokens(B, L))
  permuted, permuted_aux = _forward(x_BLD[order], _tokens(B, L))
  np.testing.assert_allclose(permuted, straight[order], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(permuted_aux['mot/entropy'], aux['mot/entropy'], rtol=1e-5)


def test_groups_of_one_are_the_sum_of_all_experts():
  y_BLD, _ = _forward(_x(), _tokens(B, L), group_size=1)
  params = _params(_layer().experts)
  hidden = np.maximum(np.einsum('BLD,EDF->BLEF', _x(), params['w_in']), 0)
  expected_BLD = np.einsum('BLEF,EFD->BLD', hidden, params['w_out'])
  np.testing.assert_allclose(y_BLD, expected_BLD, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_expert_and_the_controller():
  graph, params = nnx.split(_layer())
  total = lambda params: jnp.sum(jnp.square(nnx.merge(graph, params)(_x(), _tokens(B, L))[0]))
  gradients = nnx.to_pure_dict(jax.jit(jax.grad(total))(params))
  assert (np.abs(gradients['experts']['w_in']).max(axis=(1, 2)) > 0).all()
  assert (np.abs(gradients['experts']['w_out']).max(axis=(1, 2)) > 0).all()
  assert (np.abs(gradients['controller']) > 0).all()


@functools.partial(jax.jit, static_argnums=0)
def _decode(graph, params, x_BLD, segments_BL):
  layer = nnx.merge(graph, params)
  state, columns = layer.init_state(B, L, x_BLD.dtype), []
  for position in range(L):
    now = common.TokenInfo(segments_BL[:, position], jnp.full(B, position))
    y_BD, state = layer.step(x_BLD[:, position], state, now)
    columns.append(y_BD)
  return jnp.stack(columns, axis=1)


def test_steps_equal_the_forward_pass():
  tokens = _tokens(B, L)
  segments_BL = tokens.segments.at[1, 3:].set(0)
  expected, _ = _forward(_x(), tokens._replace(segments=segments_BL))
  got = _decode(*nnx.split(_layer()), _x(), segments_BL)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_entropy_is_one_where_all_tokens_are_the_same():
  x_BLD = jnp.broadcast_to(_x()[:1], (B, L, D))
  y_BLD, aux = _forward(x_BLD, _tokens(B, L))
  np.testing.assert_allclose(aux['mot/entropy'], 1, rtol=1e-5)
  np.testing.assert_allclose(y_BLD, jnp.broadcast_to(y_BLD[:1], y_BLD.shape), rtol=1e-5)


def test_a_lower_temperature_mixes_less():
  run = lambda t: _forward(_x(), _tokens(B, L), temperature=t)[1]['mot/entropy']
  assert 0 < run(0.3) < run(1.0) < run(3.0) < 1


def test_bfloat16_activations_stay_bfloat16():
  y_BLD, aux = _forward(_x().astype('bfloat16'), _tokens(B, L))
  assert y_BLD.dtype == jnp.bfloat16 and aux['mot/entropy'].dtype == jnp.float32
  exact, _ = _forward(_x(), _tokens(B, L))
  assert _relative_error(y_BLD.astype('float32'), np.asarray(exact)) < 2e-2


def test_batches_that_do_not_divide_into_groups_are_refused():
  with pytest.raises(ValueError, match='model.mot.group_size = 3 must divide .* got 4'):
    _layer()(_x()[:4], _tokens(4, L))


def test_annealed_to_the_end_routing_is_discrete():
  changes = {'temperature_mode': 'annealed'}
  graph, params = nnx.split(_layer(**changes))
  params['anneal'] = params['anneal'].replace(jnp.zeros(()))
  y_BLD, aux = _apply(graph, params, _x(), _tokens(B, L))
  expected_BLD, _ = _forward(_x(), _tokens(B, L), routing='discrete')
  np.testing.assert_allclose(y_BLD, expected_BLD, rtol=1e-5, atol=1e-5)
  assert aux['mot/temperature'] < 1e-5


@pytest.mark.parametrize('t', [-20.0, -300, 300])
def test_a_learned_temperature_beyond_all_bounds_is_finite(t):
  """exp(t - 1) is 1e-9, 0 and infinite: one token per mixture, and the mean of all."""
  graph, shapes = _abstract(temperature_mode='learned')
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda p: rng.standard_normal(p.shape, 'float32'), shapes)
  params['temperature'] = jnp.float32(t)

  def loss(params, x_BLD):
    y_BLD, aux = _bound(graph, params)(x_BLD, _tokens(B, L))
    return y_BLD.mean(), aux['mot/entropy']

  (_, entropy), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, _x())
  assert entropy == pytest.approx(float(t > 0), abs=1e-4)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize('config', [{'temperature_mode': 'learned'}, {}])
def test_large_scores_at_a_cold_temperature_are_finite(config):
  graph, shapes = _abstract(temperature=1e-12, **config)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda p: rng.standard_normal(p.shape, 'float32'), shapes)
  if 'temperature' in params:
    params['temperature'] = jnp.float32(-30)
  params['controller'][0] = 1e4
  x_BLD = _x().at[..., 0].set(1)

  def loss(params, x_BLD):
    return _bound(graph, params)(x_BLD, _tokens(B, L))[0].mean()

  found = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x_BLD)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_a_learned_temperature_starts_as_configured():
  layer = _layer(temperature_mode='learned', temperature=0.5)
  _, aux = _apply(*nnx.split(layer), _x(), _tokens(B, L))
  np.testing.assert_allclose(aux['mot/temperature'], 0.5, rtol=1e-6)
  assert _params(_layer(temperature_mode='learned'))['temperature'] == 1


def test_random_groups_are_those_of_the_permuted_batch():
  key = jax.random.key(7)
  run = lambda key: _forward(_x(), _tokens(B, L)._replace(key=key), grouping='random')[0]
  order = np.asarray(jax.random.permutation(key, B))
  in_order, _ = _forward(_x()[order], _tokens(B, L))
  np.testing.assert_allclose(np.asarray(run(key))[order], in_order, rtol=1e-5, atol=1e-5)
  by_batch, _ = _forward(_x(), _tokens(B, L))
  np.testing.assert_allclose(run(None), by_batch, rtol=1e-6)  # evaluation
  assert np.abs(run(key) - by_batch).max() > 0.1
  assert np.abs(run(key) - run(jax.random.key(8))).max() > 0.1


MESHES = {
  'data 8': (8, 1, 1, 1),
  'fsdp 8': (1, 8, 1, 1),
  'data 2, expert 4': (2, 1, 4, 1),
  'fsdp 2, expert 2, tensor 2': (1, 2, 2, 2),
}
ON_MESH = dict(d_model=16, num_experts=12, expert_width=24, group_size=4)
LEARNED = dict(
  grouping='random',
  temperature_mode='learned_per_expert',
  emit='softmax_over_experts',
  separate_controllers=True,
)


def _with_key(graph, params, x_BLD, segments_BL, key):
  positions_BL = jnp.zeros_like(segments_BL)
  return _bound(graph, params)(x_BLD, common.TokenInfo(segments_BL, positions_BL, key))[0]


def _on_mesh(sizes, changes):
  """Output and gradients, and the compiled program."""
  graph, shapes = _abstract(**ON_MESH, **changes)
  params = _random(shapes)
  rng = np.random.default_rng(1)
  x_BLD, dy_BLD = rng.standard_normal((2, 8, L, 16))
  segments_BL = np.ones((8, L), 'int32')
  segments_BL[1, 2:] = 0
  mesh = sharding.make_mesh(sharding.MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
  with jax.set_mesh(mesh):
    batch = jax.NamedSharding(mesh, sharding.BATCH)
    shardings = sharding.state_shardings(params, mesh)
    x_BLD, dy_BLD, segments_BL = jax.device_put((x_BLD, dy_BLD, segments_BL), batch)
    args = jax.device_put(params, shardings), x_BLD, dy_BLD, segments_BL, jax.random.key(3)
    run = functools.partial(_gradients.__wrapped__, functools.partial(_with_key, graph))
    jitted = jax.jit(run, out_shardings=(batch, shardings, batch))
    compiled = jitted.lower(*args).compile()
    return jax.device_get(compiled(*args)), compiled.as_text()


@functools.cache
def _on_one_device(**changes):
  return _on_mesh((1, 1, 1, 1), changes)[0]


@pytest.mark.parametrize(
  ('mesh', 'changes'),
  [*((name, {}) for name in MESHES), ('data 2, expert 4', LEARNED), ('fsdp 8', LEARNED)],
)
def test_values_and_gradients_do_not_depend_on_the_mesh(x64, mesh, changes):
  got, program = _on_mesh(MESHES[mesh], changes)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
  jax.tree.map(close, got, _on_one_device(**changes))
  _, fsdp, expert, tensor = MESHES[mesh]
  # Tokens move in all-to-alls only: there and back, in both directions, and their mask. Mixtures go
  # to the experts' devices and back. What is gathered are the weights of experts.
  swaps = len(re.findall(r' all-to-all\(', program))
  assert swaps == 5 + 4 * (expert > 1)
  gathered = re.findall(r'= f64\[([\d,]*)\]\S* all-gather\(', program)
  weights = sorted((12 // expert, 16, 24 // tensor))
  assert bool(gathered) == (fsdp > 1)
  assert all(sorted(map(int, shape.split(','))) == weights for shape in gathered)


def test_no_temporary_holds_a_copy_of_every_token_for_every_expert():
  sizes = dict(d_model=32, num_experts=64, expert_width=16, group_size=32)
  graph, shapes = _abstract(**sizes)
  x_BLD = jax.ShapeDtypeStruct((64, 8, 32), 'float32')
  layer = lambda params, x_BLD: _bound(graph, params)(x_BLD, _tokens(64, 8))[0]
  program = _gradients.lower(layer, shapes, x_BLD, x_BLD).compile()
  every_token_for_every_expert = 4 * x_BLD.size * 64
  assert program.memory_analysis().temp_size_in_bytes < every_token_for_every_expert / 4


def _wide_arithmetic(param_dtype):
  """Primitives that compute whole float32 arrays, forward and backward, for bfloat16 activations.

  Not counted: numbers per row, and the way of an array into a sum or out of its gradient.
  """
  graph, shapes = _abstract(dtype=param_dtype, expert_norm=True, temperature_mode='learned')
  x_BLD = jax.ShapeDtypeStruct((B, L, D), 'bfloat16')
  layer = lambda params, x_BLD: _bound(graph, params)(x_BLD, _tokens(B, L))[0]
  program = jax.make_jaxpr(lambda *args: _gradients.__wrapped__(layer, *args))(shapes, x_BLD, x_BLD)
  # Without measurements, which nobody asks for here.
  jaxpr, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.out_avals))
  arrays = [(e.primitive.name, e.outvars[0].aval) for e in _equations(jaxpr)]
  wide = {name for name, a in arrays if a.dtype == 'float32' and a.ndim == 3 and 1 not in a.shape}
  return wide - {'convert_element_type', 'broadcast_in_dim'}


def test_with_bfloat16_parameters_only_sums_are_float32():
  assert not _wide_arithmetic('bfloat16')
  assert {'dot_general', 'exp', 'mul'} <= _wide_arithmetic('float32')


def _equations(jaxpr):
  """All equations, those of functions called within included."""
  for equation in jaxpr.eqns:
    inner = [*jaxprs_in_params(equation.params)]
    if inner:
      for called in inner:
        yield from _equations(called)
    else:
      yield equation


MEASURED = {'mot/entropy', 'mot/max_weight', 'mot/std'}


@pytest.mark.parametrize(
  ('changes', 'more'),
  [
    ({}, set()),
    ({'emit': 'raw'}, set()),
    ({'emit': 'top_1', 'temperature_mode': 'annealed'}, {'mot/temperature'}),
    (
      {
        'emit': 'softmax_over_experts',
        'temperature_mode': 'learned_per_expert',
        'separate_temperatures': True,
      },
      {
        'mot/emit_entropy',
        'mot/emit_max_weight',
        'mot/emit_std',
        'mot/temperature',
        'mot/emit_temperature',
      },
    ),
  ],
  ids=lambda value: str(value if isinstance(value, dict) else sorted(value)),
)
def test_measurements_are_float32_scalars(changes, more):
  graph, shapes = _abstract(**changes, dtype='bfloat16')
  layer = lambda params, x_BLD: _bound(graph, params)(x_BLD, _tokens(B, L))[1]
  aux = jax.eval_shape(layer, shapes, jax.ShapeDtypeStruct((B, L, D), 'bfloat16'))
  assert aux.keys() == MEASURED | more
  assert {(a.shape, a.dtype) for a in aux.values()} == {((), jnp.dtype('float32'))}


def test_all_positions_together_are_soft_moe(x64):
  """arXiv:2308.00951, section 2, a slot per expert: every token sees all others of its group."""
  graph, shapes = _abstract(
    grouping='all_positions', emit='softmax_over_experts', group_size=2, expert_width=6
  )
  params = _random(shapes)
  params['controller'] *= 0.1
  rng = np.random.default_rng(3)
  x_BLD, dy_BLD = rng.standard_normal((2, B, L, params['controller'].shape[0]))
  segments_BL = np.ones((B, L), 'int32')
  segments_BL[1, 2:] = 0

  def soft_moe(params, x_BLD):
    x_CMD, valid_CM = x_BLD.reshape(B // 2, 2 * L, -1), segments_BL.reshape(B // 2, 2 * L) > 0
    logits_CME = jnp.where(valid_CM[..., None], x_CMD @ params['controller'], -1e9)
    rows = jnp.einsum('cme,cmd->ecd', jax.nn.softmax(logits_CME, axis=1), x_CMD)
    rows = jax.nn.relu(rows @ params['experts']['w_in']) @ params['experts']['w_out']
    combine_CME = jax.nn.softmax(logits_CME, axis=2) * valid_CM[..., None]
    return jnp.einsum('cme,ecd->cmd', combine_CME, rows).reshape(x_BLD.shape)

  layer = lambda params, x_BLD: _with_key(graph, params, x_BLD, segments_BL, None)

  @functools.partial(jax.jit, static_argnums=0)
  def with_gradients(f, params, x_BLD):
    y_BLD, backward = jax.vjp(f, params, x_BLD)
    return y_BLD, backward(dy_BLD)

  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)
  got = with_gradients(layer, params, x_BLD)
  jax.tree.map(close, got, with_gradients(soft_moe, params, x_BLD))
  x_BLD[0, -1] *= -3  # a later token, which only the first group sees, at every position
  changed_BL = np.any(with_gradients(layer, params, x_BLD)[0] != got[0], axis=-1)
  expected_BL = segments_BL.astype(bool) & (np.arange(B) < 2)[:, None]
  np.testing.assert_array_equal(changed_BL, expected_BL)
