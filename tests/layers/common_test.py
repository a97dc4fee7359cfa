"""Norms against NumPy; initial values: spread and bounds."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.layers import common

D = 16
SHAPES = [(3, D), (3, 7, D)]


def _normed(name, x, scale, bias, eps):
  """In float64: the definition of both norms."""
  x, scale, bias = (np.asarray(a, 'float64') for a in (x, scale, bias))
  if name == 'rms_norm':
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def _norm(name):
  """A norm with random scale and bias."""
  norm = common.NORMS[name](D, jnp.float32)
  scale, bias = jax.random.normal(jax.random.key(0), (2, D))
  norm.scale = nnx.Param(scale)
  if name == 'layer_norm':
    norm.bias = nnx.Param(bias)
  return norm, scale, bias


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('name', common.NORMS)
def test_norms_are_their_definition(name, shape):
  norm, scale, bias = _norm(name)
  x = 3 + 2 * jax.random.normal(jax.random.key(1), shape)
  expected = _normed(name, x, scale, bias, eps=1e-5)
  np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', common.NORMS)
def test_epsilon_bounds_what_small_activations_become(name):
  norm, scale, bias = _norm(name)
  x = 1e-3 * jax.random.normal(jax.random.key(1), SHAPES[0])
  expected = _normed(name, x, scale, bias, eps=1e-5)
  np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-5)
  assert np.isfinite(jax.jacobian(norm)(jnp.zeros(D))).all()


@pytest.mark.parametrize('name', common.NORMS)
def test_statistics_of_bfloat16_activations_are_float32(name):
  norm, scale, bias = _norm(name)
  x = (100 + jax.random.normal(jax.random.key(1), SHAPES[1])).astype('bfloat16')
  y = norm(x)
  assert y.dtype == jnp.bfloat16
  expected = _normed(name, np.asarray(x, 'float64'), scale, bias, eps=1e-5)
  np.testing.assert_allclose(np.asarray(y, 'float64'), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('name', common.NORMS)
def test_a_fresh_norm_has_unit_scale_and_no_bias(name):
  params = nnx.to_pure_dict(nnx.state(common.NORMS[name](D, jnp.bfloat16), nnx.Param))
  expected = {'scale': 1.0} if name == 'rms_norm' else {'scale': 1.0, 'bias': 0.0}
  assert params.keys() == expected.keys()
  for key, value in expected.items():
    assert params[key].dtype == jnp.bfloat16 and np.array_equal(params[key], np.full(D, value))


def _truncated_std(bound):
  """Standard deviation of a standard normal variable cut at +-bound."""
  density = math.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi)
  return math.sqrt(1 - 2 * bound * density / math.erf(bound / math.sqrt(2)))


@pytest.mark.parametrize(
  ('name', 'fan_in', 'scale', 'std', 'bound'),
  [
    # Wide, the bound hardly cuts. An embedding, nearly uniform.
    ('truncated_normal', 512, 0.1, math.sqrt(0.1 / 512), 0.2),
    ('truncated_normal', 1, 0.1, math.sqrt(0.1) * _truncated_std(0.2 / math.sqrt(0.1)), 0.2),
    ('truncated_normal', 16, 1.0, 0.25, 2.0),
    ('truncated_normal_fixed', 512, 0.5, 0.5 / math.sqrt(512) * _truncated_std(2), 1 / 512**0.5),
    ('truncated_normal_fixed', 1, 1.0, _truncated_std(2), 2.0),
    ('kaiming_uniform', 512, 1.0, 1 / math.sqrt(512), math.sqrt(3 / 512)),
    ('kaiming_uniform', 3, 0.5, 0.5 / math.sqrt(3), 0.5),
  ],
)
def test_spread_and_bounds_of_initial_values(key, name, fan_in, scale, std, bound):
  x = np.asarray(common.INITIALIZERS[name](key, (300, 700), fan_in, scale), 'float64')
  assert abs(x.mean()) < 0.01 * std
  assert x.std() == pytest.approx(std, rel=0.01)
  assert np.abs(x).max() <= bound * (1 + 1e-6)
  assert np.abs(x).max() > min(4 * std, 0.99 * bound)


def test_initializer_draws_anew_for_every_parameter():
  rngs = nnx.Rngs(0)
  init = common.Initializer('truncated_normal', 0.1, jnp.dtype('bfloat16'))
  first, second = init(rngs, 3, 7, fan_in=3), init(rngs, 3, 7, fan_in=3)
  assert isinstance(first, nnx.Param)
  assert first[...].shape == (3, 7) and first[...].dtype == jnp.bfloat16
  assert not np.array_equal(first[...], second[...])


def test_the_square_of_relu():
  x = jnp.array([-2.0, 0.0, 3.0])
  np.testing.assert_array_equal(common.ACTIVATIONS['relu2'](x), [0, 0, 9])
  np.testing.assert_array_equal(jax.vmap(jax.grad(common.ACTIVATIONS['relu2']))(x), [0, 0, 6])
