"""PartitionSpecs of parameters on a mesh, and the all-gather of a block."""

import jax
from jax.sharding import PartitionSpec as P

from moejax import parameters
from moejax.sharding import exchange, mesh
from moejax.sharding.mesh import SHARD_AXES


def spec(name, shape, size=mesh.size):
  """The PartitionSpec of a parameter.

  Args:
    name: its path, joined by /.
    shape: its shape; a dimension that its mesh axes do not divide is replicated.
    size: function from mesh axes to their number of devices; by default of the current mesh.
  """
  *preferred, last = (_fit(spec, shape, size) for spec in parameters.of(name).specs)
  return next((fitted for fitted, whole in preferred if whole), last[0])


def _fit(spec, shape, size):
  """The spec with the leading mesh axes of each entry that divide, and whether these are all."""
  if len(shape) < len(spec):
    return P(), False
  wanted = [()] * (len(shape) - len(spec)) + [mesh.names(entry) for entry in spec]
  fitted = [_dividing(n, axes, size) for n, axes in zip(shape, wanted, strict=True)]
  return P(*(axes or None for axes in fitted)), fitted == wanted


def _dividing(n, axes, size):
  while n % size(*axes):
    axes = axes[:-1]
  return axes


def gather(block, dtype):
  """A module whose parameters, but those of experts, are all-gathered along SHARD_AXES, in `dtype`.

  Called inside the loop over blocks, so that one block is gathered at a time; gradients are
  reduce-scattered. The partitioner alone may multiply shard by shard, which reads the activations
  as many times as there are shards. Layers gather their own experts.
  """

  def gathered(path, leaf):
    name = parameters.name_of(path[:-1])  # the last is a field of the Variable
    sharded = spec(name, leaf.shape)
    if '/experts/' in name or mesh.sharded_dim(sharded, SHARD_AXES) is None:
      return leaf
    return exchange.gather(leaf.astype(dtype), sharded, SHARD_AXES)

  if mesh.size(*SHARD_AXES) == 1:
    return block
  return jax.tree_util.tree_map_with_path(gathered, block)


def in_turn(block, x):
  """A block and its input, of which no parameter is gathered before there is the input.

  Of blocks that are not in a loop, the compiler else gathers all ahead of the first.
  """
  if mesh.size(*SHARD_AXES) == 1:
    return block, x
  return jax.lax.optimization_barrier((block, x))
