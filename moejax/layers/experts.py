"""A bank of expert feed-forward networks: what every sparse or mixing layer routes to."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.layers import common
from moejax.layers.mlp import gated_width
from moejax.ops import (
  dispatch,
  expert_loop,
  expert_parallel,
  grouped_matmul,
)
from moejax.sharding import exchange, platform, rules

# Name of what layers with experts return, for `jax.checkpoint_policies.save_only_these_names`.
OUTPUT = 'experts_output'


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
    weights = {
      name: exchange.gather(w, _spec(name, w), (expert_parallel.FSDP_AXIS,))
      for name, w in weights.items()
    }
    return _rows(self.activation, x_ECD, None, weights)

  def route(self, make_plan, x_GTD, logits_GTE, valid_GT, impl='auto') -> expert_parallel.Routed:
    """Every token through its experts: [.., d_out], summed with the weights of the plan.

    `make_plan(logits_GTE, valid_GT, packed=...)` is the router. `impl`: 'loop' goes expert by
    expert and is the fastest on a CPU; 'rows' moves all rows at once, for accelerators; 'auto'
    chooses by the platform.
    """
    weights = self._weights(x_GTD.dtype)
    return expert_parallel.route_groups(
      make_plan,
      expert_parallel.Experts(
        route=functools.partial(_route, self.activation, impl),
        rows=functools.partial(_rows, self.activation),
      ),
      x_GTD,
      logits_GTE,
      valid_GT,
      weights,
      {name: _spec(name, w) for name, w in weights.items()},
      packed=loops(impl),
    )

  def _weights(self, dtype):
    names = ('w_in', 'w_out', 'w_gate') if self.activation == 'swiglu' else ('w_in', 'w_out')
    return {name: getattr(self, name)[...].astype(dtype) for name in names}


def _spec(name, w):
  return rules.spec(f'experts/{name}', w.shape)


def loops(impl):
  """Whether experts are run one by one; packed plans are the faster ones then."""
  return impl == 'loop' or (impl == 'auto' and platform.current() == 'cpu')


def _route(activation, impl, x_TD, plan, weights) -> jax.Array:
  """What the experts of a plan make of all tokens: y_TD."""
  if loops(impl):
    return expert_loop.map_experts(_EXPERT[activation], x_TD, plan, weights)
  product = jnp.matmul
  if plan.packed:
    product = functools.partial(_grouped, group_sizes_E=plan.sizes_E)
  rows = _rows(activation, dispatch.dispatch(x_TD, plan), plan.weight, weights, product)
  return dispatch.combine(rows, plan)


def _rows(activation, rows, weight, weights, product=jnp.matmul):
  return _outer(activation, _inner(rows, weights, product), weight, weights, product)


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
