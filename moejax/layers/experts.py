"""A bank of expert feed-forward networks: what every sparse or mixing layer routes to."""

import jax
import jax.numpy as jnp
from flax import nnx


class Experts(nnx.Module):
  """E independent bias-free ReLU networks of width F, applied to rows already sorted by expert.

  Input and output x_ECD: C rows for each of E experts, any float dtype.
  """

  def __init__(self, *, num_experts, d_model, expert_width, init, rngs):
    self.w_in = init(rngs, num_experts, d_model, expert_width, fan_in=d_model)
    self.w_out = init(rngs, num_experts, expert_width, d_model, fan_in=expert_width)

  def __call__(self, x_ECD):
    h_ECF = jax.nn.relu(jnp.einsum('ECD,EDF->ECF', x_ECD, self.w_in[...].astype(x_ECD.dtype)))
    return jnp.einsum('ECF,EFD->ECD', h_ECF, self.w_out[...].astype(x_ECD.dtype))
