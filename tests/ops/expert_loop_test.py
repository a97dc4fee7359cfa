"""Whole layers: every router, both ways to run a plan, against loops and other people's code."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import dispatch, expert_loop, grouped_matmul, routing
from tests import shapes
from tests.ops import oracles

D, F = 4, 3
REFERENCE = pathlib.Path(__file__).parent.parent / 'reference'


@pytest.fixture
def x64():
  jax.config.update('jax_enable_x64', True)
  yield
  jax.config.update('jax_enable_x64', False)


def _relu(h, weight):
  return jax.nn.relu(h) * weight[..., None].astype(h.dtype)


def _swiglu(h, weight):
  gate, up = jnp.split(h, 2, axis=-1)
  return jax.nn.silu(gate) * up * weight[..., None].astype(h.dtype)


def _in_three_steps(activation, x_TD, plan, w, impl='auto'):
  if plan.packed:
    product = lambda x, w: grouped_matmul.grouped_matmul(x, w, plan.sizes_E, impl)
  else:
    product = lambda x, w: jnp.einsum('ECD,EDF->ECF', x, w)
  h = activation(product(dispatch.dispatch(x_TD, plan), w[0]), plan.weight)
  return dispatch.combine(product(h, w[1]), plan)


def _in_a_loop(activation, x_TD, plan, w):
  expert = expert_loop.Expert(
    inner=lambda x_CD, w: x_CD @ w[0], outer=lambda h, weight_C, w: activation(h, weight_C) @ w[1]
  )
  return expert_loop.map_experts(expert, x_TD, plan, w)


WAYS = {'three steps': _in_three_steps, 'loop': _in_a_loop}


def _layer(x_GTD, router_DE, w_in_EDF, w_out_EFD, *, route, way, activation=_relu):
  plan = route(routing.router_logits(x_GTD, router_DE))
  w = w_in_EDF, w_out_EFD
  y_TD = way(activation, x_GTD.reshape(-1, x_GTD.shape[-1]), plan, w)
  return y_TD.reshape(x_GTD.shape)


def _value_and_gradients(layer, args, dy):
  @jax.jit
  def run(args, dy):
    y, backward = jax.vjp(layer, *args)
    return y, *backward(dy)

  y, *gradients = run(args, dy)
  return y, dict(zip(('x', 'router', 'w_in', 'w_out'), gradients, strict=True))


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
  'k1 renormalized': _token_choice(1, renormalize=True),
  'k2': _token_choice(2),
  'k2 renormalized': _token_choice(2, renormalize=True),
  'k2 softmax after': _token_choice(2, softmax_after_top_k=True),
  'k3': _token_choice(3),
  'k3 sigmoid': _token_choice(3, scores='sigmoid', renormalize=True),
  'k2 tight': _token_choice(2, 3),
  'k3 tight, renormalized': _token_choice(3, 4, renormalize=True),
  'k3 one slot': _token_choice(3, 1),
  'k2 ample': _token_choice(2, 99),
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


KINDS = ('plain', 'padding', 'ties', 'all to one', 'an idle expert', 'many experts')


def _compare(route, oracle, inputs):
  *args, dy_GTD, _ = inputs
  y_GTD, gradients, kept, _ = oracles.moe(*args, dy_GTD, oracle)
  for name, way in WAYS.items():
    layer = functools.partial(_layer, route=route, way=way)
    got = _value_and_gradients(layer, args, dy_GTD)
    for what, a, b in [('y', got[0], y_GTD)] + [(n, got[1][n], gradients[n]) for n in gradients]:
      assert a.dtype == 'float64'
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10, err_msg=f'{what}, {name}')
  return kept


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', TOKEN_CHOICE)
def test_token_choice_is_the_loops(x64, name, kind):
  inputs, options = _inputs(kind), TOKEN_CHOICE[name]
  bias_E = None
  if options['scores'] == 'sigmoid':
    bias_E = np.linspace(-0.2, 0.2, inputs[1].shape[1])
  oracle = functools.partial(oracles.token_choice, valid_GT=inputs[-1], bias_E=bias_E, **options)
  for packed in (False, True) if options['capacity'] else (True,):
    route = functools.partial(
      routing.token_choice, valid_GT=inputs[-1], bias_E=bias_E, packed=packed, **options
    )
    _compare(route, oracle, inputs)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('softmax_over', ['experts', 'tokens'])
@pytest.mark.parametrize('capacity', [1, 3, 11])
def test_expert_choice_is_the_loops(x64, capacity, softmax_over, kind):
  inputs = _inputs(kind)
  options = dict(valid_GT=inputs[-1], softmax_over=softmax_over, capacity=capacity)
  route = functools.partial(routing.expert_choice, **options)
  _compare(route, functools.partial(oracles.expert_choice, **options), inputs)


@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS)
@pytest.mark.parametrize('packed', [False, True])
def test_more_choices_than_one_pass_combines(x64, packed, way):
  inputs = _inputs('many experts')
  *args, dy_GTD, valid_GT = inputs
  options = _token_choice(20, 6)
  oracle = functools.partial(oracles.token_choice, valid_GT=valid_GT, bias_E=None, **options)
  y_GTD, gradients, _, _ = oracles.moe(*args, dy_GTD, oracle)
  route = functools.partial(routing.token_choice, valid_GT=valid_GT, packed=packed, **options)
  got = _value_and_gradients(functools.partial(_layer, route=route, way=way), args, dy_GTD)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), got, (y_GTD, gradients)
  )


@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS)
@pytest.mark.parametrize('packed', [False, True])
def test_a_group_does_not_see_the_others(packed, way):
  *args, _, valid_GT = _inputs('plain')
  args = [jnp.asarray(a, jnp.float32) for a in args]
  route = functools.partial(routing.token_choice, k=2, capacity=3, packed=packed)
  run = lambda x, v: _layer(x, *args[1:], route=functools.partial(route, valid_GT=v), way=way)
  together = run(args[0], valid_GT)
  apart = [run(args[0][g : g + 1], valid_GT[g : g + 1]) for g in range(3)]
  np.testing.assert_allclose(together, np.concatenate(apart), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS)
def test_tokens_can_be_renamed_where_nobody_is_dropped(way):
  *args, _, valid_GT = _inputs('padding')
  x_GTD, *weights = (jnp.asarray(a, jnp.float32) for a in args)
  order = np.random.default_rng(3).permutation(x_GTD.shape[1])
  run = lambda x, v: _layer(
    x, *weights, route=lambda l: routing.token_choice(l, 2, None, valid_GT=v), way=way
  )
  permuted = run(x_GTD[:, order], valid_GT[:, order])
  np.testing.assert_allclose(permuted, run(x_GTD, valid_GT)[:, order], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS)
def test_bfloat16_in_and_out(way):
  *args, dy_GTD, valid_GT = _inputs('plain')
  args = [jnp.asarray(a, jnp.bfloat16) for a in args]
  for route in (
    functools.partial(routing.token_choice, k=2, capacity=3, valid_GT=valid_GT),
    functools.partial(routing.token_choice, k=2, capacity=None, valid_GT=valid_GT),
    functools.partial(routing.expert_choice, capacity=3, valid_GT=valid_GT),
  ):
    layer = functools.partial(_layer, route=route, way=way)
    got = _value_and_gradients(layer, args, jnp.asarray(dy_GTD, jnp.bfloat16))
    assert {a.dtype for a in jax.tree.leaves(got)} == {jnp.dtype('bfloat16')}
    wide = [a.astype(jnp.float32) for a in args]
    expected = _value_and_gradients(layer, wide, jnp.asarray(dy_GTD, jnp.float32))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
      assert np.abs(a.astype(jnp.float32) - b).max() < 0.05 * np.abs(b).max()


@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS)
def test_works_under_scan_and_remat(way):
  *args, _, valid_GT = _inputs('plain')
  x_GTD, *weights = (jnp.asarray(a, jnp.float32) for a in args)
  route = functools.partial(routing.token_choice, k=2, capacity=3, valid_GT=valid_GT, packed=True)
  layer = functools.partial(_layer, route=route, way=way)
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
  for options in (dict(packed=True), dict(packed=False)):
    route = functools.partial(routing.token_choice, k=2, capacity=3, valid_GT=valid_GT, **options)
    for way in WAYS.values():
      layer = functools.partial(_layer, route=route, way=way)
      with shapes.checked():
        jax.eval_shape(jax.grad(lambda x, layer=layer: layer(x, *args[1:]).sum()), args[0])
