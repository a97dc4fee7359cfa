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


def _token_choice(k, capacity=None, scores='softmax', softmax_after_top_k=False, renormalize=False):
  return dict(
    k=k,
    capacity=capacity,
    bias_E=np.linspace(-0.2, 0.2, E) if scores == 'sigmoid' else None,
    scores=scores,
    softmax_after_top_k=softmax_after_top_k,
    renormalize=renormalize,
  )


TOKEN_CHOICE = {
  'k1': _token_choice(1),
  'k1 tight': _token_choice(1, 3),
  'k2 ample, renormalized': _token_choice(2, 99, renormalize=True),
  'k2 one slot, softmax after': _token_choice(2, 1, softmax_after_top_k=True),
  'k3 sigmoid': _token_choice(3, scores='sigmoid', renormalize=True),
  'k3 sigmoid, tight': _token_choice(3, 3, scores='sigmoid'),
}
EXPERT_CHOICE = {
  'one slot': dict(capacity=1, softmax_over='tokens'),
  'some': dict(capacity=3, softmax_over='experts'),
  'all tokens': dict(capacity=11, softmax_over='tokens'),
}


@functools.cache
def _routes(router, name):
  """[(plans are packed, function that makes one)], the same objects in every call."""
  if router == 'expert choice':
    return [(False, functools.partial(routing.expert_choice, **EXPERT_CHOICE[name]))]
  options = TOKEN_CHOICE[name] if name in TOKEN_CHOICE else _token_choice(20, 6)
  layouts = (False, True) if options['capacity'] else (True,)
  return [(p, functools.partial(routing.token_choice, packed=p, **options)) for p in layouts]


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


def _compare(routes, oracle, inputs, ways=('loop', 'blocked')):
  *args, dy_GTD, valid_GT = inputs
  y_GTD, gradients, _, _ = oracles.moe(*args, dy_GTD, oracle)
  for packed, route in routes:
    for way in ways:
      got = sparse_layer.value_and_gradients(args, dy_GTD, valid_GT, route=route, way=way)
      for what, a, b in zip(('y', *gradients), got, (y_GTD, *gradients.values()), strict=True):
        assert a.dtype == 'float64'
        message = f'{what}, {way}, {"packed" if packed else "slotted"}'
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10, err_msg=message)


@pytest.mark.parametrize('name', TOKEN_CHOICE)
@pytest.mark.parametrize('kind', KINDS)
def test_token_choice_is_the_loops(x64, kind, name):
  inputs = _inputs(kind)
  oracle = functools.partial(oracles.token_choice, valid_GT=inputs[-1], **TOKEN_CHOICE[name])
  _compare(_routes('token choice', name), oracle, inputs)


@pytest.mark.parametrize('name', EXPERT_CHOICE)
@pytest.mark.parametrize('kind', KINDS)
def test_expert_choice_is_the_loops(x64, kind, name):
  inputs = _inputs(kind)
  oracle = functools.partial(oracles.expert_choice, valid_GT=inputs[-1], **EXPERT_CHOICE[name])
  _compare(_routes('expert choice', name), oracle, inputs)


@pytest.mark.parametrize('kind', KINDS)
def test_other_backends_are_the_loops(x64, kind):
  """What is behind a grouped product does not depend on the router: one of them is enough."""
  inputs = _inputs(kind)
  oracle = functools.partial(
    oracles.token_choice, valid_GT=inputs[-1], **TOKEN_CHOICE['k3 sigmoid, tight']
  )
  _, packed = _routes('token choice', 'k3 sigmoid, tight')
  _compare([packed], oracle, inputs, ways=('ragged_dot', 'reference'))


def test_many_experts_for_few_tokens(x64):
  """More experts than tokens, and more choices than `combine` adds in one pass."""
  inputs = _inputs('many experts')
  oracle = functools.partial(oracles.token_choice, valid_GT=inputs[-1], **_token_choice(20, 6))
  _compare(_routes('token choice', 'k20'), oracle, inputs)


@pytest.mark.parametrize('way', ['loop', 'blocked'])
def test_a_group_does_not_see_the_others(x64, way):
  x_GTD, *args, dy_GTD, valid_GT = _inputs('plain')
  other_GTD = x_GTD.copy()
  other_GTD[1:] += 1
  for _, route in _routes('token choice', 'k3 sigmoid, tight'):
    run = lambda x_GTD, route=route: sparse_layer.value_and_gradients(
      (x_GTD, *args), dy_GTD, valid_GT, route=route, way=way
    )
    np.testing.assert_allclose(run(other_GTD)[0][0], run(x_GTD)[0][0], rtol=1e-12)


@pytest.mark.parametrize('way', ['loop', 'blocked'])
def test_tokens_can_be_renamed_where_nobody_is_dropped(x64, way):
  x_GTD, *args, dy_GTD, valid_GT = _inputs('padding')
  order = np.random.default_rng(3).permutation(x_GTD.shape[1])
  [(_, route)] = _routes('token choice', 'k1')
  run = lambda x_GTD, valid_GT: sparse_layer.value_and_gradients(
    (x_GTD, *args), dy_GTD, valid_GT, route=route, way=way
  )[0]
  permuted = run(x_GTD[:, order], valid_GT[:, order])
  np.testing.assert_allclose(permuted, run(x_GTD, valid_GT)[:, order], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize('way', ['loop', 'blocked'])
@pytest.mark.parametrize('name', ['k1', 'k1 tight'])
def test_bfloat16_in_and_out(name, way):
  *args, dy_GTD, valid_GT = _inputs('plain')
  _, route = _routes('token choice', name)[0]
  narrow = [jnp.asarray(a, jnp.bfloat16) for a in (*args, dy_GTD)]
  run = lambda *args, dy: sparse_layer.value_and_gradients(args, dy, valid_GT, route=route, way=way)
  got = run(*narrow[:-1], dy=narrow[-1])
  assert {a.dtype for a in got} == {jnp.dtype('bfloat16')}
  wide = [a.astype(jnp.float32) for a in narrow]
  for a, b in zip(got, run(*wide[:-1], dy=wide[-1]), strict=True):
    assert np.abs(a.astype(jnp.float32) - b).max() < 0.05 * np.abs(b).max()


@pytest.mark.parametrize('way', ['loop', 'blocked'])
def test_works_under_scan_and_remat(way):
  *args, _, valid_GT = _inputs('plain')
  x_GTD, *weights = (jnp.asarray(a, jnp.float32) for a in args)
  route = functools.partial(routing.token_choice, k=2, capacity=3, valid_GT=valid_GT, packed=True)
  layer = functools.partial(sparse_layer.layer, route=route, way=way)
  stacked = [jnp.stack([w, w * 0.5]) for w in weights]
  policy = jax.checkpoint_policies.save_only_these_names(routing.CHOICE)

  def loss(stacked, remat):
    body = lambda x, w: (x + layer(x, *w), None)
    body = jax.checkpoint(body, prevent_cse=False, policy=policy) if remat else body
    return jnp.sum(jax.lax.scan(body, x_GTD, stacked)[0] ** 2)

  plain, rematted = (jax.jit(jax.grad(loss), static_argnums=1)(stacked, r) for r in (False, True))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), plain, rematted)


@pytest.mark.parametrize('way', ['loop', 'blocked'])
@pytest.mark.parametrize('packed', [False, True])
def test_names_are_true(packed, way):
  *args, _, valid_GT = _inputs('plain')
  route = functools.partial(routing.token_choice, k=2, capacity=4, valid_GT=valid_GT, packed=packed)
  layer = functools.partial(sparse_layer.layer, route=route, way=way)
  with shapes.checked():
    jax.eval_shape(jax.grad(lambda x: layer(x, *args[1:]).sum()), args[0])
