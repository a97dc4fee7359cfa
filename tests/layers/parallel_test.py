"""Sublayers side by side: the sum of each by itself."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.layers import common, parallel

B, L, D = 2, 3, 4
TOKENS = common.TokenInfo(jnp.ones((B, L), int), jnp.tile(jnp.arange(L)[None], (B, 1)))


class _Scale(nnx.Module):
  """y = scale * x * (1 + noise); decoding counts its steps."""

  def __init__(self, scale):
    self.scale = scale

  def __call__(self, x_BLD, tokens):
    noise = 0.0 if tokens.key is None else jax.random.uniform(tokens.key)
    return self.scale * x_BLD * (1 + noise), {'scale': jnp.float32(self.scale)}

  def init_state(self, batch_size, max_length, dtype):
    return jnp.zeros(batch_size, dtype)

  def prefill(self, x_BLD, tokens):
    return self.scale * x_BLD, jnp.full(len(x_BLD), x_BLD.shape[1] * self.scale)

  def step(self, x_BD, state, tokens):
    return self.scale * x_BD, state + self.scale


def _layer():
  return parallel.Parallel({'0_f': _Scale(2.0), '1_g': _Scale(3.0)})


def _x():
  return jnp.asarray(np.random.default_rng(0).standard_normal((B, L, D)), jnp.float32)


def test_outputs_add_up_and_measurements_stay_apart():
  y_BLD, aux = _layer()(_x(), TOKENS)
  np.testing.assert_allclose(y_BLD, 5 * _x(), rtol=1e-6)
  assert aux == {'scale': [2, 3]}


def test_every_branch_has_its_own_noise():
  key = jax.random.key(0)
  y_BLD, _ = _layer()(_x(), TOKENS._replace(key=key))
  noise = [jax.random.uniform(jax.random.fold_in(key, i)) for i in (0, 1)]
  np.testing.assert_allclose(y_BLD, (5 + 2 * noise[0] + 3 * noise[1]) * _x(), rtol=1e-6)


def test_every_branch_has_its_own_state():
  layer = _layer()
  state = layer.init_state(B, L, jnp.float32)
  y_BD, state = layer.step(_x()[:, 0], state, jax.tree.map(lambda v: v[:, 0], TOKENS))
  np.testing.assert_allclose(y_BD, 5 * _x()[:, 0], rtol=1e-6)
  assert jax.tree.map(np.ndarray.tolist, jax.device_get(state)) == {'0_f': [2, 2], '1_g': [3, 3]}
  y_BLD, filled = layer.prefill(_x()[:, :1], TOKENS)
  np.testing.assert_array_equal(y_BLD[:, 0], y_BD)
  jax.tree.map(np.testing.assert_array_equal, filled, state)
