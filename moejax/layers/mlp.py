"""Dense feed-forward layers: the baseline that sparse and mixing layers are measured against."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moejax import parameters
from moejax.layers import common
from moejax.layers.sublayer import Cost, Sublayer
from moejax.sharding.mesh import SHARD_AXES

parameters.declare('w_in w_gate', P(SHARD_AXES, 'tensor'))
parameters.declare('w_out', P('tensor', SHARD_AXES))
parameters.declare('bias_in bias_out', decays=False)


class Matrices(nnx.Module):
  """Weights of a feed-forward network, or with a leading axis of `number`: w_in, w_out, w_gate.

  `d_out`: width of the output, that of the input if None. `fan_in_out`: the fan-in with which w_out
  is initialised, the hidden width if None.
  """

  def __init__(self, *number, d_model, d_ff, activation, init, rngs, d_out=None, fan_in_out=None):
    if activation not in (known := (*common.ACTIVATIONS, 'swiglu')):
      raise ValueError(f'activation must be one of {", ".join(known)}; got {activation!r}.')
    init = common.initializer(init)
    self.activation = activation
    width = hidden_width(d_ff, activation)
    self.w_in = init(rngs, *number, d_model, width, fan_in=d_model)
    self.w_out = init(rngs, *number, width, d_out or d_model, fan_in=fan_in_out or width)
    if activation == 'swiglu':
      self.w_gate = init(rngs, *number, d_model, width, fan_in=d_model)

  def weights(self, dtype):
    """The matrices by name, as `up` and `down` take them."""
    names = ('w_in', 'w_out', 'w_gate') if self.activation == 'swiglu' else ('w_in', 'w_out')
    return {name: getattr(self, name)[...].astype(dtype) for name in names}


def up(x, weights, product=jnp.matmul):
  """Everything before the nonlinearity, of one network or of many: products of x by name."""
  return {name: product(x, w) for name, w in weights.items() if name != 'w_out'}


def down(activation, h, weight, weights, product=jnp.matmul):
  """The nonlinearity and the product after it; `weight`, unless None, scales the output.

  It multiplies hidden activations, which are narrower than a token where experts are fine-grained.
  """
  if activation == 'swiglu':
    hidden = jax.nn.silu(h['w_gate']) * h['w_in']
  else:
    hidden = common.ACTIVATIONS[activation](h['w_in'])
  if weight is not None:
    hidden = hidden * weight[..., None].astype(hidden.dtype)
  return product(hidden, weights['w_out'])


class MLP(Matrices, common.Stateless):
  """y = act(x W_in) W_out, with `biases` act(x W_in + b_in) W_out + b_out; the width F is d_ff.

  Input and output x_BLD, any float dtype. Looks at one token at a time. `aux` is empty.
  `swiglu` (arXiv:2002.05202) gates with a third matrix at width 2/3 d_ff, rounded to a multiple
  of 8, so that parameters and FLOPs stay those of the two-matrix form.
  """

  def __init__(
    self,
    *,
    d_model,
    d_ff=None,
    activation='relu',
    init='truncated_normal',
    rngs,
    biases=False,
  ):
    d_ff, init = d_ff or 4 * d_model, common.initializer(init)
    super().__init__(d_model=d_model, d_ff=d_ff, activation=activation, init=init, rngs=rngs)
    self.biases = biases
    if biases:
      self.bias_in = nnx.Param(jnp.zeros(hidden_width(d_ff, activation), init.dtype))
      self.bias_out = nnx.Param(jnp.zeros(d_model, init.dtype))

  def __call__(self, x_BLD, tokens=None):
    del tokens
    weights = self.weights(x_BLD.dtype)
    h = up(x_BLD, weights, common.product)
    # The gradient needs what the nonlinearity reads and computes: cheap to compute again, and of
    # the widest arrays of a block only one or two are kept.
    from_hidden = functools.partial(down, self.activation, product=common.product)
    from_hidden = jax.checkpoint(from_hidden, prevent_cse=False)
    if not self.biases:
      return from_hidden(h, None, weights), {}
    h['w_in'] += common.row(self.bias_in[...], h['w_in'])
    y_BLD = from_hidden(h, None, weights)
    return y_BLD + common.row(self.bias_out[...], y_BLD), {}


class MLPSublayer(Sublayer):
  """`mlp` in `model.blocks`."""

  def make(self, init, rngs):
    c = self.config
    sizes = dict(d_model=c.d_model, d_ff=c.d_ff, activation=c.activation, biases=c.biases)
    return MLP(**sizes, init=init, rngs=rngs)

  @property
  def widths(self):
    width = hidden_width(self.config.d_ff, self.config.activation)
    return {'hidden units of a feed-forward (model.d_ff)': width}

  def cost(self, length):
    del length
    c = self.config
    weights = num_weights(c.d_model, c.d_ff, c.activation)
    params = weights + (hidden_width(c.d_ff, c.activation) + c.d_model) * c.biases
    return Cost(params={'mlp': params}, active=params, model_flops={'mlp': 2 * weights})


def hidden_width(d_ff, activation):
  """Width of a layer that has, gated or not, the parameters of a plain one of width `d_ff`."""
  return max(8, round(d_ff * 2 / 3 / 8) * 8) if activation == 'swiglu' else d_ff


def num_weights(d_in, d_ff, activation, d_out=None):
  """Parameters of one feed-forward network, dense or expert."""
  matrices_in = 2 if activation == 'swiglu' else 1
  return hidden_width(d_ff, activation) * (matrices_in * d_in + (d_out or d_in))
