"""One table from the paths of parameters to mesh axes, and how a block is gathered."""

import re

import jax
from jax.sharding import PartitionSpec as P

from moejax.sharding import exchange, mesh
from moejax.sharding.mesh import SHARD_AXES

# First match on the end of a parameter's path wins. A spec names the last dimensions of the array:
# the leading axis of stacked blocks is not sharded. Of several, the first whose axes all divide.
# Experts are sharded along `fsdp` one by one if there are enough: what is gathered is in one piece.
RULES = (
  (r'embedding', P('tensor', SHARD_AXES)),
  (r'position_embedding', P(None, SHARD_AXES)),
  (r'head', P(SHARD_AXES, 'tensor')),
  (r'qkv', P(SHARD_AXES, None, 'tensor', None)),
  (r'out', P('tensor', None, SHARD_AXES)),
  (
    r'experts/(w_in|w_gate)',
    P(('expert', 'fsdp'), None, 'tensor'),
    P('expert', 'fsdp', 'tensor'),
  ),
  (r'experts/w_out', P(('expert', 'fsdp'), 'tensor', None), P('expert', 'tensor', 'fsdp')),
  (r'(w_in|w_gate)', P(SHARD_AXES, 'tensor')),
  (r'w_out', P('tensor', SHARD_AXES)),
  (r'(conv_kernel|w_delta)', P(None, 'tensor')),
  (r'(w_select|a_log)', P('tensor', None)),
  (r'(conv_bias|delta_bias|skip)', P('tensor')),
  (r'.*', P()),
)


def name_of(path):
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', '')))) for k in path)


def spec(name, shape, size=mesh.size):
  """The PartitionSpec of a parameter.

  Args:
    name: its path, joined by /.
    shape: its shape; a dimension that its mesh axes do not divide is replicated.
    size: function of mesh axes: their number of devices; by default on the current mesh.
  """
  specs = next(specs for rule, *specs in RULES if re.search(f'(^|/){rule}$', name))
  *preferred, last = (_fit(spec, shape, size) for spec in specs)
  return next((fitted for fitted, whole in preferred if whole), last[0])


def _fit(spec, shape, size):
  """The spec with the first mesh axes of each entry that divide, and whether that is all of it."""
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
  """A module whose parameters are gathered along SHARD_AXES, in `dtype`.

  Called inside the loop over blocks, so that one block's are gathered at a time; their gradients
  are summed into the shards. Left to itself, the partitioner may rather multiply shard by shard,
  which passes over the activations as many times as there are shards. Experts are left to their
  layer.
  """

  def gathered(path, leaf):
    name = name_of(path[:-1])  # the last is a field of the Variable
    sharded = spec(name, leaf.shape)
    if '/experts/' in name or mesh.sharded_dim(sharded, SHARD_AXES) is None:
      return leaf
    return exchange.gather(leaf.astype(dtype), sharded, SHARD_AXES)

  if mesh.size(*SHARD_AXES) == 1:
    return block
  return jax.tree_util.tree_map_with_path(gathered, block)
