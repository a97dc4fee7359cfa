"""Matrix products of rows sorted by group, each group with its own matrix.

Backends of `grouped_matmul`, all equal by value and gradient:

  tiled       a loop over tiles of rows of one group, in plain XLA: runs anywhere.
  ragged_dot  `jax.lax.ragged_dot`: grouped on TPU from jax 0.11 (before, its weight gradient is
              not); elsewhere XLA expands it to E times the FLOPs and memory, unless a GPU has a
              flag set that is off by default (jax 0.7 to 0.12).
  megablox    the Pallas kernel for TPU that comes with jax.

A GPU is left with the loop, which has not been timed on one. Accelerators use this only without a
capacity (`model.moe.capacity_factor = 0`); with one their experts are a batched product.
"""

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
  # Both are masked: kernels leave the output beyond the groups undefined, and the gradient of the
  # matrices must not read the input there.
  y_TF = _BACKENDS[impl](jnp.where(in_group_T1, x_TD, 0), w_EDF, group_sizes_E)
  return jnp.where(in_group_T1, y_TF, 0)


def fastest(platform):
  """The backend for 'cpu', 'gpu' or 'tpu'."""
  if platform != 'tpu':
    return 'tiled'
  return 'ragged_dot' if jax.__version_info__ >= (0, 11) else 'megablox'


_PIECE_BYTES = 2**17  # of a matrix, several of which are in the cache of a core


def one_product(x_CD, w_EDF, e):
  """x_CD times matrix e, for few rows C.

  XLA copies what it selects for a product. Piece by piece that stays in the cache of a CPU, which
  is twice as fast as with a copy of the whole matrix.
  """
  _, D, F = w_EDF.shape
  most = max(1, _PIECE_BYTES // (F * w_EDF.dtype.itemsize))
  size = max(n for n in range(1, min(D, most) + 1) if D % n == 0)

  def add(i, y_CF):
    x = jax.lax.dynamic_slice_in_dim(x_CD, i * size, size, axis=1)
    (w,) = jax.lax.dynamic_slice(w_EDF, (e, i * size, 0), (1, size, F))
    return y_CF + jnp.matmul(x, w, preferred_element_type=y_CF.dtype)

  zeros = jnp.zeros((len(x_CD), F), jnp.promote_types(x_CD.dtype, jnp.float32))
  return jax.lax.fori_loop(0, D // size, add, zeros).astype(x_CD.dtype)


_TILE = 128  # rows of a tile of the kernel, which must divide the number of rows


def _megablox(x_TD, w_EDF, group_sizes_E, interpret=False):
  from jax.experimental.pallas.ops.tpu import megablox  # needs a jaxlib with Mosaic

  T = x_TD.shape[0]
  padded = jnp.pad(x_TD, ((0, -T % _TILE), (0, 0)))
  tiling = (_TILE, _TILE, _TILE)
  return megablox.gmm(padded, w_EDF, group_sizes_E, x_TD.dtype, tiling, interpret=interpret)[:T]


class RowTiles:
  """Tiles of `size` rows, each of one group, to loop over; `number` of them hold all rows.

  The last tile of a group may reach beyond it; what it writes there, the first tile of the next
  group overwrites. Arrays are padded by `size` rows, so that the last tile of all has room.
  """

  def __init__(self, num_rows, group_sizes_E):
    E = group_sizes_E.shape[0]
    self.size = tile_size(num_rows / E)
    ends_E = jnp.cumsum(group_sizes_E)
    tiles_E = -(-group_sizes_E // self.size)
    last_E = jnp.cumsum(tiles_E)
    self.number = last_E[-1]
    tile = jnp.arange(num_rows // self.size + E, dtype=last_E.dtype)
    self.group = jnp.minimum(jnp.searchsorted(last_E, tile, side='right'), E - 1)
    self.first = (ends_E - group_sizes_E)[self.group]
    self.first += (tile - (last_E - tiles_E)[self.group]) * self.size
    self.end = ends_E[self.group]

  def pad(self, a):
    return jnp.pad(a, [(0, self.size)] + [(0, 0)] * (a.ndim - 1))

  def used(self, i):
    """Whether each row of tile i belongs to its group."""
    return self.first[i] + jnp.arange(self.size, dtype=self.first.dtype) < self.end[i]

  def of_group(self, i, tree):
    """From arrays [E, ...], those of the group of tile i."""
    return jax.tree.map(lambda a: a[self.group[i]], tree)

  def read(self, i, tree):
    read = lambda a: jax.lax.dynamic_slice_in_dim(a, self.first[i], self.size)
    return jax.tree.map(read, tree)

  def write(self, i, tree, rows):
    write = lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, self.first[i], axis=0)
    return jax.tree.map(write, tree, rows)


def tile_size(mean_rows):
  """Rows of a tile for groups of `mean_rows` rows on average: about half, 16 to 256.

  A smaller tile wastes less on the last one of each group, a larger one reads a matrix less often.
  """
  return 16 * int(min(16, max(1, -(-mean_rows // 32))))


@jax.custom_vjp
def _tiled(x_TD, w_EDF, group_sizes_E):
  T, F = x_TD.shape[0], w_EDF.shape[2]
  tiles = RowTiles(T, group_sizes_E)
  x = tiles.pad(x_TD)

  def body(i, y):
    return tiles.write(i, y, tiles.read(i, x) @ tiles.of_group(i, w_EDF))

  return jax.lax.fori_loop(0, tiles.number, body, jnp.zeros((len(x), F), x.dtype))[:T]


def _tiled_backward(saved, dy_TF):
  x_TD, w_EDF, group_sizes_E = saved
  tiles = RowTiles(x_TD.shape[0], group_sizes_E)
  rows = tiles.pad(x_TD), tiles.pad(dy_TF)

  def body(i, dw_EDF):
    x_CD, dy_CF = tiles.read(i, rows)
    dy_CF = jnp.where(tiles.used(i)[:, None], dy_CF, 0)
    dw_DF = jnp.einsum('CD,CF->DF', x_CD, dy_CF, preferred_element_type=dw_EDF.dtype)
    return dw_EDF.at[tiles.group[i]].add(dw_DF)

  # Tiles of one group are summed in float32.
  zeros_EDF = jnp.zeros(w_EDF.shape, jnp.promote_types(w_EDF.dtype, jnp.float32))
  dw_EDF = jax.lax.fori_loop(0, tiles.number, body, zeros_EDF)
  dx_TD = _tiled(dy_TF, jnp.swapaxes(w_EDF, 1, 2), group_sizes_E)
  return dx_TD, dw_EDF.astype(w_EDF.dtype), None


_tiled.defvjp(lambda *args: (_tiled(*args), args), _tiled_backward)

_BACKENDS = {'tiled': _tiled, 'ragged_dot': jax.lax.ragged_dot, 'megablox': _megablox}
