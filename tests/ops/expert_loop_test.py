"""Whole layers: every router, every way to run a plan, against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import routing
from tests import shapes
from tests.ops import oracles, sparse_layer

D, F, E = 4, 3, 5
KINDS = ('plain', 'padding', 'ties', 'all to one', 'an idle expert')


def _token_choice(k, capacity=None, scores='softmax', renormalize=False):
  return dict(
    k=k,
    capacity=capacity,
    bias_E=np.linspace(-0.2, 0.2, E) if scores == 'sigmoid' else None,
    scores=scores,
    renormalize=renormalize,
  )


TOKEN_CHOICE = {  # and whether plans are ragged
  'k1': (_token_choice(1), True),
  'k1 tight': (_token_choice(1, 3), False),
  'k2 ample, renormalized': (_token_choice(2, 99, renormalize=True), False),
  'k2 one slot, renormalized': (_token_choice(2, 1, renormalize=True), False),
  'k2 ragged, renormalized': (_token_choice(2, 4, renormalize=True), True),
  'k3 sigmoid': (_token_choice(3, scores='sigmoid', renormalize=True), True),
  'k3 sigmoid, tight': (_token_choice(3, 3, scores='sigmoid'), False),
  'k3 sigmoid, tight, ragged': (_token_choice(3, 3, scores='sigmoid'), True),
}
EXPERT_CHOICE = {
  'one slot': dict(capacity=1, softmax_over='tokens'),
  'some': dict(capacity=4, softmax_over='experts'),
}


@functools.cache  # compiled functions know a router by its identity
def _route(name, k=None, ragged=None):
  """The router of that name; or k choices for at most 6 tokens per expert."""
  if name in EXPERT_CHOICE:
    return functools.partial(routing.expert_choice, **EXPERT_CHOICE[name])
  options, ragged = TOKEN_CHOICE[name] if name else (_token_choice(k, 6), ragged)
  return functools.partial(routing.token_choice, ragged=ragged, **options)


def _inputs(kind):
  """x_GTD, router_DE, w_in_EDF, w_out_EFD, dy_GTD, valid_GT in float64."""
  num_experts, G, T = (40, 1, 11) if kind == 'many experts' else (E, 3, 11)
  rng = np.random.default_rng(0)
  experts = (num_experts, D, F), (num_experts, F, D)
  sizes = ((G, T, D), (D, num_experts), *experts, (G, T, D))
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


def _compare(route, oracle, inputs, **ways):
  *args, dy_GTD, valid_GT = inputs
  y_GTD, gradients, _, _ = oracles.moe(*args, dy_GTD, oracle)
  results = sparse_layer.value_and_gradients(args, dy_GTD, valid_GT, route=route, **ways)
  for way, got in results.items():
    for what, a, b in zip(('y', *gradients), got, (y_GTD, *gradients.values()), strict=True):
      assert a.dtype == 'float64'
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10, err_msg=f'{what}, {way}')


def _compare_token_choice(name, kind, **ways):
  inputs = _inputs(kind)
  oracle = functools.partial(oracles.token_choice, valid_GT=inputs[-1], **TOKEN_CHOICE[name][0])
  _compare(_route(name), oracle, inputs, **ways)


@pytest.mark.parametrize('name', TOKEN_CHOICE)
@pytest.mark.parametrize('kind', KINDS)
def test_token_choice_is_the_loops(x64, kind, name):
  _compare_token_choice(name, kind)


@pytest.mark.parametrize('kind', KINDS)
def test_another_backend_is_the_loops(x64, kind):
  """What is behind a grouped product does not depend on the router: one of them is enough."""
  _compare_token_choice('k3 sigmoid, tight, ragged', kind, ways=('ragged_dot',))


@pytest.mark.parametrize('name', EXPERT_CHOICE)
@pytest.mark.parametrize('kind', KINDS)
def test_expert_choice_is_the_loops(x64, kind, name):
  inputs = _inputs(kind)
  oracle = functools.partial(oracles.expert_choice, valid_GT=inputs[-1], **EXPERT_CHOICE[name])
  _compare(_route(name), oracle, inputs)


@pytest.mark.parametrize('ragged', [False, True])
def test_many_experts_for_few_tokens(x64, ragged):
  """More experts than tokens, and more choices than `combine` adds in one pass."""
  inputs = _inputs('many experts')
  oracle = functools.partial(oracles.token_choice, valid_GT=inputs[-1], **_token_choice(20, 6))
  _compare(_route(None, 20, ragged), oracle, inputs)


@pytest.mark.parametrize('name', ['k3 sigmoid, tight', 'k3 sigmoid, tight, ragged', 'k1'])
def test_a_group_does_not_see_the_others(x64, name):
  x_GTD, *args, dy_GTD, valid_GT = _inputs('plain')
  other_GTD = x_GTD.copy()
  other_GTD[1:] += 1
  run = lambda x_GTD: sparse_layer.value_and_gradients(
    (x_GTD, *args), dy_GTD, valid_GT, route=_route(name)
  )
  before, after = run(x_GTD), run(other_GTD)
  for way in before:
    np.testing.assert_allclose(after[way][0][0], before[way][0][0], rtol=1e-12)


def test_tokens_can_be_renamed_where_nobody_is_dropped(x64):
  x_GTD, *args, dy_GTD, valid_GT = _inputs('padding')
  order = np.random.default_rng(3).permutation(x_GTD.shape[1])
  run = lambda x_GTD, valid_GT: sparse_layer.value_and_gradients(
    (x_GTD, *args), dy_GTD, valid_GT, route=_route('k1')
  )
  straight, permuted = run(x_GTD, valid_GT), run(x_GTD[:, order], valid_GT[:, order])
  for way in straight:
    np.testing.assert_allclose(permuted[way][0], straight[way][0][:, order], rtol=1e-11, atol=1e-12)


def test_bfloat16_in_and_out(x64):
  *args, dy_GTD, valid_GT = (jnp.asarray(a) for a in _inputs('plain'))
  narrow = [a.astype(jnp.bfloat16) for a in (*args, dy_GTD)]
  run = lambda *args, dy: sparse_layer.value_and_gradients(args, dy, valid_GT, route=_route('k1'))
  got = run(*narrow[:-1], dy=narrow[-1])
  wide = [a.astype(jnp.float64) for a in narrow]
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(run(*wide[:-1], dy=wide[-1])), strict=True):
    assert a.dtype == jnp.bfloat16
    assert np.abs(a.astype(jnp.float64) - b).max() < 0.05 * np.abs(b).max()


def test_works_under_scan_and_remat():
  *args, _, valid_GT = _inputs('plain')
  x_GTD, *weights = (jnp.asarray(a, jnp.float32) for a in args)
  route = functools.partial(routing.token_choice, k=2, capacity=3, valid_GT=valid_GT, ragged=True)
  layer = functools.partial(sparse_layer.layer, route=route, way='loop')
  stacked = [jnp.stack([w, w * 0.5]) for w in weights]
  policy = jax.checkpoint_policies.save_only_these_names(routing.CHOICE)

  def loss(stacked, remat):
    body = lambda x, w: (x + layer(x, *w), None)
    body = jax.checkpoint(body, prevent_cse=False, policy=policy) if remat else body
    return jnp.sum(jax.lax.scan(body, x_GTD, stacked)[0] ** 2)

  plain, rematted = (jax.jit(jax.grad(loss), static_argnums=1)(stacked, r) for r in (False, True))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), plain, rematted)


@pytest.mark.parametrize('way', ['loop', 'tiled'])
@pytest.mark.parametrize('ragged', [False, True])
def test_names_are_true(ragged, way):
  *args, _, valid_GT = _inputs('plain')
  x_GTD, *weights = (jnp.asarray(a, jnp.float32) for a in args)
  route = functools.partial(routing.token_choice, k=2, capacity=4, valid_GT=valid_GT, ragged=ragged)
  layer = functools.partial(sparse_layer.layer, route=route, way=way)
  with shapes.checked():
    jax.eval_shape(jax.grad(lambda x: layer(x, *weights).sum()), x_GTD)
