"""State-space duality: the recurrence of Mamba-2 (arXiv:2405.21060) as products of matrices.

In every sequence, head h has N states of each of its P channels. From position to position (the
state starts from 0):

  dt    = softplus(delta + bias)
  state = exp(dt a) state + dt b x^T
  y     = c state + skip x

The decay is one number per head and position, so that inside a chunk of Q positions the outputs are
those of masked attention: with w[q, k] the product of the decays after k up to q, in one document,

  y = (c b^T * w * dt) x + (decay since the start of the chunk) c (state at the start) + skip x

`ssd` loops over the chunks, which are products of matrices on every platform. Only the states at
the starts of chunks are kept: the backward pass computes one chunk at a time again. `recurrence`
is the plain loop over positions; both are equal by value and gradient.
"""

import functools

import jax
import jax.numpy as jnp

from moejax.ops.chunks import split

# Positions of a chunk. Products inside of chunks grow with it, the number of states at their starts
# falls; accelerators multiply matrices of 128 as fast as smaller ones.
CHUNKS = {'cpu': 32, 'gpu': 128, 'tpu': 128}


def ssd(
  x_BLHP,
  delta_BLH,
  a_H,
  b_BLGN,
  c_BLGN,
  skip_H,
  bias_H,
  *,
  state_BHNP=None,
  reset_BL=None,
  chunk,
):
  """Runs the recurrence over all positions, in chunks.

  Args:
    x_BLHP, delta_BLH: any float dtype; delta is the step size before bias and softplus.
    a_H: negative rates of decay.
    b_BLGN, c_BLGN: how x enters the state, and how y reads it, for G groups of H / G heads.
    skip_H, bias_H: weights of x in y, and of the step size.
    state_BHNP: the state before the first position; None is zero.
    reset_BL: bool, true where a document starts: the state before that position is forgotten.
    chunk: positions of a chunk, such as one of `CHUNKS`; the last one may be shorter.

  Returns:
    y_BLHP in the dtype of x, and the state_BHNP after the last position in float32 (float64 where x
    is); both have gradients. States, decays and sums have that dtype, factors of products that of
    x. As in attention, a value that is not finite spoils later documents of its chunk.
  """
  B, L, H, P = x_BLHP.shape
  Q = min(chunk, L)
  dt_BLH, a_H, skip_H, state_BHNP, reset_BL = _prepared(
    x_BLHP, delta_BLH, a_H, b_BLGN, skip_H, bias_H, state_BHNP, reset_BL
  )

  def in_chunks(v):
    """[B, L, ...] to [chunks, B, Q], [chunks, B, H, Q] or [chunks, B, H or G, Q, P or N]."""
    # In the padding dt is 0: the state does not change.
    v = split(v, Q)
    return jnp.moveaxis(v, 2, 3) if v.ndim > 3 else v

  document = jnp.cumsum(in_chunks(reset_BL.astype(jnp.int32)), axis=2)  # 0: that before the chunk
  chunks = (*map(in_chunks, (x_BLHP, dt_BLH, b_BLGN, c_BLGN)), document)
  body = jax.checkpoint(functools.partial(_chunk, a_H, skip_H), prevent_cse=False)
  state_BHNP, y = jax.lax.scan(body, state_BHNP, chunks)
  y = jnp.moveaxis(y, (0, 2), (1, 3)).reshape(B, -1, H, P)
  return y[:, :L], state_BHNP


def recurrence(
  x_BLHP, delta_BLH, a_H, b_BLGN, c_BLGN, skip_H, bias_H, *, state_BHNP=None, reset_BL=None
):
  """`ssd` as a loop of `step` over the positions."""
  _, a_H, skip_H, state_BHNP, reset_BL = _prepared(
    x_BLHP, delta_BLH, a_H, b_BLGN, skip_H, bias_H, state_BHNP, reset_BL
  )

  def advance(state_BHNP, position):
    x_BHP, delta_BH, b_BGN, c_BGN, reset_B = position
    y_BHP, state_BHNP = step(
      x_BHP, delta_BH, a_H, b_BGN, c_BGN, skip_H, bias_H, state_BHNP, reset_B
    )
    return state_BHNP, y_BHP

  sequences = x_BLHP, delta_BLH, b_BLGN, c_BLGN, reset_BL
  positions = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), sequences)
  state_BHNP, y_LBHP = jax.lax.scan(advance, state_BHNP, positions)
  return jnp.moveaxis(y_LBHP, 0, 1), state_BHNP


def step(x_BHP, delta_BH, a_H, b_BGN, c_BGN, skip_H, bias_H, state_BHNP, reset_B):
  """One position of `ssd`: y_BHP in the dtype of x, and the next state_BHNP."""
  H, dtype = x_BHP.shape[1], state_BHNP.dtype
  heads = lambda v_BGN: jnp.repeat(v_BGN.astype(dtype), H // v_BGN.shape[1], axis=1)
  dt_BH = jax.nn.softplus(delta_BH.astype(dtype) + bias_H.astype(dtype)[None])
  decay_BH = jnp.exp(dt_BH * a_H.astype(dtype)[None])
  wide_BHP, b_BHN, c_BHN = x_BHP.astype(dtype), heads(b_BGN), heads(c_BGN)
  kept_BHNP = jnp.where(reset_B[:, None, None, None], 0, state_BHNP)
  new_BHNP = (dt_BH[..., None] * b_BHN)[..., None] * wide_BHP[:, :, None]
  state_BHNP = decay_BH[..., None, None] * kept_BHNP + new_BHNP
  y_BHP = jnp.sum(c_BHN[..., None] * state_BHNP, axis=2)
  y_BHP = y_BHP + skip_H.astype(dtype)[None, :, None] * wide_BHP
  return y_BHP.astype(x_BHP.dtype), state_BHNP


def _prepared(x_BLHP, delta_BLH, a_H, b_BLGN, skip_H, bias_H, state_BHNP, reset_BL):
  """dt_BLH, a and skip in the dtype of the state, and the state and resets, given or not."""
  (B, L, H, P), N = x_BLHP.shape, b_BLGN.shape[3]
  if H % b_BLGN.shape[2]:
    raise ValueError(f'{b_BLGN.shape[2]} groups must divide {H} heads.')
  dtype = jnp.promote_types(x_BLHP.dtype, jnp.float32)
  a_H, skip_H, bias_H = (v.astype(dtype) for v in (a_H, skip_H, bias_H))
  dt_BLH = jax.nn.softplus(delta_BLH.astype(dtype) + bias_H[None, None])
  if state_BHNP is None:
    state_BHNP = jnp.zeros((B, H, N, P), dtype)
  if reset_BL is None:
    reset_BL = jnp.zeros((B, L), bool)
  return dt_BLH, a_H, skip_H, state_BHNP.astype(dtype), reset_BL


def _chunk(a_H, skip_H, state_BHNP, chunk):
  """One chunk, heads before positions: the state after it, and y_BHQP."""
  x_BHQP, dt_BHQ, b_BGQN, c_BGQN, document_BQ = chunk
  dtype, Q = dt_BHQ.dtype, dt_BHQ.shape[2]

  def product(equation, *factors):
    factors = (v.astype(x_BHQP.dtype) for v in factors)
    return jnp.einsum(equation, *factors, preferred_element_type=dtype)

  # Logarithms of decays since the start of the chunk: differences of sums, never of large ratios.
  log_BHQ = jnp.cumsum(dt_BHQ * a_H[None, :, None], axis=2)
  same_BQQ = document_BQ[:, :, None] == document_BQ[:, None]
  seen_BQQ = same_BQQ & jnp.tril(jnp.ones((Q, Q), bool))[None]
  between_BHQQ = jnp.where(seen_BQQ[:, None], log_BHQ[..., None] - log_BHQ[:, :, None], -jnp.inf)
  weights_BHQQ = jnp.exp(between_BHQQ) * dt_BHQ[:, :, None]
  scores_BGQQ = product('BGQN,BGKN->BGQK', c_BGQN, b_BGQN)
  y_BHQP = product('BHQK,BHKP->BHQP', _by_head(scores_BGQQ, weights_BHQQ), x_BHQP)

  first_B1Q = (document_BQ == 0)[:, None]  # goes on from the state
  since_BHQ = jnp.exp(jnp.where(first_B1Q, log_BHQ, -jnp.inf))
  c_BHQN = _by_head(c_BGQN, since_BHQ[..., None])
  y_BHQP += product('BHQN,BHNP->BHQP', c_BHQN, state_BHNP)
  y_BHQP += skip_H[None, :, None, None] * x_BHQP.astype(dtype)

  last_B1Q = same_BQQ[:, -1:]  # reaches the end
  until_BHQ = jnp.exp(jnp.where(last_B1Q, log_BHQ[..., -1:] - log_BHQ, -jnp.inf)) * dt_BHQ
  b_BHQN = _by_head(b_BGQN, until_BHQ[..., None])
  new_BHNP = product('BHQN,BHQP->BHNP', b_BHQN, x_BHQP)
  kept_BHNP = jnp.where((document_BQ[:, -1] == 0)[:, None, None, None], state_BHNP, 0)
  state_BHNP = jnp.exp(log_BHQ[..., -1])[..., None, None] * kept_BHNP + new_BHNP
  return state_BHNP, y_BHQP.astype(x_BHQP.dtype)


def _by_head(v, weights):
  """v [B, G, ...] of groups, times weights [B, H, ...] of the heads of each."""
  B, G, *shape = v.shape
  weights = weights.reshape(B, G, -1, *weights.shape[2:])
  return (v[:, :, None] * weights).reshape(B, -1, *shape)
