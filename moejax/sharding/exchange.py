"""The collectives that are ours to choose: parameters, slots and tokens between devices.

`gather` acts on whole arrays; all others belong into the body of a `jax.shard_map`.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from moejax.sharding import mesh

# Name of arrays that other devices sent, for `jax.checkpoint_policies.save_only_these_names`: a
# backward pass that recomputes need not send again.
RECEIVED = 'received'


def gather(a, spec, axes):
  """An array sharded by `spec`, gathered along mesh axes; its gradient is sharded again."""
  return a if mesh.sharded_dim(spec, axes) is None else _gather(a, spec, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(a, spec, axes):
  return jax.lax.with_sharding_constraint(a, _without(spec, axes))


def _gather_forward(a, spec, axes):
  return _gather(a, spec, axes), None


def _gather_backward(spec, axes, _, gradient):
  gradient = jax.lax.with_sharding_constraint(gradient, _without(spec, axes))
  return (jax.lax.with_sharding_constraint(gradient, spec),)


_gather.defvjp(_gather_forward, _gather_backward)


def _without(spec, axes):
  kept = (tuple(axis for axis in mesh.names(entry) if axis not in axes) for entry in spec)
  return P(*(entry or None for entry in kept))


def gather_weights(weights, dims):
  """The weights of a device's experts from their shards along `fsdp`; gradients are scattered.

  `dims`: {name: the dimension that is sharded, or None}.
  """
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
  """[T, ...] of every device along `expert`, one after the other: [n * T, ...]."""
  return jax.lax.all_gather(tokens, 'expert', tiled=True)


def reduce_scatter(tokens):
  """[n * T, ...], summed over the devices along `expert`: [T, ...] back to where they came from."""
  return jax.lax.psum_scatter(tokens, 'expert', scatter_dimension=0, tiled=True)
