"""Causal multi-head self-attention, with rotary positions or without."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moejax import parameters
from moejax.layers.sublayer import Cost, Sublayer
from moejax.sharding import platform
from moejax.sharding.mesh import SHARD_AXES

parameters.declare('qkv', P(SHARD_AXES, None, 'tensor', None))
parameters.declare('out', P('tensor', None, SHARD_AXES))


class Attention(nnx.Module):
  """Causal self-attention, no biases, scores scaled by 1/sqrt(P).

  Input and output x_BLD, any float dtype; softmax in float32. Sees its own sequence, with
  `document_mask` its own document, at its own and earlier positions. `aux` is empty.

  `rope` turns on rotary positions (arXiv:2104.09864; base 10000, halves paired).
  """

  def __init__(self, *, d_model, num_heads, rope, document_mask, init, rngs):
    head_width = d_model // num_heads
    self.qkv = init(rngs, d_model, 3, num_heads, head_width, fan_in=d_model)
    self.out = init(rngs, num_heads, head_width, d_model, fan_in=d_model)
    self.rope = rope
    self.document_mask = document_mask

  def _project(self, x_BLD, positions_BL):
    qkv_D3HP = self.qkv[...].astype(x_BLD.dtype)
    q_BLHP, k_BLHP, v_BLHP = jnp.moveaxis(jnp.einsum('BLD,DCHP->BLCHP', x_BLD, qkv_D3HP), 2, 0)
    if self.rope:
      q_BLHP, k_BLHP = rotate(q_BLHP, positions_BL), rotate(k_BLHP, positions_BL)
    return q_BLHP, k_BLHP, v_BLHP

  def __call__(self, x_BLD, tokens):
    return self.prefill(x_BLD, tokens)[0], {}

  def prefill(self, x_BLD, tokens):
    """The forward pass: y_BLD, and the cache of its positions."""
    q_BLHP, k_BLHP, v_BLHP = self._project(x_BLD, tokens.positions)
    mask = None
    if self.document_mask:
      mask = tokens.segments[:, None, :, None] == tokens.segments[:, None, None, :]
    o_BLHP = jax.nn.dot_product_attention(
      q_BLHP, k_BLHP, v_BLHP, mask=mask, is_causal=True, implementation=_implementation(x_BLD.dtype)
    )
    y_BLD = jnp.einsum('BLHP,HPD->BLD', o_BLHP, self.out[...].astype(x_BLD.dtype))
    return y_BLD, {'k': k_BLHP, 'v': v_BLHP}

  def init_state(self, batch_size, max_length, dtype):
    """An empty cache: keys and values of every position."""
    _, _, H, P = self.qkv.shape
    empty = jnp.zeros((batch_size, max_length, H, P), dtype)
    return {'k': empty, 'v': empty}

  def step(self, x_BD, state, tokens):
    """One position of every sequence, written to the cache at that position."""
    q_BLHP, k_BLHP, v_BLHP = self._project(x_BD[:, None], tokens.positions[:, None])
    here = jnp.arange(x_BD.shape[0]), tokens.positions
    k_BSHP, v_BSHP = state['k'].at[here].set(k_BLHP[:, 0]), state['v'].at[here].set(v_BLHP[:, 0])
    past_BS = jnp.arange(k_BSHP.shape[1])[None, :] <= tokens.positions[:, None]
    o_BLHP = jax.nn.dot_product_attention(q_BLHP, k_BSHP, v_BSHP, mask=past_BS[:, None, None, :])
    y_BD = jnp.einsum('BHP,HPD->BD', o_BLHP[:, 0], self.out[...].astype(x_BD.dtype))
    return y_BD, {'k': k_BSHP, 'v': v_BSHP}


class AttentionSublayer(Sublayer):
  """`attention` in `model.blocks`."""

  def make(self, init, rngs):
    c = self.config
    return Attention(
      d_model=c.d_model,
      num_heads=c.num_heads,
      rope=c.positions == 'rope',
      document_mask=c.document_mask,
      init=init,
      rngs=rngs,
    )

  def problems(self):
    d_model, num_heads = self.config.d_model, self.config.num_heads
    if d_model % num_heads:
      yield f'model.num_heads = {num_heads} must divide d_model = {d_model}.'
    elif self.config.positions == 'rope' and d_model // num_heads % 2:
      yield (
        'model.positions = rope needs an even head width, got d_model / num_heads = '
        f'{d_model // num_heads}.'
      )

  @property
  def widths(self):
    return {'heads (model.num_heads)': self.config.num_heads}

  def cost(self, length):
    weights = 4 * self.config.d_model**2  # query, key, value, output
    # q k^T, then the sum of values: [L, P] by [P, L], H times.
    scores = 2 * 2 * length * self.config.d_model
    return Cost(
      params={'attention': weights},
      active=weights,
      model_flops={'attention_projections': 2 * weights, 'attention_scores': scores},
    )


def rotate(x_BLHP, positions_BL, base=10000.0):
  """Rotary position embedding: turns each pair (x[i], x[i + P/2]) by position * base**(-2i/P)."""
  half = x_BLHP.shape[-1] // 2
  dtype = jnp.promote_types(x_BLHP.dtype, jnp.float32)
  frequency = base ** (-jnp.arange(half, dtype=dtype) / half)
  angle = positions_BL[..., None, None] * frequency[None, None, None]
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  a, b = jnp.split(x_BLHP.astype(dtype), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLHP.dtype)


def _implementation(dtype):
  # The default is plain XLA on every platform (jax 0.7 to 0.12).
  half_precision = dtype in (jnp.bfloat16, jnp.float16)
  return 'cudnn' if half_precision and platform.current() == 'gpu' else 'xla'
