"""Cross-entropy of next-token prediction without the full tensor of logits.

For a vocabulary of 50k, 65k tokens of float32 logits are 13 GB. The chunked form computes the
logits of a few positions at a time and recomputes them in the backward pass.
"""

import math

import jax
import jax.numpy as jnp

from moejax.ops.chunks import split

_AT_ONCE = 2**24  # logits, where their number is chosen: 64 MiB of float32


def cross_entropy(x_BLD, head_DV, targets_BL, weights_BL):
  """Summed cross-entropy in nats; the plain reference.

  Args:
    x_BLD: final activations, any float dtype.
    head_DV: output projection; the product accumulates in float32 at least.
    targets_BL: int32 ids in [0, V).
    weights_BL: float32, 1 where a position counts and 0 where it does not.

  Returns:
    A scalar, float32 at least: sum over positions of weight * -log softmax(x @ head)[target].
  """
  logits_BLV = _logits(x_BLD, head_DV)
  target_logit_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
  nats_BL = jax.nn.logsumexp(logits_BLV, axis=-1) - target_logit_BL
  return jnp.sum(nats_BL * weights_BL)


def chunked_cross_entropy(x_BLD, head_DV, targets_BL, weights_BL, *, chunk):
  """`cross_entropy` over `chunk` positions of every sequence at a time.

  The last, ragged chunk is padded with weight 0. For `chunk=-1` and `chunk=0`, see `positions`; one
  that covers the sequence is the plain form.
  """
  B, L, _ = x_BLD.shape
  chunk = positions(chunk, B, L, head_DV.shape[1])
  if chunk == L:
    return cross_entropy(x_BLD, head_DV, targets_BL, weights_BL)
  head_DV = head_DV.astype(x_BLD.dtype)  # rounded as in the plain form
  head_DV = head_DV.astype(jnp.promote_types(head_DV.dtype, jnp.float32))  # for its gradient

  def add_chunk(total, chunk_arrays):
    x, targets, weights = chunk_arrays
    return total + jnp.sum(_nats(x, head_DV, targets) * weights), None

  chunks = tuple(split(a, chunk) for a in (x_BLD, targets_BL, weights_BL))
  return jax.lax.scan(add_chunk, jnp.zeros((), head_DV.dtype), chunks)[0]


def positions(chunk, B, L, V):
  """How many positions of B sequences are computed at once: `chunk` of L, or all, L, if it is 0.

  -1 chooses: all if they have at most 2**24 logits, else equal parts that do.
  """
  if chunk == -1:
    chunk = math.ceil(L / math.ceil(B * L * V / _AT_ONCE))
  return chunk if 0 < chunk < L else L


def target_scores(x_BLD, head_DV, targets_BL, *, chunk):
  """The log-probability (nats) of every target, and whether it is the likeliest token: [B, L] each.

  Arguments as of `chunked_cross_entropy`; of equal logits, the first is the likeliest.
  """

  def of_chunk(arrays):
    x, targets = arrays
    logits = _logits(x, head_DV)
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return target_logit - jax.nn.logsumexp(logits, axis=-1), logits.argmax(axis=-1) == targets

  return _by_chunk(of_chunk, (x_BLD, targets_BL), chunk, head_DV.shape[1])


def divergence(x_BLD, y_BLD, head_DV, *, chunk):
  """How far the next-token distributions of y are from those of x.

  Arguments as of `chunked_cross_entropy`, x and y in place of x.

  Returns:
    The Kullback-Leibler divergence of p = softmax(x @ head) from q = softmax(y @ head), in nats,
    and whether the likeliest token is another one; [B, L] each. Exactly 0 where x and y are equal.
  """

  def of_chunk(arrays):
    logits, others = (_logits(a, head_DV) for a in arrays)
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(others)
    p, gain = jnp.exp(log_p), log_q - log_p
    # Of sum(p * -gain) + sum(q) - sum(p), no term is negative: distributions that are near each
    # other do not drown in the rounding of their difference.
    near = p * (jnp.expm1(jnp.minimum(gain, 1)) - gain)
    terms = jnp.where(gain < 1, near, jnp.exp(log_q) - p * (1 + gain))
    return terms.sum(axis=-1), logits.argmax(axis=-1) != others.argmax(axis=-1)

  return _by_chunk(of_chunk, (x_BLD, y_BLD), chunk, head_DV.shape[1])


def _by_chunk(of_chunk, arrays, chunk, V):
  """A function of arrays [B, L, ...] to arrays [B, L], with the logits of `positions` at a time."""
  B, L = arrays[0].shape[:2]
  if (chunk := positions(chunk, B, L, V)) == L:
    return of_chunk(arrays)
  results = jax.lax.map(of_chunk, tuple(split(a, chunk) for a in arrays))
  return tuple(jnp.moveaxis(result, 0, 1).reshape(B, -1)[:, :L] for result in results)


@jax.custom_vjp
def _nats(x_BLD, head_DV, targets_BL):
  """-log softmax(x @ head)[target] of every position, float32 at least; logits are not kept."""
  return _nats_forward(x_BLD, head_DV, targets_BL)[0]


def _nats_forward(x_BLD, head_DV, targets_BL):
  logits_BLV = _logits(x_BLD, head_DV)
  logsumexp_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
  target_logit_BL = jnp.sum(jnp.where(_is_target(targets_BL, head_DV), logits_BLV, 0), axis=-1)
  return logsumexp_BL - target_logit_BL, (x_BLD, head_DV, targets_BL, logsumexp_BL)


def _nats_backward(kept, d_nats_BL):
  x_BLD, head_DV, targets_BL, logsumexp_BL = kept
  p_BLV = jnp.exp(_logits(x_BLD, head_DV) - logsumexp_BL[..., None])
  d_logits_BLV = (p_BLV - _is_target(targets_BL, head_DV)) * d_nats_BL[..., None]
  d_logits_BLV = d_logits_BLV.astype(x_BLD.dtype)
  d_x_BLD = jnp.einsum('BLV,DV->BLD', d_logits_BLV, head_DV.astype(x_BLD.dtype))
  d_head_DV = jnp.einsum('BLD,BLV->DV', x_BLD, d_logits_BLV, preferred_element_type=head_DV.dtype)
  return d_x_BLD, d_head_DV, None


_nats.defvjp(_nats_forward, _nats_backward)


def _logits(x_BLD, head_DV):
  head_DV = head_DV.astype(x_BLD.dtype)
  wide = jnp.promote_types(x_BLD.dtype, jnp.float32)
  return jnp.einsum('BLD,DV->BLV', x_BLD, head_DV, preferred_element_type=wide)


def _is_target(targets_BL, head_DV):
  return targets_BL[..., None] == jnp.arange(head_DV.shape[1])[None, None]
