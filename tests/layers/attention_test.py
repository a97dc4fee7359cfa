"""Attention: against NumPy, what it sees, rotary positions, decoding with a cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from moejax.layers import attention, common
from moejax.ops import softmax_attention
from moejax.sharding import mesh as mesh_lib, platform

B, L, D, H = 3, 7, 12, 2
P = D // H


def _layer(rope=False, document_mask=False, **options):
  init = common.Initializer('kaiming_uniform', 1.0, jnp.dtype('float32'))
  sizes = dict(d_model=D, num_heads=H, rope=rope, document_mask=document_mask) | options
  layer = attention.Attention(**sizes, init=init, rngs=nnx.Rngs(0))
  # Scales and biases have values at which they matter.
  draw = np.random.default_rng(0).uniform
  for path, variable in nnx.iter_graph(layer):
    if path and ('norm' in path[0] or 'bias' in path[0]) and isinstance(variable, nnx.Param):
      variable[...] = jnp.asarray(draw(0.5, 2, variable.shape), 'float32')
  return layer


EVERYTHING = dict(
  num_heads=6, num_kv_heads=2, rope=True, rope_theta=100.0, biases=True, qk_norm=True, norm_eps=0.1
)

# Heads of another width than D / H, each with its own norm.
WIDE = EVERYTHING | dict(num_heads=3, num_kv_heads=1, head_dim=2, qk_norm_per_head=True)


def _x(length=L):
  return jax.random.normal(jax.random.key(1), (B, length, D))


def _tokens(length=L, first=0):
  positions_BL = jnp.tile(jnp.arange(first, first + length)[None], (B, 1))
  return common.TokenInfo(jnp.ones((B, length), jnp.int32), positions_BL)


@functools.partial(jax.jit, static_argnums=0)
def _apply(graph, params, x_BLD, tokens):
  return nnx.merge(graph, params)(x_BLD, tokens)[0]


def _forward(x_BLD, tokens, rope=False, document_mask=False, **options):
  return _apply(*nnx.split(_layer(rope, document_mask, **options)), x_BLD, tokens)


def test_is_the_definition():
  layer, x_BLD = _layer(), np.asarray(_x(), 'float64')
  qkv_D3HP, out_HPD = np.asarray(layer.qkv[...], 'float64'), np.asarray(layer.out[...], 'float64')
  expected = np.zeros((B, L, D))
  for b in range(B):
    for h in range(H):
      q_LP, k_LP, v_LP = (x_BLD[b] @ qkv_D3HP[:, i, h] for i in range(3))
      for l in range(L):
        score_S = np.exp(q_LP[l] @ k_LP[: l + 1].T / np.sqrt(P))
        expected[b, l] += score_S / score_S.sum() @ v_LP[: l + 1] @ out_HPD[h]
  np.testing.assert_allclose(_forward(_x(), _tokens()), expected, rtol=1e-5, atol=1e-5)


def test_long_sequences_are_computed_in_blocks(monkeypatch):
  segments_BL = jnp.asarray(np.arange(L)[None] > np.arange(B)[:, None], 'int32')
  tokens = common.TokenInfo(segments_BL, _tokens().positions)
  options: Any = EVERYTHING | {'document_mask': True}
  expected = _forward(_x(), tokens, **options)
  blocks, form = [], attention.softmax_attention.blocked_attention

  def blocked(*arrays, block, **options):
    blocks.append(block)
    return form(*arrays, block=block, **options)

  monkeypatch.setattr(attention.softmax_attention, 'blocked_attention', blocked)
  monkeypatch.setattr(attention, '_BLOCKS', {'cpu': 2})
  _apply.clear_cache()
  np.testing.assert_allclose(_forward(_x(), tokens, **options), expected, rtol=1e-5, atol=1e-5)
  assert blocks == [2]


@pytest.mark.parametrize('kv_heads', [4, 1])
def test_devices_run_the_kernel_on_their_own_sequences_and_heads(monkeypatch, kv_heads):
  shapes, kernel = [], softmax_attention.tpu_kernel

  def interpreted(q_BLHP, *arrays, **options):
    shapes.append(q_BLHP.shape)
    return kernel(q_BLHP, *arrays, **options, interpret=True)

  monkeypatch.setattr(attention.softmax_attention, 'tpu_kernel', interpreted)
  monkeypatch.setattr(attention, '_BLOCKS', {'cpu': 64, 'tpu': 64})
  rng, length = np.random.default_rng(0), 128
  draw = lambda heads: jnp.asarray(rng.standard_normal((4, length, heads, 8)), 'float32')
  qkv, segments_BL = (draw(4), draw(kv_heads), draw(kv_heads)), np.arange(length)[None] // 50
  segments_BL = jnp.asarray(np.repeat(segments_BL, 4, axis=0), 'int32')
  mesh = jax.make_mesh((2, 1, 2, 2), mesh_lib.AXES, axis_types=(AxisType.Auto,) * 4)
  loss = lambda q, k, v: jnp.sum(jnp.sin(attention.attend(q, k, v, segments_BL)))
  gradients = lambda: jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*qkv)
  expected = gradients()
  with platform.compiling_for('tpu'), jax.set_mesh(mesh):
    got = gradients()
  assert shapes == [(1, length, 2 if kv_heads > 1 else 4, 8)]
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('rope', [False, True])
def test_a_token_is_seen_by_itself_and_later_positions_of_its_sequence(rope):
  x_BLD = _x()
  before = _forward(x_BLD, _tokens(), rope=rope)
  after = _forward(x_BLD.at[1, 4].add(1), _tokens(), rope=rope)
  changed_BL = np.abs(after - before).max(-1) > 0
  assert np.argwhere(changed_BL).tolist() == [[1, 4], [1, 5], [1, 6]]


@pytest.mark.parametrize(('dtype', 'error'), [('float32', 1e-5), ('float64', 1e-12)])
def test_rotation_turns_pairs_by_the_position(x64, dtype, error):
  x_BLHP = jax.random.normal(jax.random.key(2), (B, L, H, P), dtype)
  positions_BL = np.random.default_rng(0).integers(50, size=(B, L))
  rotated = attention.rotate(x_BLHP, jnp.asarray(positions_BL))
  turns = 10000.0 ** (-2 * np.arange(P // 2) / P)
  pairs = np.asarray(x_BLHP[..., : P // 2]) + 1j * np.asarray(x_BLHP[..., P // 2 :])
  pairs = pairs * np.exp(1j * positions_BL[..., None, None] * turns)
  expected = np.concatenate([pairs.real, pairs.imag], axis=-1)
  assert rotated.dtype == dtype
  np.testing.assert_allclose(rotated, expected, rtol=error, atol=error)


def test_rotary_scores_depend_on_the_distance_only():
  q_BLHP, k_BLHP = jax.random.normal(jax.random.key(3), (2, B, L, H, P))

  def scores(first):
    positions_BL = _tokens(first=first).positions
    q, k = attention.rotate(q_BLHP, positions_BL), attention.rotate(k_BLHP, positions_BL)
    return jnp.einsum('BLHP,BSHP->BHLS', q, k)

  np.testing.assert_allclose(scores(5), scores(0), rtol=1e-4, atol=1e-5)
  apart = _tokens()._replace(positions=2 * _tokens().positions)
  straight = _forward(_x(), _tokens(), rope=True)
  np.testing.assert_allclose(_forward(_x(), _tokens(first=5), rope=True), straight, atol=1e-5)
  assert np.abs(_forward(_x(), apart, rope=True) - straight).max() > 1e-2


def test_without_rotation_positions_do_not_matter():
  assert np.array_equal(_forward(_x(), _tokens(first=5)), _forward(_x(), _tokens()))


@pytest.mark.parametrize('rope', [False, True])
def test_a_document_mask_isolates_packed_documents(rope):
  first, second = _x()[:, :3], _x()[:, 3:]
  alone = jnp.concatenate(
    [_forward(first, _tokens(3), rope=rope), _forward(second, _tokens(4), rope=rope)], axis=1
  )
  packed = common.TokenInfo(
    jnp.tile(jnp.array([[1, 1, 1, 2, 2, 2, 2]]), (B, 1)),
    jnp.tile(jnp.array([[0, 1, 2, 0, 1, 2, 3]]), (B, 1)),
  )
  together = _forward(_x(), packed, rope=rope, document_mask=True)
  np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)
  open_BLD = _forward(_x(), packed, rope=rope)
  np.testing.assert_allclose(open_BLD[:, :3], alone[:, :3], rtol=1e-5, atol=1e-5)
  assert (np.abs(open_BLD - alone)[:, 3:].max(-1) > 1e-4).all()


@functools.partial(jax.jit, static_argnums=0)
def _decode(graph, params, x_BLD, late_B):
  """Outputs of steps; each sequence repeats its first position until its turn comes."""
  layer = nnx.merge(graph, params)

  def advance(state, time):
    positions_B = jnp.maximum(time - late_B, 0)
    x_BD = x_BLD[jnp.arange(B), positions_B]
    y_BD, state = layer.step(x_BD, state, common.TokenInfo(jnp.ones_like(late_B), positions_B))
    return state, y_BD

  state = layer.init_state(B, L + 2, x_BLD.dtype)
  return jnp.moveaxis(jax.lax.scan(advance, state, jnp.arange(L))[1], 0, 1)


@pytest.mark.parametrize('late', [(0, 0, 0), (0, 2, 1)])
@pytest.mark.parametrize('options', [{'rope': False}, {'rope': True}, WIDE])
def test_steps_equal_the_forward_pass_at_every_position(options, late):
  expected = _forward(_x(), _tokens(), **options)
  got = _decode(*nnx.split(_layer(**options)), _x(), jnp.array(late))
  for b, start in enumerate(late):
    np.testing.assert_allclose(got[b, start:], expected[b, : L - start], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('options', [EVERYTHING, WIDE])
def test_shared_heads_biases_and_norms_are_the_definition(options):
  """Keys and values of a head are those of many heads with equal parameters."""
  layer = _layer(**options)
  value = lambda name: np.asarray(getattr(layer, name)[...], 'float64')
  x_BLD, group = np.asarray(_x(), 'float64'), 3
  q_BLHP = np.einsum('bld,dhp->blhp', x_BLD, value('q')) + value('q_bias')
  kv = np.einsum('bld,dcjp->cbljp', x_BLD, value('kv')) + value('kv_bias')[:, None, None]

  def norm(x, scale):
    flat = x.reshape(B, L, -1, *scale.shape)
    mean = (flat**2).mean(-1, keepdims=True)
    return (flat / np.sqrt(mean + 0.1) * np.asarray(scale[...])).reshape(x.shape)

  def turn(x_BLHP):
    pairs = x_BLHP[..., :1] + 1j * x_BLHP[..., 1:]  # heads are two wide
    pairs = pairs * np.exp(1j * np.arange(L))[None, :, None, None]
    return np.concatenate([pairs.real, pairs.imag], axis=-1)

  q_BLHP, k_BLJP = turn(norm(q_BLHP, layer.q_norm.scale)), turn(norm(kv[0], layer.k_norm.scale))
  k_BLHP, v_BLHP = np.repeat(k_BLJP, group, axis=2), np.repeat(kv[1], group, axis=2)
  scores = np.einsum('blhp,bshp->bhls', q_BLHP, k_BLHP) / np.sqrt(2)
  scores = np.exp(np.where(np.tril(np.ones((L, L))), scores, -np.inf))
  o_BLHP = np.einsum('bhls,bshp->blhp', scores / scores.sum(-1, keepdims=True), v_BLHP)
  expected = np.einsum('blhp,hpd->bld', o_BLHP, value('out')) + value('out_bias')
  got = _forward(_x(), _tokens(), **options)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_activations_stay_bfloat16():
  y_BLD = _forward(_x().astype('bfloat16'), _tokens(), rope=True)
  assert y_BLD.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    y_BLD.astype('float32'), _forward(_x(), _tokens(), rope=True), rtol=5e-2, atol=5e-2
  )
