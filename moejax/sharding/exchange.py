"""Collectives that exchange parameters, slots and tokens between devices.

`gather` acts on global arrays; all others belong in the body of a `jax.shard_map`.
"""

import functools

import jax
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
