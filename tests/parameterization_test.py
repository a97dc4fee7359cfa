"""Parameterizations: what changes with size, and that nothing does at the base shape."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from moejax import model as model_lib, optimizer as optimizer_lib, parameterization
from moejax.optimizer import OptimizerConfig
from moejax.parameters import name_of
from moejax.step import init_state, train_step
from tests import tiny

NAMES = [name for name in parameterization.NAMES if name != 'standard']


def _scales(**changes):
  return model_lib.parameter_scales(tiny.model_config(**{'parameterization': 'mup'} | changes))


def _find(scales, end):
  (found,) = {scale for path, scale in scales.items() if path.endswith(end)}
  return found


def _two_steps(model):
  config = OptimizerConfig()
  optimizer = optimizer_lib.make_optimizer(config, 100, model)
  key = jax.random.key(0)

  @jax.jit
  def run(batch):
    state, losses = init_state(model, optimizer, key), []
    for _ in range(2):
      state, measured = train_step(
        state,
        batch,
        model_config=model,
        optimizer=optimizer,
        schedule=optimizer_lib.make_schedule(config, 100),
        accumulation=1,
        key=key,
      )
      losses.append(measured['loss'])
    return losses, state['params']

  return run(tiny.batch())


@pytest.mark.heavy
@pytest.mark.parametrize('name', tiny.models(slow='moe in mamba2'))
def test_at_the_base_shape_all_are_the_same_bit_for_bit(name):
  standard, *others = (
    _two_steps(tiny.model_config(**tiny.MODELS[name], parameterization=parameterization))
    for parameterization in ('standard', *NAMES)
  )
  for other in others:
    jax.tree.map(np.testing.assert_array_equal, other, standard)


def test_twice_the_width():
  base = 'd_model=6,d_ff=12,mot.expert_width=8'
  scales = _scales(base=base)
  matrix = pytest.approx((1, 1 / 2, 2**-0.5))
  assert _find(scales, '_attention/layer/qkv') == matrix
  assert _find(scales, '_attention/layer/out') == matrix
  assert _find(scales, '_mlp/layer/w_in') == _find(scales, '_mlp/layer/w_out') == matrix
  assert _find(scales, '/experts/w_in') == _find(scales, '/experts/w_out') == matrix
  assert _find(scales, '/controller') == pytest.approx((2**-0.5, 1 / 2, 1 / 2))  # as many outputs
  assert _find(scales, 'position_embedding') == scales['embedding'] == (1, 1, 1)
  assert scales['head'] == pytest.approx((2**0.5, 1, 1))
  assert _find(scales, '_mot/norm/scale') == (1, 1, 1)


def test_twice_the_width_of_mamba():
  scales = _scales(blocks=tiny.MAMBA, base='d_model=6,d_ff=12')
  for name in ('w_in', 'w_gate', 'w_out'):
    assert _find(scales, f'_mamba/layer/{name}') == pytest.approx((1, 1 / 2, 2**-0.5))
  assert _find(scales, '_mamba/layer/w_select') == (1, 1 / 2, 1 / 2)  # rank and states, as many
  for name in ('a_log', 'skip', 'conv_kernel', 'conv_bias', 'delta_bias'):
    assert _find(scales, f'_mamba/layer/{name}') == (1, 1, 1)


def test_twice_the_width_of_mamba2():
  """Twice the heads; as many states, which are no input of a product."""
  scales = _scales(blocks=((('mamba2', 'mlp'), 2),), base='d_model=6,d_ff=12')
  for name in ('w_in', 'w_gate', 'w_delta', 'w_out'):
    assert _find(scales, f'_mamba2/layer/{name}') == pytest.approx((1, 1 / 2, 2**-0.5))
  assert _find(scales, '_mamba2/layer/w_bc')[:2] == pytest.approx((1, 1 / 2))
  vectors = ['log_rate', 'skip', 'delta_bias', 'norm_scale']
  for name in (*vectors, *(f'{at}_{part}' for at in ('conv', 'bc') for part in ('kernel', 'bias'))):
    assert _find(scales, f'_mamba2/layer/{name}') == (1, 1, 1)


def test_a_tied_embedding_is_as_large_as_in_the_base_shape():
  scales = _scales(tie_embeddings=True, base='d_model=6')
  assert scales['embedding'] == pytest.approx((2**0.5, 1, 1))


@pytest.mark.parametrize(
  ('router', 'factor'), [('token_choice', 4), ('expert_choice', 4), ('relu', 1)]
)
def test_finer_experts_of_a_token_add_up_to_the_same(router, factor):
  """Four times the experts, of a quarter of the width, four per token (arXiv:2601.20205)."""
  sizes = {
    'blocks': tiny.MOE,
    'moe_router': router,
    'moe_granularity': 4,
    'parameterization': 'mup',
  }
  model = tiny.model_config(**sizes, base='moe.granularity=1')
  scales = model_lib.parameter_scales(model)
  assert _find(scales, 'experts/w_in') == pytest.approx((1, 1, 2**-0.5))  # of 6 columns, not of 12
  assert _find(scales, 'router') == (1, 1, 2)  # of 12 columns, not of 3
  assert _find(scales, 'experts/w_out').rate == factor
  params = model_lib.init_params(model, jax.random.key(0))
  base = model_lib.init_params(model.base_model, jax.random.key(0))
  std = lambda params: params['stack_0']['1_moe']['layer']['experts']['w_out'].std()
  # 4 inputs fewer, 4 terms more; weights are a fourth, but those of `relu`.
  np.testing.assert_allclose(std(params) / std(base), factor, rtol=0.1)


def test_the_number_of_experts_changes_nothing():
  model = tiny.model_config(blocks=tiny.MOE, parameterization='mup', base='moe.expansion_rate=1')
  scales = model_lib.parameter_scales(model)
  assert {scale.rate for scale in scales.values()} == {1}
  # `standard` shrinks their output matrices by their number.
  np.testing.assert_allclose(_find(scales, 'experts/w_out').init, 3**0.5)


def test_groups_of_tokens():
  """Mixtures of 4 instead of 2 tokens, and as many mixtures per token."""
  sizes = {'mot_group_size': 4, 'mot_num_experts': 8}
  scales = _scales(**sizes, base='mot.group_size=2,mot.num_experts=4')
  assert _find(scales, 'experts/w_in') == pytest.approx((2**0.5, 2**0.5, 2**0.5))
  assert _find(scales, 'experts/w_out') == pytest.approx((2**0.5, 1, 1))


def test_depth_scales_branches_only_in_completep():
  for name, scale in (('mup', 1), ('completep', 1 / 3)):
    model = tiny.model_config(
      blocks=((('attention', 'mlp'), 6),), parameterization=name, base=f'blocks={tiny.DENSE}'
    )
    assert parameterization.branch_scale(model) == pytest.approx(scale)
    assert {*model_lib.parameter_scales(model).values()} == {(1, 1, 1)}


@pytest.mark.parametrize('name', NAMES)
def test_outputs_and_scores(name):
  model = tiny.model_config(blocks=tiny.DENSE, parameterization=name, base='d_model=6')
  plain = dataclasses.replace(model, parameterization='standard')
  params = model_lib.init_params(plain, jax.random.key(0))
  logits = lambda config, params: model_lib.bind(config, params)(tiny.batch()['inputs'])
  params['stack_0']['0_attention']['layer']['qkv'] *= 0  # scores
  scaled = jax.tree.map(lambda a: a, params)
  scaled['head'] *= 2
  np.testing.assert_allclose(logits(model, scaled), logits(plain, params), rtol=1e-5)


def test_rates_scale_updates_but_not_weight_decay():
  model = tiny.model_config(parameterization='mup', base='d_model=6')
  params = model_lib.init_params(model, jax.random.key(0))
  keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
  gradients = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)

  def updates(model, **changes):
    config = OptimizerConfig(**{'weight_decay': 0.0, 'clip_norm': 1e9} | changes)
    optimizer = optimizer_lib.make_optimizer(config, 100, model)
    return jax.jit(optimizer.update)(gradients, optimizer.init(params), params)[0]

  scales = model_lib.parameter_scales(model)
  plain, decayed = updates(None), updates(None, weight_decay=0.1)
  decay = jax.tree.map(lambda a, b: a - b, decayed, plain)
  expected = jax.tree_util.tree_map_with_path(
    lambda path, u, d: u * scales[name_of(path)].rate + d, plain, decay
  )
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7)
  jax.tree.map(close, updates(model, weight_decay=0.1), expected)


def test_epsilon_shrinks_with_the_gradients():
  model = tiny.model_config(parameterization='mup', base='d_model=6')
  params = {'embedding': np.ones((2, 2), np.float32)}
  gradients = {'embedding': np.full((2, 2), 1e-3, np.float32)}

  def update(model, eps):
    config = OptimizerConfig(eps=eps, weight_decay=0.0)
    optimizer = optimizer_lib.make_optimizer(config, 100, model)
    return optimizer.update(gradients, optimizer.init(params), params)[0]['embedding']

  np.testing.assert_array_equal(update(model, 1e-3), update(None, 0.5e-3))


@pytest.mark.parametrize(
  'base, message',
  [
    ('d_model=5', "model.base = 'd_model=5': model.num_heads = 3 must divide d_model = 5."),
    ('dmodel=6', "'dmodel' is no size of a model; did you mean 'd_model'?"),
    ('activation=gelu', "'activation' is no size of a model"),
    ('d_model', "d_model must be an integer, got ''"),
    ('d_model=0', 'd_model must be at least 1, got 0'),
    ('moe.granularity=5', 'model.moe.granularity = 5 must divide model.d_ff = 24'),
    ("blocks=((('attention','mlp'),2),)", 'its blocks must be those of the model, repeated more'),
  ],
)
def test_a_base_shape_that_does_not_fit(base, message):
  blocks = ((('attention', 'moe'), 2),)
  with pytest.raises(ValueError, match=re.escape(message)) as error:
    tiny.model_config(blocks=blocks, parameterization='mup', base=base)
  assert str(error.value).startswith(f'model.base = {base!r}: ')


def test_an_optimizer_without_rates_is_refused(monkeypatch):
  monkeypatch.setitem(optimizer_lib.OPTIMIZERS, 'mine', lambda config, schedule, decays: None)
  model = tiny.model_config(parameterization='mup')
  with pytest.raises(ValueError, match='optimizer.name = mine takes no argument `rates`'):
    optimizer_lib.make_optimizer(OptimizerConfig(name='mine'), 10, model)
