"""Where arrays live: the mesh, one table from parameter paths to mesh axes, and the batch.

Layers do not know the mesh. Mesh axes: `data` (replicas), `fsdp` (batch and parameter shards),
`expert` (batch and experts), `tensor` (heads, hidden widths, vocabulary).
"""

import dataclasses
import math
import re

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from moejax.ops.mesh import BATCH_AXES

AXES = ('data', 'fsdp', 'expert', 'tensor')
BATCH = P(BATCH_AXES)

# First match on the end of a parameter's path wins. A spec names the last dimensions of the array:
# the leading axis of stacked blocks stays whole.
RULES = (
  (r'embedding', P('tensor', 'fsdp')),
  (r'position_embedding', P(None, 'fsdp')),
  (r'head', P('fsdp', 'tensor')),
  (r'qkv', P('fsdp', None, 'tensor', None)),
  (r'out', P('tensor', None, 'fsdp')),
  (r'experts/(w_in|w_gate)', P('expert', 'fsdp', 'tensor')),
  (r'experts/w_out', P('expert', 'tensor', 'fsdp')),
  (r'(w_in|w_gate)', P('fsdp', 'tensor')),
  (r'w_out', P('tensor', 'fsdp')),
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
  """A mesh with all AXES over `devices` (default: all there are)."""
  devices = jax.devices() if devices is None else devices
  shape = config.shape(len(devices))
  return jax.make_mesh(shape, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


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
    name = '/'.join(_key(k) for k in path)
    spec = next(spec for rule, spec in RULES if re.search(f'(^|/){rule}$', name))
    return NamedSharding(mesh, _fit(spec, leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(place, abstract_state)


def abstract(make, mesh):
  """Shapes, dtypes and shardings of what `make()` returns, without making it."""
  tree = jax.eval_shape(make)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree,
    state_shardings(tree, mesh),
  )


def _key(entry):
  return str(getattr(entry, 'key', getattr(entry, 'name', getattr(entry, 'idx', ''))))


def _fit(spec, shape, mesh):
  if len(shape) < len(spec):
    return P()
  padded = (None,) * (len(shape) - len(spec)) + tuple(spec)
  fits = (axis and n % mesh.shape[axis] == 0 for axis, n in zip(padded, shape, strict=True))
  return P(*(axis if ok else None for axis, ok in zip(padded, fits, strict=True)))


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
