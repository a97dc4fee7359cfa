"""A bank of expert feed-forward networks: what every sparse or mixing layer routes to."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.layers import common
from moejax.layers.mlp import gated_width
from moejax.ops import dispatch, expert_loop, grouped_matmul


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
    gated = activation == 'swiglu'
    width = gated_width(expert_width) if gated else expert_width
    self.w_in = init(rngs, num_experts, d_model, width, fan_in=d_model)
    self.w_out = init(rngs, num_experts, width, d_out or d_model, fan_in=fan_in_out or width)
    if gated:
      self.w_gate = init(rngs, num_experts, d_model, width, fan_in=d_model)

  def __call__(self, x_ECD):
    """C rows for each expert: y_ECD in the dtype of x."""
    weights = self._weights(x_ECD.dtype)
    return _outer(self.activation, _inner(x_ECD, weights), None, weights)

  def route(self, x_TD, plan, impl='auto') -> jax.Array:
    """Every token through its experts: [T, d_out], outputs summed with the weights of the plan.

    `impl`: 'loop' goes expert by expert and is the fastest on a CPU; 'rows' moves all rows at once,
    for accelerators; 'auto' chooses by the default device.
    """
    weights = self._weights(x_TD.dtype)
    if loops(impl):
      return expert_loop.map_experts(_EXPERT[self.activation], x_TD, plan, weights)
    rows = dispatch.dispatch(x_TD, plan)
    product = jnp.matmul
    if plan.packed:
      product = functools.partial(_grouped, group_sizes_E=plan.sizes_E)
    h = _inner(rows, weights, product)
    return dispatch.combine(_outer(self.activation, h, plan.weight, weights, product), plan)

  def _weights(self, dtype):
    names = ('w_in', 'w_out', 'w_gate') if self.activation == 'swiglu' else ('w_in', 'w_out')
    return {name: getattr(self, name)[...].astype(dtype) for name in names}


def loops(impl):
  """Whether `Experts.route` goes expert by expert; packed plans are the faster ones then."""
  return impl == 'loop' or (impl == 'auto' and jax.default_backend() == 'cpu')


def _grouped(x_TD, w_EDF, group_sizes_E):
  return grouped_matmul.grouped_matmul(x_TD, w_EDF, group_sizes_E)


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


_EXPERT = {
  name: expert_loop.Expert(_inner, functools.partial(_outer, name))
  for name in (*common.ACTIVATIONS, 'swiglu')
}
