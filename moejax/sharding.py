"""Where arrays live: the mesh, one table from parameter paths to mesh axes, and the batch.

Layers do not know the mesh. Mesh axes: `data` (replicas), `fsdp` (batch and parameter shards),
`expert` (batch, experts, and shards of all other parameters), `tensor` (heads, hidden widths,
vocabulary).
"""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from moejax.ops import mesh as mesh_lib
from moejax.ops.mesh import BATCH_AXES, SHARD_AXES

AXES = ('data', 'fsdp', 'expert', 'tensor')
BATCH = P(BATCH_AXES)

# First match on the end of a parameter's path wins. A spec names the last dimensions of the array:
# the leading axis of stacked blocks stays whole. Of several, the first whose mesh axes all divide.
# Whole experts lie along `fsdp` if there are enough: what is gathered is then in one piece.
RULES = (
  (r'embedding', P('tensor', SHARD_AXES)),
  (r'position_embedding', P(None, SHARD_AXES)),
  (r'head', P(SHARD_AXES, 'tensor')),
  (r'qkv', P(SHARD_AXES, None, 'tensor', None)),
  (r'out', P('tensor', None, SHARD_AXES)),
  (
    r'experts/(w_in|w_gate)',
    P(('expert', 'fsdp'), None, 'tensor'),
    P('expert', 'fsdp', 'tensor'),
  ),
  (r'experts/w_out', P(('expert', 'fsdp'), 'tensor', None), P('expert', 'tensor', 'fsdp')),
  (r'(w_in|w_gate)', P(SHARD_AXES, 'tensor')),
  (r'w_out', P('tensor', SHARD_AXES)),
  (r'(conv_kernel|w_delta)', P(None, 'tensor')),
  (r'(w_select|a_log)', P('tensor', None)),
  (r'(conv_bias|delta_bias|skip)', P('tensor')),
  (r'.*', P()),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Section `mesh`: devices along each axis; -1, at most once, takes what the others leave."""

  data: int
  fsdp: int
  expert: int
  tensor: int

  def __post_init__(self):
    sizes = dataclasses.astuple(self)
    if any(n < 1 and n != -1 for n in sizes) or sizes.count(-1) > 1:
      raise ValueError(
        f'mesh sizes must be positive, with at most one -1 for "the rest"; got '
        f'{dict(zip(AXES, sizes, strict=True))}.'
      )

  def shape(self, num_devices):
    """Sizes of AXES on this many devices."""
    sizes = dataclasses.astuple(self)
    known = math.prod(n for n in sizes if n != -1)
    if num_devices % known or (-1 not in sizes and known != num_devices):
      raise ValueError(
        f'mesh {dict(zip(AXES, sizes, strict=True))} does not fit {num_devices} devices: the '
        'product of its sizes must be the number of devices. Set one of mesh.data, mesh.fsdp, '
        'mesh.expert, mesh.tensor to -1 to let it take the rest.'
      )
    return tuple(num_devices // known if n == -1 else n for n in sizes)


def make_mesh(config, devices=None):
  """A mesh with all AXES over `devices` (default: all there are).

  Several slices of a TPU, which a slower network joins, lie along `data`, or else `fsdp`.
  """
  devices = jax.devices() if devices is None else devices
  shape = config.shape(len(devices))
  slices = len({getattr(device, 'slice_index', None) for device in devices})
  if slices > 1:
    sizes = _by_slices(shape, slices)
    make = functools.partial(mesh_utils.create_hybrid_device_mesh, *sizes)
  else:
    make = functools.partial(mesh_utils.create_device_mesh, shape)
  placed = make(devices, allow_split_physical_axes=True)
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _by_slices(shape, slices):
  """Sizes of AXES inside of a slice, and over slices."""
  for axis, size in enumerate(shape[:2]):
    if size % slices == 0:
      between = [1] * len(shape)
      between[axis] = slices
      return [n // m for n, m in zip(shape, between, strict=True)], between
  raise ValueError(
    f'mesh {dict(zip(AXES, shape, strict=True))}: the {slices} slices must divide mesh.data or '
    'mesh.fsdp, along which they lie.'
  )


def batch_shards(mesh):
  """Over how many devices the batch dimension is split."""
  return math.prod(mesh.shape[axis] for axis in BATCH[0])


def replicated(mesh):
  """The sharding of an array that is whole on every device."""
  return NamedSharding(mesh, P())


def state_shardings(abstract_state, mesh):
  """A NamedSharding for every array of the train state; optimizer moments lie as their parameters.

  A dimension that its mesh axis does not divide stays whole.
  """

  def place(path, leaf):
    of_mesh = lambda *axes: math.prod(mesh.shape[axis] for axis in axes)
    return NamedSharding(mesh, spec(_name(path), leaf.shape, of_mesh))

  return jax.tree_util.tree_map_with_path(place, abstract_state)


def gather(block, dtype):
  """A module whose parameters are whole along SHARD_AXES, and then in `dtype`.

  Called inside the loop over blocks, so that one block's are whole at a time; their gradients are
  summed into the shards. Left to itself, the partitioner may rather multiply shard by shard, which
  passes over the activations as many times as there are shards. Experts are left to their layer.
  """

  def whole(path, leaf):
    name = _name(path[:-1])  # the last is a field of the Variable
    lies = spec(name, leaf.shape)
    if '/experts/' in name or mesh_lib.split_dim(lies, SHARD_AXES) is None:
      return leaf
    return mesh_lib.gather(leaf.astype(dtype), lies, SHARD_AXES)

  if mesh_lib.size(*SHARD_AXES) == 1:
    return block
  return jax.tree_util.tree_map_with_path(whole, block)


def abstract(make, mesh):
  """Shapes, dtypes and shardings of what `make()` returns, without making it."""
  tree = jax.eval_shape(make)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree,
    state_shardings(tree, mesh),
  )


def _name(path):
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', '')))) for k in path)


def spec(name, shape, size=mesh_lib.size):
  """The PartitionSpec of a parameter.

  Args:
    name: its path, joined by /.
    shape: its shape; a dimension that its mesh axes do not divide stays whole.
    size: function of mesh axes: over how many devices they go; by default on the mesh at hand.
  """
  specs = next(specs for rule, *specs in RULES if re.search(f'(^|/){rule}$', name))
  *preferred, last = (_fit(spec, shape, size) for spec in specs)
  return next((fitted for fitted, whole in preferred if whole), last[0])


def _fit(spec, shape, size):
  """The spec with the first mesh axes of each entry that divide, and whether that is all of it."""
  if len(shape) < len(spec):
    return P(), False
  wanted = [()] * (len(shape) - len(spec)) + [mesh_lib.names(entry) for entry in spec]
  fitted = [_dividing(n, axes, size) for n, axes in zip(shape, wanted, strict=True)]
  return P(*(axes or None for axes in fitted)), fitted == wanted


def _dividing(n, axes, size):
  while n % size(*axes):
    axes = axes[:-1]
  return axes


def abstract_batch(data_config, mesh):
  """Shapes, dtypes and shardings of a global batch."""
  shape = (data_config.batch_size, data_config.sequence_length)
  leaf = jax.ShapeDtypeStruct(shape, np.int32, sharding=NamedSharding(mesh, BATCH))
  return dict.fromkeys(('inputs', 'targets', 'segments', 'positions'), leaf)


def place_batch(batch, mesh):
  """This process's rows of a batch as global arrays, sharded over the batch axes."""
  sharding = NamedSharding(mesh, BATCH)
  place = jax.make_array_from_process_local_data
  return jax.tree.map(lambda rows: place(sharding, rows), batch)


def process_part(mesh, num_rows):
  """Which rows of a batch of `num_rows` the devices of this process hold: its part of the data.

  Returns:
    Arguments of `data.make_loader`: the rows, in order; which of how many equal parts they are.

  Raises:
    ValueError: processes hold parts that differ and overlap.
  """
  rows = {}
  indices = NamedSharding(mesh, BATCH).devices_indices_map((num_rows,))
  for device, (block,) in indices.items():
    rows.setdefault(device.process_index, set()).update(range(*block.indices(num_rows)))
  parts = sorted({tuple(sorted(held)) for held in rows.values()})
  if sum(map(len, parts)) != num_rows:
    raise ValueError(
      f'mesh {dict(mesh.shape)}: the sequences of a batch do not lie in equal parts on the '
      f'{len(rows)} processes. Make mesh.tensor divide the devices of a process, or be a multiple.'
    )
  mine = tuple(sorted(rows[jax.process_index()]))
  return {'rows': mine, 'part': parts.index(mine), 'num_parts': len(parts)}


def fetch(tree):
  """A pytree of arrays as numpy arrays, whole on every process; all processes call it together."""
  return multihost_utils.process_allgather(tree, tiled=True)
