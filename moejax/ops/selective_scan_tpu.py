"""The selective scan as a Pallas kernel for TPU, forwards and backwards.

A program of the grid has one sequence and one tile of channels. It loops over the chunks in order
with the state in VMEM; states are on sublanes and channels on lanes, [N, I], so that registers are
full. The forward pass saves the state at the start of every chunk; the backward pass recomputes the
states of one chunk into VMEM.

Nothing is a matrix product, so nothing is rounded to bfloat16 on the way.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_TILES = (512, 384, 256, 128)  # channels of a program: the first of these that divides all
_CHUNK = 128  # positions between two saved states
_ROWS = 16  # positions read at once, and unrolled: the sublanes of bfloat16


def chunk_size(num_positions):
  """Positions of a chunk; `scan` takes whole chunks."""
  return min(_CHUNK, -(-num_positions // _ROWS) * _ROWS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(interpret, sequences, channels, state_BNI):
  """The scan of `moejax.ops.selective_scan`, on its named tuples.

  Args:
    interpret: whether to run the operations of the kernel one by one, on any platform.
    sequences: whole chunks of positions, channels in a multiple of 128.
    channels, state_BNI: in the dtype of b, c and keep, which is that of all sums.

  Returns:
    y_BLI in the dtype of x, and the last state_BNI.
  """
  return _forward(interpret, sequences, channels, state_BNI)[0]


def _forward(interpret, sequences, channels, state_BNI):
  B, N, I = state_BNI.shape
  blocks = _Blocks(sequences, channels, N)
  y_BLI, starts, end_BNI = blocks.call(
    _forward_kernel,
    interpret,
    in_specs=(blocks.sequences, blocks.channels, blocks.state),
    out_specs=(blocks.wide, blocks.start, blocks.state),
    out_shape=(
      _like(sequences.x),
      jax.ShapeDtypeStruct((B, blocks.grid[2], N, I), state_BNI.dtype),
      _like(state_BNI),
    ),
  )(*_prepared(sequences, channels), state_BNI)
  return (y_BLI, end_BNI), (sequences, channels, starts)


def _backward(interpret, saved, cotangents):
  sequences, channels, starts = saved
  dout_BLI, dend_BNI = cotangents
  B, N, I = dend_BNI.shape
  L, dtype = dout_BLI.shape[1], dend_BNI.dtype
  blocks = _Blocks(sequences, channels, N, reverse=True)
  # Sums over the channels of one tile, and over the positions of one sequence.
  by_tile = jax.ShapeDtypeStruct((blocks.grid[1], B, L, N), dtype)
  by_sequence = jax.ShapeDtypeStruct((B, 1, I), dtype)
  dsequences, dchannels, dstate_BNI = blocks.call(
    _backward_kernel,
    interpret,
    in_specs=(blocks.wide, blocks.sequences, blocks.channels, blocks.start, blocks.state),
    out_specs=(
      blocks.sequences._replace(b=blocks.by_tile, c=blocks.by_tile, keep=None),
      channels._replace(a=blocks.state, skip=blocks.by_sequence, bias=blocks.by_sequence),
      blocks.state,
    ),
    out_shape=(
      jax.tree.map(_like, sequences)._replace(b=by_tile, c=by_tile, keep=None),
      channels._replace(a=_like(dend_BNI), skip=by_sequence, bias=by_sequence),
      _like(dend_BNI),
    ),
    scratch_shapes=[pltpu.VMEM((blocks.chunk, N, blocks.tile), dtype)],
  )(dout_BLI, *_prepared(sequences, channels), starts, dend_BNI)
  dsequences = dsequences._replace(
    b=jnp.sum(dsequences.b, axis=0),
    c=jnp.sum(dsequences.c, axis=0),
    keep=jnp.zeros_like(sequences.keep),
  )
  dchannels = channels._replace(
    a=jnp.sum(dchannels.a, axis=0).T,
    skip=jnp.sum(dchannels.skip, axis=(0, 1)),
    bias=jnp.sum(dchannels.bias, axis=(0, 1)),
  )
  return dsequences, dchannels, dstate_BNI


scan.defvjp(_forward, _backward)


class _Blocks:
  """The grid of programs (sequence, tile of channels, chunk), and their blocks."""

  def __init__(self, sequences, channels, num_states, reverse=False):
    B, L, I = sequences.x.shape
    N, chunk = num_states, chunk_size(L)
    tile = next(size for size in _TILES if I % size == 0)
    chunks = L // chunk
    self.chunk, self.tile = chunk, tile
    self.grid = B, I // tile, chunks
    at = (lambda k: chunks - 1 - k) if reverse else (lambda k: k)
    self.wide = pl.BlockSpec((None, chunk, tile), lambda b, i, k: (b, at(k), i))
    self.start = pl.BlockSpec((None, None, N, tile), lambda b, i, k: (b, at(k), 0, i))
    self.state = pl.BlockSpec((None, N, tile), lambda b, i, k: (b, 0, i))
    self.by_tile = pl.BlockSpec((None, None, chunk, N), lambda b, i, k: (i, b, at(k), 0))
    self.by_sequence = pl.BlockSpec((None, 1, tile), lambda b, i, k: (b, 0, i))
    narrow = lambda width: pl.BlockSpec((None, chunk, width), lambda b, i, k: (b, at(k), 0))
    self.sequences = sequences._replace(
      x=self.wide, delta=self.wide, b=narrow(N), c=narrow(N), gate=self.wide, keep=narrow(1)
    )
    shared = lambda rows: pl.BlockSpec((rows, tile), lambda b, i, k: (0, i))
    self.channels = channels._replace(a=shared(N), skip=shared(1), bias=shared(1))

  def call(self, kernel, interpret, **arguments):
    return pl.pallas_call(
      kernel,
      grid=self.grid,
      # Chunks in order: blocks that do not depend on the chunk carry state from one to the next.
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=('parallel', 'parallel', 'arbitrary')
      ),
      interpret=interpret,
      name=f'selective_scan{kernel.__name__}',
      **arguments,
    )


def _like(v):
  return jax.ShapeDtypeStruct(v.shape, v.dtype)


def _prepared(sequences, channels):
  """Sequences and channels for the kernels, `a` scaled so that powers of 2 are the decay."""
  return (
    sequences._replace(keep=sequences.keep[..., None]),
    channels._replace(
      a=channels.a.T * math.log2(math.e), skip=channels.skip[None], bias=channels.bias[None]
    ),
  )


class _Group(NamedTuple):
  """What both passes need of _ROWS positions."""

  x: Any  # [L, I]
  raw: Any  # dt is its softplus
  dt: Any
  dx: Any  # dt x
  keep: Any  # 0 where a document starts, else 1
  gate: Any
  b: Any  # [N, L]
  c: Any

  def decay(self, t, a_NI):
    return jnp.exp2(self.dt[t : t + 1] * a_NI)

  def kept(self, t, state_NI):
    """The state, but 0 where a document starts, even if the state before is infinite."""
    return jnp.where(self.keep[t : t + 1] > 0, state_NI, 0)

  def advance(self, t, a_NI, kept_NI):
    """The state after position t, from the kept one before, and what y reads from it."""
    state_NI = self.decay(t, a_NI) * kept_NI + self.b[:, t : t + 1] * self.dx[t : t + 1]
    return state_NI, jnp.sum(self.c[:, t : t + 1] * state_NI, axis=0, keepdims=True)


def _rows(i):
  return pl.ds(pl.multiple_of(i * _ROWS, _ROWS), _ROWS)


def _group(rows, sequences, channels):
  dtype = channels.a.dtype
  x_LI = sequences.x[rows, :].astype(dtype)
  raw_LI = sequences.delta[rows, :].astype(dtype) + channels.bias[...]
  dt_LI = jax.nn.softplus(raw_LI)
  return _Group(
    x=x_LI,
    raw=raw_LI,
    dt=dt_LI,
    dx=dt_LI * x_LI,
    keep=jnp.broadcast_to(sequences.keep[rows, :], dt_LI.shape),
    gate=sequences.gate[rows, :].astype(dtype),
    b=sequences.b[rows, :].T,
    c=sequences.c[rows, :].T,
  )


def _forward_kernel(sequences, channels, state, y, start, end):
  @pl.when(pl.program_id(2) == 0)
  def _():
    end[...] = state[...]

  start[...] = end[...]
  a_NI, skip = channels.a[...], channels.skip[...]

  def advance(i, state_NI):
    rows = _rows(i)
    group = _group(rows, sequences, channels)
    read = []
    for t in range(_ROWS):
      state_NI, read_1I = group.advance(t, a_NI, group.kept(t, state_NI))
      read.append(read_1I)
    y_LI = jnp.concatenate(read, axis=0) + skip * group.x
    y[rows, :] = (y_LI * jax.nn.silu(group.gate)).astype(y.dtype)
    return state_NI

  end[...] = jax.lax.fori_loop(0, y.shape[0] // _ROWS, advance, end[...])


def _backward_kernel(dout, sequences, channels, start, dend, dsequences, dchannels, dstate, kept):
  @pl.when(pl.program_id(2) == 0)
  def _():
    dstate[...] = dend[...]
    for sums in dchannels:
      sums[...] = jnp.zeros_like(sums)

  a_NI, skip = channels.a[...], channels.skip[...]
  groups = dout.shape[0] // _ROWS

  def recompute(i, state_NI):
    """The forward pass: the state that enters each position, and what needs the one after."""
    rows = _rows(i)
    group = _group(rows, sequences, channels)
    dout_LI = dout[rows, :].astype(a_NI.dtype)
    sigmoid_LI = jax.nn.sigmoid(group.gate)
    dy_LI = dout_LI * group.gate * sigmoid_LI  # of y before the gate
    parts = []
    for t in range(_ROWS):
      kept_NI = group.kept(t, state_NI)
      kept[i * _ROWS + t] = kept_NI
      state_NI, read_1I = group.advance(t, a_NI, kept_NI)
      dc_N1 = jnp.sum(state_NI * dy_LI[t : t + 1], axis=1, keepdims=True)
      parts.append((read_1I, dc_N1))
    read, dc = zip(*parts, strict=True)
    y_LI = jnp.concatenate(read, axis=0) + skip * group.x
    dsilu_LI = sigmoid_LI * (1 + group.gate * (1 - sigmoid_LI))
    dsequences.gate[rows, :] = (dout_LI * y_LI * dsilu_LI).astype(dsequences.gate.dtype)
    dsequences.c[rows, :] = jnp.concatenate(dc, axis=1).T
    return state_NI

  def backward_step(i, carry):
    """From the gradient of the state after a group to that of the state before it."""
    i = groups - 1 - i
    rows = _rows(i)
    group = _group(rows, sequences, channels)
    dy_LI = dout[rows, :].astype(a_NI.dtype) * jax.nn.silu(group.gate)
    dstate_NI, da_NI = carry
    parts = []
    for t in reversed(range(_ROWS)):
      dafter_NI = dstate_NI + group.c[:, t : t + 1] * dy_LI[t : t + 1]
      db_N1 = jnp.sum(dafter_NI * group.dx[t : t + 1], axis=1, keepdims=True)
      ddx_1I = jnp.sum(dafter_NI * group.b[:, t : t + 1], axis=0, keepdims=True)
      dkept_NI = group.decay(t, a_NI) * dafter_NI
      drate_NI = dkept_NI * kept[i * _ROWS + t]  # the gradient of dt a
      dstate_NI = group.kept(t, dkept_NI)
      ddt_1I = jnp.sum(drate_NI * a_NI, axis=0, keepdims=True)
      da_NI = da_NI + drate_NI * group.dt[t : t + 1]
      parts.append((db_N1, ddx_1I, ddt_1I))
    db, ddx, ddt = zip(*reversed(parts), strict=True)
    ddx_LI = jnp.concatenate(ddx, axis=0)
    ddt_LI = jnp.concatenate(ddt, axis=0) * math.log(2) + ddx_LI * group.x
    ddelta_LI = ddt_LI * jax.nn.sigmoid(group.raw)
    dx_LI = ddx_LI * group.dt + dy_LI * skip
    dsequences.x[rows, :] = dx_LI.astype(dsequences.x.dtype)
    dsequences.delta[rows, :] = ddelta_LI.astype(dsequences.delta.dtype)
    dsequences.b[rows, :] = jnp.concatenate(db, axis=1).T
    dchannels.skip[...] += jnp.sum(dy_LI * group.x, axis=0, keepdims=True)
    dchannels.bias[...] += jnp.sum(ddelta_LI, axis=0, keepdims=True)
    return dstate_NI, da_NI

  jax.lax.fori_loop(0, groups, recompute, start[...])
  carry = dstate[...], dchannels.a[...]
  dstate[...], dchannels.a[...] = jax.lax.fori_loop(0, groups, backward_step, carry)
