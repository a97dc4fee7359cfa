"""The step and the loop: resume equals never stopping, accumulation, golden losses."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common, dense, fine_grained, moe, mot
from moejax import (
  cli,
  config as config_lib,
  evaluate,
  generate,
  metrics,
  model as model_lib,
  run_folder,
  step as step_lib,
  train,
)
from moejax.checkpoint import Checkpoints
from tests import tiny


def _debug_config(module=mot, **changes):
  config = module.get_config('debug')
  config.mesh.update({'data': 1, 'tensor': -1})  # all 8 devices, but nothing to split a group over
  config.model.num_heads = 8
  config.optimizer.accumulation = 1
  config.train.log_interval = 3
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config


def _params_of(workdir):
  _, step, params, _ = run_folder.load_run(workdir)
  return step, jax.device_get(params)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run of 6 steps, never stopped."""
  workdir = tmp_path_factory.mktemp('runs') / 'finished'
  assert train.train(_debug_config(), workdir) == cli.OK
  return workdir


class _StopAfter(train.Interrupt):
  """An interrupt that comes by itself before a given step."""

  def __init__(self, steps):
    super().__init__()
    self.left = steps + 1

  def reached(self, step):
    self.left -= 1
    return self.left <= 0


def test_a_stopped_and_resumed_run_is_bitwise_the_run_that_never_stopped(
  finished, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    patch.setattr(train, 'Interrupt', lambda: _StopAfter(4))
    assert train.train(_debug_config(), tmp_path) == cli.INTERRUPTED
  assert Checkpoints(run_folder.checkpoint_dir(tmp_path)).latest_step() == 4  # between log lines
  assert train.train(_debug_config(), tmp_path) == cli.OK
  (step, params), (other_step, other_params) = _params_of(finished), _params_of(tmp_path)
  assert step == other_step == 6
  jax.tree.map(np.testing.assert_array_equal, params, other_params)
  assert metrics.loss_curve(finished) == metrics.loss_curve(tmp_path)


def test_a_finished_run_started_again_keeps_what_it_learnt(finished, tmp_path):
  run = shutil.copytree(finished, tmp_path / 'run')
  assert train.train(_debug_config(), run) == cli.OK
  before, after = (json.loads((f / 'summary.json').read_text()) for f in (finished, run))
  for name in ('train_loss', 'validation', 'sample', 'steps'):
    assert after[name] == before[name]


def test_a_finished_run_leaves_everything_it_learnt(finished):
  names = {path.name for path in finished.iterdir()}
  assert {'config.json', 'metrics.jsonl', 'summary.json', 'loss.png', 'checkpoints'} <= names
  summary = json.loads((finished / 'summary.json').read_text())
  assert summary['tokens_seen'] == 6 * 16 * 32
  assert json.loads((finished / 'config.json').read_text())['corpus'] == summary['corpus']
  assert run_folder.read(finished).to_dict() == _debug_config().to_dict()
  assert summary['parameters']['total'] > summary['parameters']['active'] > 0
  assert 0 < summary['validation']['loss'] < 7
  nats_per_bit = summary['validation']['loss'] / summary['validation']['bits_per_byte']
  assert nats_per_bit == pytest.approx(np.log(2), rel=0.01)
  assert summary['versions']['jax'] == jax.__version__
  entropies = [e for e in metrics.read_metrics(finished)[0] if e.startswith('mot/entropy/')]
  assert entropies == ['mot/entropy/00', 'mot/entropy/01']


def test_running_a_finished_run_again_changes_nothing(finished):
  before = _params_of(finished)[1]
  assert train.train(_debug_config(), finished) == cli.OK
  jax.tree.map(np.testing.assert_array_equal, before, _params_of(finished)[1])


def test_evaluation_of_a_run_gives_the_loss_in_its_summary(finished):
  stages, _, params, mesh = run_folder.load_run(finished)
  from moejax import data

  loader = data.make_loader(stages.data, 'validation')
  result, _ = evaluate.evaluate(stages.model, params, loader, stages.train.eval_batches, mesh)
  summary = json.loads((finished / 'summary.json').read_text())
  assert result['loss'] == pytest.approx(summary['validation']['loss'], rel=1e-5)


def test_generation_of_a_run(finished):
  stages, _, params, _ = run_folder.load_run(finished)
  texts = generate.continuations(stages.model, params, stages.tokenizer, ['def ', 'x'], 8)
  assert len(texts) == 2


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'model.d_model': 32}, 'model.d_model: 16 there, 32 here'),
    ({'data.seed': 7}, 'data.seed: 0 there, 7 here'),
  ],
)
def test_a_workdir_with_another_run_is_refused_and_left_alone(finished, changes, message):
  before = (finished / 'config.json').read_text()
  with pytest.raises(ValueError, match=message):
    train.train(_debug_config(**changes), finished)
  assert (finished / 'config.json').read_text() == before


def test_another_corpus_is_refused_on_resume(finished, monkeypatch):
  from moejax.data import loader

  monkeypatch.setattr(loader, 'fingerprint', lambda *parts: 'another')
  monkeypatch.setattr(step_lib, 'lower_train_step', None)  # not even compiled
  with pytest.raises(ValueError, match="data.source = 'stdlib' now gives another"):
    train.train(_debug_config(), finished)


def test_another_tokenizer_is_refused(finished, monkeypatch):
  from moejax.data import tokenizer

  monkeypatch.setattr(tokenizer, '_fingerprint', lambda *parts: 'another')
  with pytest.raises(ValueError, match='data.tokenizer: the checkpoint was trained with'):
    run_folder.load_run(finished)


def test_a_diverging_run_stops_with_advice_and_keeps_its_last_checkpoint(tmp_path):
  changes = {'optimizer.peak_lr': 1e30, 'optimizer.clip_norm': 1e30, 'optimizer.warmup_steps': 0}
  config = _debug_config(**changes, **{'train.checkpoint_interval': 1})
  with pytest.raises(RuntimeError, match='lower optimizer.peak_lr'):
    train.train(config, tmp_path)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'model.mot.group_size': 5}, 'model.mot.group_size = 5 must divide the 16 sequences'),
    ({'optimizer.accumulation': 3}, 'optimizer.accumulation = 3 must divide'),
    ({'model.vocab_size': 100}, 'model.vocab_size = 100 is smaller than the 259 ids'),
    ({'data.files': 'nothing/*.txt', 'data.source': 'text'}, 'data.files'),
    ({'data.tokenizer': 'missing.model'}, 'data.tokenizer'),
    ({'optimizer.peak_lr': -1.0}, 'optimizer.peak_lr must be positive'),
    ({'optimizer.decay': 'some'}, 'optimizer.decay must be one of all, matrices'),
    (
      {'optimizer.moment_dtype': 'float16'},
      "moment_dtype must be one of '', float32, bf",
    ),
    ({'train.steps': 0}, 'train.steps must be at least 1'),
    ({'train.sample_prompt': ''}, 'train.sample_prompt must not be empty'),
    ({'mesh.tensor': 3}, 'does not fit 8 devices'),
    ({'mesh.tensor': 1, 'mesh.data': 8, 'data.batch_size': 12}, 'cannot be split over the 8'),
    ({'model.num_heads': 4}, 'mesh.tensor = 8 must divide the 4 heads .model.num_heads.'),
    ({'model.d_ff': 60}, 'mesh.tensor = 8 must divide the 60 hidden units of a feed-forward'),
    ({'model.mot.expert_width': 36}, 'mesh.tensor = 8 must divide the 36 .* .model.mot.expert_wid'),
    (
      {'mesh.tensor': 1, 'mesh.expert': 8, 'model.mot.num_experts': 4},
      'mesh.expert = 8 must divide the 4 experts of a layer .model.mot.num_experts.',
    ),
    (
      {'mesh.tensor': 1, 'mesh.expert': 8, 'model.blocks': tiny.MOE, 'model.moe.expansion_rate': 3},
      'mesh.expert = 8 must divide the 3 experts of a layer .model.moe.expansion_rate',
    ),
    (
      {'mesh.tensor': 1, 'mesh.data': 8, 'model.blocks': tiny.MOE},
      'model.moe.group_size = 4 must divide the 2 sequences of a device',
    ),
    ({'model.blocks': tiny.MAMBA, 'model.mamba.expand': 1.25}, 'must divide the 20 channels'),
  ],
)
def test_bad_configs_are_refused_before_anything_is_written(tmp_path, changes, message):
  workdir = tmp_path / 'run'
  with pytest.raises(ValueError, match=message):
    train.train(_debug_config(**changes), workdir)
  assert not workdir.exists()


def test_all_problems_are_reported_together():
  config = _debug_config(**{'optimizer.peak_lr': -1.0, 'model.d_model': 15, 'train.steps': 0})
  with pytest.raises(ValueError) as caught:
    config_lib.resolve(config)
  assert [line.split()[0] for line in str(caught.value).splitlines()] == [
    'model.num_heads',
    'optimizer.peak_lr',
    'train.steps',
  ]


def _steps(config, num_steps, accumulation=1, learning_rate=1e-2, optimizer=None):
  optimizer = optimizer or optax.adamw(learning_rate)
  state = jax.jit(lambda key: step_lib.init_state(config, optimizer, key))(jax.random.key(0))
  step = jax.jit(
    functools.partial(
      step_lib.train_step,
      model_config=config,
      optimizer=optimizer,
      schedule=lambda step: jnp.float32(learning_rate),
      accumulation=accumulation,
      key=jax.random.key(0),
    )
  )
  measured = []
  for i in range(num_steps):
    state, metrics_now = step(state, tiny.batch(seed=i))
    measured.append(metrics_now)
  return state, measured


def test_accumulation_gives_the_gradient_of_the_whole_batch():
  config = tiny.model_config()
  whole, measured = _steps(config, 2)
  parts, measured_parts = _steps(config, 2, accumulation=2)
  np.testing.assert_allclose(measured_parts[1]['loss'], measured[1]['loss'], rtol=1e-6)
  np.testing.assert_allclose(measured_parts[0]['grad_norm'], measured[0]['grad_norm'], rtol=1e-5)
  assert measured_parts[0]['aux']['mot/entropy'].shape == (2,)
  del whole, parts


@pytest.mark.parametrize('model', tiny.MODELS)
def test_golden_losses_of_five_steps(model, golden):
  _, measured = _steps(tiny.model_config(**tiny.MODELS[model], init_scale=1.0), 5)
  numbers = {key: [float(m[key]) for m in measured] for key in ('loss', 'grad_norm')}
  golden(f'five_steps_{model.replace(" ", "_")}', numbers, rtol=2e-6)


def test_the_schedule_warms_up_peaks_and_ends_at_its_fraction():
  from moejax.optimizer import OptimizerConfig, make_schedule

  fields = common.baseline().optimizer.to_dict() | {'peak_lr': 2.0, 'warmup_steps': 10}
  schedule = make_schedule(OptimizerConfig(**fields), 100)
  values = [float(schedule(step)) for step in (0, 4, 9, 10, 55, 100)]
  np.testing.assert_allclose(values, [0.2, 1.0, 2.0, 2.0, 1.1, 0.2], rtol=1e-5)


@pytest.mark.parametrize('warmup', [0, 1, 2, 10, 100, 200])
@pytest.mark.parametrize('start', [0, 50])
def test_every_step_trains(warmup, start):
  from moejax.optimizer import OptimizerConfig, make_schedule

  fields = {'warmup_steps': warmup, 'schedule_start': start, 'final_lr_fraction': 0.1}
  schedule = make_schedule(OptimizerConfig(**fields, peak_lr=2.0), start + 100)
  rates = np.array([float(schedule(step)) for step in range(start, start + 100)])
  np.testing.assert_allclose(rates[0], 2 / max(warmup, 1), rtol=1e-5)
  assert (rates > 0).all() and rates.max() == pytest.approx(min(2, 200 / max(warmup, 1)))


def test_weight_decay_reaches_norms_only_if_asked():
  from moejax.optimizer import OptimizerConfig, make_optimizer

  fields = common.baseline().optimizer.to_dict() | {'warmup_steps': 0}
  norm = {'scale': jnp.ones(3), 'bias': jnp.ones(3), 'emit_temperature': jnp.ones(())}
  params = {'norm': norm, 'w_in': jnp.ones((3, 4))}
  zeros = jax.tree.map(jnp.zeros_like, params)
  for decay, norm_decays in (('all', True), ('matrices', False)):
    optimizer = make_optimizer(OptimizerConfig(**(fields | {'decay': decay})), 10)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert bool((updates['w_in'] < 0).all())
    assert {bool((u < 0).all()) for u in updates['norm'].values()} == {norm_decays}


@pytest.mark.parametrize('model', ['mot', 'expert choice'])
def test_a_step_in_bfloat16_alone_keeps_a_state_of_bfloat16(model):
  from moejax.optimizer import OptimizerConfig, make_optimizer, make_schedule

  config = tiny.model_config(**tiny.MODELS[model], dtype='bfloat16', param_dtype='bfloat16')
  fields = common.baseline().optimizer.to_dict()
  optimizer = make_optimizer(OptimizerConfig(**fields), 10)
  step = functools.partial(
    step_lib.train_step,
    model_config=config,
    optimizer=optimizer,
    schedule=make_schedule(OptimizerConfig(**fields), 10),
    accumulation=1,
    key=jax.random.key(0),
  )
  state = jax.eval_shape(lambda: step_lib.init_state(config, optimizer, jax.random.key(0)))
  after, measured = jax.eval_shape(step, state, tiny.batch())
  assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, state)
  assert {a.dtype for a in jax.tree.leaves(state)} == {jnp.dtype('bfloat16'), jnp.dtype('int32')}
  assert {a.dtype for a in jax.tree.leaves(measured)} == {jnp.dtype('float32')}


def _optimizer(**changes):
  from moejax.optimizer import OptimizerConfig, make_optimizer

  fields = common.baseline().optimizer.to_dict() | {'warmup_steps': 0}
  return make_optimizer(OptimizerConfig(**fields | changes), 10)


def _moments(state):
  """The arrays of the first and of the second moment."""
  named = jax.tree.leaves_with_path(state['optimizer'])
  of = lambda moment: [a for path, a in named if f'.{moment}[' in jax.tree_util.keystr(path)]
  return of('mu'), of('nu')


def test_the_first_moment_can_be_narrower_than_the_parameters(tmp_path):
  config = tiny.model_config()
  exact, expected = _steps(config, 5, optimizer=_optimizer())
  state, measured = _steps(config, 5, optimizer=_optimizer(moment_dtype='bfloat16'))
  losses = [[float(m['loss']) for m in run] for run in (measured, expected)]
  assert losses[0] != losses[1]
  np.testing.assert_allclose(*losses, rtol=1e-3)
  mu, nu = _moments(state)
  assert {a.dtype for a in mu} == {jnp.dtype('bfloat16')}
  assert {a.dtype for a in (*nu, *_moments(exact)[0])} == {jnp.dtype('float32')}
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(5, state, None, {'config': {}})
  restored = checkpoints.restore(5, jax.eval_shape(lambda: state), None)
  checkpoints.close()
  assert jax.tree.map(lambda a: a.dtype, restored) == jax.tree.map(lambda a: a.dtype, state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_the_first_moment_can_be_wider_than_the_parameters():
  config = tiny.model_config(dtype='bfloat16', param_dtype='bfloat16')
  optimizer = _optimizer(moment_dtype='float32')
  init = lambda: step_lib.init_state(config, optimizer, jax.random.key(0))

  def update(state):
    gradients = jax.tree.map(jnp.ones_like, state['params'])
    updates, moments = optimizer.update(gradients, state['optimizer'], state['params'])
    return state | {
      'params': optax.apply_updates(state['params'], updates),
      'optimizer': moments,
    }

  state = jax.eval_shape(init)
  assert jax.eval_shape(lambda: update(init())) == state
  mu, nu = _moments(state)
  assert {a.dtype for a in mu} == {jnp.dtype('float32')}
  assert {a.dtype for a in nu} == {jnp.dtype('bfloat16')}


def test_a_run_from_before_a_field_existed_is_still_read(finished, tmp_path):
  fields = json.loads((finished / 'config.json').read_text())
  del fields['optimizer']['moment_dtype']
  (tmp_path / 'config.json').write_text(json.dumps(fields))
  assert run_folder.read(tmp_path).to_dict() == _debug_config().to_dict()


def test_annealed_temperatures_fall_linearly_to_zero_at_the_last_step():
  from moejax.optimizer import OptimizerConfig, gradient_norm, make_optimizer

  fields = common.baseline().optimizer.to_dict() | {'anneal_from': 2}
  optimizer = make_optimizer(OptimizerConfig(**fields), 6)
  params = {'anneal': jnp.ones(2), 'w_in': jnp.ones((3, 4))}
  gradients = {'anneal': jnp.full(2, 7.0), 'w_in': jnp.full((3, 4), 0.5)}
  assert gradient_norm(gradients) == pytest.approx(0.5 * 12**0.5)
  state, scales = optimizer.init(params), []
  for _ in range(6):
    updates, state = optimizer.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    scales.append(params['anneal'].tolist())
  np.testing.assert_allclose(np.array(scales).T, 2 * [[1, 1, 0.75, 0.5, 0.25, 0]])


def test_decay_of_matrices_spares_the_recurrence_of_mamba():
  from moejax.optimizer import OptimizerConfig, make_optimizer

  fields = common.baseline().optimizer.to_dict() | {'warmup_steps': 0, 'decay': 'matrices'}
  config = tiny.model_config(**tiny.MODELS['moe in mamba'])
  shapes = jax.eval_shape(lambda: model_lib.init_params(config, jax.random.key(0)))
  params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
  optimizer = make_optimizer(OptimizerConfig(**fields), 10)
  zeros = jax.tree.map(np.zeros_like, params)
  updates = jax.jit(lambda p: optimizer.update(zeros, optimizer.init(p), p)[0])(params)
  names = {True: set(), False: set()}
  for path, update in jax.tree.leaves_with_path(updates):
    names[bool((update < 0).all())].add(path[-1].key)
  assert names[False] == {'a_log', 'skip', 'delta_bias', 'conv_bias', 'scale', 'bias'}
  assert names[True] >= {'w_in', 'w_gate', 'w_out', 'w_select', 'w_delta', 'conv_kernel', 'router'}


def test_the_balance_bias_moves_against_the_load():
  from moejax.optimizer import OptimizerConfig, gradient_norm, make_optimizer

  fields = common.baseline().optimizer.to_dict() | {'balance_bias_rate': 0.25}
  optimizer = make_optimizer(OptimizerConfig(**fields), 10)
  params = {'balance_bias': jnp.zeros(3), 'router': jnp.ones((2, 3))}
  gradients = {'balance_bias': jnp.array([0.5, 0.0, -0.1]), 'router': jnp.full((2, 3), 2.0)}
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  np.testing.assert_allclose(updates['balance_bias'], [-0.25, 0.0, 0.25])
  np.testing.assert_allclose(gradient_norm(gradients), np.sqrt(6 * 4), rtol=1e-6)


def test_balance_without_a_loss():
  """Routing that starts lopsided is level after some steps of the bias alone."""
  from moejax.optimizer import OptimizerConfig, make_optimizer

  config = tiny.model_config(
    **tiny.MODELS['token choice'], moe_balance_bias=True, moe_balance_loss=0.0
  )
  fields = common.baseline().optimizer.to_dict() | {'balance_bias_rate': 0.02, 'peak_lr': 1e-9}
  optimizer = make_optimizer(OptimizerConfig(**fields), 100)
  _, measured = _steps(config, 40, optimizer=optimizer)
  first, last = (measured[i]['aux']['moe/load_cv'].mean() for i in (0, -1))
  assert last < 0.5 * first


@pytest.mark.parametrize('other', [mot, moe, fine_grained])
def test_equal_active_flops_at_every_size(other):
  from moejax import flops

  sizes = {mot: common.SIZES, moe: ['laptop'], fine_grained: ['laptop', *common.SCALING_SIZES]}
  for size in sizes[other]:
    pair = [_model_of(module, size) for module in (dense, other)]
    a, b = (flops.training_flops_per_token(model, 256)['model'] for model in pair)
    assert a == pytest.approx(b, rel=1e-9), size
    a, b = (module.get_config(size) for module in (dense, other))
    assert (a.train.steps, a.data) == (b.train.steps, b.data), size


def _model_of(module, size):
  from moejax.model import ModelConfig

  config = module.get_config(size)
  fields = {**config.model, 'vocab_size': 50_257, 'max_length': 256}
  return ModelConfig(**fields)
