"""Whole layers: every router, every way to run a plan, against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import routing
from tests import shapes
from tests.ops import oracles, sparse_layer

D, F = 4, 3
WAYS = sparse_layer.WAYS


def _token_choice(k, capacity=None, scores='softmax', softmax_after_top_k=False, renormalize=False):
  return dict(
    k=k,
    capacity=capacity,
    scores=scores,
    softmax_after_top_k=softmax_after_top_k,
    renormalize=renormalize,
  )


TOKEN_CHOICE = {
  'k1': _token_choice(1),
  'k1 tight': _token_choice(1, 3),
  'k2 renormalized': _token_choice(2, renormalize=True),
  'k2 softmax after, tight': _token_choice(2, 3, softmax_after_top_k=True),
  'k2 ample': _token_choice(2, 99),
  'k2 one slot': _token_choice(2, 1, renormalize=True),
  'k3 sigmoid': _token_choice(3, scores='sigmoid', renormalize=True),
  'k3 sigmoid, tight': _token_choice(3, 3, scores='sigmoid'),
}


def _inputs(kind):
  """x_GTD, router_DE, w_in_EDF, w_out_EFD, dy_GTD, valid_GT in float64."""
  E, G, T = (40, 1, 11) if kind == 'many experts' else (5, 3, 11)
  rng = np.random.default_rng(0)
  sizes = ((G, T, D), (D, E), (E, D, F), (E, F, D), (G, T, D))
  x_GTD, router_DE, w_in_EDF, w_out_EFD, dy_GTD = (rng.standard_normal(s) for s in sizes)
  valid_GT = np.ones((G, T), bool)
  if kind == 'padding':
    valid_GT = rng.random((G, T)) < 0.6
    valid_GT[1] = False
  elif kind == 'ties':  # whole numbers: equal tokens, and experts 1 and 3 with equal scores
    x_GTD = rng.integers(-1, 2, x_GTD.shape).astype(float)
    x_GTD[:, 4:8] = x_GTD[:, :1]
    router_DE = rng.integers(-1, 2, router_DE.shape).astype(float)
    router_DE[:, 3] = router_DE[:, 1]
  elif kind == 'all to one':
    x_GTD[..., 0] = 1
    router_DE[0, 2] += 50
  elif kind == 'an idle expert':
    x_GTD[..., 0] = 1
    router_DE[0, 2] -= 50
  return x_GTD, router_DE, w_in_EDF, w_out_EFD, dy_GTD, valid_GT


def _compare(route, oracle, inputs, packed):
  *args, dy_GTD, _ = inputs
  y_GTD, gradients, _, _ = oracles.moe(*args, dy_GTD, oracle)
  for name, way in sparse_layer.ways_for(packed).items():
    layer = functools.partial(sparse_layer.layer, route=route, way=way)
    got = sparse_layer.value_and_gradients(layer, args, dy_GTD)
    for what, a, b in [('y', got[0], y_GTD)] + [(n, got[1][n], gradients[n]) for n in gradients]:
      assert a.dtype == 'float64'
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10, err_msg=f'{what}, {name}')


def _compare_token_choice(options, inputs):
  valid_GT, E = inputs[-1], inputs[1].shape[1]
  bias_E = np.linspace(-0.2, 0.2, E) if options['scores'] == 'sigmoid' else None
  options = dict(valid_GT=valid_GT, bias_E=bias_E, **options)
  oracle = functools.partial(oracles.token_choice, **options)
  for packed in (False, True) if options['capacity'] else (True,):
    route = functools.partial(routing.token_choice, packed=packed, **options)
    _compare(route, oracle, inputs, packed)


@pytest.mark.parametrize('kind', ['plain', 'padding', 'ties', 'all to one', 'an idle expert'])
@pytest.mark.parametrize('name', TOKEN_CHOICE)
def test_token_choice_is_the_loops(x64, name, kind):
  _compare_token_choice(TOKEN_CHOICE[name], _inputs(kind))


@pytest.mark.parametrize('k', [1, 20])
def test_many_experts_for_few_tokens(x64, k):
  """More experts than tokens, and more choices than `combine` does in one pass."""
  _compare_token_choice(_token_choice(k, 6), _inputs('many experts'))


@pytest.mark.parametrize('kind', ['plain', 'padding', 'ties', 'all to one', 'an idle expert'])
@pytest.mark.parametrize('softmax_over', ['experts', 'tokens'])
@pytest.mark.parametrize('capacity', [1, 3, 11])
def test_expert_choice_is_the_loops(x64, capacity, softmax_over, kind):
  inputs = _inputs(kind)
  options = dict(valid_GT=inputs[-1], softmax_over=softmax_over, capacity=capacity)
  route = functools.partial(routing.expert_choice, **options)
  _compare(route, functools.partial(oracles.expert_choice, **options), inputs, packed=False)


@pytest.mark.parametrize('packed', [False, True])
def test_a_group_does_not_see_the_others(x64, packed):
  *args, _, valid_GT = _inputs('plain')
  route = functools.partial(routing.token_choice, k=2, capacity=3, packed=packed)
  for way in sparse_layer.ways_for(packed).values():
    run = lambda x, v, way=way: sparse_layer.layer(
      x, *args[1:], route=functools.partial(route, valid_GT=v), way=way
    )
    together_GTD = run(args[0], valid_GT)
    other_GTD = args[0].copy()
    other_GTD[1:] += 1
    np.testing.assert_allclose(run(other_GTD, valid_GT)[0], together_GTD[0], rtol=1e-12)


@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS)
def test_tokens_can_be_renamed_where_nobody_is_dropped(x64, way):
  *args, _, valid_GT = _inputs('padding')
  x_GTD, *weights = args
  order = np.random.default_rng(3).permutation(x_GTD.shape[1])
  run = lambda x, v: sparse_layer.layer(
    x, *weights, route=lambda l: routing.token_choice(l, 2, None, valid_GT=v), way=way
  )
  permuted = run(x_GTD[:, order], valid_GT[:, order])
  np.testing.assert_allclose(permuted, run(x_GTD, valid_GT)[:, order], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize('way', ['loop', 'blocked'])
def test_bfloat16_in_and_out(way):
  *args, dy_GTD, valid_GT = _inputs('plain')
  args = [jnp.asarray(a, jnp.bfloat16) for a in args]
  for route in (
    functools.partial(routing.token_choice, k=2, capacity=3, valid_GT=valid_GT),
    functools.partial(routing.token_choice, k=2, capacity=None, valid_GT=valid_GT),
  ):
    layer = functools.partial(sparse_layer.layer, route=route, way=WAYS[way])
    got = sparse_layer.value_and_gradients(layer, args, jnp.asarray(dy_GTD, jnp.bfloat16))
    assert {a.dtype for a in jax.tree.leaves(got)} == {jnp.dtype('bfloat16')}
    wide = [a.astype(jnp.float32) for a in args]
    expected = sparse_layer.value_and_gradients(layer, wide, jnp.asarray(dy_GTD, jnp.float32))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
      assert np.abs(a.astype(jnp.float32) - b).max() < 0.05 * np.abs(b).max()


@pytest.mark.parametrize('way', ['loop', 'blocked'])
def test_works_under_scan_and_remat(way):
  *args, _, valid_GT = _inputs('plain')
  x_GTD, *weights = (jnp.asarray(a, jnp.float32) for a in args)
  route = functools.partial(routing.token_choice, k=2, capacity=3, valid_GT=valid_GT, packed=True)
  layer = functools.partial(sparse_layer.layer, route=route, way=WAYS[way])
  stacked = [jnp.stack([w, w * 0.5]) for w in weights]
  policy = jax.checkpoint_policies.save_only_these_names(routing.CHOICE)

  def loss(stacked, remat):
    body = lambda x, w: (x + layer(x, *w), None)
    body = jax.checkpoint(body, prevent_cse=False, policy=policy) if remat else body
    return jnp.sum(jax.lax.scan(body, x_GTD, stacked)[0] ** 2)

  plain, rematted = (jax.jit(jax.grad(loss), static_argnums=1)(stacked, r) for r in (False, True))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), plain, rematted)


def test_names_are_true():
  *args, _, valid_GT = _inputs('plain')
  for packed in (False, True):
    route = functools.partial(
      routing.token_choice, k=2, capacity=4, valid_GT=valid_GT, packed=packed
    )
    for way in sparse_layer.ways_for(packed).values():
      layer = functools.partial(sparse_layer.layer, route=route, way=way)
      with shapes.checked():
        jax.eval_shape(jax.grad(lambda x, layer=layer: layer(x, *args[1:]).sum()), args[0])
