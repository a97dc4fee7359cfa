"""Blocks: sublayers in sequence, a pre-norm residual around each."""

import jax.numpy as jnp
from flax import nnx

from moejax.layers import common


class Residual(nnx.Module):
  """x + scale * sublayer(norm(x)); x keeps its dtype, the sublayer computes in the model's."""

  def __init__(self, layer, norm, dtype, scale):
    self.dtype = dtype
    self.scale = scale
    self.norm = norm
    self.layer = layer

  def __call__(self, x_BLD, tokens):
    y_BLD, aux = self.layer(self._normalize(x_BLD), tokens)
    return self._add(x_BLD, y_BLD), aux

  def prefill(self, x_BLD, tokens):
    y_BLD, state = self.layer.prefill(self._normalize(x_BLD), tokens)
    return self._add(x_BLD, y_BLD), state

  def step(self, x_BD, state, tokens):
    y_BD, state = self.layer.step(self._normalize(x_BD), state, tokens)
    return self._add(x_BD, y_BD), state

  def _normalize(self, x):
    return self.norm(x).astype(self.dtype)

  def _add(self, x, y):
    return x + (y if self.scale == 1 else self.scale * y)


class Block(nnx.Module):
  """One repeat of a pattern of sublayers; `make_layer(name)` and `make_norm()` make its parts."""

  def __init__(self, pattern, make_layer, make_norm, dtype, scale=1.0):
    self.names = tuple(f'{i}_{sublayer}' for i, sublayer in enumerate(pattern))
    for name, sublayer in zip(self.names, pattern, strict=True):
      setattr(self, name, Residual(make_layer(sublayer), make_norm(), dtype, scale))

  def __call__(self, x_BLD, tokens):
    auxes = []
    for i, name in enumerate(self.names):
      x_BLD, aux = getattr(self, name)(x_BLD, tokens.for_part(i))
      auxes.append(aux)
    joined = common.join_aux(auxes)
    return x_BLD, {measured: jnp.stack(values) for measured, values in joined.items()}

  def init_state(self, batch_size, max_length, dtype):
    layers = {name: getattr(self, name).layer for name in self.names}
    return {name: f.init_state(batch_size, max_length, dtype) for name, f in layers.items()}

  def prefill(self, x_BLD, tokens):
    state = {}
    for name in self.names:
      x_BLD, state[name] = getattr(self, name).prefill(x_BLD, tokens)
    return x_BLD, state

  def step(self, x_BD, state, tokens):
    new_state = {}
    for name in self.names:
      x_BD, new_state[name] = getattr(self, name).step(x_BD, state[name], tokens)
    return x_BD, new_state
