"""Matrix products of rows sorted by group, each group with its own matrix.

Backends of `grouped_matmul`, all equal by value and gradient:

  blocked     a loop over blocks of rows of one group, in plain XLA: runs anywhere.
  ragged_dot  `jax.lax.ragged_dot`: grouped on TPU from jax 0.11 (before, its weight gradient is
              not); elsewhere XLA expands it to E times the FLOPs and memory, unless a GPU has a
              flag set that is off by default (jax 0.7 to 0.12).
  megablox    the Pallas kernel for TPU that comes with jax.

On a GPU that leaves the loop: one block after the other, but no product in vain. It has not been
timed on one. Layers come here only without a capacity (`model.moe.capacity_factor = 0`); with one
their experts are a batched product there.
"""

import typing

import jax
import jax.numpy as jnp


def grouped_matmul(x_TD, w_EDF, group_sizes_E, impl):
  """y_TF with y[t] = x[t] @ w[group of t].

  Args:
    x_TD: rows sorted by group, any float dtype.
    w_EDF: one matrix per group, of the same dtype.
    group_sizes_E: int32, rows of each group; a group can be empty. Their sum is at most T.
    impl: a backend, such as `fastest` names for a platform.

  Returns:
    y_TF in the dtype of x. Rows beyond the groups are zero, whatever x holds there, even NaN, and
    have no gradient.
  """
  if impl not in _BACKENDS:
    raise ValueError(f'impl must be one of {", ".join(_BACKENDS)}; got {impl!r}.')
  if x_TD.dtype != w_EDF.dtype:
    raise ValueError(f'rows and matrices must have one dtype, got {x_TD.dtype} and {w_EDF.dtype}.')
  in_group_T1 = (jnp.arange(x_TD.shape[0]) < group_sizes_E.sum())[:, None]
  # On both sides: kernels leave the output beyond the groups undefined, and the gradient of the
  # matrices must not meet what the input holds there.
  y_TF = _BACKENDS[impl](jnp.where(in_group_T1, x_TD, 0), w_EDF, group_sizes_E)
  return jnp.where(in_group_T1, y_TF, 0)


def fastest(platform):
  """The backend for 'cpu', 'gpu' or 'tpu'."""
  if platform != 'tpu':
    return 'blocked'
  return 'ragged_dot' if jax.__version_info__ >= (0, 11) else 'megablox'


def _ragged_dot(x_TD, w_EDF, group_sizes_E):
  return jax.lax.ragged_dot(x_TD, w_EDF, group_sizes_E.astype(jnp.int32))


_TILE = 128  # rows of a tile of the kernel, which must divide the number of rows


def _megablox(x_TD, w_EDF, group_sizes_E, interpret=False):
  from jax.experimental.pallas.ops.tpu import megablox  # needs a jaxlib with Mosaic

  T = x_TD.shape[0]
  padded = jnp.pad(x_TD, ((0, -T % _TILE), (0, 0)))
  sizes = group_sizes_E.astype(jnp.int32)
  tiling = (_TILE, _TILE, _TILE)
  y = megablox.gmm(padded, w_EDF, sizes, x_TD.dtype, tiling, interpret=interpret)
  return y[:T]


class Blocks(typing.NamedTuple):
  """A list of blocks of rows, every one within one group; entries from `number` on mean nothing."""

  number: jax.Array  # int32 scalar
  group: jax.Array  # int32: the group of a block
  first: jax.Array  # int32: its first row
  end: jax.Array  # int32: the row after the last of its group; a block may reach beyond


def blocks_of_groups(group_sizes_E, size, num_rows):
  """Cuts the rows of every group into blocks of `size`; the last one of a group may be shorter."""
  E = group_sizes_E.shape[0]
  ends_E = jnp.cumsum(group_sizes_E)
  blocks_E = -(-group_sizes_E // size)
  last_E = jnp.cumsum(blocks_E)
  block = jnp.arange(num_rows // size + E, dtype=last_E.dtype)
  group = jnp.minimum(jnp.searchsorted(last_E, block, side='right'), E - 1)
  first = (ends_E - group_sizes_E)[group] + (block - (last_E - blocks_E)[group]) * size
  return Blocks(last_E[-1], group, first, ends_E[group])


def block_size(mean_rows):
  """Rows of a block for groups of `mean_rows` rows on average: about half, 16 to 256.

  A smaller block wastes less on the last one of each group, a larger one reads a matrix less often.
  """
  return 16 * int(min(16, max(1, -(-mean_rows // 32))))


@jax.custom_vjp
def _blocked(x_TD, w_EDF, group_sizes_E):
  T, F = x_TD.shape[0], w_EDF.shape[2]
  step = _Steps(T, group_sizes_E)

  def body(i, y_TF):
    block, start, mine_C1 = step(i)
    y_CF = jnp.einsum('CD,DF->CF', step.rows(x_TD, start), w_EDF[block])
    # The block may hold rows of its neighbours.
    y_CF = jnp.where(mine_C1, y_CF, step.rows(y_TF, start))
    return jax.lax.dynamic_update_slice_in_dim(y_TF, y_CF, start, axis=0)

  return jax.lax.fori_loop(0, step.number, body, jnp.zeros((T, F), x_TD.dtype))


class _Steps:
  """Steps of a loop over blocks: `group, first row of the slice, rows of the group in it`."""

  def __init__(self, num_rows, group_sizes_E):
    mean = num_rows / group_sizes_E.shape[0]
    self.size = min(block_size(mean), num_rows)
    self.last_start = num_rows - self.size
    self.blocks = blocks_of_groups(group_sizes_E, self.size, num_rows)
    self.number = self.blocks.number

  def __call__(self, i):
    first, end = self.blocks.first[i], self.blocks.end[i]
    start = jnp.minimum(first, self.last_start)  # a slice must not reach beyond the array
    row = start + jnp.arange(self.size, dtype=start.dtype)
    return self.blocks.group[i], start, ((row >= first) & (row < end))[:, None]

  def rows(self, a, start):
    return jax.lax.dynamic_slice_in_dim(a, start, self.size, axis=0)


def _blocked_backward(saved, dy_TF):
  x_TD, w_EDF, group_sizes_E = saved
  step = _Steps(x_TD.shape[0], group_sizes_E)

  def body(i, dw_EDF):
    block, start, mine_C1 = step(i)
    dy_CF = jnp.where(mine_C1, step.rows(dy_TF, start), 0)
    dw_DF = jnp.einsum(
      'CD,CF->DF', step.rows(x_TD, start), dy_CF, preferred_element_type=dw_EDF.dtype
    )
    return dw_EDF.at[block].add(dw_DF)

  # Blocks of one group add up in float32.
  zeros_EDF = jnp.zeros(w_EDF.shape, jnp.promote_types(w_EDF.dtype, jnp.float32))
  dw_EDF = jax.lax.fori_loop(0, step.number, body, zeros_EDF)
  dx_TD = _blocked(dy_TF, jnp.swapaxes(w_EDF, 1, 2), group_sizes_E)
  return dx_TD, dw_EDF.astype(w_EDF.dtype), None


_blocked.defvjp(lambda *args: (_blocked(*args), args), _blocked_backward)

_BACKENDS = {
  'blocked': _blocked,
  'ragged_dot': _ragged_dot,
  'megablox': _megablox,
}
