"""The mesh that an op finds itself on, for ops that choose their own collectives."""

import functools
import math

import jax
from jax.sharding import PartitionSpec as P

# Name of arrays that other devices sent, for `jax.checkpoint_policies.save_only_these_names`: a
# backward pass that computes anew need not send anew.
RECEIVED = 'received'

BATCH_AXES = ('data', 'fsdp', 'expert')  # sequences lie along these, the outermost first
SHARD_AXES = ('fsdp', 'expert')  # all parameters but those of experts lie in parts along these


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


def split_dim(spec, axes):
  """The dimension of an array of this PartitionSpec that is split along `axes`, or None."""
  split = [dim for dim, entry in enumerate(spec) if size(*_both(entry, axes)) > 1]
  return split[0] if split else None


def gather(a, spec, axes):
  """An array that lies as `spec` says, whole along `axes`; its gradient is in parts again."""
  return a if split_dim(spec, axes) is None else _gather(a, spec, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(a, spec, axes):
  return jax.lax.with_sharding_constraint(a, _whole(spec, axes))


def _gather_forward(a, spec, axes):
  return _gather(a, spec, axes), None


def _gather_backward(spec, axes, _, gradient):
  gradient = jax.lax.with_sharding_constraint(gradient, _whole(spec, axes))
  return (jax.lax.with_sharding_constraint(gradient, spec),)


_gather.defvjp(_gather_forward, _gather_backward)


def _whole(spec, axes):
  kept = (tuple(axis for axis in names(entry) if axis not in axes) for entry in spec)
  return P(*(entry or None for entry in kept))


def names(entry):
  """The mesh axes of an entry of a PartitionSpec, as a tuple."""
  return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def _both(entry, axes):
  return tuple(axis for axis in names(entry) if axis in axes)
