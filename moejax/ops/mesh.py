"""The mesh that an op finds itself on, for ops that choose their own collectives."""

import math

import jax

# Name of arrays that other devices sent, for `jax.checkpoint_policies.save_only_these_names`: a
# backward pass that computes anew need not send anew.
RECEIVED = 'received'

BATCH_AXES = ('data', 'fsdp', 'expert')  # sequences lie along these, the outermost first


def size(*axes):
  """Devices along mesh axes, as far as these are there and still the partitioner's."""
  current = jax.sharding.get_abstract_mesh()
  free = () if current.empty else current.auto_axes
  return math.prod(current.shape[axis] for axis in axes if axis in free)


def batch_axes(number):
  """The batch axes with several devices, as many as divide `number`, to split a leading axis."""
  axes = ()
  for axis in BATCH_AXES:
    if size(axis) > 1 and number % size(*axes, axis) == 0:
      axes += (axis,)
  return axes
