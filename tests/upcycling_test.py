"""Dense runs that become sparse or mixing ones: outputs, moments and routers at the switch."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import dense, mamba, mot
from moejax import (
  another_router,
  cli,
  config as config_lib,
  flops,
  model as model_lib,
  reroute,
  step as step_lib,
  train,
)
from moejax.differences import by_name


def _models(router='token_choice', changes=None):
  """A dense run_config, and that of the model that it becomes, both with `changes` of fields."""
  config = dense.get_config('debug')
  old = config_lib.resolve(config)
  another_router.with_router(config, router)
  config.model.update_from_flattened_dict({'moe.capacity_factor': 0.0} | (changes or {}))
  return old, config_lib.resolve(config)


def _states(old, new):
  """The state of a dense model, moments of 1 included, and what becomes of it."""
  source = jax.jit(step_lib.fresh_state(old))()
  source['optimizer'] = jax.tree.map(lambda leaf: leaf + 1, source['optimizer'])
  fresh = step_lib.fresh_state(new)
  switch = lambda source: another_router.convert(source, fresh(), old.model, new.model)
  return source, jax.jit(switch)(source)


def _logits(run_config, state):
  inputs_BL = jax.random.randint(jax.random.key(1), (4, 16), 0, 256)
  return jax.jit(lambda p: model_lib.bind(run_config.model, p)(inputs_BL))(state['params'])


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'activation': 'gelu', 'moe.granularity': 4, 'moe.expansion_rate': 3},
    {'moe.granularity': 1, 'moe.experts_per_token': 2},
    {'moe.experts_per_token': 6},
  ],
  ids=str,
)
def test_weights_that_sum_to_1_keep_the_function(changes):
  old, new = _models(changes=changes)
  if activation := changes.get('activation'):
    model = dataclasses.replace(old.model, activation=activation)
    old = dataclasses.replace(old, model=model)
  source, switched = _states(old, new)
  np.testing.assert_allclose(_logits(new, switched), _logits(old, source), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('scores', ['softmax', 'sigmoid'])
def test_other_weights_begin_nearly_equal(scores):
  changes = {'moe.renormalize': False, 'moe.granularity': 1, 'moe.scores': scores}
  old, new = _models(changes=changes)
  source, switched = _states(old, new)
  expected, got = _logits(old, source), _logits(new, switched)
  assert 1e-6 < np.abs(got - expected).max() < 0.03 * np.abs(expected).max()


def test_copies_take_their_share_of_the_moments():
  old, new = _models(changes={'moe.granularity': 2, 'moe.expansion_rate': 4})
  source, switched = (by_name(state) for state in _states(old, new))
  shown = {}
  for name, leaf in switched.items():
    kind = next((part for part in ('mu', 'nu') if f'/{part}/' in name), '')
    if kind and '1_moe' in name:
      shown[kind, name.rpartition('/')[2]] = set(np.unique(np.asarray(leaf)).tolist())
  assert shown['mu', 'w_in'] == {1 / 4} and shown['nu', 'w_in'] == {1 / 16}
  assert shown['mu', 'w_out'] == {1 / 8} and shown['nu', 'w_out'] == {1 / 64}
  assert shown['mu', 'router'] == {0} and switched['step'] == source['step']
  outside = [name for name in source if '1_mlp' not in name]
  for name in outside:
    np.testing.assert_array_equal(source[name], switched[name])


def test_a_mixture_of_equal_tokens_is_the_dense_layer():
  old, new = _models('mot')
  source, switched = _states(old, new)
  same_BL = np.broadcast_to(np.arange(16, dtype=np.int32), (new.model.mot.group_size, 16))
  expected, got = (
    jax.jit(lambda p, model=c.model: model_lib.bind(model, p)(same_BL))(state['params'])
    for c, state in ((old, source), (new, switched))
  )
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('router', another_router.ROUTERS)
def test_a_token_keeps_its_flops(router):
  old, new = _models(router, {'moe.capacity_factor': 1.0})
  a, b = (flops.training_flops_per_token(c.model, 64)['model'] for c in (old, new))
  assert a == pytest.approx(b, rel=1e-9)


@pytest.mark.parametrize(
  ('module', 'changes', 'message'),
  [
    (mamba, {}, 'mot layers or with moe layers'),
    (dense, {'biases': True}, 'experts have no biases'),
  ],
)
def test_models_without_layers_that_become_experts_are_refused(module, changes, message):
  config = module.get_config('debug')
  config.model.update(changes)
  with pytest.raises(ValueError, match=message):
    another_router.with_router(config, 'token_choice')


def test_experts_do_not_become_dense():
  with pytest.raises(ValueError, match='does not become a dense one'):
    another_router.with_router(mot.get_config('debug'), 'dense')


def test_hidden_units_that_cannot_be_cut_are_refused():
  old, new = _models(changes={'activation': 'swiglu', 'moe.granularity': 16})
  with pytest.raises(ValueError, match='hidden units cannot be cut into those of 16 experts'):
    another_router.convert({}, {}, old.model, new.model)


@pytest.mark.heavy
def test_a_dense_run_is_evaluated_and_trained_under_every_router(tmp_path):
  config = dense.get_config('debug')
  config.mesh.update({'data': 1, 'tensor': -1})
  config.model.num_heads = 8
  config.train.update({'steps': 2, 'sample_length': 0})
  assert train.train(config, tmp_path / 'dense') == cli.OK
  cells = {c.router: c for c in reroute.measure(tmp_path / 'dense', another_router.ROUTERS, 1)}
  assert list(cells) == ['dense', *another_router.ROUTERS]
  assert cells['token_choice'].loss == pytest.approx(cells['dense'].loss, abs=1e-5)
  cell = reroute.repair(tmp_path / 'dense', cells['token_choice'], tmp_path, 2)
  assert cell and cell.after < cell.at
  assert cell.at == pytest.approx(cell.before, abs=1e-5)
