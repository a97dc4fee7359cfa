"""Runs of several durations that train their shared steps once."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest

from moejax import (
  checkpoint,
  cli,
  config as config_lib,
  metrics,
  report,
  run_folder,
  runner,
  step as step_lib,
  train,
)
from moejax.data import loader as loader_lib
from tests import tiny

pytestmark = pytest.mark.heavy
TIMES = {'seconds_per_step', 'tokens_per_second', 'wall_seconds'}


@pytest.fixture(scope='module')
def fields(tmp_path_factory):
  """Of runs that take as little time as they can, and save seldom."""
  folder = tmp_path_factory.mktemp('texts')
  for i in range(30):
    (folder / f'{i}.txt').write_text(f'text {i}, of a few words\n' * 20)
  values = {'model.blocks': "((('mlp',),1),)", 'data.source': 'text'}
  values |= {'data.files': f'{folder}/*.txt', 'train.sample_length': 0, 'train.log_interval': 3}
  values |= {'train.eval_interval': 5, 'train.keep_checkpoints': 1, 'optimizer.warmup_steps': 2}
  values |= {'optimizer.schedule': 'wsd', 'optimizer.accumulation': 1, 'train.trackers': '()'}
  return {name: str(value) for name, value in values.items()}


@pytest.fixture(autouse=True)
def loader_with_a_position(monkeypatch):
  """Has the loader save the number of batches, as those of streams do, and check it."""
  read = loader_lib.TokenLoader.batch

  def batch(self, step):
    self.position = step + 1
    return read(self, step)

  save = lambda self, folder: (folder / 'position').write_text(str(self.position))
  load = lambda self, folder: setattr(self, 'position', int((folder / 'position').read_text()))
  for name, method in {'batch': batch, 'save': save, 'load': load}.items():
    monkeypatch.setattr(loader_lib.TokenLoader, name, method)


class _Process:
  """Stands in for a training process: trains in this one, as soon as it is started."""

  started = []

  def __init__(self, arguments, **_):
    *arguments, workdir = arguments[3:]
    self.started.append(workdir.rpartition('/')[2])
    config = cli.config_of(arguments)
    try:
      self.returncode = train.train(config, workdir.removeprefix('--workdir='))
    except RuntimeError as error:
      self.returncode = getattr(error, 'exit_code', cli.FAILED)

  def poll(self):
    return self.returncode


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
  monkeypatch.setattr(runner.subprocess, 'Popen', _Process)
  monkeypatch.setattr(runner, '_backend', lambda: 'cpu')
  monkeypatch.setattr(runner, '_POLL_SECONDS', 0)
  monkeypatch.setattr(_Process, 'started', [])


def _cell(fields, steps, **changed):
  changed = {f'{name.replace("__", ".")}': str(value) for name, value in changed.items()}
  fields = fields | {'train.steps': str(steps)} | changed
  name = '-'.join([str(steps), *changed.values()])
  config = 'configs/dense.py:debug'
  return runner.Cell(name=name, config=config, fields=fields, steps=steps, params=1, flops=1.0)


def _state(workdir):
  """The newest state of a run, and the position in its data."""
  run_config = config_lib.resolve(run_folder.read(workdir))
  abstract = tiny.abstract(step_lib.fresh_state(run_config))
  with contextlib.closing(run_folder.checkpoints(workdir, run_config)) as checkpoints:
    step = checkpoints.latest_step()
    state = jax.device_get(checkpoints.restore(step, abstract))
  return state, (run_folder.checkpoint_dir(workdir) / str(step) / 'data' / 'position').read_text()


def _assert_same_run(workdir, other, but=()):
  jax.tree.map(np.testing.assert_array_equal, _state(workdir), _state(other))
  lines = [
    [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    for lines in map(metrics.read_metrics, (workdir, other))
  ]
  assert lines[0] == lines[1]
  summaries = [report.read_summary(folder) for folder in (workdir, other)]
  same = ('config', 'steps', 'tokens_seen', 'validation', 'train_loss', 'history', 'finished')
  for name in set(same) - set(but):
    assert summaries[0][name] == summaries[1][name], name


@pytest.fixture(scope='module')
def whole(fields, tmp_path_factory):
  """Runs of 20 and 41 steps, each trained whole."""
  folder = tmp_path_factory.mktemp('whole')
  with pytest.MonkeyPatch.context() as patch:
    loader_with_a_position.__wrapped__(patch)
    for steps in (20, 41):
      cell = _cell(fields, steps)
      assert train.train(cli.config_of(cell.arguments[2:]), folder / cell.name) == cli.OK
  return folder


def test_forked_runs_are_bitwise_those_that_are_trained_whole(fields, whole, tmp_path, capsys):
  cells = [_cell(fields, steps) for steps in (41, 10, 20)]
  other = _cell(fields, 20, train__seed=1)  # shares nothing
  assert runner.run([*cells, other], tmp_path) == cli.OK
  printed = capsys.readouterr().out
  # 8 of 10 and 16 of 20 steps are before the decay.
  assert '67 steps to train instead of 91: 24, before learning rates decay, are shared' in printed
  assert '4 of 4 cells are done' in printed
  assert _Process.started == ['10', '20', '41', '20-1']
  for steps in ('20', '41'):
    _assert_same_run(tmp_path / steps, whole / steps)
  origins = {c.name: report.read_summary(tmp_path / c.name)['origin'] for c in (*cells, other)}
  assert origins['41'] == {'forked_from': '20', 'step': 16}
  assert origins['20'] == {'forked_from': '10', 'step': 8}
  assert origins['10'] is origins['20-1'] is None
  kept = {path.name for path in run_folder.checkpoint_dir(tmp_path / '20').iterdir()}
  assert kept == {'16', '20'}  # where its decay begins, and the newest


def test_an_interrupted_fork_resumes(fields, whole, tmp_path, monkeypatch):
  cells = [_cell(fields, steps) for steps in (10, 20)]

  class Interrupted(train.Interrupt):
    def reached(self, step):
      return step == 12  # the second run, on its way to its decay

  with monkeypatch.context() as patch:
    patch.setattr(train, 'Interrupt', Interrupted)
    assert runner.run(cells, tmp_path) == cli.FAILED  # as far as the stand-in can tell
  assert not runner.is_done(tmp_path, cells[1])
  assert runner.run(cells, tmp_path) == cli.OK
  _assert_same_run(tmp_path / '20', whole / '20')
  assert report.read_summary(tmp_path / '20')['resumed_from'] == 12


def test_a_finished_run_goes_on_from_where_its_decay_began(fields, whole, tmp_path):
  shutil.copytree(whole / '20', tmp_path / 'run')
  shutil.rmtree(run_folder.checkpoint_dir(tmp_path / 'run') / '20')
  config = cli.config_of(_cell(fields, 41).arguments[2:])
  assert train.train(config, tmp_path / 'run') == cli.OK
  _assert_same_run(tmp_path / 'run', whole / '41', but=['history'])
  (change,) = report.read_summary(tmp_path / 'run')['history']
  assert change == {'from_step': 16, 'changes': {'train.steps': [20, 41]}}


def test_a_fork_that_is_killed_is_made_again(fields, whole, tmp_path, monkeypatch):
  cells = [_cell(fields, steps) for steps in (10, 20)]

  def killed(*paths):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(checkpoint, '_share', killed)
    runner.run(cells, tmp_path)
  assert (tmp_path / '20' / 'metrics.jsonl').exists() and _Process.started == ['10']
  assert runner.run(cells, tmp_path) == cli.OK
  _assert_same_run(tmp_path / '20', whole / '20')
  assert report.read_summary(tmp_path / '20')['resumed_from'] == 8


def test_a_damaged_checkpoint_is_not_forked(fields, whole, tmp_path, capsys):
  cells = [_cell(fields, steps) for steps in (10, 20)]
  assert runner.run(cells[:1], tmp_path) == cli.OK
  (run_folder.checkpoint_dir(tmp_path / '10') / '8' / 'data' / 'position').write_text('9')
  assert runner.run(cells, tmp_path) == cli.OK
  assert 'note: 20 is trained from its first step' in capsys.readouterr().err
  _assert_same_run(tmp_path / '20', whole / '20')


def test_a_checkpoint_of_other_settings_is_not_forked(fields, tmp_path):
  cells = [_cell(fields, steps) for steps in (10, 20)]
  assert runner.run(cells[:1], tmp_path) == cli.OK
  path = run_folder.checkpoint_dir(tmp_path / '10') / '8' / 'metadata.json'
  metadata = json.loads(path.read_text())
  metadata['history'] = [{'from_step': 4, 'changes': {'optimizer.peak_lr': [1, 2]}}]
  path.write_text(json.dumps(metadata))
  assert runner.run(cells, tmp_path) == cli.OK
  assert report.read_summary(tmp_path / '20')['resumed_from'] == 0


def test_a_cell_waits_for_the_steps_that_another_one_trains(fields, tmp_path):
  short, long = cells = [_cell(fields, steps) for steps in (10, 20)]
  settings = {cell.name: runner.settings_of(cell) for cell in cells}
  scheduler = runner._Scheduler(cells, tmp_path, None, settings, runner._sources(cells, settings))
  ready = lambda: [cell.name for cell in cells if scheduler._is_ready(cell)]
  assert ready() == ['10']
  scheduler.waiting.remove(short)
  scheduler.running['process'] = short
  assert ready() == ['10']
  step = run_folder.checkpoint_dir(tmp_path / '10') / '8'
  step.mkdir(parents=True)
  (step / 'manifest.json').touch()
  assert ready() == ['10', '20']  # although the short one is still training
  (step / 'manifest.json').unlink()
  scheduler.running.clear()
  assert ready() == ['10', '20']  # it failed
