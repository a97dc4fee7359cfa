"""Default vectors: the formula and its gradients, what moves them, and what a token may see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.layers import common, moe
from moejax.optimizer import OptimizerConfig, make_optimizer
from tests.ops import oracles

B, L, D, F, D_OUT, E, K = 4, 3, 6, 8, 5, 4, 2


def _config(**changes):
  sizes = {'expansion_rate': E // K, 'granularity': K, 'group_size': 2}
  return moe.MoEConfig(**{**sizes, 'router': 'default_vectors', **changes})


@functools.cache
def _layer(capacity_factor):
  make = lambda: moe.MixtureOfExperts(
    _config(capacity_factor=capacity_factor), d_model=D, d_out=D_OUT, d_ff=F * K, rngs=nnx.Rngs(0)
  )
  graph, params = nnx.split(nnx.eval_shape(make))
  rng = np.random.default_rng(1)
  return graph, jax.tree.map(lambda p: rng.standard_normal(p.shape), nnx.to_pure_dict(params))


def _apply(graph, params, x_BLD, tokens, call=moe.MixtureOfExperts.__call__):
  return call(nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params))), x_BLD, tokens)


def _inputs():
  rng = np.random.default_rng(0)
  x_BLD, dy_BLD = rng.standard_normal((B, L, D)), rng.standard_normal((B, L, D_OUT))
  tokens = common.TokenInfo.unpadded(x_BLD.shape)
  return x_BLD, dy_BLD, tokens._replace(segments=tokens.segments.at[1, 2:].set(0))


@pytest.mark.parametrize('capacity_factor', [0.0, 0.7])
def test_is_the_formula(x64, capacity_factor):
  graph, params = _layer(capacity_factor)
  x_BLD, dy_BLD, tokens = _inputs()
  forward = lambda params, x: _apply(graph, params, x, tokens)[0]
  with_gradients = jax.jit(
    lambda *args: (lambda y, vjp: (y, *vjp(dy_BLD)))(*jax.vjp(forward, *args))
  )
  y_BLD, dparams, dx_BLD = with_gradients(params, x_BLD)

  groups = lambda a: np.swapaxes(np.asarray(a).reshape(B // 2, 2, L, -1), 1, 2).reshape(
    2, 2 * L, -1
  )
  x_GTD, dy_GTD, valid_GT = groups(x_BLD), groups(dy_BLD), groups(tokens.segments > 0)[..., 0]
  router_DE, default_ED = params['router'], params['default_output']
  w_in_EDF, w_out_EFD = params['experts']['w_in'], params['experts']['w_out']
  capacity = _config(capacity_factor=capacity_factor).capacity(2 * L)
  options = dict(k=K, bias_E=None, scores='softmax', renormalize=False)
  route = functools.partial(oracles.token_choice, capacity=capacity, valid_GT=valid_GT, **options)
  y_GTD, expected, kept, number = oracles.moe(x_GTD, router_DE, w_in_EDF, w_out_EFD, dy_GTD, route)
  assert (len(kept) < number) == (capacity_factor > 0)
  missing_GTE, outputs = np.tile(valid_GT[..., None], E).astype(float), [[] for _ in range(E)]
  for g, _, t, e, _ in kept:
    missing_GTE[g, t, e] = 0
    outputs[e].append(np.maximum(x_GTD[g, t] @ w_in_EDF[e], 0) @ w_out_EFD[e])
  p_GTE = oracles.softmax(x_GTD @ router_DE, 2)
  dlogits_GTE = oracles.softmax_gradient(p_GTE, missing_GTE * (dy_GTD @ default_ED.T), 2)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10)
  close(groups(y_BLD), y_GTD + (p_GTE * missing_GTE) @ default_ED)
  close(groups(dx_BLD), expected['x'] + dlogits_GTE @ router_DE.T)
  close(dparams['router'], expected['router'] + np.einsum('gtd,gte->de', x_GTD, dlogits_GTE))
  for name in ('w_in', 'w_out'):
    close(dparams['experts'][name], expected[name])
  mean_ED = np.stack([np.mean(rows, axis=0) for rows in outputs])
  close(dparams['default_output'], default_ED - mean_ED)


def test_default_vectors_are_means_that_decay():
  optimizer = make_optimizer(OptimizerConfig(accumulation=2), 10)
  params = {'default_output': jnp.float32([[1.0, 2.0], [3.0, 4.0]])}
  means = [np.float32([[5, 5], [3, 4]]), np.float32([[7, 1], [3, 4]])]  # of two microbatches
  gradients = {'default_output': sum(params['default_output'] - mean for mean in means)}
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  moved = params['default_output'] + updates['default_output']
  np.testing.assert_allclose(moved, [[0.9 + 0.6, 1.8 + 0.3], [3, 4]], rtol=1e-6)


@jax.jit
def _forward(params, x_BLD, tokens):
  apply = functools.partial(_apply, _layer(0.0)[0], params)
  prefilled, _ = apply(x_BLD, tokens, moe.MixtureOfExperts.prefill)
  last = jax.tree.map(lambda a: a[:, -1], tokens)
  stepped = apply(x_BLD[:, -1], last, lambda layer, x, at: layer.step(x, {}, at)[0])
  return apply(x_BLD, tokens)[0], prefilled, stepped


def test_decoding_is_the_forward_pass_and_no_token_sees_another():
  (_, params), (x_BLD, _, tokens) = _layer(0.0), _inputs()
  y_BLD, prefilled, stepped = _forward(params, x_BLD, tokens)
  np.testing.assert_allclose(prefilled, y_BLD, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(stepped, y_BLD[:, -1], rtol=1e-5, atol=1e-5)
  assert not np.any(y_BLD[1, 2])  # padding
  x_BLD[2, 1] *= -3
  changed = np.any(_forward(params, x_BLD, tokens)[0] != y_BLD, axis=-1)
  assert np.argwhere(changed).tolist() == [[2, 1]]
