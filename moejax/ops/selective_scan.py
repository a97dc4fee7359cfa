"""The selective scan of Mamba (arXiv:2312.00752, Section 3 and Appendix C), forwards and backwards.

In every sequence, for channel i and state n, from position to position (h starts from 0):

  dt = softplus(delta + bias)
  h  = exp(dt a) h + dt b x
  y  = (sum over n of c h  +  skip x) silu(gate)

The decay differs per channel and state, so there is no matrix product, and
`jax.lax.associative_scan` would write the states [B, L, N, I] several times. The fast form loops
over the positions and never holds all states: it saves the state at the start of every chunk, and
the backward pass recomputes one chunk at a time.

Implementations of `selective_scan`, all equal by value and gradient:

  reference      a loop of `step` over the positions, differentiated by JAX.
  cpu, gpu, tpu  the chunked form in plain XLA, with loops tuned for that platform.
  tpu_kernel     the chunked form as a Pallas kernel, where a device has a multiple of 128 channels.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def selective_scan(
  x_BLI,
  delta_BLI,
  a_IN,
  b_BLN,
  c_BLN,
  skip_I,
  gate_BLI,
  bias_I,
  *,
  state_BNI=None,
  reset_BL=None,
  impl,
):
  """Runs the recurrence over all positions.

  Args:
    x_BLI, delta_BLI, gate_BLI: any float dtype; delta is the step size before bias and softplus.
    a_IN: negative rates of decay.
    b_BLN, c_BLN: how x enters the state, and how y reads it.
    skip_I, bias_I: weights of x in y, and of the step size.
    state_BNI: the state before the first position; None is zero.
    reset_BL: bool, true where a document starts: the state before that position is forgotten.
    impl: an implementation, such as `fastest` names for a platform.

  Returns:
    y_BLI in the dtype of x, and the state_BNI after the last position in float32 (float64 where x
    is). The state and all sums have that dtype throughout. Both have gradients.
  """
  if impl not in _IMPLEMENTATIONS:
    raise ValueError(f'impl must be one of {", ".join(_IMPLEMENTATIONS)}; got {impl!r}.')
  B, L, I = x_BLI.shape
  dtype = jnp.promote_types(x_BLI.dtype, jnp.float32)
  b_BLN, c_BLN = b_BLN.astype(dtype), c_BLN.astype(dtype)
  channels = _Channels(*(v.astype(dtype) for v in (a_IN, skip_I, bias_I)))
  if state_BNI is None:
    state_BNI = jnp.zeros((B, a_IN.shape[1], I), dtype)
  keep_BL = jnp.ones((B, L), dtype) if reset_BL is None else 1 - reset_BL.astype(dtype)
  return _IMPLEMENTATIONS[impl](
    _Sequences(x_BLI, delta_BLI, b_BLN, c_BLN, gate_BLI, keep_BL), channels, state_BNI.astype(dtype)
  )


def fastest(platform, channels):
  """The implementation for 'cpu', 'gpu' or 'tpu', and this many channels on a device."""
  return 'tpu_kernel' if platform == 'tpu' and channels % _LANES == 0 else platform


def step(x_BI, delta_BI, a_IN, b_BN, c_BN, skip_I, gate_BI, bias_I, state_BNI, reset_B):
  """One position of `selective_scan`: y_BI in the dtype of x, and the next state_BNI."""
  keep_B = 1 - reset_B.astype(state_BNI.dtype)
  sequences = _Sequences(x_BI, delta_BI, b_BN, c_BN, gate_BI, keep_B)
  return _step(sequences, _Channels(a_IN, skip_I, bias_I), state_BNI)


class _Sequences(NamedTuple):
  """What varies with the position, [B, L, ...], or [B, ...] at one position.

  Arrays, or one value for each of them, such as its padding.
  """

  x: Any  # I
  delta: Any  # I
  b: Any  # N
  c: Any  # N
  gate: Any  # I
  keep: Any  # 0 where a document starts, else 1


class _Channels(NamedTuple):
  """Parameters of the channels."""

  a: Any  # [I, N]
  skip: Any  # [I]
  bias: Any  # [I]


def _reference(sequences, channels, state_BNI):
  def advance(state_BNI, position):
    y_BI, state_BNI = _step(position, channels, state_BNI)
    return state_BNI, y_BI

  positions = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), sequences)
  state_BNI, y_LBI = jax.lax.scan(advance, state_BNI, positions)
  return jnp.moveaxis(y_LBI, 0, 1), state_BNI


def _step(position, channels, state_BNI):
  x_BI, delta_BI, b_BN, c_BN, gate_BI, keep_B = (v.astype(state_BNI.dtype) for v in position)
  dt_BI = jax.nn.softplus(delta_BI + channels.bias[None])
  kept_BNI = _keep(state_BNI, keep_B)
  state_BNI = _advance(kept_BNI, channels.a.T, dt_BI, dt_BI * x_BI, b_BN)
  y_BI = jnp.sum(state_BNI * c_BN[..., None], axis=1) + channels.skip[None] * x_BI
  return (y_BI * jax.nn.silu(gate_BI)).astype(position.x.dtype), state_BNI


def _keep(state_BNI, keep_B):
  """The state, but 0 where a document starts, even if the state before is infinite."""
  return jnp.where(keep_B[:, None, None] > 0, state_BNI, 0)


def _advance(kept_BNI, a_NI, dt_BI, dx_BI, b_BN):
  """h = exp(dt a) h + dx b, where dx = dt x."""
  return jnp.exp(dt_BI[:, None] * a_NI[None]) * kept_BNI + dx_BI[:, None] * b_BN[..., None]


class _Tuning(NamedTuple):
  """How loops and sums are computed."""

  chunk: int  # positions between two saved states
  unroll: int  # positions per iteration; on CPU, fusion would recompute steps
  by_slices: bool  # sums over N as additions: XLA on CPU is slow to reduce a small middle axis
  by_products: bool  # sums over I as matrix-vector products


_TUNINGS = {
  'cpu': _Tuning(chunk=16, unroll=1, by_slices=True, by_products=True),
  'gpu': _Tuning(chunk=64, unroll=16, by_slices=False, by_products=False),
  'tpu': _Tuning(chunk=64, unroll=4, by_slices=False, by_products=False),
}


def _chunked(tuning, sequences, channels, state_BNI):
  chunk = min(tuning.chunk, sequences.x.shape[1])
  scan = functools.partial(_scan, tuning._replace(chunk=chunk))
  return _in_chunks(chunk, scan, sequences, channels, state_BNI)


def _in_chunks(chunk, scan, sequences, channels, state_BNI):
  """`scan` of sequences that are padded to whole chunks."""
  L = sequences.x.shape[1]
  # In the padding dt is softplus(-inf) = 0: the state does not change.
  fill = _Sequences(x=0, delta=-jnp.inf, b=0, c=0, gate=0, keep=1)
  widths = lambda v: [(0, 0), (0, -L % chunk)] + [(0, 0)] * (v.ndim - 2)
  pad = lambda v, value: jnp.pad(v, widths(v), constant_values=value)
  y, state_BNI = scan(jax.tree.map(pad, sequences, fill), channels, state_BNI)
  return y[:, :L], state_BNI


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(tuning, sequences, channels, state_BNI):
  return _forward(tuning, sequences, channels, state_BNI)[0]


def _forward(tuning, sequences, channels, state_BNI):
  a_NI = channels.a.T

  def advance(state_BNI, position):
    dt_BI, dx_BI, b_BN, c_BN, keep_B = position
    state_BNI = _advance(_keep(state_BNI, keep_B), a_NI, dt_BI, dx_BI, b_BN)
    return state_BNI, _sum_states(tuning, state_BNI, c_BN[..., None])

  def chunk(carry, i):
    state_BNI, y_all = carry
    x_LBI, dt_LBI, b_LBN, c_LBN, gate_LBI, keep_LB = _chunk(tuning, sequences, channels, i)
    positions = (dt_LBI, dt_LBI * x_LBI, b_LBN, c_LBN, keep_LB)
    end_BNI, y_LBI = jax.lax.scan(advance, state_BNI, positions, unroll=tuning.unroll)
    y_LBI = (y_LBI + _row(channels.skip) * x_LBI) * jax.nn.silu(gate_LBI)
    return (end_BNI, _write(y_all, y_LBI, i)), state_BNI

  number = sequences.x.shape[1] // tuning.chunk
  carry = (state_BNI, jnp.zeros_like(sequences.x))
  (state_BNI, y_BLI), starts = jax.lax.scan(chunk, carry, jnp.arange(number))
  return (y_BLI, state_BNI), (sequences, channels, starts)


def _backward(tuning, saved, cotangents):
  sequences, channels, starts = saved
  dy_BLI, dstate_BNI = cotangents
  a_NI = channels.a.T

  def recompute(state_BNI, position):
    """The forward step: the state that enters a position, and what needs the one after."""
    dt_BI, dx_BI, b_BN, c_BN, keep_B, dy_BI = position
    kept_BNI = _keep(state_BNI, keep_B)
    after_BNI = _advance(kept_BNI, a_NI, dt_BI, dx_BI, b_BN)
    dc_BN = _sum_channels(tuning, after_BNI, dy_BI)
    return after_BNI, (kept_BNI, dc_BN, _sum_states(tuning, after_BNI, c_BN[..., None]))

  def backward_step(carry, position):
    """From the gradient of the state after a position to that of the state before it."""
    dstate_BNI, da_BNI = carry
    dt_BI, dx_BI, b_BN, c_BN, keep_B, dy_BI, kept_BNI = position
    dafter_BNI = dstate_BNI + c_BN[..., None] * dy_BI[:, None]
    db_BN = _sum_channels(tuning, dafter_BNI, dx_BI)
    ddx_BI = _sum_states(tuning, dafter_BNI, b_BN[..., None])
    dkept_BNI = jnp.exp(dt_BI[:, None] * a_NI[None]) * dafter_BNI
    drate_BNI = dkept_BNI * kept_BNI  # the gradient of dt a
    dstate_BNI = _keep(dkept_BNI, keep_B)
    ddt_BI = _sum_states(tuning, drate_BNI, a_NI[None])
    return (dstate_BNI, da_BNI + drate_BNI * dt_BI[:, None]), (db_BN, ddx_BI, ddt_BI)

  def chunk(carry, chunk_and_start):
    i, start_BNI = chunk_and_start
    dstate_BNI, da_BNI, dskip_I, dbias_I, gradients = carry
    x_LBI, dt_LBI, b_LBN, c_LBN, gate_LBI, keep_LB = _chunk(tuning, sequences, channels, i)
    dout_LBI = _read(dy_BLI, i, tuning.chunk, dt_LBI.dtype)
    sigmoid_LBI = jax.nn.sigmoid(gate_LBI)
    dy_LBI = dout_LBI * gate_LBI * sigmoid_LBI  # of y before the gate
    positions = (dt_LBI, dt_LBI * x_LBI, b_LBN, c_LBN, keep_LB, dy_LBI)
    _, (before, dc_LBN, y_LBI) = jax.lax.scan(recompute, start_BNI, positions, unroll=tuning.unroll)
    (dstate_BNI, da_BNI), (db_LBN, ddx_LBI, ddt_LBI) = jax.lax.scan(
      backward_step, (dstate_BNI, da_BNI), (*positions, before), reverse=True, unroll=tuning.unroll
    )
    # The derivative of softplus is the sigmoid, which is 1 - exp(-dt).
    ddelta_LBI = (ddt_LBI + ddx_LBI * x_LBI) * -jnp.expm1(-dt_LBI)
    dsilu_LBI = sigmoid_LBI * (1 + gate_LBI * (1 - sigmoid_LBI))
    parts = (
      ddx_LBI * dt_LBI + dy_LBI * _row(channels.skip),
      ddelta_LBI,
      db_LBN,
      dc_LBN,
      dout_LBI * (y_LBI + _row(channels.skip) * x_LBI) * dsilu_LBI,
    )
    gradients = tuple(_write(whole, part, i) for whole, part in zip(gradients, parts, strict=True))
    dskip_I = dskip_I + jnp.sum(dy_LBI * x_LBI, axis=(0, 1))
    dbias_I = dbias_I + jnp.sum(ddelta_LBI, axis=(0, 1))
    return (dstate_BNI, da_BNI, dskip_I, dbias_I, gradients), None

  *differentiable, keep_BL = sequences
  zeros = jax.tree.map(
    jnp.zeros_like, (dstate_BNI, channels.skip, channels.bias, tuple(differentiable))
  )
  chunks = (jnp.arange(starts.shape[0]), starts)
  (dstate_BNI, da_BNI, dskip_I, dbias_I, gradients), _ = jax.lax.scan(
    chunk, (dstate_BNI, *zeros), chunks, reverse=True
  )
  dsequences = _Sequences(*gradients, keep=jnp.zeros_like(keep_BL))
  return dsequences, _Channels(jnp.sum(da_BNI, axis=0).T, dskip_I, dbias_I), dstate_BNI


_scan.defvjp(_forward, _backward)


def _chunk(tuning, sequences, channels, i):
  """Chunk i of the sequences, positions first, with dt in place of delta."""
  dtype = channels.a.dtype
  part = jax.tree.map(lambda v: _read(v, i, tuning.chunk, dtype), sequences)
  return part._replace(delta=jax.nn.softplus(part.delta + _row(channels.bias)))


def _read(whole, i, size, dtype):
  part = jax.lax.dynamic_slice_in_dim(whole, i * size, size, axis=1)
  return jnp.moveaxis(part, 1, 0).astype(dtype)


def _write(whole, part, i):
  part = jnp.moveaxis(part, 0, 1).astype(whole.dtype)
  return jax.lax.dynamic_update_slice_in_dim(whole, part, i * part.shape[1], axis=1)


def _row(v_I):
  return v_I[None, None]


def _sum_states(tuning, v_BNI, weights):
  """The sum over N of v * weights, [B or 1, N, I or 1]."""
  if not tuning.by_slices:
    return jnp.sum(v_BNI * weights, axis=1)
  return sum(v_BNI[:, n] * weights[:, n] for n in range(v_BNI.shape[1]))


def _sum_channels(tuning, v_BNI, weights_BI):
  """The sum over I of v * weights; as a product in full precision, which is not the default."""
  if not tuning.by_products:
    return jnp.sum(v_BNI * weights_BI[:, None], axis=2)
  return jnp.einsum('BNI,BI->BN', v_BNI, weights_BI, precision=jax.lax.Precision.HIGHEST)


_LANES = 128  # of a TPU: the kernel takes channels in multiples of it


def _tpu_kernel(sequences, channels, state_BNI, interpret=False):
  from moejax.ops import selective_scan_tpu  # here, as Pallas loads slowly

  I = state_BNI.shape[2]
  if I % _LANES:
    raise ValueError(f'tpu_kernel takes channels in multiples of {_LANES}, got {I} per device.')
  chunk = selective_scan_tpu.chunk_size(sequences.x.shape[1])
  scan = functools.partial(selective_scan_tpu.scan, interpret)
  return _in_chunks(chunk, scan, sequences, channels, state_BNI)


_IMPLEMENTATIONS = {
  'reference': _reference,
  **{name: functools.partial(_chunked, tuning) for name, tuning in _TUNINGS.items()},
  'tpu_kernel': _tpu_kernel,
}
