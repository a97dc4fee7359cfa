"""The sparse layer: the loops over tokens and experts reproduced, sizes, leaks, balance."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import fine_grained, moe as moe_config
from moejax.layers import common, moe
from tests.ops import oracles

B, L, D, F, M = 6, 5, 8, 12, 3
ROUTERS = {
  'token choice': {'capacity_factor': 0.8},
  'token choice, nobody dropped': {'capacity_factor': 0.0},
  'top 1': {'experts_per_token': 1},
  'Mixtral': {'renormalize': True},
  'sigmoid, by position': {'scores': 'sigmoid', 'group_by': 'position'},
  'expert choice': {'router': 'expert_choice', 'capacity_factor': 1.0},
  'over tokens': {'router': 'expert_choice', 'scores': 'softmax_over_tokens'},
  'flat expert choice': {'router': 'expert_choice', 'group_by': 'sequence'},
  'ReLU': {'router': 'relu', 'capacity_factor': 0.8},
}
CAUSAL = [name for name in ROUTERS if name != 'flat expert choice']


def _config(**changes):
  return moe.MoEConfig(**{'expansion_rate': 2, 'granularity': 2, 'group_size': M, **changes})


@functools.lru_cache
def _layer(d_out=None, **changes):
  """The layer without its parameters, and random ones, float64."""
  make = lambda: moe.MixtureOfExperts(
    _config(**changes),
    d_model=D,
    d_out=d_out,
    d_ff=F,
    activation='relu',
    init=common.Initializer('kaiming_uniform', 1.0, jnp.dtype('float32')),
    rngs=nnx.Rngs(0),
  )
  graph, params = nnx.split(nnx.eval_shape(make))
  rng = np.random.default_rng(1)
  return graph, jax.tree.map(
    lambda p: rng.standard_normal(p.shape) / np.prod(p.shape[-1:]) ** 0.5, nnx.to_pure_dict(params)
  )


def _apply(graph, params, x_BLD, tokens):
  return nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))(x_BLD, tokens)


_forward = jax.jit(_apply, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _with_gradients(graph, params, x_BLD, tokens, dy):
  y, backward = jax.vjp(lambda p, x: _apply(graph, p, x, tokens)[0], params, x_BLD)
  return y, *backward(dy)


def _inputs(dtype='float32'):
  rng = np.random.default_rng(0)
  x_BLD = rng.standard_normal((B, L, D)).astype(dtype)
  segments_BL = np.ones((B, L), np.int32)
  segments_BL[1, 3:] = 0
  positions_BL = np.tile(np.arange(L, dtype=np.int32), (B, 1))
  return x_BLD, common.TokenInfo(jnp.asarray(segments_BL), jnp.asarray(positions_BL))


def _groups(a_BL, by_position):
  """[B, L, ...] as routing groups, earlier positions first, and the way back."""
  split = np.swapaxes(a_BL.reshape(B // M, M, *a_BL.shape[1:]), 1, 2)
  return split.reshape(-1, M if by_position else M * L, *a_BL.shape[2:])


def _ungroup(a_GT):
  split = a_GT.reshape(B // M, L, M, *a_GT.shape[2:])
  return np.swapaxes(split, 1, 2).reshape(B, L, *a_GT.shape[2:])


@pytest.mark.parametrize('impl', ['loop', 'rows'])
@pytest.mark.parametrize(
  ('router', 'd_out'), [*((router, D) for router in ROUTERS), ('top 1', 5), ('expert choice', 11)]
)
def test_is_a_loop_over_tokens_and_experts(x64, router, d_out, impl):
  config = _config(**ROUTERS[router], impl=impl)
  graph, params = _layer(d_out, **ROUTERS[router], impl=impl)
  x_BLD, tokens = _inputs('float64')
  dy = np.random.default_rng(2).standard_normal((B, L, d_out))
  y, dparams, dx_BLD = _with_gradients(graph, params, x_BLD, tokens, dy)
  x_GTD, dy_GTD, segments_GT = (
    _groups(np.asarray(a), config.by_position) for a in (x_BLD, dy, tokens.segments)
  )
  options = {
    'expert_choice': {'softmax_over': config.scores.partition('softmax_over_')[2] or 'experts'},
    'token_choice': {'k': config.top_k, 'bias_E': None, 'scores': config.scores}
    | {'renormalize': config.renormalize},
    'relu': {},
  }
  route = functools.partial(
    getattr(oracles, config.router),
    valid_GT=segments_GT > 0,
    capacity=config.capacity(x_GTD.shape[1]),
    **options[config.router],
  )
  weights = params['router'], params['experts']['w_in'], params['experts']['w_out']
  y_GTD, expected, *_ = oracles.moe(x_GTD, *weights, dy_GTD, route)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10)
  close(y, _ungroup(y_GTD))
  close(dx_BLD, _ungroup(expected['x']))
  close(dparams['router'], expected['router'])
  for name in ('w_in', 'w_out'):
    close(dparams['experts'][name], expected[name])


@pytest.mark.parametrize('router', ROUTERS)
def test_only_flat_expert_choice_sees_the_future(router):
  graph, params = _layer(**ROUTERS[router])
  x_BLD, tokens = _inputs()
  before, _ = _forward(graph, params, x_BLD, tokens)
  seen = False
  for example in range(B):
    changed = x_BLD.copy()
    changed[example, 2] *= -3
    after, _ = _forward(graph, params, changed, tokens)
    seen |= not np.array_equal(before[:, :2], after[:, :2])
  assert seen == (router not in CAUSAL) == _config(**ROUTERS[router]).leaks()


@pytest.mark.parametrize('router', ['token choice', 'expert choice'])
def test_padding_is_never_routed(router):
  graph, params = _layer(**ROUTERS[router])
  x_BLD, tokens = _inputs()
  y_BLD, aux = _forward(graph, params, x_BLD, tokens)
  changed = np.where((tokens.segments > 0)[..., None], x_BLD, np.nan)
  other, other_aux = _forward(graph, params, np.nan_to_num(changed, nan=7.0), tokens)
  np.testing.assert_array_equal(y_BLD, other)
  assert (np.asarray(y_BLD)[1, 3:] == 0).all()
  jax.tree.map(np.testing.assert_array_equal, aux, other_aux)


@pytest.mark.parametrize('changes', [{}, {'router': 'relu'}], ids=['token choice', 'ReLU'])
def test_few_tokens_are_computed_one_by_one(changes):
  """As in decoding; where a gradient is needed, and on other platforms, in other ways."""
  make = lambda impl: moe.MixtureOfExperts(
    _config(expansion_rate=5, capacity_factor=0.0, group_size=1, impl=impl, **changes),
    d_model=D,
    d_ff=F,
    activation='swiglu',
    rngs=nnx.Rngs(0),
  )
  graphs = {impl: nnx.split(make(impl))[0] for impl in ('loop', 'rows')}
  params = nnx.state(make('loop'))
  x_BLD = jax.random.normal(jax.random.key(0), (3 if not changes else 1, 1, D))
  tokens = common.TokenInfo.unpadded(x_BLD.shape)
  tokens = tokens._replace(segments=tokens.segments.at[1:2].set(0))
  run = lambda x_BLD, impl: nnx.merge(graphs[impl], params)(x_BLD, tokens)[0]
  few = jax.jit(lambda x: run(x, 'loop'))(x_BLD)
  in_tiles = jax.jit(lambda x: jax.vjp(lambda x: run(x, 'loop'), x)[0])(x_BLD)
  np.testing.assert_allclose(few, in_tiles, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(few, jax.jit(lambda x: run(x, 'rows'))(x_BLD), rtol=1e-5, atol=1e-6)
  assert np.abs(few[0]).max() > 0


def test_measurements():
  graph, params = _layer(capacity_factor=0.5, z_loss=0.1)
  x_BLD, tokens = _inputs()
  _, aux = _forward(graph, params, x_BLD, tokens)
  assert aux['moe/load'].shape == (4,)
  np.testing.assert_allclose(aux['moe/load'].sum(), 4, rtol=1e-6)
  np.testing.assert_allclose(aux['moe/load_max'], aux['moe/load'].max(), rtol=1e-6)
  # 2 groups of 4 experts with 4 slots; 28 tokens that are not padding choose 2 experts each.
  np.testing.assert_allclose(aux['moe/dropped'], 1 - 32 / 56, rtol=1e-6)
  expected = 0.01 * aux['moe/balance'] + 0.1 * aux['moe/z']
  np.testing.assert_allclose(aux['auxiliary_loss'], expected, rtol=1e-6)


def test_the_gradient_of_the_balance_bias_is_the_load_above_the_mean():
  graph, params = _layer(balance_bias=True, balance_loss=0.0)
  x_BLD, tokens = _inputs()

  @jax.jit
  def objective(params):
    aux = _apply(graph, params, x_BLD, tokens)[1]
    return aux['auxiliary_loss'], aux['moe/load']

  (value, load_E), gradients = jax.value_and_grad(objective, has_aux=True)(params)
  assert value == 0
  # In whole numbers: choices above the mean, times the number of experts.
  choices = 2 * int((tokens.segments > 0).sum())
  np.testing.assert_array_equal(gradients['balance_bias'], np.round(choices * (load_E - 1)))
  assert not np.abs(gradients['router']).any()


@pytest.mark.parametrize('level', [-60.0, 1e18])
def test_gradients_are_finite_whatever_the_scores(level):
  """One token whose scores all underflow, or whose squared logsumexp is infinite."""
  sigmoid = {'scores': 'sigmoid', 'renormalize': True, 'balance_bias': True, 'balance_loss': 0.1}
  graph, params = _layer(**sigmoid if level < 0 else {})
  x_BLD, tokens = _inputs()
  params = params | {'router': np.eye(D, params['router'].shape[1]) * max(1, level)}
  x_BLD[0, 1] = level if level < 0 else 1e3

  def loss(params, x_BLD):
    y_BLD, aux = _apply(graph, params, x_BLD, tokens)
    return 1e-3 * y_BLD.mean() + aux['auxiliary_loss'], aux['moe/z']

  (value, z), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x_BLD)
  assert np.isinf(z) == (level > 0)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, gradients)))


def test_a_shared_expert_is_added():
  x_BLD, tokens = _inputs()
  graph, params = _layer(shared_width=4)
  with_shared, _ = _forward(graph, params, x_BLD, tokens)
  plain_graph, plain_params = _layer()
  plain_params = {name: params[name] for name in plain_params}
  plain, _ = _forward(plain_graph, plain_params, x_BLD, tokens)
  shared = np.maximum(x_BLD @ params['shared']['w_in'], 0) @ params['shared']['w_out']
  np.testing.assert_allclose(with_shared, plain + shared, rtol=1e-5, atol=1e-6)


def test_jitter_needs_a_key():
  graph, params = _layer(jitter=0.5, capacity_factor=0.0)
  x_BLD, tokens = _inputs()
  quiet, _ = _forward(graph, params, x_BLD, tokens)
  plain_graph, _ = _layer(capacity_factor=0.0)
  np.testing.assert_array_equal(quiet, _forward(plain_graph, params, x_BLD, tokens)[0])
  noisy = [
    _forward(graph, params, x_BLD, tokens._replace(key=jax.random.key(i)))[0] for i in (1, 1, 2)
  ]
  np.testing.assert_array_equal(noisy[0], noisy[1])
  assert not np.array_equal(noisy[0], noisy[2])


def test_sizes_follow_the_paper():
  c = fine_grained.get_config('25M,granularity=8,expansion_rate=64')
  config, d_ff = moe.MoEConfig(**c.model.moe), c.model.d_ff
  assert (config.num_experts, config.expert_width(d_ff), config.top_k) == (512, 256, 8)
  assert config.capacity(256) == 4  # 256 / expansion rate, whatever the granularity
  assert config.fan_in_out(d_ff) == d_ff
  assert config.by_position and config.output_norm
  for granularity in (1, 2, 4, 16):
    other = dataclasses.replace(config, granularity=granularity)
    assert other.capacity(256) == 4
    assert other.num_experts * other.expert_width(d_ff) == 64 * d_ff
    assert other.top_k * other.expert_width(d_ff) == d_ff
  switch = moe.MoEConfig(**moe_config.get_config('25M').model.moe)
  assert (switch.num_experts, switch.top_k, switch.expert_width(2048)) == (32, 1, 2048)
  assert switch.fan_in_out(2048) == 32 * 2048


def test_a_batch_that_cannot_be_cut_into_groups_is_refused():
  graph, params = _layer()
  x_BLD, tokens = _inputs()
  with pytest.raises(ValueError, match='model.moe.group_size = 3 must divide .* got 4'):
    _apply(graph, params, x_BLD[:4], jax.tree.map(lambda a: a[:4], tokens))
