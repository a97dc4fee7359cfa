"""Attention: the blocked form against the plain one, and what it needs."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from moejax.ops import softmax_attention

B, L, H, J, WIDTH = 2, 13, 6, 2, 5


def _inputs(dtype) -> tuple:
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(2 * rng.standard_normal(shape), dtype)
  segments_BL = jnp.asarray(np.cumsum(rng.random((B, L)) < 0.3, axis=1), 'int32')
  return draw(B, L, H, WIDTH), draw(B, L, J, WIDTH), draw(B, L, J, WIDTH), segments_BL


def _value_and_gradients(form, *inputs):
  *qkv, segments_BL = inputs
  q_BLHP = qkv[0]
  weights_BLHP = jnp.cos(jnp.arange(q_BLHP.size)).reshape(q_BLHP.shape).astype(q_BLHP.dtype)

  def loss(*qkv):
    o_BLHP = form(*qkv, segments_BL)
    return jnp.sum(o_BLHP * weights_BLHP), o_BLHP

  (_, o_BLHP), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*qkv)
  return o_BLHP, *gradients


def _assert_close(got, expected, **tolerance):
  for a, b in zip(got, expected, strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_allclose(np.asarray(a, 'float64'), np.asarray(b, 'float64'), **tolerance)


@pytest.mark.parametrize('has_documents', [False, True])
@pytest.mark.parametrize('block', [1, 4, 13, 16])
def test_blocks_compute_the_same(x64, block, has_documents):
  *qkv, segments_BL = _inputs('float64')
  segments_BL = segments_BL if has_documents else None
  forms = (
    softmax_attention.attention,
    functools.partial(softmax_attention.blocked_attention, block=block),
  )
  expected, got = (
    _value_and_gradients(functools.partial(form, scale=0.3), *qkv, segments_BL) for form in forms
  )
  # The plain form has its softmax in float32.
  _assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_blocks_keep_the_precision_of_their_inputs(x64):
  *qkv, segments_BL = _inputs('float64')
  form = softmax_attention.blocked_attention
  expected, got = (
    _value_and_gradients(functools.partial(form, block=block), *qkv, segments_BL)
    for block in (L, 3)
  )
  _assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('has_documents', [False, True])
@pytest.mark.parametrize('length', [200, 256])
def test_the_kernel_computes_the_same(length, has_documents):
  rng = np.random.default_rng(0)
  draw = lambda heads: jnp.asarray(rng.standard_normal((2, length, heads, 8)), 'float32')
  qkv = draw(4), draw(2), draw(2)
  segments_BL = jnp.asarray(np.cumsum(rng.random((2, length)) < 0.05, axis=1), 'int32')
  segments_BL = segments_BL if has_documents else None
  kernel = functools.partial(softmax_attention.tpu_kernel, interpret=True)
  expected, got = (
    _value_and_gradients(functools.partial(form, scale=0.3), *qkv, segments_BL)
    for form in (softmax_attention.attention, kernel)
  )
  _assert_close(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
  'form',
  [
    functools.partial(softmax_attention.blocked_attention, block=4),
    functools.partial(softmax_attention.tpu_kernel, interpret=True),
  ],
)
def test_half_precision_is_rounded_alike(form):
  inputs = _inputs('bfloat16')
  wide = *(a.astype('float32') for a in inputs[:3]), inputs[3]
  expected = _value_and_gradients(softmax_attention.attention, *wide)
  got = _value_and_gradients(form, *inputs)
  assert {a.dtype.name for a in got} == {'bfloat16'}
  as_wide = [a.astype('float32') for a in got]
  _assert_close(as_wide, expected, rtol=0.03, atol=0.05)


def test_large_scores_neither_overflow_nor_vanish():
  q_BLHP, k_BLJP, v_BLJP, segments_BL = _inputs('float32')
  inputs = 1e4 * q_BLHP, k_BLJP, v_BLJP, segments_BL
  form = functools.partial(softmax_attention.blocked_attention, block=4)
  expected, got = (_value_and_gradients(f, *inputs) for f in (softmax_attention.attention, form))
  assert all(np.isfinite(a).all() for a in got)
  np.testing.assert_allclose(got[0], expected[0], atol=1e-5)


def test_memory_grows_with_the_length_and_not_with_its_square():
  form = functools.partial(softmax_attention.blocked_attention, block=64)
  loss = lambda *qkv: jnp.sum(form(*qkv))

  def temporary(length):
    q_BLHP = jax.ShapeDtypeStruct((1, length, 2, 8), 'float32')
    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q_BLHP, q_BLHP, q_BLHP)
    memory: Any = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes

  assert temporary(8192) < 5 * temporary(2048) < 60e6


def test_devices_compute_their_own_sequences_and_heads():
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('data', 'tensor'))
  place = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, P(*axes)))
  rng = np.random.default_rng(0)
  draw = lambda heads: rng.standard_normal((4, 7, heads, 6)).astype('float32')
  qkv, segments_BL = [draw(4), draw(2), draw(2)], np.cumsum(rng.random((4, 7)) < 0.3, axis=1)
  form = functools.partial(softmax_attention.blocked_attention, block=3)
  loss = lambda *arrays: jnp.sum(jnp.sin(form(*arrays)), axis=(1, 3))
  gradients = jax.jit(jax.grad(lambda *arrays: loss(*arrays).sum(), (0, 1, 2)))
  expected = gradients(*qkv, segments_BL)
  placed = [*(place(a, 'data', None, 'tensor') for a in qkv), place(segments_BL, 'data')]
  compiled: Any = gradients.lower(*placed).compile()
  _assert_close(compiled(*placed), expected, rtol=1e-5, atol=1e-6)
  assert not re.search('all-gather|all-reduce|all-to-all|collective', compiled.as_text())
