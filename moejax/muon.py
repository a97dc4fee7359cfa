"""Muon: momentum of which every hidden matrix is orthogonalized by itself.

Every block and every expert has matrices of its own, and so have queries, keys and values
(`parameters.Parameter.is_matrix`). The devices of a mesh divide them among each other.
"""

import math
from typing import Any

import jax
import numpy as np
import optax

from moejax import parameters
from moejax.sharding import exchange, mesh, rules

MOMENTUM = 0.95  # in all published runs
ADAMW_RMS = 0.2  # root mean square of AdamW's updates before the rate, about (arXiv:2502.16982)


def scale_by_muon(moment_dtype=None):
  """Turns gradients of hidden matrices into updates as large as AdamW's before the rate.

  Nesterov momentum, its singular values made 0.7 to 1.2 by five Newton-Schulz iterations
  (kellerjordan.github.io/posts/muon), times 0.2 sqrt(max(inputs, outputs)): AdamW's rate and weight
  decay carry over (arXiv:2502.16982).
  """
  momentum = optax.trace(MOMENTUM, nesterov=True, accumulator_dtype=moment_dtype)
  each = lambda updates, _: jax.tree_util.tree_map_with_path(_orthogonal, updates)
  return optax.chain(momentum, optax.stateless(each))


def is_matrix(path, leaf):
  """Whether a leaf of the parameters holds hidden matrices."""
  return parameters.of(parameters.name_of(path)).is_matrix(leaf.shape)


def _orthogonal(path, update):
  name = parameters.name_of(path)
  about, spec = parameters.of(name), rules.spec(name, update.shape)
  inputs, outputs = (tuple(i % update.ndim for i in dims) for dims in (about.inputs, about.outputs))
  rows, columns = (math.prod(update.shape[i] for i in dims) for dims in (inputs, outputs))
  number = [i for i in range(update.ndim) if i not in inputs + outputs]
  order = [*number, *inputs, *outputs]
  axes = _axes(spec, order, len(number))

  def of_shard(shard):
    ordered = shard.transpose(order)
    split = ordered.reshape(-1, *ordered.shape[len(number) :])
    split = exchange.divide(of_whole, split, axes)
    return split.reshape(ordered.shape).transpose(np.argsort(order))

  def of_whole(matrices):
    return orthogonalize(matrices.reshape(-1, rows, columns)).reshape(matrices.shape)

  if mesh.size(*mesh.AXES) > 1:
    of_shard = jax.shard_map(of_shard, in_specs=spec, out_specs=spec, check_vma=False)
  return ADAMW_RMS * max(rows, columns) ** 0.5 * of_shard(update)


def _axes(spec, order, number):
  """Mesh axes as `exchange.divide` takes them; so many dimensions of `order` count matrices."""
  names = [mesh.names(entry) for entry in (*spec, *[None] * (len(order) - len(spec)))]
  dims = {
    axis: 1 + place for place, dim in enumerate(order[number:]) for axis in reversed(names[dim])
  }
  apart = {axis for dim in order[:number] for axis in names[dim]}  # each has its own matrices
  replicas = dict.fromkeys(axis for axis in mesh.AXES if axis not in {*dims, *apart})
  return [(axis, dim) for axis, dim in (dims | replicas).items() if mesh.size(axis) > 1]


def orthogonalize(x):
  """U V^T of every matrix U S V^T of [number, rows, columns], about; zeros stay zeros."""
  # Without momentum, optax's transformation is its iterations alone, and needs no state.
  iterations: Any = optax.contrib.scale_by_muon(
    beta=0.0, nesterov=False, weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 2)
  )
  return iterations.update(x, iterations.init(x))[0]
