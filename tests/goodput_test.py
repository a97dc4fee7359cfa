"""The ledger of wall time adds up, over interrupts and kills; and profiler traces of steps."""

import gzip
import json
import time

import pytest

from configs import dense
from moejax import config as config_lib, goodput, metrics, profiling, report, train


class Clock:
  """A clock that moves when it is told to."""

  def __init__(self, now=1000.0):
    self.now = now

  def __call__(self):
    return self.now


def _ledger(clock, **seconds):
  """A ledger that began now, and saw these phases."""
  ledger = goodput.Ledger(clock=clock)
  for phase, duration in seconds.items():
    clock.now += duration
    ledger.lap(phase)
  return ledger


def test_every_second_is_in_one_phase():
  clock = Clock()
  ledger = goodput.Ledger(began=clock.now - 5, clock=clock)
  ledger.lap('start_up')
  for phase, seconds in [('compile', 10), ('input', 1), ('step', 30), ('input', 1), ('step', 50)]:
    clock.now += seconds
    ledger.lap(phase)
  assert {phase: s for phase, s in ledger.seconds.items() if s} == {
    'start_up': 5, 'compile': 10, 'input': 2, 'step': 80,
  }  # fmt: skip
  assert ledger.wall == 97 and ledger.training == 82
  assert ledger.describe() == 'goodput 82% of 1m37s: start-up 5 s, compile 10 s, input 2 s'


def test_an_interrupted_run_loses_nothing(tmp_path):
  clock = Clock()
  first = _ledger(clock, start_up=5, compile=10, step=20)
  saved = dict(first.seconds)  # in the checkpoint
  clock.now += 3
  first.lap('checkpoint')
  first.write(tmp_path, 20)
  clock.now += 1e6  # nobody trains
  second = _ledger(clock, start_up=6, restore=1)
  second.resume(tmp_path, 20, saved)
  assert second.wall == 38 + 7 and second.seconds['lost'] == 0
  assert second.training == first.training == 23


def test_work_that_is_done_again_is_lost(tmp_path):
  clock = Clock()
  first = _ledger(clock, start_up=5, step=20, checkpoint=3)
  first.write(tmp_path, 20)
  writer = metrics.MetricsWriter(tmp_path, 0)
  clock.now += 12
  first.lap('step')
  writer.write(30, {'wall_seconds': first.wall})  # and then it is killed
  writer.close()
  second = _ledger(clock, start_up=6)
  second.resume(tmp_path, 20, {'step': 20.0})
  assert second.wall == 40 + 6 and second.seconds['lost'] == 12
  second.write(tmp_path, 20)  # killed before its first log line, which dropped those of the first
  metrics.MetricsWriter(tmp_path, 20).close()
  third = _ledger(clock, start_up=7)
  third.resume(tmp_path, 20, {'step': 20.0})
  assert third.wall == 46 + 7


def test_without_a_checkpoint_all_is_lost(tmp_path):
  clock = Clock()
  _ledger(clock, start_up=5, step=20).write(tmp_path, 0)
  second = _ledger(clock, start_up=6)
  second.resume(tmp_path, 0, {})
  assert second.wall == 31 and second.training == second.seconds['step'] == 20


@pytest.mark.parametrize('damage', ['', '[1]', '{"step": 20}', '[' * 100_000])
def test_a_damaged_ledger_counts_as_none(tmp_path, damage):
  (tmp_path / 'goodput.json').write_text(damage)
  ledger = goodput.Ledger()
  ledger.resume(tmp_path, 20, {'step': 9.0})
  assert ledger.wall == ledger.training == 9


@pytest.fixture
def config(tmp_path):
  for i in range(30):
    (tmp_path / f'{i}.txt').write_text(f'text {i}, of a few words\n' * 20)
  config = dense.get_config('debug')
  config.model.blocks = ((('mlp',), 1),)
  config.data.update({'source': 'text', 'files': f'{tmp_path}/*.txt'})
  config.train.update({'steps': 12, 'log_interval': 2, 'eval_interval': 6, 'sample_length': 0})
  config.train.checkpoint_interval = 4
  return config


class _Killed(BaseException):
  """As if the process had died."""


class _Interrupt(train.Interrupt):
  """An interrupt before a given step, or a kill."""

  def __init__(self, step, kill):
    super().__init__()
    self._at, self._kill = step, kill

  def reached(self, step):
    if step == self._at and self._kill:
      raise _Killed
    return step >= self._at


@pytest.mark.heavy
def test_the_phases_of_a_run_add_up_over_its_processes(config, tmp_path, monkeypatch, capsys):
  wall = 0.0
  config.train.profile_steps = '2:5'
  folder = tmp_path / 'run'
  for step, kill in ((3, False), (7, True), (12, False)):
    monkeypatch.setattr(train, 'Interrupt', lambda s=step, k=kill: _Interrupt(s, k))
    time.sleep(1)  # JAX names traces by the second
    began = time.monotonic()
    try:
      train.train(config, folder, began=began)
    except _Killed:
      (last,) = [m for m in metrics.read_metrics(folder) if m['step'] == 6 and 'wall_seconds' in m]
      wall = last['wall_seconds']
    else:
      wall += time.monotonic() - began
  summary = report.read_summary(folder)
  ledger = summary['goodput']
  assert set(ledger) == set(goodput.PHASES)
  assert sum(ledger.values()) == pytest.approx(wall, rel=0.01)
  assert all(ledger[phase] > 0 for phase in goodput.PHASES)
  overhead = sum(ledger[phase] for phase in ('start_up', 'compile', 'restore', 'lost'))
  assert summary['seconds'] == pytest.approx(sum(ledger.values()) - overhead)
  printed = capsys.readouterr().out
  assert 'goodput ' in printed and 'start-up ' in printed.rpartition('goodput ')[2]
  # The traces: of step 2 and 3 before the interrupt, of step 4 after it.
  assert 'profile of steps 2 to 3: ' in printed and 'profile of steps 4 to 4: ' in printed
  assert sorted(map(_steps, folder.glob('profile/plugins/profile/*/*.trace.json.gz'))) == [
    [2, 3], [4],
  ]  # fmt: skip
  assert len([*folder.glob('profile/plugins/profile/*/*.xplane.pb')]) == 2


def _steps(path):
  """The numbers of the training steps in a trace."""
  events = json.loads(gzip.decompress(path.read_bytes()))['traceEvents']
  steps = [event['args'] for event in events if event.get('name') == 'train' and 'args' in event]
  return sorted({int(arguments['step_num']) for arguments in steps})


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('10', 'must be .FIRST:END. .*; got .10.'),
    ('0:3', 'must be'),
    ('5:5', 'must be'),
    ('a:b', 'must be'),
    ('10:5202', 'goes beyond the last step, train.steps = 5200'),
  ],
)
def test_steps_that_cannot_be_profiled(text, message):
  with pytest.raises(ValueError, match=f'train.profile_steps .*{message}'):
    config_lib.TrainConfig(profile_steps=text)


def test_steps_to_profile():
  assert list(profiling.parse('10:13')) == [10, 11, 12] and not profiling.parse('')
  config_lib.TrainConfig(steps=12, profile_steps='10:13')
