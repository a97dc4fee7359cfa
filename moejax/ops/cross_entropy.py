"""Cross-entropy of next-token prediction without the full tensor of logits.

For a vocabulary of 50k, 65k tokens of float32 logits are 13 GB. The chunked form computes the
logits of a few positions at a time and computes them again in the backward pass.
"""

import jax
import jax.numpy as jnp


def cross_entropy(x_BLD, head_DV, targets_BL, weights_BL):
  """Summed cross-entropy in nats; the plain reference.

  Args:
    x_BLD: final activations, any float dtype.
    head_DV: output projection; the product accumulates in float32.
    targets_BL: int32 ids in [0, V).
    weights_BL: float32, 1 where a position counts and 0 where it does not.

  Returns:
    A float32 scalar: sum over positions of weight * -log softmax(x @ head)[target].
  """
  logits_BLV = jnp.einsum(
    'BLD,DV->BLV', x_BLD, head_DV.astype(x_BLD.dtype), preferred_element_type=jnp.float32
  )
  target_logit_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
  nats_BL = jax.nn.logsumexp(logits_BLV, axis=-1) - target_logit_BL
  return jnp.sum(nats_BL * weights_BL)


def chunked_cross_entropy(x_BLD, head_DV, targets_BL, weights_BL, *, chunk):
  """`cross_entropy` over `chunk` positions of every sequence at a time.

  Chunks run along positions, so that a batch sharded over devices stays where it is. The last,
  ragged chunk is padded with weight 0. `chunk=0`, or one that covers the sequence, is the plain
  form.
  """
  B, L, D = x_BLD.shape
  if not 0 < chunk < L:
    return cross_entropy(x_BLD, head_DV, targets_BL, weights_BL)
  num_chunks = -(-L // chunk)

  def split(a):  # [B, L, ...] -> [num_chunks, B, chunk, ...]
    a = jnp.pad(a, [(0, 0), (0, num_chunks * chunk - L)] + [(0, 0)] * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(B, num_chunks, chunk, *a.shape[2:]), 1, 0)

  @jax.checkpoint
  def add_chunk(total, chunk_arrays):
    x, targets, weights = chunk_arrays
    return total + cross_entropy(x, head_DV, targets, weights), None

  chunks = (split(x_BLD), split(targets_BL), split(weights_BL))
  return jax.lax.scan(add_chunk, jnp.float32(0), chunks)[0]
