"""The Mixture-of-Tokens layer: the paper's own code reproduced, what it leaks, what it refuses."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import common as configs_common
from moejax.layers import common, mot
from moejax.ops import mixing

B, L, D, E, F, M = 6, 5, 8, 4, 7, 3
REFERENCE = pathlib.Path(__file__).parent.parent / 'reference' / 'llm_random_mot_basic.npz'


def _layer(d_model=D, **changes):
  fields = configs_common.baseline().model.mot.to_dict()
  fields |= {'num_experts': E, 'expert_width': F, 'group_size': M}
  return mot.MixtureOfTokens(
    mot.MoTConfig(**fields | changes),
    d_model=d_model,
    d_ff=0,
    activation='relu',
    init=common.Initializer('kaiming_uniform', 1.0, jnp.dtype('float32')),
    rngs=nnx.Rngs(0),
  )


def _params(module):
  return jax.device_get(nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def _tokens(batch_size, length):
  positions_BL = jnp.tile(jnp.arange(length)[None], (batch_size, 1))
  return common.Tokens(jnp.ones((batch_size, length), jnp.int32), positions_BL)


def _x():
  return jax.random.normal(jax.random.key(1), (B, L, D))


@functools.partial(jax.jit, static_argnums=0)
def _apply(graph, params, x_BLD, tokens):
  return nnx.merge(graph, params)(x_BLD, tokens)


def _forward(x_BLD, tokens, **changes):
  return _apply(*nnx.split(_layer(**changes)), x_BLD, tokens)


def _relative_error(got, expected):
  return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 2e-6), ('float64', 1e-10)])
def test_reproduces_the_papers_code(x64, dtype, tolerance):
  with np.load(REFERENCE) as arrays:
    reference = dict(arrays)
  names = ('controller', 'lin1', 'lin2')
  given = lambda name: jnp.asarray(reference[name], dtype)
  tokens = _tokens(*reference['x'].shape[:2])

  def layer(params, x_BLD):
    layer = _layer(d_model=12, num_experts=8, expert_width=6, group_size=4)
    layer.controller = nnx.Param(params['controller'])
    layer.experts.w_in = nnx.Param(params['lin1'])
    layer.experts.w_out = nnx.Param(params['lin2'])
    return layer(x_BLD, tokens)[0]

  @jax.jit
  def run(params, x_BLD, dy_BLD):
    y_BLD, backward = jax.vjp(layer, params, x_BLD)
    return y_BLD, *backward(dy_BLD)

  y_BLD, dparams, dx_BLD = run({n: given(f'w.{n}') for n in names}, given('x'), given('dy'))
  results = {'y': y_BLD, 'dx': dx_BLD} | {f'g.{n}': dparams[n] for n in names}
  assert {a.dtype for a in results.values()} == {jnp.dtype(dtype)}
  errors = {name: _relative_error(a, reference[name]) for name, a in results.items()}
  assert max(errors.values()) < tolerance, errors


def test_reproduces_the_papers_mixing_weights(x64):
  with np.load(REFERENCE) as arrays:
    reference = dict(arrays)
  x_GMLD = reference['x'].reshape(2, 4, 5, 12)
  logits_GMLE = jnp.einsum('GMLD,DE->GMLE', x_GMLD, reference['w.controller'])
  weights_GMLE = mixing.merge_weights(logits_GMLE, np.ones((2, 4, 5), bool))
  weights_LGME = np.moveaxis(weights_GMLE, 2, 0)
  np.testing.assert_allclose(weights_LGME, reference['merge_weights'], rtol=1e-10)
  np.testing.assert_allclose(weights_LGME, reference['emit_weights'], rtol=1e-10)


def test_is_the_definition_with_padding():
  segments_BL = np.ones((B, L), 'int32')
  segments_BL[1, 2:] = segments_BL[M:, 4] = 0  # 4: a group without any token
  y_BLD, _ = _forward(_x(), _tokens(B, L)._replace(segments=jnp.asarray(segments_BL)))
  x_BLD, params = np.asarray(_x(), 'float64'), _params(_layer())
  expected_BLD = np.zeros((B, L, D))
  for first, l, e in itertools.product(range(0, B, M), range(L), range(E)):
    group = [b for b in range(first, first + M) if segments_BL[b, l]]
    weights = np.exp(x_BLD[group, l] @ params['controller'][:, e])
    weights /= weights.sum()
    hidden_F = np.maximum(weights @ x_BLD[group, l] @ params['experts']['w_in'][e], 0)
    expected_BLD[group, l] += weights[:, None] * (hidden_F @ params['experts']['w_out'][e])
  np.testing.assert_allclose(y_BLD, expected_BLD, rtol=1e-5, atol=1e-5)
  assert np.array_equal(np.abs(y_BLD).max(-1) > 0, segments_BL > 0)


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
    now = common.Tokens(segments_BL[:, position], jnp.full(B, position))
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
  assert aux.keys() == {'mot/entropy'}
  np.testing.assert_allclose(aux['mot/entropy'], 1, rtol=1e-6)
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


def test_discrete_routing_hands_an_expert_one_token():
  y_BLD, aux = _forward(_x(), _tokens(B, L), routing='discrete')
  x_BLD, params = np.asarray(_x(), 'float64'), _params(_layer())
  expected_BLD = np.zeros((B, L, D))
  for first, l, e in itertools.product(range(0, B, M), range(L), range(E)):
    b = first + np.argmax(x_BLD[first : first + M, l] @ params['controller'][:, e])
    hidden_F = np.maximum(x_BLD[b, l] @ params['experts']['w_in'][e], 0)
    expected_BLD[b, l] += hidden_F @ params['experts']['w_out'][e]
  np.testing.assert_allclose(y_BLD, expected_BLD, rtol=1e-5, atol=1e-5)
  assert aux['mot/entropy'] == 0


def test_uniform_routing_gives_all_tokens_of_a_group_their_mean():
  y_BLD, aux = _forward(_x(), _tokens(B, L), routing='uniform')
  mean_GLD = np.asarray(_x()).reshape(B // M, M, L, D).mean(axis=1)
  params = _params(_layer().experts)
  hidden = np.maximum(np.einsum('GLD,EDF->GLEF', mean_GLD, params['w_in']), 0)
  out_GLD = np.einsum('GLEF,EFD->GLD', hidden, params['w_out']) / M
  np.testing.assert_allclose(y_BLD, np.repeat(out_GLD, M, axis=0), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(aux['mot/entropy'], 1, rtol=1e-6)
