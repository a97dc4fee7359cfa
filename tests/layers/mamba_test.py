"""The Mamba layer: transformers' numbers reproduced, its initialisation, documents, decoding."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.layers import common, mamba
from tests import shapes

B, L, D, N, W = 2, 7, 12, 3, 4
REFERENCE = pathlib.Path(__file__).parent.parent / 'reference' / 'hf_mamba_mixer.npz'


def _layer(d_model=D, state_size=N, dtype='float32'):
  config = mamba.MambaConfig(state_size=state_size, conv_width=W)
  init = common.Initializer('truncated_normal', 1.0, jnp.dtype(dtype))
  return mamba.Mamba(config, d_model=d_model, init=init, rngs=nnx.Rngs(0))


def _random_layer(dtype='float32'):
  """A layer, as (graph, parameters), in which every parameter matters."""
  graph, params = nnx.split(_layer(dtype=dtype))
  rng = np.random.default_rng(0)
  return graph, jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape).astype(dtype), params)


def _x(dtype='float32'):
  return jnp.asarray(np.random.default_rng(1).standard_normal((B, L, D)), dtype)


def _tokens(*starts, length=L):
  """Packed documents that start at these positions of every row."""
  segments_L = np.searchsorted(starts, np.arange(length), side='right')
  positions_L = np.arange(length) - np.asarray(starts)[segments_L - 1]
  tile = lambda v_L: jnp.asarray(np.tile(v_L[None], (B, 1)), jnp.int32)
  return common.TokenInfo(tile(segments_L), tile(positions_L))


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph, params, x_BLD, tokens):
  return nnx.merge(graph, params)(x_BLD, tokens)[0]


@functools.partial(jax.jit, static_argnums=0)
def _prefill(graph, params, x_BLD, tokens):
  return nnx.merge(graph, params).prefill(x_BLD, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _steps(graph, params, state, x_BLD, tokens):
  """All positions, one at a time."""
  layer = nnx.merge(graph, params)

  def advance(state, position):
    x_BD, now = position
    y_BD, state = layer.step(x_BD, state, now)
    return state, y_BD

  by_time = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (x_BLD, tokens))
  return jnp.moveaxis(jax.lax.scan(advance, state, by_time)[1], 0, 1)


def _reference_weights(reference, prefix):
  """The reference's matrices by our names: [in, out], and in and gate apart."""
  get = lambda name: reference[f'{prefix}.{name}']
  w_in, w_gate = np.split(get('in_proj.weight').T, 2, axis=1)
  return {
    'w_in': w_in,
    'w_gate': w_gate,
    'conv_kernel': get('conv1d.weight')[:, 0].T,
    'conv_bias': get('conv1d.bias'),
    'w_select': get('x_proj.weight').T,
    'w_delta': get('dt_proj.weight').T,
    'delta_bias': get('dt_proj.bias'),
    'a_log': get('A_log'),
    'skip': get('D'),
    'w_out': get('out_proj.weight').T,
  }


def run_with(layer, weights, reference):
  """The outputs of a layer with other weights, and the gradients of these and of its inputs."""
  graph, params = nnx.split(layer)
  assert jax.tree.map(jnp.shape, nnx.to_pure_dict(params)) == jax.tree.map(jnp.shape, weights)
  tokens = _tokens(0, length=reference['x'].shape[1])

  @jax.jit
  def run(weights, x_BLD, dy_BLD):
    def apply(weights, x_BLD):
      nnx.replace_by_pure_dict(params, weights)
      return nnx.merge(graph, params)(x_BLD, tokens)[0]

    y_BLD, backward = jax.vjp(apply, weights, x_BLD)
    return y_BLD, backward(dy_BLD)

  return run(weights, reference['x'], reference['dy'])


def test_reproduces_transformers():
  with np.load(REFERENCE) as arrays:
    reference = dict(arrays)
  weights = _reference_weights(reference, 'w')
  y_BLD, (gradients, dx_BLD) = run_with(_layer(d_model=20, state_size=5), weights, reference)
  got = {'y': y_BLD, 'x': dx_BLD, **gradients}
  expected = {'y': reference['y'], 'x': reference['dx'], **_reference_weights(reference, 'g')}
  errors = {k: np.abs(got[k] - v).max() / np.abs(v).max() for k, v in expected.items()}
  assert max(errors.values()) < 2e-6, errors


def test_starts_as_the_reference_does():
  layer = _layer(d_model=256, state_size=16)
  steps = jax.nn.softplus(layer.delta_bias[...])
  assert mamba.MIN_STEP * 0.999 < steps.min() < 1.5e-3 and 0.07 < steps.max() < 0.1001
  assert abs(np.log(steps).mean() - np.log(0.01)) < 0.2  # even in the logarithm
  np.testing.assert_allclose(np.exp(layer.a_log[...]), np.tile(np.arange(1, 17), (512, 1)), 1e-6)
  np.testing.assert_array_equal(layer.skip[...], 1)
  fan_in = {'w_in': 256, 'w_gate': 256, 'conv_kernel': W, 'conv_bias': W}
  fan_in |= {'w_select': 512, 'w_delta': 16, 'w_out': 512}
  for name, n in fan_in.items():
    largest = np.abs(getattr(layer, name)[...]).max() * n**0.5
    assert 0.98 < largest <= 1.0001, name


@pytest.mark.parametrize('cut', range(L + 1))
def test_prefill_and_steps_are_the_forward_pass(x64, cut):
  graph, params = _random_layer('float64')
  x_BLD, tokens = _x('float64'), _tokens(0)
  split = lambda tree, part: jax.tree.map(lambda v: v[:, part], tree)
  columns = []
  if cut:
    y_BLD, state = _prefill(graph, params, x_BLD[:, :cut], split(tokens, slice(cut)))
    columns.append(y_BLD)
  else:
    state = nnx.merge(graph, params).init_state(B, L, jnp.float64)
  if cut < L:
    rest = slice(cut, None)
    columns.append(_steps(graph, params, state, x_BLD[:, rest], split(tokens, rest)))
  expected = _forward(graph, params, x_BLD, tokens)
  np.testing.assert_allclose(jnp.concatenate(columns, axis=1), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('border', [1, 2, 5])
def test_packed_documents_are_separate_documents(x64, border):
  graph, params = _random_layer('float64')
  x_BLD = _x('float64')
  packed = _forward(graph, params, x_BLD, _tokens(0, border))
  first = _forward(graph, params, x_BLD[:, :border], _tokens(0, length=border))
  second = _forward(graph, params, x_BLD[:, border:], _tokens(0, length=L - border))
  expected = jnp.concatenate([first, second], axis=1)
  np.testing.assert_allclose(packed, expected, rtol=1e-11, atol=1e-11)
  empty = nnx.merge(graph, params).init_state(B, L, jnp.float64)
  stepped = _steps(graph, params, empty, x_BLD, _tokens(0, border))
  np.testing.assert_allclose(stepped, expected, rtol=1e-11, atol=1e-11)


def test_a_position_is_seen_from_itself_on_by_its_own_sequence():
  graph, params = _random_layer()
  before = _forward(graph, params, _x(), _tokens(0))
  after = _forward(graph, params, _x().at[1, 2].add(1), _tokens(0))
  changed_BL = np.abs(after - before).max(-1) > 0
  assert np.argwhere(changed_BL).tolist() == [[1, l] for l in range(2, L)]


class _Linear(nnx.Module):
  """Stands for experts: a matrix of known size, which says that it ran."""

  def __init__(self, d_in, d_out):
    self.w = nnx.Param(jnp.zeros((d_in, d_out)))

  def __call__(self, x_BLD, tokens):
    return x_BLD @ self.w[...], {'width': jnp.float32(x_BLD.shape[-1])}

  def prefill(self, x_BLD, tokens):
    return self(x_BLD, tokens)[0], {}

  def step(self, x_BD, state, tokens):
    return x_BD @ self.w[...], state


@pytest.mark.parametrize(
  ('moe_in', 'widths'), [('conv', [D]), ('out+gate', [D, 2 * D]), ('conv+gate+out', [D, D, 2 * D])]
)
def test_experts_take_the_place_of_projections(moe_in, widths):
  config = mamba.MambaConfig(expand=2.0, state_size=N, conv_width=W, moe_in=moe_in)
  init = common.Initializer('truncated_normal', 1.0, jnp.dtype('float32'))
  layer = mamba.Mamba(config, d_model=D, init=init, rngs=nnx.Rngs(0), experts=_Linear)
  graph, params = _random_layer()
  plain = nnx.to_pure_dict(params)
  names = {'conv': 'w_in', 'gate': 'w_gate', 'out': 'w_out'}
  sparse = {names[word]: {'w': plain[names[word]]} for word in moe_in.split('+')}
  sparse_graph, sparse_params = nnx.split(layer)
  nnx.replace_by_pure_dict(sparse_params, plain | sparse)
  x_BLD, tokens = _x(), _tokens(0)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  y_BLD, aux = nnx.merge(sparse_graph, sparse_params)(x_BLD, tokens)
  close(y_BLD, _forward(graph, params, x_BLD, tokens))
  assert aux == {'width': widths}
  close(_prefill(sparse_graph, sparse_params, x_BLD, tokens)[0], y_BLD)
  empty = layer.init_state(B, L, jnp.float32)
  close(_steps(sparse_graph, sparse_params, empty, x_BLD, tokens), y_BLD)


def test_the_state_does_not_grow_with_the_length():
  layer = _layer()
  sizes = [layer.init_state(B, length, jnp.bfloat16) for length in (1, 1000)]
  assert jax.tree.map(jnp.shape, sizes[0]) == jax.tree.map(jnp.shape, sizes[1])
  assert sizes[0]['scan'].dtype == jnp.float32 and sizes[0]['window'].dtype == jnp.bfloat16


def test_bfloat16_activations_stay_bfloat16():
  graph, params = _random_layer()
  y_BLD = _forward(graph, params, _x('bfloat16'), _tokens(0))
  exact = _forward(graph, params, _x(), _tokens(0))
  assert y_BLD.dtype == jnp.bfloat16
  assert np.abs(y_BLD.astype('float32') - exact).max() < 3e-2 * np.abs(exact).max()


def test_names_are_true():
  graph, params = _random_layer()
  with shapes.checked():
    jax.eval_shape(lambda p: _prefill.__wrapped__(graph, p, _x(), _tokens(0)), params)
    layer = nnx.merge(graph, params)
    now = jax.tree.map(lambda v: v[:, 0], _tokens(0))
    layer.step(_x()[:, 0], layer.init_state(B, L, jnp.float32), now)
