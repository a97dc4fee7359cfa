"""Sparse layers of other programs reproduced: value, gradients, auxiliary losses."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.layers import common
from moejax.ops import routing
from tests.ops import sparse_layer

REFERENCE = pathlib.Path(__file__).parent.parent / 'reference'
TOLERANCE = {'float32': 2e-6, 'float64': 1e-10}


def _load(name):
  with np.load(REFERENCE / f'{name}.npz') as arrays:
    arrays = dict(arrays)
  config = json.loads(arrays.pop('config_json').tobytes())
  # Switch of transformers has one array per expert, and matrices are [out, in].
  for kind in 'wg':
    for part in ('wi', 'wo'):
      prefix = f'{kind}.experts.expert_'
      if f'{prefix}0.{part}.weight' in arrays:
        experts = [arrays[f'{prefix}{e}.{part}.weight'].T for e in range(config['experts'])]
        arrays[f'{kind}.{part}'] = np.stack(experts)
  return arrays, config


@functools.partial(jax.jit, static_argnums=0)
def _run(layer, args, dy):
  y, backward = jax.vjp(layer, *args)
  return y, *backward(dy)


def _run_losses(losses, x_GTD, router_DE):
  """{name: (value, gradient by x, gradient by the router)}."""

  @jax.jit
  def run(*args):
    return {name: jax.value_and_grad(loss, argnums=(0, 1))(*args) for name, loss in losses.items()}

  got = run(x_GTD, router_DE)
  return {name: (value, *gradients) for name, (value, gradients) in got.items()}


def _relative_error(got, expected):
  return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()


def _check(got, expected, dtype):
  assert {a.dtype for a in got} == {jnp.dtype(dtype)}
  errors = [_relative_error(a, b) for a, b in zip(got, expected, strict=True)]
  assert max(errors) < TOLERANCE[dtype], errors


def _losses(shape_GT, k):
  """The balance loss as other programs count it, and the z-loss, of x and the router."""
  valid_GT = np.ones(shape_GT, bool)

  def balance(x_GTD, router_DE):
    logits_GTE = routing.router_logits(x_GTD, router_DE)
    plan = routing.token_choice(logits_GTE, k, None, valid_GT=valid_GT)
    return k * routing.load_balancing_loss(logits_GTE, plan.counts_GE, valid_GT, k=k)

  z = lambda x_GTD, router_DE: routing.z_loss(routing.router_logits(x_GTD, router_DE), valid_GT)
  return {'load_balancing_loss': balance, 'z_loss': z}


def _mean_over_sequences(loss):
  by_sequence = jax.vmap(lambda x_TD, router_DE: loss(x_TD[None], router_DE), in_axes=(0, None))
  return lambda x_GTD, router_DE: by_sequence(x_GTD, router_DE).mean()


HUGGING_FACE = {
  # name: (router, w_in, w_out, are matrices [out, in], activation, options of token_choice)
  'hf_switch_e8_cap64_nodrops': (
    'router.classifier.weight',
    'wi',
    'wo',
    sparse_layer.relu,
    dict(capacity=64),
  ),
  'hf_mixtral_e4k1': (
    'gate.weight',
    'experts.gate_up_proj',
    'experts.down_proj',
    sparse_layer.swiglu,
    dict(capacity=None, renormalize=True),
  ),
  'hf_olmoe_e16k1': (
    'gate.weight',
    'experts.gate_up_proj',
    'experts.down_proj',
    sparse_layer.swiglu,
    dict(capacity=None),
  ),
}


@pytest.mark.parametrize('name', HUGGING_FACE)
def test_transformers(name):
  a, config = _load(name)
  router, w_in, w_out, activation, options = HUGGING_FACE[name]
  turn = (lambda w: w) if w_in == 'wi' else (lambda w: w.swapaxes(-1, -2))
  names = (router, w_in, w_out)
  weights = lambda kind: [
    f(a[f'{kind}.{n}']) for f, n in zip((np.transpose, turn, turn), names, strict=True)
  ]
  args = a['x'], *weights('w')
  valid_GT = np.ones(a['x'].shape[:2], bool)
  route = functools.partial(routing.token_choice, k=config['k'], valid_GT=valid_GT, **options)
  layer = functools.partial(sparse_layer.layer, route=route, way='loop', activation=activation)
  y, dx, drouter, *dw = _run(layer, args, a['dy'])
  g_router, *g_w = weights('g')
  if config['renormalise_topk']:  # a weight of 1: nothing but rounding reaches the router
    assert max(np.abs(drouter).max(), np.abs(g_router).max()) < 1e-6
  else:
    _check([drouter], [g_router], 'float32')
  _check([y, dx, *dw], [a['y'], a['dx'], *g_w], 'float32')


@pytest.mark.parametrize('name', HUGGING_FACE)
def test_transformers_losses(name):
  a, config = _load(name)
  router_DE = a[f'w.{HUGGING_FACE[name][0]}'].T
  if 'switch' in name:  # balances every sequence by itself
    losses = _losses((1, a['x'].shape[1]), config['k'])
    losses = {name: _mean_over_sequences(loss) for name, loss in losses.items()}
  else:
    losses = _losses(a['x'].shape[:2], config['k'])
  for name, got in _run_losses(losses, a['x'], router_DE).items():
    key = f'aux.{name}'
    _check(got, (a[key], a[f'{key}.dx'], a[f'{key}.drouter'].T), 'float32')


LLM_RANDOM = (
  'gating.gate',
  'expert_inner_function.lin1_weight',
  'expert_inner_function.lin2_weight',
)


@pytest.mark.parametrize(
  ('name', 'dtype', 'way'),
  [
    ('llm_random_tc_k1_nodrop', 'float64', 'loop'),
    ('llm_random_tc_k1_nodrop', 'float32', 'tiled'),
    ('llm_random_tc_k2_nodrop', 'float64', 'tiled'),
    ('llm_random_tc_k2_nodrop', 'float32', 'loop'),
  ],
)
def test_llm_random_token_choice(x64, name, dtype, way):
  a, config = _load(name)
  k = config['routing_top_k']
  x_GTD, dy_GTD, *weights = (
    jnp.asarray(a[n], dtype) for n in ('x', 'dy', *(f'w.{n}' for n in LLM_RANDOM))
  )
  route = functools.partial(
    routing.token_choice, k=k, capacity=None, valid_GT=np.ones(x_GTD.shape[:2], bool)
  )
  layer = functools.partial(sparse_layer.layer, route=route, way=way)
  expected = a['y'], a['dx'], *(a[f'g.{n}'] for n in LLM_RANDOM)
  _check(_run(layer, (x_GTD, *weights), dy_GTD), expected, dtype)


@pytest.mark.parametrize('name', ['llm_random_tc_k1_nodrop', 'llm_random_tc_k2_nodrop'])
def test_llm_random_load_balancing_loss(x64, name):
  a, config = _load(name)
  balance = _losses(a['x'].shape[:2], config['routing_top_k'])['load_balancing_loss']
  weighted = lambda *args: config['load_balancing_loss_weight'] * balance(*args)
  got = _run_losses({'balance': weighted}, a['x'], a['w.gating.gate'])['balance']
  key = 'aux.load_balancing_loss'
  _check(got, (a[key], a[f'{key}.dx'], a[f'{key}.g.gating.gate']), 'float64')


@pytest.mark.parametrize(
  ('name', 'dtype', 'way'),
  [
    ('llm_random_ec_no_layernorm', 'float64', 'loop'),
    ('llm_random_ec_no_layernorm', 'float32', 'tiled'),
    ('llm_random_ec_repo_default_granular', 'float64', 'tiled'),
    ('llm_random_ec_repo_default_granular', 'float32', 'loop'),
  ],
)
def test_llm_random_expert_choice(x64, name, dtype, way):
  """A group is the batch at one position; granular experts have a layer norm on their sum."""
  a, config = _load(name)
  norm = ('ln.l.weight', 'ln.l.bias') if config['use_layer_norm'] else ()
  names = LLM_RANDOM + norm
  x_BLD, dy_BLD, *weights = (
    jnp.asarray(a[n], dtype) for n in ('x', 'dy', *(f'w.{n}' for n in names))
  )
  B, L, _ = x_BLD.shape
  route = functools.partial(
    routing.expert_choice,
    capacity=round(config['topk_fraction'] * B),
    valid_GT=np.ones((L, B), bool),
  )

  def layer(x_BLD, router_DE, w_in_EDF, w_out_EFD, *norm):
    y_LBD = sparse_layer.layer(
      jnp.swapaxes(x_BLD, 0, 1),
      router_DE,
      w_in_EDF,
      w_out_EFD,
      route=route,
      way=way,
    )
    y_BLD = jnp.swapaxes(y_LBD, 0, 1)
    return common.layer_norm(y_BLD, *norm) if norm else y_BLD

  expected = a['y'], a['dx'], *(a[f'g.{n}'] for n in names)
  _check(_run(layer, (x_BLD, *weights), dy_BLD), expected, dtype)


def test_llm_random_expert_choice_picks_the_same_tokens(x64):
  a, config = _load('llm_random_ec_no_layernorm')
  B, L, _ = a['x'].shape
  logits_GTE = routing.router_logits(a['x'].swapaxes(0, 1), a['w.gating.gate'])
  capacity = round(config['topk_fraction'] * B)
  plan = routing.expert_choice(logits_GTE, capacity, valid_GT=np.ones((L, B), bool))
  by_expert = lambda rows: np.moveaxis(np.reshape(rows, (config['n_experts'], L, -1)), 1, 2)
  np.testing.assert_array_equal(by_expert(plan.token % B), a['topk_indices'])
  np.testing.assert_allclose(by_expert(plan.weight), a['topk_values'], rtol=1e-12)
