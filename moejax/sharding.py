"""Where arrays live: the mesh, the train state by the rules of ops/placement.py, and the batch.

Layers do not know the mesh. Mesh axes: `data` (replicas), `fsdp` (batch and parameter shards),
`expert` (batch, experts, and shards of all other parameters), `tensor` (heads, hidden widths,
vocabulary).
"""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from moejax.ops import placement
from moejax.ops.mesh import BATCH_AXES

AXES = ('data', 'fsdp', 'expert', 'tensor')
BATCH = P(BATCH_AXES)


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
    return NamedSharding(mesh, placement.spec(placement.name_of(path), leaf.shape, of_mesh))

  return jax.tree_util.tree_map_with_path(place, abstract_state)


def abstract(make, mesh):
  """Shapes, dtypes and shardings of what `make()` returns, without making it."""
  tree = jax.eval_shape(make)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree,
    state_shardings(tree, mesh),
  )


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
