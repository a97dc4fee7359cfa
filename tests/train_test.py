"""The step and the loop: resume equals never stopping, accumulation, golden losses."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import dense, fine_grained, moe, mot
from moejax import (
  cli,
  config as config_lib,
  evaluate,
  generate,
  goodput,
  manifest,
  metrics,
  model as model_lib,
  progress,
  report,
  results,
  run_folder,
  sharding,
  start,
  step as step_lib,
  train,
  variants,
)
from moejax.checkpoint import Checkpoints
from tests import tiny

pytestmark = pytest.mark.heavy


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


@pytest.mark.versions
def test_a_stopped_and_resumed_run_is_bitwise_the_run_that_never_stopped(
  finished, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    patch.setattr(train, 'Interrupt', lambda: _StopAfter(4))
    assert train.train(_debug_config(), tmp_path) == cli.INTERRUPTED
  assert Checkpoints(run_folder.checkpoint_dir(tmp_path)).latest_step() == 4  # between log lines
  until_then = report.read_summary(tmp_path)
  assert not report.is_finished(until_then)
  assert until_then['steps'] == 4 and until_then['config']['train']['steps'] == 6
  assert (tmp_path / 'loss.png').exists()
  assert train.train(_debug_config(), tmp_path) == cli.OK
  (step, params), (other_step, other_params) = _params_of(finished), _params_of(tmp_path)
  assert step == other_step == 6
  jax.tree.map(np.testing.assert_array_equal, params, other_params)
  assert metrics.loss_curve(finished) == metrics.loss_curve(tmp_path)
  (before, after) = (report.read_summary(folder)['training'] for folder in (finished, tmp_path))
  assert before == after and before['last_step'] == 6 and before['loss'] > 0
  assert report.is_finished(report.read_summary(tmp_path))


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
  assert summary['date'].endswith('Z')
  entropies = [e for e in metrics.read_metrics(finished)[0] if e.startswith('mot/entropy/')]
  assert entropies == ['mot/entropy/00', 'mot/entropy/01']


def _files(folder):
  """What every file of a run holds; the lease is of whoever came last."""
  paths = (path for path in folder.rglob('*') if path.is_file() and path.parent.name != 'lease')
  return {path: path.read_bytes() for path in paths}


def test_running_a_finished_run_again_changes_nothing(finished, monkeypatch):
  before = _files(finished)
  monkeypatch.setattr(train, 'set_up', None)  # not even compiled
  assert train.train(_debug_config(), finished) == cli.OK
  assert train.train(_debug_config(**{'train.log_interval': 1}), finished) == cli.OK
  assert _files(finished) == before


def test_a_plot_that_a_kill_prevented_is_made_by_the_next_start(finished, tmp_path):
  run = shutil.copytree(finished, tmp_path / 'run')
  (run / 'loss.png').unlink()
  assert train.train(_debug_config(), run) == cli.OK
  assert (run / 'loss.png').read_bytes() == (finished / 'loss.png').read_bytes()


def test_a_run_ended_between_its_last_checkpoint_and_its_summary_is_finished(finished, tmp_path):
  run = shutil.copytree(finished, tmp_path / 'run')
  (run / 'summary.json').write_text('{"steps": 6, "tra')
  changes = {'train.log_interval': 1, 'train.eval_batches': 1}
  assert train.train(_debug_config(**changes), run) == cli.OK
  before, after = map(report.read_summary, (finished, run))
  for name in ('config', 'train_loss', 'sample', 'steps', 'tokens_seen', 'history'):
    assert after[name] == before[name]
  assert after['validation'] == pytest.approx(before['validation'])
  until_then = json.loads((run / 'checkpoints' / '6' / 'metadata.json').read_text())['seconds']
  assert after['seconds'] > until_then > 0 == before['resumed_from']
  assert metrics.read_metrics(run) == metrics.read_metrics(finished)  # no evaluation stands twice


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'train.seed': 7, 'train.steps': 6}, 'trained with other.*\ntrain.seed: 0 there, 7 here'),
    ({'optimizer.peak_lr': 0.5}, 'trained with other.*\noptimizer.peak_lr: 0.006 there, 0.5 h'),
    ({'train.steps': 3}, r'train.steps = 3: the run in .* is at step 6 already'),
    (
      {'train.seed': 7, 'train.steps': 9},
      'began with another seed.*\ntrain.seed: 0 there, 7',
    ),
  ],
)
def test_settings_that_a_run_was_not_trained_with_are_refused(finished, changes, message):
  before = _files(finished)
  with pytest.raises(ValueError, match=message):
    train.train(_debug_config(**changes), finished)
  assert _files(finished) == before


def test_evaluation_of_a_run_gives_the_loss_in_its_summary(finished):
  run_config, _, params, mesh = run_folder.load_run(finished)
  from moejax import data

  loader = data.make_loader(run_config.data, 'validation')
  result, _ = evaluate.evaluate(
    run_config.model, params, loader, run_config.train.eval_batches, mesh
  )
  summary = json.loads((finished / 'summary.json').read_text())
  assert result['loss'] == pytest.approx(summary['validation']['loss'], rel=1e-5)


def test_generation_of_a_run(finished):
  run_config, _, params, _ = run_folder.load_run(finished)
  texts = generate.continuations(run_config.model, params, run_config.tokenizer, ['def ', 'x'], 8)
  assert [isinstance(text, str) for text in texts] == [True, True]


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
  from moejax.data import batch

  monkeypatch.setattr(batch, 'fingerprint', lambda *parts: 'another')
  monkeypatch.setattr(start, 'lower_train_step', None)  # not even compiled
  with pytest.raises(ValueError, match="data.source = 'stdlib' now gives another"):
    train.train(_debug_config(), finished)


def test_another_tokenizer_is_refused(finished, monkeypatch):
  from moejax.data import tokenizer

  monkeypatch.setattr(tokenizer, '_fingerprint', lambda *parts: 'another')
  with pytest.raises(ValueError, match='data.tokenizer: the checkpoint was trained with'):
    run_folder.load_run(finished)


def test_damaged_records_of_a_run_are_left_out_or_named(finished, tmp_path, monkeypatch):
  run = train.prepare(_debug_config(), shutil.copytree(finished, tmp_path / 'run'))
  with contextlib.closing(run_folder.checkpoints(run.workdir, run.run_config)) as run.checkpoints:
    metadata = run.checkpoints.metadata(6)
    monkeypatch.setattr(run.checkpoints, 'metadata', lambda _: metadata)
    for entry in ('[' * 100_000, '{"step": 6, "seconds": null}', '{"step": 6, "seconds": "x"}'):
      (run.workdir / 'goodput.json').write_text(entry)
      run.ledger = goodput.Ledger()
      assert train.resume(run) == 6 and run.ledger.training == pytest.approx(metadata['seconds'])
    for window in ([1, 2], {'total': 3}, None):
      metadata['window'] = window
      with pytest.raises(ValueError, match='cannot read the log window of checkpoint 6'):
        train.resume(run)
    bad = {'config': [], 'corpus': 3, 'history': {}, 'seconds': '1', 'goodput': {'other': 'x'}}
    for name, value in bad.items():
      monkeypatch.setattr(run.checkpoints, 'metadata', lambda _, n=name, v=value: metadata | {n: v})
      with pytest.raises(ValueError, match=f'checkpoint 6: {name} in its metadata.json is '):
        train.resume(run)


def _small_config(texts, **changes):
  """Of a run that takes as little time as one can."""
  fields = {'model.blocks': ((('mlp',), 1),), 'model.loss_chunk': 0, 'train.sample_length': 0}
  fields |= {'data.source': 'text', 'data.files': texts}
  return _debug_config(dense, **fields | changes)


DIVERGING = {'optimizer.peak_lr': 1e15, 'optimizer.clip_norm': 1e30, 'optimizer.warmup_steps': 0}
OFTEN = {'train.checkpoint_interval': 1, 'train.log_interval': 8, 'train.eval_interval': 8}


def _kept(workdir):
  """Steps with a checkpoint, all of which are finite and have a finite loss."""
  checkpoints = Checkpoints(run_folder.checkpoint_dir(workdir))
  run_config = config_lib.resolve(run_folder.read(workdir))
  with contextlib.closing(checkpoints):
    steps = manifest.steps(run_folder.checkpoint_dir(workdir))
    for step in steps:
      state = checkpoints.restore(step, tiny.abstract(step_lib.fresh_state(run_config)))
      assert step_lib.is_finite(state)
      assert np.isfinite(step_lib.eval_step(run_config.model, 1, state['params'], tiny.batch())[0])
  return steps


def test_a_run_that_diverges_at_once_saves_nothing(texts, tmp_path):
  config = _small_config(texts, **DIVERGING | OFTEN)
  for _ in range(2):  # the same command says the same
    with pytest.raises(RuntimeError, match='^training diverged: after step 1 .*; no checkpoint'):
      train.train(config, tmp_path)
    assert _kept(tmp_path) == []


def test_a_run_that_diverges_later_keeps_its_good_checkpoints(texts, tmp_path):
  good = _small_config(texts, **OFTEN | {'train.steps': 3, 'train.eval_interval': 3})
  assert train.train(good, tmp_path) == cli.OK
  bad = _small_config(texts, **DIVERGING | OFTEN)
  for _ in range(2):
    advice = 'the checkpoint of step 3 is good: lower optimizer.peak_lr'
    with pytest.raises(RuntimeError, match=f'^training diverged: after step 4 .*; {advice}'):
      train.train(bad, tmp_path)
    assert _kept(tmp_path) == [1, 2, 3]
  longer = _small_config(texts, **OFTEN | {'train.eval_interval': 2})  # the advice, followed
  seconds = report.read_summary(tmp_path)['seconds']
  assert train.train(longer, tmp_path) == cli.OK
  assert _kept(tmp_path) == [4, 5, 6]
  summary = report.read_summary(tmp_path)
  assert summary['config'] == json.loads(json.dumps(longer.to_dict()))
  assert summary['history'] == [
    {'from_step': 3, 'changes': {'train.eval_interval': [3, 2], 'train.steps': [3, 6]}}
  ]
  assert summary['seconds'] > seconds and summary['resumed_from'] == 3


def _told(workdir):
  """The lines of metrics.jsonl without times."""
  timed = ('seconds_per_step', 'tokens_per_second', 'wall_seconds')
  lines = metrics.read_metrics(workdir)
  return [{name: line[name] for name in line if name not in timed} for line in lines]


@pytest.fixture(scope='module')
def evaluated(texts, tmp_path_factory):
  """A config, and a run of it: evaluations at steps 2 and 4, and a last one."""
  fields = {'steps': 4, 'log_interval': 1, 'eval_interval': 2, 'checkpoint_interval': 100}
  fields |= {'eval_batches': 3, 'final_eval_batches': 3}
  config = _small_config(texts, **{f'train.{name}': value for name, value in fields.items()})
  workdir = tmp_path_factory.mktemp('evaluated')
  assert train.train(config, workdir) == cli.OK
  return config, workdir


@pytest.mark.parametrize(
  ('evaluation', 'number', 'step'),
  [(1, signal.SIGHUP, 2), (2, signal.SIGUSR1, 4), (3, signal.SIGTERM, 4)],
)
def test_a_signal_during_an_evaluation_saves_and_the_evaluation_is_made_up_for(
  evaluated, tmp_path, monkeypatch, evaluation, number, step
):
  config, whole = evaluated
  evaluate_batches, evaluations, batches = progress.evaluation, [], []

  def interrupted(*args, before_batch, **options):
    evaluations.append(1)

    def before():
      if len(evaluations) == evaluation:
        batches.append(1)
        if len(batches) == 2:
          os.kill(os.getpid(), number)
      before_batch()

    return evaluate_batches(*args, before_batch=before, **options)

  with monkeypatch.context() as patch:
    patch.setattr(progress, 'evaluation', interrupted)
    assert train.train(config, tmp_path) == cli.INTERRUPTED
  assert len(batches) == 2  # the third one is not waited for
  assert Checkpoints(run_folder.checkpoint_dir(tmp_path)).latest_step() == step
  assert train.train(config, tmp_path) == cli.OK
  assert _told(tmp_path) == _told(whole)
  assert train.train(config, tmp_path) == cli.OK
  assert _told(tmp_path) == _told(whole)


@pytest.fixture
def run(texts, tmp_path):
  """A Run of 3 steps with its state, before its first one; saves and evaluates once, at the end."""
  changes = {'train.steps': 3, 'train.log_interval': 2}
  run = train.prepare(_small_config(texts, **changes), tmp_path)
  with (
    contextlib.closing(run_folder.checkpoints(tmp_path, run.run_config)) as run.checkpoints,
    jax.set_mesh(run.mesh),
  ):
    train.set_up(run, train.resume(run))
    with contextlib.closing(run.writer):
      yield run


def _spoil(run, at, state):
  """Has a step lead to another state."""
  train_step = run.train_step

  def spoilt(state_before, *inputs):
    good, numbers = train_step(state_before, *inputs)
    if run.step + 1 != at:
      return good, numbers
    return good | state(good), numbers

  run.train_step = spoilt


def _overflow(state):
  return {'params': jax.tree.map(lambda a: a * 1e30, state['params'])}


def _hidden_nan(state):
  return {'step': state['step'], 'more': jnp.nan}


@pytest.mark.parametrize('state', [_overflow, _hidden_nan])
@pytest.mark.parametrize('at', [2, 3])  # before an interrupt; at the last step
def test_a_state_that_cannot_go_on_is_not_saved(run, state, at):
  _spoil(run, at, state)
  with pytest.raises(metrics.Diverged, match=f'after step {at} the .* not finite'):
    train.loop(run, _StopAfter(at))
  assert run.checkpoints.latest_step() is None


def test_a_validation_loss_that_is_not_finite_ends_the_run(run, monkeypatch):
  lost = types.SimpleNamespace(result={'loss': math.nan, 'tokens': 1}, extent={}, aux={})
  monkeypatch.setattr(progress, 'evaluation', lambda *_, **__: lost)
  with pytest.raises(metrics.Diverged, match='after step 3 the validation loss is not finite'):
    train.loop(run, _StopAfter(3))
  assert run.checkpoints.latest_step() is None


def _slow_first_step(run):
  """Has the first step of a process take ten seconds, by its clock."""
  train_step, first = run.train_step, run.step + 1

  def slow(*inputs):
    if run.step + 1 == first:
      run.averager.skip(-10)
    return train_step(*inputs)

  run.train_step = slow


def test_speeds_are_those_of_steps_without_the_first(run, monkeypatch, capsys):
  monkeypatch.setattr(train, '_STEPS_TO_ESTIMATE', 2)
  monkeypatch.setattr(progress.start_page, 'time_left', 'about {}'.format)
  run.averager.skip(-1000)  # what set-up might take
  _slow_first_step(run)
  assert train.loop(run, _StopAfter(3))
  first = metrics.read_metrics(run.workdir)[0]
  assert 0 < first['seconds_per_step'] < 5
  assert (
    first['tokens_per_second'] == run.run_config.data.tokens_per_step / first['seconds_per_step']
  )
  assert 'mfu' not in first  # of a CPU
  said = capsys.readouterr().out
  assert ' tok/s' in said and 'MFU' not in said and 'about' not in said  # less than ten seconds


def test_the_first_step_alone_has_no_speed(run, capsys):
  run.run_config = dataclasses.replace(
    run.run_config, train=dataclasses.replace(run.run_config.train, log_interval=1)
  )
  assert train.loop(run, _StopAfter(3))
  lines = [line for line in metrics.read_metrics(run.workdir) if 'loss' in line]
  assert ['seconds_per_step' in line for line in lines] == [False, True, True]
  line = capsys.readouterr().out.splitlines()[0]
  assert line.startswith('step 1/3') and 'tok/s' not in line and 'left' not in line


def test_the_time_of_a_run_includes_its_evaluations(run, monkeypatch, capsys):
  monkeypatch.setattr(progress.start_page, 'time_left', 'about {:.0f} s'.format)
  longer = dataclasses.replace(run.run_config.train, steps=103, eval_interval=50, eval_batches=30)
  longer = dataclasses.replace(longer, final_eval_batches=9)
  run.run_config, run.step = dataclasses.replace(run.run_config, train=longer), 3
  run.averager = types.SimpleNamespace(means=lambda: {'seconds_per_step': 2.0})
  progress.estimate(run)
  # 100 steps; at 50, 100 and 103 evaluations that take as long as 10, and at the end one of 3.
  assert capsys.readouterr().out == 'about 266 s\n'
  run.averager = types.SimpleNamespace(means=dict)
  progress.estimate(run)
  assert not capsys.readouterr().out


def test_mfu_is_relative_to_a_peak_that_is_known(run):
  run.peak_flops = 1e9
  assert train.loop(run, _StopAfter(3))
  first = metrics.read_metrics(run.workdir)[0]
  rate = first['tokens_per_second'] * run.flops_per_token['model']
  assert first['mfu'] == pytest.approx(rate / 1e9)


def test_a_summary_of_the_last_checkpoint_is_not_that_of_the_run(run):
  assert train.loop(run, _StopAfter(3))
  assert report.read_summary(run.workdir)['steps'] == 3 and not train.is_finished(run)
  train.finish(run)
  assert train.is_finished(run)


def test_steps_in_which_clipping_bound_are_counted(run):
  """Of a run whose threshold lies between its gradient norms."""
  train_config = dataclasses.replace(run.run_config.train, log_interval=1)
  run.run_config = dataclasses.replace(run.run_config, train=train_config)
  norms = []
  train_step = run.train_step

  def step(*args):
    state, measured = train_step(*args)
    norms.append(float(measured['grad_norm']))
    return state, measured

  run.train_step = step
  assert train.loop(run, _StopAfter(3))
  train.finish(run)
  clipped = dict(metrics.loss_curve(run.workdir, 'clipped'))
  clip_norm = run.run_config.optimizer.clip_norm
  assert clipped == {i: float(norm >= clip_norm) for i, norm in enumerate(norms, 1)}
  training = report.read_summary(run.workdir)['training']
  assert training['clipped'] == np.mean([*clipped.values()])
  assert training['epochs'] == 3 * 16 / run.loader.num_sequences < 1


@pytest.mark.parametrize('factor', [0.999, 1.001])
def test_a_step_is_clipped_if_its_update_is_that_of_a_smaller_gradient(factor):
  config = _debug_config(dense)
  config.optimizer.update({'b1': 0.0, 'b2': 0.0, 'eps': 1.0})

  def step(clip_norm):
    config.optimizer.clip_norm = clip_norm
    run_config = config_lib.resolve(config)
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1, -1))
    with jax.set_mesh(mesh):
      abstract = sharding.abstract(step_lib.fresh_state(run_config), mesh)
      state = step_lib.make_state(step_lib.fresh_state(run_config), abstract)
      batch = sharding.place_batch(tiny.batch(rows=16, length=32), mesh)
      train_step = step_lib.jit_train_step(run_config, abstract, mesh)
      return train_step(state, batch, step_lib.make_clock(run_config)(0))[1]

  free = step(1e9)
  measured = step(factor * float(free['grad_norm']))
  is_changed = float(measured['update_norm']) != float(free['update_norm'])
  assert measured['clipped'] == (factor < 1) == is_changed and not free['clipped']


def test_the_curve_is_of_the_first_batches_and_the_summary_of_the_whole_split(run, capsys):
  few = dataclasses.replace(run.run_config.train, eval_batches=2, final_eval_batches=0)
  run.run_config = dataclasses.replace(run.run_config, train=few)
  assert train.loop(run, _StopAfter(3))
  train.finish(run)
  said, loader = capsys.readouterr().out, run.eval_loader
  counted = [batch['counted'] & (batch['segments'] > 0) for batch in _batches_of(loader)]
  tokens, sequences = int(np.sum(counted)), sum(int(rows.any(1).sum()) for rows in counted)
  result = report.read_summary(run.workdir)['validation']
  assert result['whole_split'] and result['batches'] == loader.num_batches > 2
  assert (result['tokens'], result['sequences']) == (tokens, sequences)
  assert sequences == loader.num_sequences
  documents = sum(
    sum((batch['targets'] == 1)[counted[i]]) for i, batch in enumerate(_batches_of(loader))
  )
  assert result['documents'] == documents > 1
  at_the_end = {entry['step']: entry for entry in metrics.read_metrics(run.workdir)}
  of_curve = [e for e in metrics.read_metrics(run.workdir) if 'validation/loss' in e]
  assert of_curve[-1]['validation/tokens'] == 2 * 16 * 32 and of_curve[-1]['step'] == 3
  assert at_the_end[3]['final/loss'] == result['loss'] != of_curve[-1]['validation/loss']
  assert 'nats per token' in said and 'first 2 batches\n' in said
  assert f'averaged over the whole validation split: {documents} documents, ' in said


def _batches_of(loader):
  return [loader.batch(step) for step in range(loader.num_batches)]


def test_a_failing_plot_leaves_the_run_saved(run, monkeypatch, capsys):
  monkeypatch.setattr(report, 'plot_losses', lambda *_: 1 / 0)
  assert train.loop(run, _StopAfter(3))
  train.finish(run)
  assert 'warning: no loss.png: ZeroDivisionError' in capsys.readouterr().out
  assert train.is_finished(run)


def test_what_cannot_be_written_beside_the_checkpoints_ends_no_run(run, monkeypatch, capsys):
  often = {'log_interval': 1, 'eval_interval': 1, 'checkpoint_interval': 1}
  often = dataclasses.replace(run.run_config.train, **often)
  run.run_config = dataclasses.replace(run.run_config, train=often)
  evaluation = progress.evaluation

  def routed(*args, **options):
    done = evaluation(*args, **options)
    aux = {'moe/load': np.ones((1, 2))}
    return types.SimpleNamespace(result=done.result, extent=done.extent, aux=aux)

  monkeypatch.setattr(progress, 'evaluation', routed)
  for name in ('router.png', 'goodput.json', 'loss.png'):
    (run.workdir / name).unlink(missing_ok=True)
    (run.workdir / name / 'x').mkdir(parents=True)  # a folder in place of the file
  with monkeypatch.context() as patch:
    patch.setattr(report, 'write_summary', lambda *_: open('/no/such', 'w'))
    assert train.loop(run, _StopAfter(3))
  train.finish(run)
  said = capsys.readouterr().out
  for name in ('router.png', 'goodput.json', 'loss.png', 'summary.json'):
    assert said.count(f'warning: no {name}: ') == 1
  assert train.is_finished(run) and run.checkpoints.latest_step() == 3


def test_a_failing_sample_leaves_the_run_finished(run, monkeypatch, capsys):
  def fail(*args):
    raise IndexError('no such token')

  monkeypatch.setattr(results, 'continuations', fail)
  sampling = dataclasses.replace(run.run_config.train, sample_length=2)
  run.run_config = dataclasses.replace(run.run_config, train=sampling)
  assert train.loop(run, _StopAfter(3))
  train.finish(run)
  assert 'warning: no sample: IndexError: no such token' in capsys.readouterr().out
  assert train.is_finished(run) and (run.workdir / 'loss.png').exists()


def test_a_loader_that_cannot_be_saved_is_refused_before_training(texts, tmp_path, monkeypatch):
  from moejax.data import loader

  asked = []  # a seqio iterator that has not started can always be saved
  batch = loader.TokenLoader.batch
  monkeypatch.setattr(loader.TokenLoader, 'batch', lambda *args: asked.append(args) or batch(*args))

  def fail(self, directory):
    assert asked
    raise ValueError('data.task: its position cannot be saved')

  monkeypatch.setattr(loader.TokenLoader, 'save', fail)
  with pytest.raises(ValueError, match='its position cannot be saved'):
    train.train(_small_config(texts), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_checkpoint_that_is_not_finite_is_named(texts, tmp_path):
  config = _small_config(texts)
  run_config = config_lib.resolve(config)
  state = step_lib.fresh_state(run_config)()
  run = train.prepare(config, tmp_path)
  with contextlib.closing(run_folder.checkpoints(tmp_path, run.run_config)) as checkpoints:
    state['params'] = jax.tree.map(lambda a: a * jnp.nan, state['params'])
    checkpoints.save(2, state, run.loader, run.describe())
  with pytest.raises(ValueError, match='checkpoints/2 holds numbers that are not finite. Delete'):
    train.train(config, tmp_path)


def test_a_renamed_checkpoint_is_named(evaluated, tmp_path):
  config, whole = evaluated
  workdir = shutil.copytree(whole, tmp_path / 'run')
  config = config.copy_and_resolve_references()
  config.train.steps = 9
  steps = run_folder.checkpoint_dir(workdir)
  (steps / '4').rename(steps / '7')
  with pytest.raises(ValueError, match='checkpoints/7 holds step 4. Give the folder that name'):
    train.train(config, workdir)
  (steps / '7').rename(steps / '04')
  assert train.train(config, workdir) == cli.OK  # from the beginning
  assert (steps / '04').exists()


def test_a_run_goes_on_from_a_damaged_config_and_summary(evaluated, tmp_path, capsys):
  config, whole = evaluated
  workdir = shutil.copytree(whole, tmp_path / 'run')
  (workdir / 'config.json').write_bytes(bytes(99))
  (workdir / 'summary.json').write_text('{"finished": true, ')
  assert train.train(config, workdir) == cli.OK
  said = capsys.readouterr()
  assert 'summary.json is damaged, and is written again' in said.out
  assert 'config of checkpoint 4 is used' in said.err
  assert report.is_finished(report.read_summary(workdir))
  assert run_folder.read(workdir).to_dict() == config.to_dict()
  assert not capsys.readouterr().err  # rebuilt


def test_training_without_jit(texts, tmp_path):
  sizes = {'data.batch_size': 2, 'data.sequence_length': 8, 'train.eval_batches': 1}
  with jax.disable_jit():
    assert train.train(_small_config(texts, **sizes, **{'train.steps': 1}), tmp_path) == cli.OK
  assert report.read_summary(tmp_path)['steps'] == 1


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
    ({'train.sample_prompt': 'x' * 32}, "has 32 tokens of data.tokenizer = 'bytes'; expected 1 to"),
    ({'mesh.tensor': 3}, 'does not fit 8 devices'),
    ({'mesh.tensor': 1, 'mesh.data': 8, 'data.batch_size': 12}, 'cannot be split over the 8'),
    ({'model.num_heads': 4}, 'mesh.tensor = 8 must divide the 4 heads .model.num_heads.'),
    (
      {'model.d_ff': 60, 'model.blocks': ((('mlp',), 2),)},
      'mesh.tensor = 8 must divide the 60 hidden units of a feed-forward',
    ),
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
    tiny.train_step(
      config, optimizer, accumulation=accumulation, schedule=lambda step: jnp.float32(learning_rate)
    )
  )
  measured = []
  for i in range(num_steps):
    state, metrics_now = step(state, tiny.batch(seed=i))
    measured.append(metrics_now)
  return state, measured


@pytest.mark.heavy
@pytest.mark.parametrize('model', ['mot', 'token choice'])
def test_accumulation_gives_the_gradient_of_the_whole_batch(model):
  fields = tiny.MODELS[model] | {'moe_balance_loss': 0.0, 'moe_capacity_factor': 8.0}
  config = tiny.model_config(**fields)
  optimizer = optax.sgd(0.1)  # what a step changes is the gradient
  whole, measured = _steps(config, 2, optimizer=optimizer)
  parts, measured_parts = _steps(config, 2, accumulation=2, optimizer=optimizer)
  for name in ('loss', 'grad_norm', 'update_norm'):
    np.testing.assert_allclose(measured_parts[1][name], measured[1][name], rtol=1e-5)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, parts['params'], whole['params'])
  assert all(a.shape[0] == 2 for a in measured_parts[0]['aux'].values())


def test_an_update_is_measured_whatever_the_gradient():
  state, (measured,) = _steps(tiny.model_config(), 1, optimizer=optax.sgd(0.1))
  np.testing.assert_allclose(measured['update_norm'], 0.1 * measured['grad_norm'], rtol=1e-5)
  assert measured['skipped'] == 0 and step_lib.is_finite(state)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_a_skipped_update_changes_the_step_alone(name):
  from moejax.optimizer import OptimizerConfig, make_optimizer

  optimizer = make_optimizer(OptimizerConfig(name=name, warmup_steps=0), 10)
  bad = tiny.batch()
  bad |= {'segments': np.zeros_like(bad['segments'])}  # without a target, the mean is 0 / 0
  model = tiny.model_config(**tiny.MODELS['token choice'], moe_balance_bias=True)
  state = jax.jit(lambda key: step_lib.init_state(model, optimizer, key))(jax.random.key(0))
  step = tiny.train_step(model, optimizer, accumulation=2, schedule=lambda step: jnp.float32(1.0))
  after, measured = jax.jit(step)(state, bad)
  assert measured['skipped'] == 1 and np.isnan(measured['loss'])
  assert (int(state.pop('step')), int(after.pop('step'))) == (0, 1)
  jax.tree.map(np.testing.assert_array_equal, state, after)


def test_evaluation_takes_no_more_memory_than_training(texts):
  sizes = {'model.blocks': ((('mlp',), 2),), 'model.remat': 'full', 'model.loss_chunk': 8}
  sizes |= {'data.batch_size': 512, 'optimizer.accumulation': 64}
  run_config = config_lib.resolve(_small_config(texts, **sizes))
  mesh = sharding.make_mesh(run_config.mesh)
  with jax.set_mesh(mesh):
    state = sharding.abstract(step_lib.fresh_state(run_config), mesh)
    training = step_lib.lower_train_step(run_config, state, mesh).compile()
    evaluation = step_lib.lower_eval_step(run_config, state['params'], mesh).compile()
  used = [program.memory_analysis().temp_size_in_bytes for program in (evaluation, training)]
  assert used[0] <= used[1]


def _programs(config):
  """What a run compiles before its first step, as text: the state, a training step, evaluation."""
  run_config = config_lib.resolve(config)
  mesh = sharding.make_mesh(run_config.mesh)
  init = step_lib.fresh_state(run_config)
  with jax.set_mesh(mesh):
    state = sharding.abstract(init, mesh)
    training = step_lib.lower_train_step(run_config, state, mesh)
    evaluation = step_lib.lower_eval_step(run_config, state['params'], mesh)
  programs = (jax.jit(lambda init: init()).lower(init), training, evaluation)
  return [program.as_text() for program in programs]


def test_runs_that_differ_in_rate_duration_and_seed_share_their_compiled_programs(texts):
  changes = {'optimizer.peak_lr': 0.02, 'optimizer.warmup_steps': 3, 'train.steps': 77}
  changes |= {'optimizer.final_lr_fraction': 0.0, 'optimizer.schedule_start': 1, 'train.seed': 5}
  changes |= {'optimizer.anneal_from': 4, 'data.seed': 6}
  noisy = {'model.blocks': ((('attention', 'mot'), 1), (('attention', 'moe'), 1))}
  noisy |= {'model.mot.temperature_mode': 'annealed', 'model.moe.jitter': 0.1}
  one, other = (_programs(_small_config(texts, **noisy | c)) for c in ({}, changes))
  assert one == other
  assert _programs(_small_config(texts, **noisy, **{'optimizer.b1': 0.8}))[1] != one[1]


@pytest.mark.parametrize('seed', [0, 5, 2**31, 2**32 - 1])
def test_a_seed_that_is_an_input_gives_the_same_keys(seed):
  data = lambda seed: jax.random.key_data(step_lib.noise_key(seed))
  np.testing.assert_array_equal(jax.jit(data)(np.uint32(seed)), data(seed))


def test_a_clock_shows_the_schedules_of_every_step(texts):
  from moejax.optimizer import make_schedules

  fields = {'train.steps': 7, 'train.seed': 3, 'optimizer.warmup_steps': 2}
  run_config = config_lib.resolve(_small_config(texts, **fields, **{'optimizer.anneal_from': 3}))
  clock, schedules = step_lib.make_clock(run_config), make_schedules(run_config.optimizer, 7)
  for step in range(7):
    now = clock(step)
    np.testing.assert_allclose(now[:2], [schedule(step) for schedule in schedules], rtol=1e-6)
    assert now.seed == 3 and {value.dtype for value in now[:2]} == {np.dtype('float32')}


def test_microbatches_of_an_evaluation_hold_whole_groups():
  config = tiny.model_config()
  assert step_lib.microbatches(config, 64, 8) == 8
  assert step_lib.microbatches(config.with_mot(group_size=32), 64, 8) == 2
  assert step_lib.microbatches(config.with_mot(group_size=64), 64, 8) == 1


def test_noise_has_a_key_of_its_own():
  data = lambda key: jax.random.key_data(key).tolist()
  drawn = [data(jax.random.fold_in(jax.random.key(3), i)) for i in range(100)]  # parameters'
  noise = [data(jax.random.fold_in(step_lib.noise_key(3), step)) for step in range(100)]
  assert len({*map(tuple, drawn), *map(tuple, noise)}) == 200


def test_a_state_made_with_less_effort_is_the_same_and_sharded(texts, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '')  # as users have it
  run_config = config_lib.resolve(_small_config(texts))
  mesh = sharding.make_mesh(run_config.mesh)
  init = step_lib.fresh_state(run_config)
  with jax.set_mesh(mesh):
    abstract = sharding.abstract(init, mesh)
    state = step_lib.make_state(init, abstract)
  usual = jax.jit(init, compiler_options={'xla_backend_optimization_level': 3})
  jax.tree.map(np.testing.assert_array_equal, state, usual())
  assert jax.tree.map(lambda a: a.sharding, state) == jax.tree.map(lambda a: a.sharding, abstract)


@pytest.mark.versions
@pytest.mark.parametrize('model', tiny.MODELS)
def test_golden_losses_of_five_steps(model, golden):
  _, measured = _steps(tiny.model_config(**tiny.MODELS[model], init_scale=1.0), 5)
  numbers = {key: [float(m[key]) for m in measured] for key in ('loss', 'grad_norm')}
  golden(f'five_steps_{model.replace(" ", "_")}', numbers, rtol=2e-6)


def test_the_schedule_warms_up_peaks_and_ends_at_its_fraction():
  from moejax.optimizer import OptimizerConfig, make_schedule

  fields = {'peak_lr': 2.0, 'warmup_steps': 10}
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

  fields = {'warmup_steps': 0}
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
  optimizer = make_optimizer(OptimizerConfig(), 10)
  step = tiny.train_step(config, optimizer, schedule=make_schedule(OptimizerConfig(), 10))
  state = jax.eval_shape(lambda: step_lib.init_state(config, optimizer, jax.random.key(0)))
  after, measured = jax.eval_shape(step, state, tiny.batch())
  assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, state)
  assert {a.dtype for a in jax.tree.leaves(state)} == {jnp.dtype('bfloat16'), jnp.dtype('int32')}
  assert {a.dtype for a in jax.tree.leaves(measured)} == {jnp.dtype('float32')}


def _optimizer(**changes):
  from moejax.optimizer import OptimizerConfig, make_optimizer

  fields = {'warmup_steps': 0}
  return make_optimizer(OptimizerConfig(**fields | changes), 10)


def _moments(state):
  """The arrays of the first and of the second moment."""
  named = jax.tree.leaves_with_path(state['optimizer'])
  of = lambda moment: [a for path, a in named if f'.{moment}[' in jax.tree_util.keystr(path)]
  return of('mu'), of('nu')


@pytest.mark.heavy
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
  restored = checkpoints.restore(5, tiny.abstract(lambda: state), None)
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

  fields = {'anneal_from': 2}
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

  fields = {'warmup_steps': 0, 'decay': 'matrices'}
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

  fields = {'balance_bias_rate': 0.25}
  optimizer = make_optimizer(OptimizerConfig(**fields), 10)
  params = {'balance_bias': jnp.zeros(3), 'router': jnp.ones((2, 3))}
  gradients = {'balance_bias': jnp.array([0.5, 0.0, -0.1]), 'router': jnp.full((2, 3), 2.0)}
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  np.testing.assert_allclose(updates['balance_bias'], [-0.25, 0.0, 0.25])
  np.testing.assert_allclose(gradient_norm(gradients), np.sqrt(6 * 4), rtol=1e-6)


@pytest.mark.heavy
def test_balance_without_a_loss():
  """Routing that starts lopsided is level after some steps of the bias alone."""
  from moejax.optimizer import OptimizerConfig, make_optimizer

  config = tiny.model_config(
    **tiny.MODELS['token choice'], moe_balance_bias=True, moe_balance_loss=0.0
  )
  fields = {'balance_bias_rate': 0.02, 'peak_lr': 1e-9}
  optimizer = make_optimizer(OptimizerConfig(**fields), 100)
  _, measured = _steps(config, 40, optimizer=optimizer)
  first, last = (measured[i]['aux']['moe/load_cv'].mean() for i in (0, -1))
  assert last < 0.5 * first


@pytest.mark.parametrize('other', [mot, moe, fine_grained])
def test_equal_active_flops_at_every_size(other):
  from moejax import flops

  sizes = {mot: variants.SIZES, moe: ['laptop'], fine_grained: ['laptop', *variants.SCALING_SIZES]}
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
