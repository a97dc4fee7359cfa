"""The mesh that an op finds itself on, for ops that choose their own collectives."""

import math

import jax

BATCH_AXES = ('data', 'fsdp', 'expert')  # sequences lie along these


def size(axis, number=0):
  """Devices along an axis that is still the partitioner's; 1 where they do not divide `number`."""
  current = jax.sharding.get_abstract_mesh()
  if current.empty or axis not in current.auto_axes or number % current.shape[axis]:
    return 1
  return current.shape[axis]


def batch_axes(number):
  """The batch axes, as many as divide `number`, along which to split the leading axis."""
  axes = ()
  for axis in BATCH_AXES:
    split = math.prod(map(size, axes)) * size(axis)
    if size(axis) > 1 and number % split == 0:
      axes += (axis,)
  return axes
