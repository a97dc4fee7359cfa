"""A bank of expert feed-forward networks: what every sparse or mixing layer routes to."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moejax import parameters
from moejax.layers import common
from moejax.layers.mlp import hidden_width
from moejax.ops import expert_loop, grouped_matmul
from moejax.sharding import exchange, platform, rules

# Name of what layers with experts return, for `jax.checkpoint_policies.save_only_these_names`.
OUTPUT = 'experts_output'

# Along `fsdp` whole experts are sharded if there are enough: what is gathered is in one piece.
parameters.declare(
  'experts/w_in experts/w_gate',
  P(('expert', 'fsdp'), None, 'tensor'),
  P('expert', 'fsdp', 'tensor'),
)
parameters.declare(
  'experts/w_out', P(('expert', 'fsdp'), 'tensor', None), P('expert', 'tensor', 'fsdp')
)


class Experts(nnx.Module):
  """E independent bias-free networks y = act(x W_in) W_out of width F, as `layers.mlp.MLP`.

  `d_out`: width of y, that of x if None. `fan_in_out`: the fan-in that W_out is initialised with;
  the hidden width if None.
  """

  def __init__(
    self,
    *,
    num_experts,
    d_model,
    expert_width,
    activation,
    init,
    rngs,
    d_out=None,
    fan_in_out=None,
  ):
    self.activation = activation
    width = hidden_width(expert_width, activation)
    self.w_in = init(rngs, num_experts, d_model, width, fan_in=d_model)
    self.w_out = init(rngs, num_experts, width, d_out or d_model, fan_in=fan_in_out or width)
    if activation == 'swiglu':
      self.w_gate = init(rngs, num_experts, d_model, width, fan_in=d_model)

  def __call__(self, x_ECD):
    """C rows for each expert: y_ECD in the dtype of x."""
    weights = self.weights(x_ECD.dtype)
    weights = {
      name: exchange.gather(weights[name], spec, ('fsdp',)) for name, spec in specs(weights).items()
    }
    return feed_forward(self.activation, x_ECD, None, weights)

  def weights(self, dtype):
    """{name: [E, ...]}, as `feed_forward` takes them."""
    names = ('w_in', 'w_out', 'w_gate') if self.activation == 'swiglu' else ('w_in', 'w_out')
    return {name: getattr(self, name)[...].astype(dtype) for name in names}


def specs(weights):
  """How the mesh shards each of the weights of all experts: {name: PartitionSpec}."""
  return {name: rules.spec(f'experts/{name}', w.shape) for name, w in weights.items()}


def in_a_loop(impl):
  """Whether experts run one by one, as a CPU likes it ('loop'), or all rows at once ('rows')."""
  return impl == 'loop' or (impl == 'auto' and platform.current() == 'cpu')


def feed_forward(activation, rows, weight, weights, sizes_E=None):
  """What experts make of their rows.

  Args:
    activation: name of the nonlinearity.
    rows: [E, C, D]; or [rows, D], sorted by expert.
    weight: what a row's output is multiplied by, [E, C] or [rows]; None is 1.
    weights: {name: [E, ...]}, in the dtype of the rows.
    sizes_E: int32: how many of the sorted rows each expert has.

  Returns:
    Rows of the width of `w_out`.
  """
  product = jnp.matmul
  if rows.ndim == 2:
    impl = grouped_matmul.fastest(platform.current())
    product = lambda x, w: grouped_matmul.grouped_matmul(x, w, sizes_E, impl)
  return _outer(activation, _inner(rows, weights, product), weight, weights, product)


def _inner(x, weights, product=jnp.matmul):
  """Everything before the nonlinearity, for one expert or for all of them."""
  return {name: product(x, w) for name, w in weights.items() if name != 'w_out'}


def _outer(activation, h, weight, weights, product=jnp.matmul):
  """The nonlinearity and the product after it; the weight, if there is one, scales the output.

  It scales hidden activations, which are narrower than a token where experts are fine.
  """
  if activation == 'swiglu':
    hidden = jax.nn.silu(h['w_gate']) * h['w_in']
  else:
    hidden = common.ACTIVATIONS[activation](h['w_in'])
  if weight is not None:
    hidden = hidden * weight[..., None].astype(hidden.dtype)
  return product(hidden, weights['w_out'])


# By activation: one expert for `expert_loop.map_experts`.
ONE = {
  name: expert_loop.Expert(_inner, functools.partial(_outer, name))
  for name in (*common.ACTIVATIONS, 'swiglu')
}
