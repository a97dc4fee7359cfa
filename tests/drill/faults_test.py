"""Faults reach what they are meant for, and a drill notices a guarantee that does not hold."""

import contextlib
import functools
import importlib
import shutil
import sys

import pytest

from moejax import cli, manifest, report, train
from moejax.drill import faults, inject, verdicts
from moejax.drill.runs import (
  SHORT,
  STEPS,
  DidNotHold,
  NotTried,
  Runs,
  changed,
  fingerprints,
  step_folder,
)

# A program in which no damage of a checkpoint is noticed.
BLIND = """
import runpy, sys
from moejax import manifest
manifest.problem = lambda folder: ''
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
"""


class Recorder:
  """Runs that are none: which injections do the faults ask for?"""

  def __init__(self, undisturbed):
    self.undisturbed, self.injections = undisturbed, []

  def train(self, folder, injection=None, *_, **environment):
    self.injections += [injection] if injection else []
    return ''

  kill = train

  def copy(self, folder):
    shutil.copytree(self.undisturbed, folder)

  def begin(self, folder, injection=None, *_, **options):
    self.train(folder, injection)
    raise NotTried

  def check_same(self, *_):
    pass


@pytest.fixture(scope='module')
def arguments(texts):
  fields = {'data.source': 'text', 'data.files': texts, 'model.blocks': ((('mlp',), 1),)}
  fields = [f'--config.{name}={value}' for name, value in fields.items()]
  return ['--config=dense:debug', *fields]


@pytest.fixture(scope='module')
def undisturbed(arguments, tmp_path_factory):
  """The folder of a short run, and which injections of all faults would have acted."""
  folder, hit = tmp_path_factory.mktemp('drill'), []
  recorder = Recorder(folder / 'undisturbed')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(faults, 'largest_file', lambda _: folder)
    patch.setattr(report, 'read_summary', lambda _: {'versions': {'platform': 'cpu'}})
    for fault in faults.FAULTS:
      with contextlib.suppress(DidNotHold, NotTried, OSError, KeyError):
        fault.attempt(recorder, folder / fault.name)
  with pytest.MonkeyPatch.context() as patch:
    for injection in recorder.injections:
      module, _, path = injection.place.partition(':')
      *parents, name = path.split('.')
      owner = functools.reduce(getattr, parents, importlib.import_module(module))
      patch.setattr(owner, name, getattr(owner, name))  # which is undone later
      inject.inject(injection, lambda injection, _: hit.append(injection))
    short = [f'--config.{name}={value}' for name, value in SHORT.items()]
    assert train.train(cli.config_of([*arguments, *short]), recorder.undisturbed) == cli.OK
  return recorder.undisturbed, recorder.injections, hit


def test_the_places_of_all_faults_are_reached_in_a_short_run(undisturbed):
  _, injections, hit = undisturbed
  assert len(injections) > 10 and sorted(injections) == sorted(hit)


@pytest.mark.parametrize('name', ['flip_bit', 'cut_off', 'delete_file', 'delete_manifest'])
def test_damage_of_a_checkpoint_is_damage(undisturbed, tmp_path, name):
  shutil.copytree(step_folder(undisturbed[0], STEPS), tmp_path / 'step')
  assert not manifest.problem(tmp_path / 'step')
  getattr(faults, f'_{name}')(tmp_path / 'step')
  assert manifest.problem(tmp_path / 'step')


def _cut(path):
  path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize(
  'damage, message',
  [
    (lambda folder: (folder / 'summary.json').unlink(), 'summary.json is not that of a fin'),
    (lambda folder: (folder / 'loss.png').unlink(), 'there is no loss.png'),
    (lambda folder: _cut(folder / 'metrics.jsonl'), 'line 11 of metrics.jsonl is not the same'),
    (lambda folder: shutil.rmtree(step_folder(folder, 8)), 'checkpoint 8 is damaged: .* missing'),
  ],
)
def test_runs_are_compared_whole(undisturbed, tmp_path, damage, message):
  runs = Runs(tmp_path, [], 1)
  runs.undisturbed = undisturbed[0]
  runs.copy(tmp_path / 'copy')
  runs.check_same(tmp_path / 'copy')
  damage(tmp_path / 'copy')
  with pytest.raises(DidNotHold, match=message):
    runs.check_same(tmp_path / 'copy')


def test_arrays_are_compared_by_their_bits(undisturbed):
  before, after = (fingerprints(undisturbed[0], step) for step in (6, 8))
  assert not changed(before, fingerprints(undisturbed[0], 6))
  assert 'step' in (names := changed(before, after)) and len(names) > 5
  assert changed(before, before | {'new': ()}) == ['new']


def test_a_program_that_does_not_end_is_ended(tmp_path):
  waits = Runs(tmp_path, [], 1, (sys.executable, '-c', 'import time; time.sleep(60)'))
  waits._patience, waits.seconds = 0.01, -19.99
  with pytest.raises(DidNotHold, match='a program did not end within'):
    waits.train(tmp_path / 'run')
  waits._end = 0
  with pytest.raises(NotTried, match='no time was left'):
    waits.train(tmp_path / 'run')
  says = Runs(tmp_path, [], 1, (sys.executable, '-c', 'print(1); print(2); raise SystemExit(3)'))
  with pytest.raises(RuntimeError, match='8 steps fail: exit code 3 instead of 0: 2 .see'):
    says.train_undisturbed()
  assert (tmp_path / 'undisturbed.log').read_text() == '1\n2\n-- exit code 3\n'


@pytest.mark.heavy
def test_a_drill_of_a_run_and_of_one_whose_guarantee_is_broken(
  undisturbed, arguments, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '8')  # as the undisturbed run has
  of = {fault.name: fault for fault in faults.FAULTS}
  for name, fault, program in (
    ('whole', 'kill in a save', (sys.executable, '-m')),
    ('broken', 'flipped bit', (sys.executable, '-c', BLIND)),
  ):
    runs = Runs(tmp_path / name, arguments, 60, program)
    shutil.copytree(undisturbed[0], runs.undisturbed)
    assert verdicts.drill([of[fault]], runs) == (name == 'whole')
  output = capsys.readouterr().out
  assert 'kill in a save: held' in output
  assert 'flipped bit: did not hold: it does not say: skipped damaged checkpoints: 8' in output
