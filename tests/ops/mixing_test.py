"""Mixing of tokens: against the loops that define it, and the properties that follow from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import mixing

G, M, L, D, E, F = 2, 5, 3, 6, 4, 7


def _inputs(dtype='float32', group_size=M):
  """Activations and weights: x_GMLD, controller_DE, w_in_EDF, w_out_EFD."""
  rng = np.random.default_rng(0)
  shapes = [(G, group_size, L, D), (D, E), (E, D, F), (E, F, D)]
  return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def _padded():
  """Some padding everywhere, but a valid token in every group."""
  valid_GML = np.random.default_rng(1).random((G, M, L)) < 0.6
  valid_GML[:, 1] |= ~valid_GML.any(axis=1)
  return valid_GML


def _with_an_empty_group():
  valid_GML = _padded()
  valid_GML[1, :, 2] = False
  return valid_GML


ALL = np.ones((G, M, L), bool)


@jax.jit
def _mix(x_GMLD, controller_DE, w_in_EDF, w_out_EFD, valid_GML):
  logits_GMLE = jnp.einsum('GMLD,DE->GMLE', x_GMLD, controller_DE)
  weights_GMLE = mixing.merge_weights(logits_GMLE, valid_GML)
  h_EGLF = jnp.einsum('EGLD,EDF->EGLF', mixing.merge(x_GMLD, weights_GMLE), w_in_EDF)
  out_EGLD = jnp.einsum('EGLF,EFD->EGLD', jax.nn.relu(h_EGLF), w_out_EFD)
  return mixing.emit(out_EGLD, weights_GMLE)


def _definition(x_GMLD, controller_DE, w_in_EDF, w_out_EFD, valid_GML):
  """The loops, over one position at a time: unrolled, all of them compile for long."""

  def at_position(x_GMD, valid_GM):
    x_GMLD, valid_GML = x_GMD[:, :, None], valid_GM[:, :, None]
    return mixing.mixture_of_tokens_reference(
      x_GMLD, controller_DE, w_in_EDF, w_out_EFD, valid_GML
    )[:, :, 0]

  return jax.vmap(at_position, in_axes=2, out_axes=2)(x_GMLD, valid_GML)


@functools.partial(jax.jit, static_argnums=0)
def _output_and_gradients(mix, args, valid_GML):
  """The output, and the gradients of its random projection by the activations and all weights."""
  y_GMLD, backward = jax.vjp(lambda *args: mix(*args, valid_GML), *args)
  return y_GMLD, backward(jax.random.normal(jax.random.key(2), y_GMLD.shape, y_GMLD.dtype))


@pytest.mark.parametrize('valid_GML', [ALL, _padded(), _with_an_empty_group()])
def test_values_and_gradients_are_those_of_the_definition(x64, valid_GML):
  args = _inputs('float64')
  y_GMLD, gradients = _output_and_gradients(_mix, args, valid_GML)
  expected, expected_gradients = _output_and_gradients(_definition, args, valid_GML)
  assert y_GMLD.dtype == jnp.float64
  np.testing.assert_allclose(y_GMLD, expected, rtol=1e-12, atol=1e-12)
  if valid_GML.any(axis=1).all():  # the definition's gradient of an empty softmax is NaN
    close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)
    jax.tree.map(close, gradients, expected_gradients)


def test_invalid_tokens_have_no_influence_and_get_nothing():
  x_GMLD, *weights = _inputs()
  valid_GML = _padded()
  y_GMLD = _mix(x_GMLD, *weights, valid_GML)
  other_GMLD = jnp.where(valid_GML[..., None], x_GMLD, 9 - x_GMLD)
  assert np.array_equal(_mix(other_GMLD, *weights, valid_GML), y_GMLD)
  assert np.array_equal(np.abs(y_GMLD).max(-1) > 0, valid_GML)
  _, (dx_GMLD, *_) = _output_and_gradients(_mix, [x_GMLD, *weights], valid_GML)
  assert np.array_equal(np.abs(dx_GMLD).max(-1) > 0, valid_GML)


def test_a_group_without_valid_tokens_gives_zeros_and_finite_gradients():
  args, valid_GML = _inputs(), _with_an_empty_group()
  y_GMLD, gradients = _output_and_gradients(_mix, args, valid_GML)
  assert not np.any(y_GMLD[1, :, 2]) and np.any(y_GMLD[0, :, 2])
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
  assert not np.any(gradients[0][1, :, 2])


def test_permuting_a_group_permutes_its_outputs():
  x_GMLD, *weights = _inputs()
  valid_GML = _padded()
  order = np.array([2, 0, 4, 1, 3])
  permuted = _mix(x_GMLD[:, order], *weights, valid_GML[:, order])
  straight = _mix(x_GMLD, *weights, valid_GML)
  np.testing.assert_allclose(permuted, straight[:, order], rtol=1e-5, atol=1e-5)
  assert np.abs(permuted - straight).max() > 0.1


def test_nothing_moves_along_positions_or_between_groups():
  x_GMLD, *weights = _inputs()
  changed = _mix(x_GMLD.at[1, 0, 2].add(1), *weights, ALL) - _mix(x_GMLD, *weights, ALL)
  moved_GL = np.abs(changed).max(axis=(1, 3)) > 0
  assert np.argwhere(moved_GL).tolist() == [[1, 2]]


def test_groups_of_one_are_the_sum_of_all_experts():
  x_GMLD, controller_DE, w_in_EDF, w_out_EFD = _inputs(group_size=1)
  h_EGMLF = jax.nn.relu(jnp.einsum('GMLD,EDF->EGMLF', x_GMLD, w_in_EDF))
  expected = jnp.einsum('EGMLF,EFD->GMLD', h_EGMLF, w_out_EFD)
  y_GMLD = _mix(x_GMLD, controller_DE, w_in_EDF, w_out_EFD, np.ones((G, 1, L), bool))
  np.testing.assert_allclose(y_GMLD, expected, rtol=1e-5, atol=1e-5)


def test_weights_of_each_expert_sum_to_one_over_the_group():
  valid_GML = _with_an_empty_group()
  logits_GMLE = jax.random.normal(jax.random.key(0), (G, M, L, E))
  weights_GMLE = np.asarray(mixing.merge_weights(logits_GMLE, valid_GML))
  expected = np.broadcast_to(valid_GML.any(axis=1)[..., None], (G, L, E))
  np.testing.assert_allclose(weights_GMLE.sum(axis=1), expected, rtol=1e-6)
  assert not weights_GMLE[~valid_GML].any()


def test_temperature_divides_the_scores():
  logits_GMLE = jax.random.normal(jax.random.key(0), (G, M, L, E))
  hot = mixing.merge_weights(logits_GMLE, _padded(), temperature=4.0)
  np.testing.assert_allclose(hot, mixing.merge_weights(logits_GMLE / 4, _padded()), rtol=1e-6)
  cold = mixing.merge_weights(logits_GMLE, ALL, temperature=1e-4)
  one_hot = jax.nn.one_hot(logits_GMLE.argmax(axis=1), M, axis=1)
  np.testing.assert_allclose(cold, one_hot, atol=1e-6)


def test_mixtures_keep_the_activations_dtype():
  x_GMLD, *_ = _inputs('bfloat16')
  weights_GMLE = mixing.merge_weights(jnp.zeros((G, M, L, E)), ALL)
  mixtures_EGLD = mixing.merge(x_GMLD, weights_GMLE)
  assert mixtures_EGLD.dtype == mixing.emit(mixtures_EGLD, weights_GMLE).dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ('logits_of_first', 'valid', 'entropy'),
  [(0.0, M, 1.0), (1e3, M, 0.0), (0.0, 2, np.log(2) / np.log(M)), (0.0, 1, 0.0)],
)
def test_entropy_of_uniform_one_hot_and_partial_weights(logits_of_first, valid, entropy):
  logits_GMLE = jnp.zeros((G, M, L, E)).at[:, 0].set(logits_of_first)
  valid_GML = np.broadcast_to(np.arange(M)[:, None] < valid, (G, M, L))
  weights_GMLE = mixing.merge_weights(logits_GMLE, valid_GML)
  entropy_E = mixing.normalized_entropy(weights_GMLE)
  np.testing.assert_allclose(entropy_E, np.full(E, entropy), rtol=1e-6, atol=1e-7)


def test_entropy_of_groups_of_one_is_zero():
  entropy_E = mixing.normalized_entropy(jnp.ones((G, 1, L, E)))
  assert np.array_equal(entropy_E, np.zeros(E))
