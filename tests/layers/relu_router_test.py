"""ReLU routing: its penalty, what moves the coefficient, decoding, and what a token may see."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import parameters
from moejax.layers import common, moe
from moejax.optimizer import OptimizerConfig, make_optimizer

B, L, D, F, E, K = 4, 3, 6, 8, 4, 2


def _config(**changes):
  sizes = {'expansion_rate': E // K, 'granularity': K, 'group_size': 2, 'capacity_factor': 0.0}
  return moe.MoEConfig(**{**sizes, 'router': 'relu', **changes})


@functools.cache
def _layer():
  init = common.Initializer('kaiming_uniform')
  layer = moe.MixtureOfExperts(_config(), d_model=D, d_ff=F, init=init, rngs=nnx.Rngs(0))
  return nnx.split(layer)


def _inputs():
  x_BLD = np.random.default_rng(0).standard_normal((B, L, D)).astype('f')
  tokens = common.TokenInfo.unpadded(x_BLD.shape)
  return x_BLD, tokens._replace(segments=tokens.segments.at[1, 2:].set(0))


def test_the_penalty_is_the_formula(x64):
  rng = np.random.default_rng(1)
  logits_GTE, valid_GT = rng.standard_normal((2, 5, E)), rng.random((2, 5)) < 0.8
  config, coefficient = _config(), 0.3
  weights_TE = np.maximum(logits_GTE, 0)[valid_GT]
  counts_GE = ((logits_GTE > 0) & valid_GT[..., None]).sum(1)
  own = {'log_penalty': jnp.float32(math.log(coefficient))}
  loss = lambda logits, own: config.rule.loss(logits, counts_GE, valid_GT, config=config, own=own)
  ((value, aux), (d_logits_GTE, d_own)) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
    logits_GTE, own
  )
  share_E = E / (K * len(weights_TE)) * (weights_TE > 0).sum(0)
  l1 = (share_E * weights_TE).sum() / len(weights_TE)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
  close(value, coefficient * l1)
  close(aux['active'], (weights_TE > 0).sum() / len(weights_TE))
  positive_GTE = (logits_GTE > 0) & valid_GT[..., None]
  close(d_logits_GTE, coefficient * share_E * positive_GTE / len(weights_TE))
  assert d_own['log_penalty'] == K * len(weights_TE) - counts_GE.sum()


@pytest.mark.parametrize(
  'missing, factor', [((-9.0, 4.0), 1.2), ((9.0, -4.0), 1 / 1.2), ((4, -4), 1)]
)
def test_one_coefficient_follows_the_experts_of_all_layers(missing, factor):
  names = ('stack_0', 'stack_1')
  tree = lambda values: {
    name: {'log_penalty': jnp.float32([value])} for name, value in zip(names, values, strict=True)
  }
  optimizer = make_optimizer(OptimizerConfig(), 10)
  params = tree((-2.0, -2.0))
  updates, _ = optimizer.update(tree(missing), optimizer.init(params), params)
  for name in names:
    np.testing.assert_allclose(updates[name]['log_penalty'], [math.log(factor)], rtol=1e-6)
  assert parameters.of('stack_0/1_moe/layer/log_penalty').moved_by


@jax.jit
def _forward(x_BLD, tokens):
  layer = nnx.merge(*_layer())
  last = jax.tree.map(lambda a: a[:, -1], tokens)
  stepped, _ = layer.step(x_BLD[:, -1], {}, last)
  return layer(x_BLD, tokens)[0], layer.prefill(x_BLD, tokens)[0], stepped


def test_decoding_is_the_forward_pass_and_no_token_sees_another():
  x_BLD, tokens = _inputs()
  y_BLD, prefilled, stepped = _forward(x_BLD, tokens)
  assert np.abs(y_BLD[0]).max(axis=-1).all() and not np.any(y_BLD[1, 2])
  np.testing.assert_allclose(prefilled, y_BLD, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(stepped, y_BLD[:, -1], rtol=1e-6, atol=1e-6)
  changed, _, _ = _forward(x_BLD * np.where(np.arange(B) == 2, -3, 1)[:, None, None], tokens)
  changes_B = np.any(changed != y_BLD, axis=(1, 2))
  assert changes_B.tolist() == [False, False, True, False]
