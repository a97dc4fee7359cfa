"""What sublayers share: initialisers, norms, and facts about the tokens."""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import parameters
from moejax.ops import rows
from moejax.sharding import platform


class TokenInfo(NamedTuple):
  """What a sublayer may know about the tokens of its activations.

  Shapes are [B, L] in a forward pass and [B] in one decoding step; int32, but for the last ones.
  """

  segments: jax.Array  # 1, 2, ... per packed document; 0 is padding
  positions: jax.Array  # position of the token in its document or sequence
  key: jax.Array | None = None  # for this sublayer's noise in this step; None: no noise
  # True: layers with experts also return, in `aux`, what they did with every token
  # (`experts.observation`).
  observed: bool | None = None
  # [B, L, E] or [B, E], float: of a router that several layers share, in place of their own.
  scores: jax.Array | None = None

  def for_part(self, index):
    """The same with another key, for one of several parts."""
    return self if self.key is None else self._replace(key=jax.random.fold_in(self.key, index))

  @classmethod
  def unpadded(cls, shape):
    """Of sequences [B, L, ...] that are one document each, at positions 0 to L - 1."""
    B, L, *_ = shape
    positions_L = jnp.arange(L, dtype=jnp.int32)
    return cls(jnp.ones((B, L), jnp.int32), jnp.broadcast_to(positions_L[None], (B, L)))


def unpadded(x_BLD, d_model):
  """The TokenInfo of a layer that is given none; raises ValueError if it cannot process x."""
  shape, dtype = jnp.shape(x_BLD), jnp.result_type(x_BLD)
  if len(shape) != 3 or shape[-1] != d_model or not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(
      f'x: expected a floating dtype, [sequences, positions, d_model = {d_model}]; got '
      f'{dtype.name}{list(shape)}.'
    )
  return TokenInfo.unpadded(shape)


Tokens = TokenInfo  # its name in version 0.1, which programs of users import


def join_aux(auxes):
  """Joins the `aux` of several sublayers: name -> list of their values, in order."""
  joined = {}
  for aux in auxes:
    for name, value in aux.items():
      joined.setdefault(name, []).extend(jax.tree.leaves(value))
  return joined


def last_token(x_BLD, tokens):
  """x_BD of the last token of every sequence, before its padding."""
  last_B = jnp.maximum(jnp.sum(tokens.segments > 0, axis=1) - 1, 0)
  return x_BLD[jnp.arange(x_BLD.shape[0]), last_B]


class Stateless(nnx.Module):
  """A sublayer without decoding state: it decodes by its forward pass."""

  def init_state(self, batch_size, max_length, dtype):
    del batch_size, max_length, dtype
    return {}

  def prefill(self, x_BLD, tokens):
    return self(x_BLD, tokens)[0], {}

  def step(self, x_BD, state, tokens):
    """The forward pass over one position of every sequence."""
    one_position = jax.tree.map(lambda a: a[:, None], tokens)
    return self.prefill(x_BD[:, None], one_position)[0][:, 0], state


def truncated_normal(key, shape, fan_in, scale, dtype=jnp.float32):
  """N(0, scale / fan_in) cut at +-2 * scale, an absolute bound.

  The initialisation of the papers' runs (`truncated_normal` in their code). For a large fan-in the
  bound is many standard deviations out; for an embedding (fan-in 1) it shapes the distribution.
  """
  std = (scale / fan_in) ** 0.5
  bound = 2 * scale / std
  return std * jax.random.truncated_normal(key, -bound, bound, shape, dtype)


def truncated_normal_fixed(key, shape, fan_in, scale, dtype=jnp.float32):
  """Standard deviation scale / sqrt(fan_in), cut at +-2 standard deviations."""
  return scale / fan_in**0.5 * jax.random.truncated_normal(key, -2, 2, shape, dtype)


def kaiming_uniform(key, shape, fan_in, scale, dtype=jnp.float32):
  """Uniform in +-scale * sqrt(3 / fan_in)."""
  bound = scale * (3 / fan_in) ** 0.5
  return jax.random.uniform(key, shape, dtype, -bound, bound)


INITIALIZERS = {
  'truncated_normal': truncated_normal,
  'truncated_normal_fixed': truncated_normal_fixed,
  'kaiming_uniform': kaiming_uniform,
}


class Initializer(NamedTuple):
  """Makes parameters; the model sets the distribution and its scale, the layer the fan-in.

  `name`: one of INITIALIZERS. `scale`: a factor, whose meaning they document. `dtype`: of the
  parameters.
  """

  name: str = 'truncated_normal'
  scale: float = 1.0
  dtype: Any = jnp.float32

  def __call__(self, rngs, *shape, fan_in):
    """A float array of `shape` as an `nnx.Param`."""
    init = INITIALIZERS[self.name]
    return nnx.Param(init(rngs.params(), shape, fan_in, self.scale, self.dtype))


def initializer(init) -> Any:
  """The argument `init` of a layer: an Initializer or its like, or a name or function of one.

  Raises:
    ValueError: it is none of these.
  """
  for name, function in INITIALIZERS.items():
    if init in (name, function):
      return Initializer(name)
  if not callable(init) or 'fan_in' not in inspect.signature(init).parameters:
    raise ValueError(
      f'init must be one of {", ".join(INITIALIZERS)}, or layers.Initializer(name, scale, dtype); '
      f'got {init!r}.'
    )
  return init


def layer_norm(x, scale_D, bias_D, eps=1e-5):
  """Layer norm of x [..., D], computed in the wider dtype of x and its parameters; returns x's."""
  wide = _wide(x, scale_D)
  normal = rms_norm(wide - wide.mean(-1, keepdims=True), scale_D, eps)
  return (normal + row(bias_D, wide)).astype(x.dtype)


def rms_norm(x, scale_D, eps=1e-5):
  """Root-mean-square norm of x [..., D], with dtypes as in `layer_norm`."""
  wide = _wide(x, scale_D)
  normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
  return (normal * row(scale_D, wide)).astype(x.dtype)


def _wide(x, scale_D):
  return x.astype(jnp.promote_types(x.dtype, scale_D.dtype))


def product(x, w, axes=1):
  """Sums over the last `axes` of x and the first of w, as one product of rows.

  With several leading axes, XLA's CPU backend is slow: whole steps took up to 1.7 times as long.
  """
  form = rows.product if platform.current() == 'cpu' else rows.reference
  y = form(x.reshape(-1, *x.shape[-axes:]), w)
  return y.reshape(*x.shape[:-axes], *w.shape[axes:])


def row(v, like):
  """v in the dtype of `like`, with the leading axes that strict rank promotion requires."""
  return v.astype(like.dtype).reshape((1,) * (like.ndim - v.ndim) + v.shape)


parameters.declare('scale bias', decays=False)


class LayerNorm(nnx.Module):
  """`layer_norm` with learned scale and bias."""

  def __init__(self, d_model, dtype, eps=1e-5):
    self.scale = nnx.Param(jnp.ones(d_model, dtype))
    self.bias = nnx.Param(jnp.zeros(d_model, dtype))
    self.eps = eps

  def __call__(self, x):
    return layer_norm(x, self.scale[...], self.bias[...], self.eps)


class RMSNorm(nnx.Module):
  """`rms_norm` with a learned scale."""

  def __init__(self, d_model, dtype, eps=1e-5):
    self.scale = nnx.Param(jnp.ones(d_model, dtype))
    self.eps = eps

  def __call__(self, x):
    return rms_norm(x, self.scale[...], self.eps)


NORMS = {'layer_norm': LayerNorm, 'rms_norm': RMSNorm}

ACTIVATIONS = {
  'relu': jax.nn.relu,
  'relu2': lambda x: jnp.square(jax.nn.relu(x)),  # arXiv:2109.08668
  'gelu': functools.partial(jax.nn.gelu, approximate=True),
}
