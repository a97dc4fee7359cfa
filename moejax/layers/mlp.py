"""Dense feed-forward layers: the baseline that sparse and mixing layers are measured against."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax import parameters
from moejax.layers import common
from moejax.layers.sublayer import Cost, Sublayer
from moejax.sharding.mesh import SHARD_AXES

parameters.declare('w_in w_gate', P(SHARD_AXES, 'tensor'))
parameters.declare('w_out', P('tensor', SHARD_AXES))


class MLP(common.Stateless):
  """y = act(x W_in) W_out without biases; the width F is d_ff.

  Input and output x_BLD, any float dtype. Looks at one token at a time. `aux` is empty.
  `swiglu` (arXiv:2002.05202) gates with a third matrix at width 2/3 d_ff, rounded to a multiple
  of 8, so that parameters and FLOPs stay those of the two-matrix form.
  """

  def __init__(self, *, d_model, d_ff, activation, init, rngs):
    self.activation = activation
    width = hidden_width(d_ff, activation)
    self.w_in = init(rngs, d_model, width, fan_in=d_model)
    self.w_out = init(rngs, width, d_model, fan_in=width)
    if activation == 'swiglu':
      self.w_gate = init(rngs, d_model, width, fan_in=d_model)

  def __call__(self, x_BLD, tokens):
    del tokens
    h_BLF = jnp.einsum('BLD,DF->BLF', x_BLD, self.w_in[...].astype(x_BLD.dtype))
    if self.activation == 'swiglu':
      gate_BLF = jnp.einsum('BLD,DF->BLF', x_BLD, self.w_gate[...].astype(x_BLD.dtype))
      h_BLF = jax.nn.silu(gate_BLF) * h_BLF
    else:
      h_BLF = common.ACTIVATIONS[self.activation](h_BLF)
    return jnp.einsum('BLF,FD->BLD', h_BLF, self.w_out[...].astype(x_BLD.dtype)), {}


class MLPSublayer(Sublayer):
  """`mlp` in `model.blocks`."""

  def make(self, init, rngs):
    c = self.config
    return MLP(d_model=c.d_model, d_ff=c.d_ff, activation=c.activation, init=init, rngs=rngs)

  @property
  def widths(self):
    width = hidden_width(self.config.d_ff, self.config.activation)
    return {'hidden units of a feed-forward (model.d_ff)': width}

  def cost(self, length):
    del length
    weights = num_weights(self.config.d_model, self.config.d_ff, self.config.activation)
    return Cost(params={'mlp': weights}, active=weights, model_flops={'mlp': 2 * weights})


def hidden_width(d_ff, activation):
  """Width of a layer that has, gated or not, the parameters of a plain one of width `d_ff`."""
  return max(8, round(d_ff * 2 / 3 / 8) * 8) if activation == 'swiglu' else d_ff


def num_weights(d_in, d_ff, activation, d_out=None):
  """Parameters of one feed-forward network, dense or expert."""
  matrices_in = 2 if activation == 'swiglu' else 1
  return hidden_width(d_ff, activation) * (matrices_in * d_in + (d_out or d_in))
