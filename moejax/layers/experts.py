"""A bank of expert feed-forward networks: what every sparse or mixing layer routes to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moejax import parameters
from moejax.layers import common, mlp
from moejax.ops import expert_loop, grouped_matmul
from moejax.sharding import exchange, platform, rules

# Name of the outputs of layers with experts, for `jax.checkpoint_policies.save_only_these_names`.
OUTPUT = 'experts_output'

# `fsdp` shards whole experts if there are enough, so that each is gathered in one piece.
parameters.declare(
  'experts/w_in experts/w_gate',
  P(('expert', 'fsdp'), None, 'tensor'),
  P('expert', 'fsdp', 'tensor'),
)
parameters.declare(
  'experts/w_out', P(('expert', 'fsdp'), 'tensor', None), P('expert', 'tensor', 'fsdp')
)


class Experts(mlp.Matrices):
  """E independent bias-free networks y = act(x W_in) W_out, as `layers.mlp.MLP`."""

  def __call__(self, x_ECD):
    """C rows for each expert: y_ECD in the dtype of x."""
    weights = self.weights(x_ECD.dtype)
    weights = {
      name: exchange.gather(weights[name], spec, ('fsdp',)) for name, spec in specs(weights).items()
    }
    return feed_forward(self.activation, x_ECD, None, weights)

  def products(self, x_ND, valid_N):
    """Inner products of the outputs of every two experts, summed over the same valid inputs."""
    number = self.w_in.shape[0]
    y_END = self(jnp.broadcast_to(x_ND[None], (number, *x_ND.shape)))
    y = jnp.where(valid_N[None, :, None], y_END, 0).astype(jnp.float32).reshape(number, -1)
    return jnp.matmul(y, y.T, precision=jax.lax.Precision.HIGHEST)


_COMPARED = 64  # inputs of a batch on which experts are compared


def observation(experts, logits_BLE, weights_BLE, x_ND, valid_N):
  """What a layer with experts did with every token, for its `aux`; float32.

  Args:
    experts: the `Experts`.
    logits_BLE: of the router or controller; their softmax is the scores.
    weights_BLE: what each expert's output is multiplied by for each token, or each token in the
      mixture of each expert; 0 where it does not get there.
    x_ND, valid_N: inputs of experts, a sample of which they are compared on.

  Returns:
    A dict of 'logits', 'weights', and 'products', `Experts.products` [E, E].
  """
  number = len(x_ND)
  some = np.random.default_rng(0).choice(number, min(number, _COMPARED), replace=False)
  some.sort()
  products = experts.products(x_ND[some], valid_N[some])
  seen = {'logits': logits_BLE, 'weights': weights_BLE, 'products': products}
  return {name: a.astype(jnp.float32) for name, a in seen.items()}


def specs(weights):
  """How the mesh shards each of the weights of all experts: {name: PartitionSpec}."""
  return {name: rules.spec(f'experts/{name}', w.shape) for name, w in weights.items()}


def in_a_loop(impl):
  """Whether experts run one by one, which is faster on a CPU, or all rows at once."""
  return impl == 'loop' or (impl == 'auto' and platform.current() == 'cpu')


def feed_forward(activation, rows, weight, weights, sizes_E=None):
  """Applies experts to their rows.

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
  return mlp.down(activation, mlp.up(rows, weights, product), weight, weights, product)


def _one_of(activation, x_CD, weight_C, weights, e):
  product = lambda x, w: grouped_matmul.one_product(x, w, e)
  return mlp.down(activation, mlp.up(x_CD, weights, product), weight_C, weights, product)


def _one(activation):
  """An expert for `expert_loop.map_experts`."""
  return expert_loop.Expert(
    functools.partial(mlp.up, product=common.product),
    functools.partial(mlp.down, activation, product=common.product),
    functools.partial(_one_of, activation),
  )


ONE = {name: _one(name) for name in (*common.ACTIVATIONS, 'swiglu')}
