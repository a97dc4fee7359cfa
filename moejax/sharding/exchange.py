"""Collectives that exchange parameters, slots and tokens between devices.

`gather` acts on global arrays; all others belong in the body of a `jax.shard_map`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from moejax.sharding import mesh

# Name of arrays from other devices, for `jax.checkpoint_policies.save_only_these_names`: a backward
# pass that recomputes need not exchange them again.
RECEIVED = 'received'


def gather(a, spec, axes):
  """An array sharded by `spec`, gathered along mesh axes; its gradient is sharded again."""
  if mesh.sharded_dim(spec, axes) is None:
    return a
  kept = (tuple(axis for axis in mesh.names(entry) if axis not in axes) for entry in spec)
  constrain = jax.lax.with_sharding_constraint  # its transpose is itself
  return constrain(constrain(a, spec), P(*(entry or None for entry in kept)))


def gather_weights(weights, dims):
  """All-gathers a device's experts along `fsdp`; `dims`: {name: the sharded dimension or None}."""
  gather = functools.partial(jax.lax.all_gather, axis_name='fsdp', tiled=True)
  return {
    name: w if dims[name] is None else gather(w, axis=dims[name]) for name, w in weights.items()
  }


def to_experts(slots):
  """[E, C, ...] of all experts to [E / n, n * C, ...] of this device's: one all-to-all."""
  slots = jax.lax.all_to_all(slots, 'expert', split_axis=0, concat_axis=1, tiled=True)
  return checkpoint_name(slots, RECEIVED)


def from_experts(slots):
  """[E / n, n * C, ...] of this device's experts back to [E, C, ...]: one all-to-all."""
  slots = jax.lax.all_to_all(slots, 'expert', split_axis=1, concat_axis=0, tiled=True)
  return checkpoint_name(slots, RECEIVED)


def all_gather(tokens):
  """[T, ...] of every device along `expert`, concatenated: [n * T, ...]."""
  return jax.lax.all_gather(tokens, 'expert', tiled=True)


def reduce_scatter(tokens):
  """[n * T, ...], summed over the devices along `expert`: each keeps its own [T, ...]."""
  return jax.lax.psum_scatter(tokens, 'expert', scatter_dimension=0, tiled=True)


def divide(work, items, axes):
  """`work(items)`, of which every device does a part.

  Args:
    work: function of [any number, ...], of every item by itself.
    items: [n, ...]: this device's shard of each of n items.
    axes: mesh axes, each with the dimension of an item that it shards (1 or more), or None if its
      devices have the same items. Of several that shard one dimension, the innermost comes first.

  Returns:
    This device's shard of the n results.
  """
  if not axes:
    return work(items)
  (axis, dim), *others = axes
  n, devices = len(items), jax.lax.axis_size(axis)
  if dim is None and n < devices:  # the results would take longer than the work
    return divide(work, items, others)
  items = jnp.pad(items, [(0, -n % devices)] + [(0, 0)] * (items.ndim - 1))
  if dim is None:
    part = len(items) // devices
    items = jax.lax.dynamic_slice_in_dim(items, jax.lax.axis_index(axis) * part, part)
    results = jax.lax.all_gather(divide(work, items, others), axis, tiled=True)
  else:
    exchange = functools.partial(jax.lax.all_to_all, axis_name=axis, tiled=True)
    whole = exchange(items, split_axis=0, concat_axis=dim)
    results = exchange(divide(work, whole, others), split_axis=dim, concat_axis=0)
  return results[:n]
