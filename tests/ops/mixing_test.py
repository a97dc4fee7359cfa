"""Mixing of tokens: against the loops that define it, and the properties that follow from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import mixing

C, M, D, E, F = 6, 5, 8, 4, 7


def _inputs(dtype='float32', group_size=M):
  """Activations and weights: x_CMD, controller_DE, w_in_EDF, w_out_EFD."""
  rng = np.random.default_rng(0)
  shapes = [(C, group_size, D), (D, E), (E, D, F), (E, F, D)]
  return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def _padded():
  """Some padding everywhere, but a valid token in every group."""
  valid_CM = np.random.default_rng(1).random((C, M)) < 0.6
  valid_CM[:, 1] |= ~valid_CM.any(axis=1)
  return valid_CM


def _with_an_empty_group():
  valid_CM = _padded()
  valid_CM[4] = False
  return valid_CM


ALL = np.ones((C, M), bool)


@jax.jit
def _mix(x_CMD, controller_DE, w_in_EDF, w_out_EFD, valid_CM):
  logits_CME = jnp.einsum('CMD,DE->CME', x_CMD, controller_DE)
  weights_CME = mixing.softmax(logits_CME, valid_CM)
  h_ECF = jnp.einsum('ECD,EDF->ECF', mixing.merge(x_CMD, weights_CME), w_in_EDF)
  out_ECD = jnp.einsum('ECF,EFD->ECD', jax.nn.relu(h_ECF), w_out_EFD)
  return mixing.emit(out_ECD, weights_CME)


def _definition(x_CMD, controller_DE, w_in_EDF, w_out_EFD, valid_CM):
  """The papers' definition, a loop over experts; groups are mapped, as to unroll them is slow."""

  def of_group(x_MD, valid_M):
    y_MD = jnp.zeros_like(x_MD)
    for e in range(controller_DE.shape[1]):
      scores_M = jnp.where(valid_M, x_MD @ controller_DE[:, e], -jnp.inf)
      weights_M = jnp.where(valid_M.any(), jax.nn.softmax(scores_M), 0)
      out_D = jax.nn.relu(weights_M @ x_MD @ w_in_EDF[e]) @ w_out_EFD[e]
      y_MD += weights_M[:, None] * out_D[None]
    return y_MD

  return jax.vmap(of_group)(x_CMD, valid_CM)


@functools.partial(jax.jit, static_argnums=0)
def _output_and_gradients(mix, args, valid_CM):
  """The output, and the gradients of its random projection by the activations and all weights."""
  y_CMD, backward = jax.vjp(lambda *args: mix(*args, valid_CM), *args)
  return y_CMD, backward(jax.random.normal(jax.random.key(2), y_CMD.shape, y_CMD.dtype))


@pytest.mark.parametrize('valid_CM', [ALL, _padded(), _with_an_empty_group()])
def test_values_and_gradients_are_those_of_the_definition(x64, valid_CM):
  args = _inputs('float64')
  y_CMD, gradients = _output_and_gradients(_mix, args, valid_CM)
  expected, expected_gradients = _output_and_gradients(_definition, args, valid_CM)
  assert y_CMD.dtype == jnp.float64
  np.testing.assert_allclose(y_CMD, expected, rtol=1e-12, atol=1e-12)
  if valid_CM.any(axis=1).all():  # the definition's gradient of an empty softmax is NaN
    close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)
    jax.tree.map(close, gradients, expected_gradients)


def test_invalid_tokens_have_no_influence_and_get_nothing():
  x_CMD, *weights = _inputs()
  valid_CM = _padded()
  y_CMD = _mix(x_CMD, *weights, valid_CM)
  other_CMD = jnp.where(valid_CM[..., None], x_CMD, 9 - x_CMD)
  assert np.array_equal(_mix(other_CMD, *weights, valid_CM), y_CMD)
  assert np.array_equal(np.abs(y_CMD).max(-1) > 0, valid_CM)
  _, (dx_CMD, *_) = _output_and_gradients(_mix, [x_CMD, *weights], valid_CM)
  assert np.array_equal(np.abs(dx_CMD).max(-1) > 0, valid_CM)


def test_a_group_without_valid_tokens_gives_zeros_and_finite_gradients():
  args, valid_CM = _inputs(), _with_an_empty_group()
  y_CMD, gradients = _output_and_gradients(_mix, args, valid_CM)
  assert not np.any(y_CMD[4]) and np.any(y_CMD[0])
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
  assert not np.any(gradients[0][4])


def test_permuting_a_group_permutes_its_outputs():
  x_CMD, *weights = _inputs()
  valid_CM = _padded()
  order = np.array([2, 0, 4, 1, 3])
  permuted = _mix(x_CMD[:, order], *weights, valid_CM[:, order])
  straight = _mix(x_CMD, *weights, valid_CM)
  np.testing.assert_allclose(permuted, straight[:, order], rtol=1e-5, atol=1e-5)
  assert np.abs(permuted - straight).max() > 0.1


def test_nothing_moves_between_groups():
  x_CMD, *weights = _inputs()
  changed = _mix(x_CMD.at[3, 0].add(1), *weights, ALL) - _mix(x_CMD, *weights, ALL)
  assert np.flatnonzero(np.abs(changed).max(axis=(1, 2))).tolist() == [3]


def test_groups_of_one_are_the_sum_of_all_experts():
  x_CMD, controller_DE, w_in_EDF, w_out_EFD = _inputs(group_size=1)
  h_ECMF = jax.nn.relu(jnp.einsum('CMD,EDF->ECMF', x_CMD, w_in_EDF))
  expected = jnp.einsum('ECMF,EFD->CMD', h_ECMF, w_out_EFD)
  y_CMD = _mix(x_CMD, controller_DE, w_in_EDF, w_out_EFD, np.ones((C, 1), bool))
  np.testing.assert_allclose(y_CMD, expected, rtol=1e-5, atol=1e-5)


def _logits():
  return np.random.default_rng(3).standard_normal((C, M, E)).astype('float32')


def test_weights_sum_to_one_over_what_shares_them():
  valid_CM = _with_an_empty_group()
  over_tokens = np.asarray(mixing.softmax(_logits(), valid_CM))
  expected = np.broadcast_to(valid_CM.any(axis=1)[:, None], (C, E))
  np.testing.assert_allclose(over_tokens.sum(axis=1), expected, rtol=1e-6)
  over_experts = np.asarray(mixing.softmax(_logits(), valid_CM, over=mixing.EXPERTS))
  np.testing.assert_allclose(over_experts.sum(axis=2), valid_CM, rtol=1e-6)
  assert not over_tokens[~valid_CM].any() and not over_experts[~valid_CM].any()


def test_temperature_divides_the_scores():
  logits_CME = _logits()
  hot = mixing.softmax(logits_CME, _padded(), temperature=4.0)
  np.testing.assert_allclose(hot, mixing.softmax(logits_CME / 4, _padded()), rtol=1e-6)
  cold = mixing.softmax(logits_CME, ALL, temperature=1e-4)
  one_hot = jax.nn.one_hot(logits_CME.argmax(axis=1), M, axis=1)
  np.testing.assert_allclose(cold, one_hot, atol=1e-6)


@pytest.mark.parametrize('over', [mixing.TOKENS, mixing.EXPERTS])
def test_one_hot_marks_the_largest_valid_weight_and_all_that_tie(over):
  logits_CME = _logits()
  logits_CME[0, 1:3] = logits_CME[0, :, :1] = 9  # ties between tokens, and between experts
  valid_CM = _with_an_empty_group()
  weights_CME = np.asarray(mixing.softmax(logits_CME, valid_CM, over=over))
  hot_CME = np.asarray(mixing.one_hot(weights_CME, valid_CM, over))
  largest = weights_CME.max(axis=over, keepdims=True)
  assert np.array_equal(hot_CME == 1, (weights_CME == largest) & (weights_CME > 0))
  counts = hot_CME.sum(axis=over)
  assert counts.max() > 1 and not hot_CME[~valid_CM].any()


def test_mixtures_keep_the_activations_dtype():
  x_CMD, *_ = _inputs('bfloat16')
  weights_CME = mixing.softmax(jnp.zeros((C, M, E)), ALL)
  mixtures_ECD = mixing.merge(x_CMD, weights_CME)
  assert mixtures_ECD.dtype == mixing.emit(mixtures_ECD, weights_CME).dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ('logits_of_first', 'valid', 'entropy', 'largest'),
  [
    (0.0, M, 1.0, 1 / M),
    (1e3, M, 0.0, 1.0),
    (0.0, 2, np.log(2) / np.log(M), 1 / 2),
    (0.0, 1, 0.0, 1.0),
    (0.0, 0, 0.0, 0.0),
  ],
)
def test_statistics_of_uniform_one_hot_and_partial_weights(
  logits_of_first, valid, entropy, largest
):
  logits_CME = np.zeros((C, M, E), 'float32')
  logits_CME[:, 0] = logits_of_first
  valid_CM = np.broadcast_to(np.arange(M) < valid, (C, M)).copy()
  valid_CM[2] = False  # a group of padding does not count
  weights_CME = mixing.softmax(logits_CME, valid_CM)
  got = mixing.statistics(weights_CME, valid_CM)
  std = np.asarray(weights_CME)[valid_CM].std() if valid else 0.0
  expected = {'entropy': entropy, 'max_weight': largest, 'std': std}
  assert got.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-6, atol=1e-7)


def test_statistics_over_experts_count_valid_tokens():
  valid_CM = _with_an_empty_group()
  weights_CME = np.asarray(mixing.softmax(_logits(), valid_CM, over=mixing.EXPERTS))
  got = mixing.statistics(weights_CME, valid_CM, mixing.EXPERTS)
  rows = weights_CME[valid_CM]
  np.testing.assert_allclose(got['max_weight'], rows.max(axis=1).mean(), rtol=1e-6)
  entropy = -(rows * np.log(rows)).sum(axis=1).mean() / np.log(E)
  np.testing.assert_allclose(got['entropy'], entropy, rtol=1e-5)
  np.testing.assert_allclose(got['std'], rows.std(), rtol=1e-5)


def test_entropy_of_groups_of_one_is_zero():
  assert mixing.statistics(jnp.ones((C, 1, E)), np.ones((C, 1), bool))['entropy'] == 0
