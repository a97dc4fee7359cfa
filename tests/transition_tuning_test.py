"""From a Mixture-of-Tokens run to a sparse one: what is kept, what is refused, and going on."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import dense, mot
from moejax import (
  cli,
  config as config_lib,
  generate,
  metrics,
  model as model_lib,
  run_folder,
  step as step_lib,
  train,
  transition_tuning,
)
from moejax.checkpoint import Checkpoints
from moejax.optimizer import OptimizerConfig, make_optimizer, make_schedule
from tests import tiny

pytestmark = pytest.mark.heavy

SPARSE = {'token_choice': {'moe_capacity_factor': 1.25}, 'expert_choice': {}}


def _debug_config():
  config = mot.get_config('debug')
  config.mesh.update({'data': 1, 'tensor': -1})  # all 8 devices, but nothing to split a group over
  config.model.num_heads = 8
  config.optimizer.accumulation = 1
  return config


class _StopAfterOneStep(train.Interrupt):
  """An interrupt that comes by itself."""

  def __init__(self):
    super().__init__()
    self.left = 2

  def reached(self, step):
    self.left -= 1
    return self.left <= 0


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A Mixture-of-Tokens run of 6 steps, and one that goes on from it for 2, stopped in between."""
  folder = tmp_path_factory.mktemp('runs')
  old, new = folder / 'old', folder / 'new'
  assert train.train(_debug_config(), old) == cli.OK
  tune = functools.partial(transition_tuning.tune, old, new, 'token_choice', steps=2)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, 'Interrupt', _StopAfterOneStep)
    assert tune() == cli.INTERRUPTED
  assert tune() == cli.OK
  return old, new


def _restore(folder, step):
  """The train state of a checkpoint, as numpy arrays."""
  run_config = config_lib.resolve(run_folder.read(folder))
  optimizer = make_optimizer(run_config.optimizer, run_config.train.steps)
  init = functools.partial(step_lib.init_state, run_config.model, optimizer, jax.random.key(0))
  checkpoints = Checkpoints(run_folder.checkpoint_dir(folder))
  state = jax.device_get(checkpoints.restore(step, tiny.abstract(init)))
  checkpoints.close()
  return state


def test_nothing_is_initialised_anew(runs):
  old, new = (_restore(folder, 6) for folder in runs)
  layer, sparse = (
    state['params']['stack_0'][name]['layer'] for state, name in ((old, '1_mot'), (new, '1_moe'))
  )
  np.testing.assert_array_equal(layer['controller'], sparse['router'])
  jax.tree.map(np.testing.assert_array_equal, layer['experts'], sparse['experts'])
  everything = lambda state: sorted(leaf.tobytes() for leaf in jax.tree.leaves(state))
  assert everything(old) == everything(new)  # moments and step, too


def test_the_run_goes_on_and_reports_the_switch(runs):
  old, new = runs
  assert Checkpoints(run_folder.checkpoint_dir(new)).latest_step() == 8
  transition = json.loads((new / 'summary.json').read_text())['transition']
  assert [transition[k]['step'] for k in ('before', 'at_the_switch', 'after')] == [6, 6, 8]
  before = json.loads((old / 'summary.json').read_text())['validation']['loss']
  assert transition['before']['loss'] == pytest.approx(before, rel=1e-5)
  assert all(0 < transition[k]['loss'] < 7 for k in ('at_the_switch', 'after'))
  assert [step for step, _ in metrics.loss_curve(new)] == [7, 8]
  assert len(metrics.loss_curve(new, 'before/loss')) == 1


def test_the_new_run_decodes_one_request_alone(runs):
  run_config, step, params, _ = run_folder.load_run(runs[1])
  assert step == 8 and run_config.model.mixed_sequences == 1
  (text,) = generate.continuations(run_config.model, params, run_config.tokenizer, ['def '], 3)
  assert isinstance(text, str)


def test_losses_that_are_not_known_are_left_out(tmp_path):
  assert transition_tuning.report(tmp_path) == {}
  (tmp_path / 'metrics.jsonl').write_text('{"step": 6, "validation/loss": 2.0}\n')
  last = {'step': 6, 'loss': 2.0}
  assert transition_tuning.report(tmp_path) == {'at_the_switch': last, 'after': last}


def test_a_folder_without_a_run_is_named(tmp_path):
  with pytest.raises(ValueError, match='--from=.*/nothing holds no run'):
    transition_tuning.tune(tmp_path / 'nothing', tmp_path / 'new', 'token_choice')


def test_fewer_steps_than_the_run_has_are_refused(runs, tmp_path):
  fields = {'train.steps': '1'}
  with pytest.raises(ValueError, match=r'train\.steps = 1: the run .*--steps=N'):
    transition_tuning.tune(runs[0], tmp_path / 'new', 'token_choice', fields=fields)
  assert not (tmp_path / 'new').exists()


def test_a_run_that_began_with_other_moments_is_refused(runs):
  with pytest.raises(ValueError, match="began with {'optimizer': 'continue'}, not"):
    transition_tuning.tune(*runs, 'token_choice', steps=2, moments='restart')


def _params(config):
  return jax.jit(model_lib.init_params, static_argnums=0)(config, jax.random.key(0))


@pytest.mark.parametrize('router', SPARSE)
def test_the_sparse_model_has_a_finite_loss_at_the_switch(router):
  source = tiny.model_config(init_scale=1.0, mot_expert_width=tiny.F // 2)
  blocks = ((('attention', 'mlp'), 1), (('attention', 'moe'), 2))
  sparse = tiny.model_config(blocks=blocks, moe_router=router)
  abstract = jax.eval_shape(lambda: model_lib.init_params(sparse, jax.random.key(0)))
  params = transition_tuning.convert({'params': _params(source)}, {'params': abstract})['params']
  nats, targets, _ = jax.jit(lambda p: model_lib.bind(sparse, p).loss(tiny.batch()))(params)
  assert 0 < nats / targets < 2 * np.log(tiny.V)


def test_a_temperature_goes_into_the_router_and_its_moments():
  source = {kind: {'controller': np.ones(3)} for kind in ('params', 'mu', 'nu')}
  fresh = {kind: {'router': np.zeros(3)} for kind in source}
  new = transition_tuning.convert(source, fresh, temperature=0.5)
  # Where the router is twice as large, its gradient is half as large.
  scales = {kind: float(arrays['router'][0]) for kind, arrays in new.items()}
  assert scales == {'params': 2, 'mu': 0.5, 'nu': 0.25}


def test_moments_take_the_dtype_of_the_new_run():
  source, fresh = {'mu': np.full(3, 1.25)}, {'mu': np.zeros(3, jnp.bfloat16)}
  new = transition_tuning.convert(source, fresh)['mu']
  assert new.dtype == jnp.bfloat16 and (new == 1.25).all()


def test_arrays_without_a_place_are_refused_by_name():
  with pytest.raises(ValueError, match=r'head is \(2,\) there and does not exist'):
    transition_tuning.convert({'head': np.ones(2)}, {'embedding': np.ones(2)})
  with pytest.raises(ValueError, match=r'head is \(2,\) there and is \(3,\)'):
    transition_tuning.convert({'head': np.ones(2)}, {'head': np.ones(3)})


def test_models_that_cannot_become_sparse_are_refused():
  with pytest.raises(ValueError, match='model.blocks of this run has attention, mlp'):
    transition_tuning.make_sparse(dense.get_config(), 'token_choice')
  config = mot.get_config()
  config.model.mot.temperature_mode = 'learned'
  with pytest.raises(ValueError, match='has no model.mot.temperature_mode = learned'):
    transition_tuning.make_sparse(config, 'token_choice')
  config = mot.get_config()
  config.model.mot.expert_width = 24
  with pytest.raises(ValueError, match='64 experts of width 24 are not'):
    transition_tuning.make_sparse(config, 'token_choice')


@pytest.mark.parametrize('router', SPARSE)
def test_a_token_gets_the_flops_that_it_had(router):
  from moejax import flops

  config = mot.get_config()
  mixing = config_lib.resolve(config).model
  transition_tuning.make_sparse(config, router)
  sparse = config_lib.resolve(config).model
  assert sparse.moe.num_experts == mixing.mot.num_experts and sparse.moe.top_k == 2
  a, b = (flops.training_flops_per_token(model, 64)['model'] for model in (mixing, sparse))
  assert a == pytest.approx(b, rel=1e-9)


def test_forgotten_moments_keep_their_place_in_the_schedule():
  config = OptimizerConfig(warmup_steps=10, weight_decay=0.0)
  optimizer, schedule = make_optimizer(config, 100), make_schedule(config, 100)
  params = {'w': jnp.ones(3)}
  updates, _ = optimizer.update(
    params, transition_tuning.fresh_moments(optimizer, params, 60), params
  )
  # Adam's first step is of the length of the learning rate, whatever the gradient.
  np.testing.assert_allclose(updates['w'], -schedule(60), rtol=1e-4)


def test_annealed_temperatures_stay_where_they_are_when_moments_are_forgotten():
  fields = config_lib.baseline().optimizer.to_dict() | {'anneal_from': 20}
  optimizer = make_optimizer(OptimizerConfig(**fields), 100)
  params = {'anneal': jnp.float32(0.5), 'w': jnp.ones(3)}  # at step 60
  updates, state = optimizer.update(
    params, transition_tuning.fresh_moments(optimizer, params, 60), params
  )
  np.testing.assert_allclose(params['anneal'] + updates['anneal'], (100 - 61) / 80, rtol=1e-6)
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, optimizer.init(params))


def test_a_schedule_can_begin_later():
  whole = make_schedule(OptimizerConfig(warmup_steps=10), 100)
  later = make_schedule(OptimizerConfig(warmup_steps=10, schedule_start=1000), 1100)
  for step in (0, 5, 10, 50, 100):
    np.testing.assert_allclose(later(step + 1000), whole(step), rtol=1e-5)
