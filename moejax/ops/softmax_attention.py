"""Causal attention within documents, without a score for every pair of positions in memory.

The scores of 8,192 positions and 8 heads are 2 GB of float32 for one sequence and layer. The
blocked form holds those of a block of queries and a block of keys at a time: online softmax
(arXiv:1805.02867) in the forward pass, scores computed again in the backward pass, as in
FlashAttention (arXiv:2205.14135, arXiv:2307.08691). Keys of later blocks are not touched at all.
On a TPU the kernel that comes with jax does the same, with the scores in on-chip memory.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from moejax.ops.chunks import split


def attention(
  q_BLHP,
  k_BLJP,
  v_BLJP,
  segments_BL=None,
  *,
  scale=None,
  implementation: Literal['xla', 'cudnn'] = 'xla',
):
  """Causal attention; the plain reference.

  Args:
    q_BLHP: queries, any float dtype.
    k_BLJP, v_BLJP: keys and values, of heads that groups of H / J queries share.
    segments_BL: int32: documents, which do not see each other; None: all is one.
    scale: of the scores; None: 1 / sqrt(P).
    implementation: of `jax.nn.dot_product_attention`.

  Returns:
    o_BLHP, in the dtype of the queries. The softmax is in float32 at least.
  """
  mask = None
  if segments_BL is not None:
    mask = segments_BL[:, None, :, None] == segments_BL[:, None, None, :]
  return jax.nn.dot_product_attention(
    q_BLHP,
    k_BLJP,
    v_BLJP,
    mask=mask,
    scale=scale,
    is_causal=True,
    implementation=implementation,
  )


def of_last(q_BHP, k_BJSP, v_BJSP, positions_B, *, scale=None):
  """`attention` of one query per sequence, at its position, to keys and values up to there.

  Heads come before positions, so that the products read keys and values as they lie in memory.
  """
  B, H, P = q_BHP.shape
  _, J, S, _ = k_BJSP.shape
  scale = P**-0.5 if scale is None else scale
  s_BJRS = scale * _product('BJRP,BJSP->BJRS', q_BHP.reshape(B, J, H // J, P), k_BJSP)
  past_BS = jnp.arange(S)[None] <= positions_B[:, None]
  p_BJRS = jax.nn.softmax(jnp.where(past_BS[:, None, None], s_BJRS, -jnp.inf))
  o_BJRP = _product('BJRS,BJSP->BJRP', p_BJRS.astype(v_BJSP.dtype), v_BJSP)
  return o_BJRP.reshape(B, H, P).astype(q_BHP.dtype)


def blocked_attention(q_BLHP, k_BLJP, v_BLJP, segments_BL=None, *, scale=None, block):
  """`attention` with scores of `block` by `block` positions in memory, per sequence and head."""
  B, L, H, P = q_BLHP.shape
  J = k_BLJP.shape[2]
  scale = P**-0.5 if scale is None else scale
  # Heads come before positions, once for all products. Keys that are added at the end come after
  # all queries, which do not see them.
  by_head = lambda a: jnp.moveaxis(split(a, block), 2, -2)
  q_NBJRMP = by_head(q_BLHP.reshape(B, L, J, H // J, P))
  k_NBJMP, v_NBJMP = by_head(k_BLJP), by_head(v_BLJP)
  segments_NBM = None if segments_BL is None else split(segments_BL, block)
  o_NBJRMP: Any = _attend(scale, q_NBJRMP, k_NBJMP, v_NBJMP, segments_NBM)
  return jnp.transpose(o_NBJRMP, (1, 0, 4, 2, 3, 5)).reshape(B, -1, H, P)[:, :L]


_LANES = 128  # of a TPU: the kernel takes positions in multiples of it
_TILES = (512, 256, 128)  # positions of a block: the first of these that divides all


def tpu_kernel(q_BLHP, k_BLJP, v_BLJP, segments_BL=None, *, scale=None, interpret=False):
  """`attention` as the kernel for TPUs that comes with jax, "splash attention".

  `interpret`: whether to run the operations of the kernel one by one, on any platform.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as splash  # loads slowly

  _, L, H, P = q_BLHP.shape
  scale = P**-0.5 if scale is None else scale
  # As in the blocked form, keys that are added at the end are not seen.
  pad = lambda a: jnp.pad(a, [(0, 0), (0, -L % _LANES)] + [(0, 0)] * (a.ndim - 2))
  by_head = lambda a: jnp.swapaxes(pad(a), 1, 2)
  padded = L + -L % _LANES
  tile = next(n for n in _TILES if padded % n == 0)
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([splash.CausalMask((padded, padded))] * H),
    block_sizes=splash.BlockSizes(
      tile, tile, block_q_dkv=tile, block_kv_dkv=tile, block_q_dq=tile, block_kv_dq=tile
    ),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  scaled = (scale * q_BLHP.astype(_wide(q_BLHP))).astype(q_BLHP.dtype)  # the kernel has no factor
  inputs = by_head(scaled), by_head(k_BLJP), by_head(v_BLJP)
  if segments_BL is not None:
    inputs += (splash.SegmentIds(pad(segments_BL), pad(segments_BL)),)
  o_BHLP: Any = jax.vmap(kernel)(*inputs)
  return jnp.swapaxes(o_BHLP, 1, 2)[:, :L]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q_NBJRMP, k_NBJMP, v_NBJMP, segments_NBM):
  """N blocks of M positions; H = J * R heads."""
  return _attend_forward(scale, q_NBJRMP, k_NBJMP, v_NBJMP, segments_NBM)[0]


def _attend_forward(scale, q_NBJRMP, k_NBJMP, v_NBJMP, segments_NBM):
  N, *row_shape, _ = q_NBJRMP.shape
  wide = _wide(q_NBJRMP)

  def step(carry, pair):
    o_NBJRMP, lse_NBJRM, sum_BJRMP, max_BJRM, norm_BJRM = carry
    i, j = pair
    s_BJRMK = _scores(scale, q_NBJRMP, k_NBJMP, segments_NBM, i, j)
    first = j == 0
    before_BJRM = jnp.where(first, -jnp.inf, max_BJRM)
    max_BJRM = jnp.maximum(before_BJRM, s_BJRMK.max(-1))
    shift_BJRM = jnp.where(max_BJRM == -jnp.inf, 0, max_BJRM)  # no key yet
    p_BJRMK = jnp.exp(s_BJRMK - shift_BJRM[..., None])
    kept_BJRM = jnp.exp(before_BJRM - shift_BJRM)
    norm_BJRM = kept_BJRM * norm_BJRM + p_BJRMK.sum(-1)
    value_BJRMP = _product('BJRMK,BJKP->BJRMP', p_BJRMK.astype(v_NBJMP.dtype), v_NBJMP[j])
    sum_BJRMP = kept_BJRM[..., None] * sum_BJRMP + value_BJRMP
    # The last block of keys of a row of blocks is the diagonal one, which has the last word.
    o_BJRMP = sum_BJRMP / jnp.where(norm_BJRM == 0, 1, norm_BJRM)[..., None]
    o_NBJRMP = o_NBJRMP.at[i].set(o_BJRMP.astype(o_NBJRMP.dtype))
    lse_NBJRM = lse_NBJRM.at[i].set(shift_BJRM + jnp.log(norm_BJRM))
    return (o_NBJRMP, lse_NBJRM, sum_BJRMP, max_BJRM, norm_BJRM), None

  row = jnp.zeros(row_shape, wide)
  begin = jnp.zeros_like(q_NBJRMP), jnp.zeros((N, *row_shape), wide)
  begin += jnp.zeros(q_NBJRMP.shape[1:], wide), row, row
  (o_NBJRMP, lse_NBJRM, *_), _ = jax.lax.scan(step, begin, _pairs(N))
  return o_NBJRMP, (q_NBJRMP, k_NBJMP, v_NBJMP, segments_NBM, o_NBJRMP, lse_NBJRM)


def _attend_backward(scale, saved, do_NBJRMP):
  q_NBJRMP, k_NBJMP, v_NBJMP, segments_NBM, o_NBJRMP, lse_NBJRM = saved
  wide = _wide(q_NBJRMP)
  dot_NBJRM = jnp.sum(do_NBJRMP.astype(wide) * o_NBJRMP.astype(wide), axis=-1)

  def step(carry, pair):
    dq, dk, dv = carry
    i, j = pair
    s_BJRMK = _scores(scale, q_NBJRMP, k_NBJMP, segments_NBM, i, j)
    p_BJRMK = jnp.exp(s_BJRMK - lse_NBJRM[i][..., None])
    do_BJRMP = do_NBJRMP[i]
    dv = dv.at[j].add(_product('BJRMK,BJRMP->BJKP', p_BJRMK.astype(do_BJRMP.dtype), do_BJRMP))
    dp_BJRMK = _with_keys(do_BJRMP, v_NBJMP[j])
    ds_BJRMK = scale * p_BJRMK * (dp_BJRMK - dot_NBJRM[i][..., None])
    ds_BJRMK = ds_BJRMK.astype(q_NBJRMP.dtype)
    dq = dq.at[i].add(_product('BJRMK,BJKP->BJRMP', ds_BJRMK, k_NBJMP[j]))
    dk = dk.at[j].add(_product('BJRMK,BJRMP->BJKP', ds_BJRMK, q_NBJRMP[i]))
    return (dq, dk, dv), None

  inputs = q_NBJRMP, k_NBJMP, v_NBJMP
  zeros = tuple(jnp.zeros(a.shape, wide) for a in inputs)
  gradients, _ = jax.lax.scan(step, zeros, _pairs(len(q_NBJRMP)))
  return *(g.astype(a.dtype) for g, a in zip(gradients, inputs, strict=True)), None


_attend.defvjp(_attend_forward, _attend_backward)


def _pairs(blocks):
  """Indices of blocks of queries and of keys that they see, row after row."""
  return tuple(np.tril_indices(blocks))


def _scores(scale, q_NBJRMP, k_NBJMP, segments_NBM, i, j):
  """Those of a block of queries and a block of keys, -inf where a query does not see a key."""
  s_BJRMK = scale * _with_keys(q_NBJRMP[i], k_NBJMP[j])
  M = s_BJRMK.shape[-1]
  place = jnp.arange(M)
  seen_BMK = ((i - j) * M + place[:, None] >= place[None])[None]
  if segments_NBM is not None:
    seen_BMK &= segments_NBM[i][:, :, None] == segments_NBM[j][:, None]
  return jnp.where(seen_BMK[:, None, None], s_BJRMK, -jnp.inf)


def _with_keys(a_BJRMP, b_BJKP):
  """Sums over P. R and M are one axis of the product: else jax 0.7 takes no bfloat16 on a CPU."""
  B, J, R, M, P = a_BJRMP.shape
  y_BJQK = _product('BJQP,BJKP->BJQK', a_BJRMP.reshape(B, J, R * M, P), b_BJKP)
  return y_BJQK.reshape(B, J, R, M, -1)


def _product(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=_wide(a))


def _wide(a):
  return jnp.promote_types(a.dtype, jnp.float32)
