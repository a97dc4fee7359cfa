"""The device mesh: its axes, its construction, and queries of the current mesh.

Mesh axes: `data` (replicas), `fsdp` (batch and parameter shards), `expert` (batch, experts, and
shards of all other parameters), `tensor` (heads, hidden widths, vocabulary).
"""

import dataclasses
import functools
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec as P

from moejax.fields import Section, default

AXES = ('data', 'fsdp', 'expert', 'tensor')
BATCH_AXES = ('data', 'fsdp', 'expert')  # sequences are sharded along these, outermost first
SHARD_AXES = ('fsdp', 'expert')  # of all parameters but those of experts
BATCH = P(BATCH_AXES)


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
  """Devices along each axis; -1, at most once, takes what the others leave.

  Sizes of 0 are chosen by `moejax.estimate`: results do not depend on them.
  """

  PATH = 'mesh'

  data: int = default(-1, 'devices that hold replicas; -1: the rest', minimum=-1)
  fsdp: int = default(
    0, 'devices that share batch and parameters; 0: what fits; 1 on a CPU', minimum=-1
  )
  expert: int = default(
    0, 'devices that share batch and experts; 0: what fits; 1 on a CPU', minimum=-1
  )
  tensor: int = default(1, 'devices that share heads, hidden widths, vocabulary', minimum=-1)

  def conflicts(self):
    sizes = dataclasses.astuple(self)
    if 0 in (self.data, self.tensor) or sizes.count(-1) > 1:
      yield (
        'mesh sizes must be positive, with at most one -1 for "the rest", and 0 only for mesh.fsdp '
        f'and mesh.expert; got {dict(zip(AXES, sizes, strict=True))}.'
      )

  def shape(self, num_devices):
    """Sizes of AXES on this many devices; sizes that are still 0 are 1."""
    sizes = tuple(n or 1 for n in dataclasses.astuple(self))
    known = math.prod(n for n in sizes if n != -1)
    if num_devices % known or (-1 not in sizes and known != num_devices):
      raise ValueError(
        f'mesh {dict(zip(AXES, sizes, strict=True))} does not fit {num_devices} devices: the '
        'product of its sizes must be the number of devices. Set one of mesh.data, mesh.fsdp, '
        'mesh.expert, mesh.tensor to -1 to let it take the rest.'
      )
    return tuple(num_devices // known if n == -1 else n for n in sizes)


def make_mesh(config, devices=None):
  """A mesh with all AXES over `devices` (default: all devices).

  Several slices of a TPU, connected by a slower network, are along `data`, or else `fsdp`.
  """
  devices = jax.devices() if devices is None else devices
  shape = config.shape(len(devices))
  slices = len({getattr(device, 'slice_index', None) for device in devices})
  if slices > 1:
    sizes = by_slices(shape, slices)
    make = functools.partial(mesh_utils.create_hybrid_device_mesh, *sizes)
  else:
    make = functools.partial(mesh_utils.create_device_mesh, shape)
  placed = make(devices, allow_split_physical_axes=True)
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(config):
  """A mesh of the sizes of a MeshConfig, none of them -1, without devices."""
  return AbstractMesh(dataclasses.astuple(config), AXES)


def by_slices(shape, slices):
  """Sizes of AXES within a slice, and across slices; ValueError if they cannot be divided so."""
  for axis, size in enumerate(shape[:2]):
    if size % slices == 0:
      between = [1] * len(shape)
      between[axis] = slices
      return [n // m for n, m in zip(shape, between, strict=True)], between
  raise ValueError(
    f'mesh {dict(zip(AXES, shape, strict=True))}: the {slices} slices must divide mesh.data or '
    'mesh.fsdp.'
  )


def describe(sizes):
  """Sizes by mesh axis as text: 'data 2, expert 8'."""
  return ', '.join(f'{axis} {n}' for axis, n in sizes.items() if n > 1) or 'one device'


def batch_shards(mesh):
  """Number of shards of the batch dimension."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def size(*axes):
  """Number of devices along mesh axes; 1 without a mesh, and in the body of a `shard_map`."""
  current = jax.sharding.get_abstract_mesh()
  free = () if current.empty else current.auto_axes
  return math.prod(current.shape[axis] for axis in axes if axis in free)


def batch_axes(number):
  """The batch axes of several devices that together divide `number`, to shard a leading axis."""
  axes = ()
  for axis in BATCH_AXES:
    if size(axis) > 1 and number % size(*axes, axis) == 0:
      axes += (axis,)
  return axes


def num_shards(spec, axis):
  """Shards of an array of this PartitionSpec along a mesh axis."""
  return size(axis) if any(axis in names(entry) for entry in spec) else 1


def sharded_dim(spec, axes):
  """The dimension of an array of this PartitionSpec that is sharded along `axes`, or None."""
  along = lambda entry: size(*(axis for axis in names(entry) if axis in axes))
  return next((dim for dim, entry in enumerate(spec) if along(entry) > 1), None)


def names(entry):
  """The mesh axes of an entry of a PartitionSpec, as a tuple."""
  return entry if isinstance(entry, tuple) else (entry,) if entry else ()
