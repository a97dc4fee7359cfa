"""Cross-entropy: the plain form against NumPy, the chunked form against the plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.layers.loss import next_token_loss
from moejax.ops import cross_entropy
from moejax.sharding import platform

B, L, D, V = 3, 7, 5, 11


def _inputs(dtype='float32'):
  rng = np.random.default_rng(0)
  x_BLD = jnp.asarray(rng.standard_normal((B, L, D)), dtype)
  head_DV = jnp.asarray(rng.standard_normal((D, V)), 'float32')
  targets_BL = jnp.asarray(rng.integers(V, size=(B, L)), 'int32')
  weights_BL = jnp.asarray(rng.random((B, L)) < 0.7, 'float32')
  return x_BLD, head_DV, targets_BL, weights_BL


def _value_and_gradients(chunk, *args):
  f = functools.partial(cross_entropy.chunked_cross_entropy, chunk=chunk)
  return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 3)))(*args)


def _assert_trees_close(got, expected, **tolerance):
  assert jax.tree.map(lambda a: (a.shape, a.dtype), got) == jax.tree.map(
    lambda a: (a.shape, a.dtype), expected
  )
  as_numbers = lambda tree: jax.tree.map(lambda a: np.asarray(a, 'float64'), tree)
  close = functools.partial(np.testing.assert_allclose, **tolerance)
  jax.tree.map(close, as_numbers(got), as_numbers(expected))


def test_plain_form_is_the_definition():
  nats = jax.jit(cross_entropy.cross_entropy)(*_inputs())
  x_BLD, head_DV, targets_BL, weights_BL = map(np.asarray, _inputs())
  total = 0.0
  for b in range(B):
    for l in range(L):
      p_V = np.exp(x_BLD[b, l].astype('float64') @ head_DV)
      total -= weights_BL[b, l] * np.log(p_V[targets_BL[b, l]] / p_V.sum())
  assert nats.dtype == jnp.float32
  np.testing.assert_allclose(nats, total, rtol=1e-6)


@pytest.mark.parametrize('chunk', [1, 2, 3, 6, 7, 8])
def test_chunks_change_neither_value_nor_gradients(chunk):
  args = _inputs()
  plain = _value_and_gradients(0, *args)
  _assert_trees_close(_value_and_gradients(chunk, *args), plain, rtol=2e-6, atol=2e-6)


def test_chunks_in_bfloat16():
  args = _inputs('bfloat16')
  plain = _value_and_gradients(0, *args)
  assert plain[0].dtype == jnp.float32 and plain[1][0].dtype == jnp.bfloat16
  _assert_trees_close(_value_and_gradients(2, *args), plain, rtol=2e-2, atol=2e-2)
  exact, _ = _value_and_gradients(0, *_inputs())
  np.testing.assert_allclose(plain[0], exact, rtol=1e-2)


@pytest.mark.parametrize('chunk', [0, 3])
def test_positions_of_weight_zero_do_not_count(chunk):
  x_BLD, head_DV, targets_BL, weights_BL = _inputs()
  nats, (dx_BLD, _, _) = _value_and_gradients(chunk, x_BLD, head_DV, targets_BL, weights_BL)
  other_BL = jnp.where(weights_BL > 0, targets_BL, 0)
  again, _ = _value_and_gradients(chunk, x_BLD, head_DV, other_BL, weights_BL)
  assert nats == again
  counts_BL = np.abs(dx_BLD).max(-1) > 0
  assert np.array_equal(counts_BL, weights_BL > 0)
  zero, gradients = _value_and_gradients(chunk, x_BLD, head_DV, targets_BL, 0 * weights_BL)
  assert zero == 0 and not np.any(gradients[0]) and not np.any(gradients[1])


@pytest.mark.parametrize('chunk', [0, 3])
def test_large_logits_stay_finite(chunk):
  x_BLD, head_DV, targets_BL, weights_BL = _inputs()
  result = _value_and_gradients(chunk, 1e4 * x_BLD, head_DV, targets_BL, weights_BL)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))


def test_chunks_save_memory():
  length, vocabulary = 64, 4096
  shapes = [(2, length, D), (D, vocabulary), (2, length), (2, length)]
  dtypes = ['float32', 'float32', 'int32', 'float32']
  args = [jax.ShapeDtypeStruct(*s) for s in zip(shapes, dtypes, strict=True)]

  def temporary_bytes(chunk):
    f = functools.partial(cross_entropy.chunked_cross_entropy, chunk=chunk)
    compiled = jax.jit(jax.grad(f, argnums=(0, 1))).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits_bytes = 2 * length * vocabulary * 4
  assert temporary_bytes(0) >= logits_bytes
  assert temporary_bytes(4) < logits_bytes / 4


@pytest.mark.parametrize('scale', [1e-4, 1.0, 30.0])
def test_divergence_is_the_definition(scale):
  x_BLD, head_DV, _, _ = _inputs()
  y_BLD = x_BLD + scale * x_BLD[::-1]
  find = jax.jit(cross_entropy.divergence, static_argnames='chunk')
  nats_BL, changed_BL = find(x_BLD, y_BLD, head_DV, chunk=0)
  logits, others = (
    np.asarray(a, 'float64') @ np.asarray(head_DV, 'float64') for a in (x_BLD, y_BLD)
  )
  log_p, log_q = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (logits, others))
  expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
  np.testing.assert_allclose(nats_BL, expected, rtol=5e-3)
  np.testing.assert_array_equal(changed_BL, logits.argmax(-1) != others.argmax(-1))
  for chunked, whole in zip(
    find(x_BLD, y_BLD, head_DV, chunk=3), (nats_BL, changed_BL), strict=True
  ):
    np.testing.assert_allclose(chunked, whole, rtol=1e-5)
  assert not np.any(find(x_BLD, x_BLD, head_DV, chunk=0)[0])


@pytest.mark.parametrize(
  ('chunk', 'sizes', 'at_once'),
  [
    (0, (8, 256, 50_257), 256),
    (32, (8, 256, 50_257), 32),
    (-1, (8, 256, 50_257), 37),  # 7 parts, of 14.9 million logits
    (-1, (8, 256, 8192), 256),  # 2**24 logits
    (-1, (8, 256, 8193), 128),
    (-1, (32, 64, 256), 64),
    (-1, (4096, 3, 2**20), 1),
  ],
)
def test_large_vocabularies_are_chunked_unless_told_otherwise(chunk, sizes, at_once):
  assert cross_entropy.positions(chunk, *sizes) == at_once


def test_the_chosen_chunk_is_that_of_the_sizes(monkeypatch):
  monkeypatch.setattr(cross_entropy, '_AT_ONCE', 2 * B * V)
  of = lambda chunk: functools.partial(cross_entropy.chunked_cross_entropy, chunk=chunk)
  chosen, chunks, plain = (str(jax.make_jaxpr(of(c))(*_inputs())) for c in (-1, 2, 0))
  assert chosen == chunks != plain


def test_accelerators_compute_all_logits_at_once_unless_told_otherwise(monkeypatch):
  monkeypatch.setattr(cross_entropy, '_AT_ONCE', 2 * B * V)

  def traced(target, chunk):
    with platform.compiling_for(target):
      return str(jax.make_jaxpr(functools.partial(next_token_loss, chunk=chunk))(*_inputs()))

  assert traced('tpu', -1) == traced('tpu', 0) != traced('tpu', 2) == traced('cpu', -1)
