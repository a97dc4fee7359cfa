"""Collectives of ours: what moves arrays between devices."""

import functools

import jax
from jax.sharding import PartitionSpec as P

from moejax.sharding import mesh

# Name of arrays that other devices sent, for `jax.checkpoint_policies.save_only_these_names`: a
# backward pass that computes anew need not send anew.
RECEIVED = 'received'


def gather(a, spec, axes):
  """An array that lies as `spec` says, whole along `axes`; its gradient is in parts again."""
  return a if mesh.split_dim(spec, axes) is None else _gather(a, spec, axes)


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
  kept = (tuple(axis for axis in mesh.names(entry) if axis not in axes) for entry in spec)
  return P(*(entry or None for entry in kept))
