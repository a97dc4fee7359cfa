"""Dense feed-forward layers: the baseline that sparse and mixing layers are measured against."""

import jax
import jax.numpy as jnp

from moejax.layers import common


class MLP(common.Stateless):
  """y = act(x W_in) W_out without biases; the width F is d_ff.

  Input and output x_BLD, any float dtype. Looks at one token at a time. `aux` is empty.
  `swiglu` (arXiv:2002.05202) gates with a third matrix at width 2/3 d_ff, rounded to a multiple
  of 8, so that parameters and FLOPs stay those of the two-matrix form.
  """

  def __init__(self, *, d_model, d_ff, activation, init, rngs):
    self.activation = activation
    width = gated_width(d_ff) if activation == 'swiglu' else d_ff
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


def gated_width(d_ff):
  """Width of a gated layer with the parameters of a plain one of width `d_ff`."""
  return max(8, round(d_ff * 2 / 3 / 8) * 8)
