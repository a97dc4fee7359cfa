"""The table of a drill, and what it exits with."""

import csv
import json
import types

import pytest

from moejax import cli
from moejax.drill import __main__ as program, faults, runs as runs_lib, verdicts
from moejax.drill.faults import Fault
from moejax.drill.runs import DidNotHold, NotTried

SUMMARY = {'date': '2026-11-27', 'commit': None, 'versions': {'jax': '0', 'device_count': 2}}
SUMMARY['versions']['device_kind'] = 'cpu'


class Runs:
  """Runs that take 30 of the 100 seconds that are left."""

  def __init__(self, folder, *_):
    self.folder, self.undisturbed, self.seconds = folder, folder / 'undisturbed', 30
    self.left = lambda: 100

  def train_undisturbed(self):
    self.undisturbed.mkdir()
    (self.undisturbed / 'summary.json').write_text(json.dumps(SUMMARY))


def _hold(runs, folder):
  folder.mkdir()


def _break(runs, folder):
  folder.mkdir()
  raise DidNotHold('other | bits')


def _miss(runs, folder):
  (folder / 'summary.json').read_text()


def _refuse(runs, folder):
  folder.mkdir()
  raise NotTried('one device')


def _fault(attempt, starts=1):
  name = attempt.__name__.strip('_')
  return Fault(name, f'{name}s it', 'it holds', attempt, starts)


GOOD = [_fault(_hold), _fault(_refuse), _fault(_hold, 4)]


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'drill').mkdir()
  return tmp_path / 'drill'


def _drill(of, folder):
  runs = Runs(folder)
  runs.train_undisturbed()
  return verdicts.drill(of, runs)


def test_what_held_and_what_was_not_tried_is_no_failure(folder, capsys):
  assert _drill(GOOD, folder)
  assert {path.name for path in folder.iterdir()} == {'drill.md', 'drill.csv'}
  lines = capsys.readouterr().out.splitlines()
  assert lines[:2] == ['hold: held', 'refuse: not tried: one device']
  assert lines[2] == 'hold: not tried: it takes about 2m00s, and 1m40s were left'
  assert '1 held, 0 did not hold, 2 not tried' in lines


def test_a_drill_in_which_nothing_is_tried_fails(folder):
  assert not _drill(GOOD[1:], folder)


def test_one_guarantee_that_does_not_hold_is_a_failure_and_its_folder_stays(folder):
  assert not _drill([*GOOD, _fault(_break), _fault(_miss)], folder)
  rows = [*csv.reader((folder / 'drill.csv').read_text().splitlines())]
  assert rows[0] == ['fault', 'what was done', 'what must hold', 'verdict']
  assert rows[4] == ['break', 'breaks it', 'it holds', 'did not hold: other | bits']
  assert rows[5][3].startswith('did not hold: [Errno 2] No such file')
  assert {'break', 'undisturbed'} <= {path.name for path in folder.iterdir()}
  page = (folder / 'drill.md').read_text().splitlines()
  assert page[2] == '2026-11-27, commit None, jax 0, 2 x cpu; 8 steps take 30s.'
  assert page[4] == '| fault | what was done | what must hold | verdict |'
  assert page[9] == r'| break | breaks it | it holds | did not hold: other \| bits |'


@pytest.mark.parametrize('attempt, code', [(_hold, cli.OK), (_break, cli.FAILED)])
def test_exit_codes_and_whose_folder_it_is(tmp_path, monkeypatch, attempt, code):
  given = types.SimpleNamespace(config='dense:debug', workdir=str(tmp_path), minutes=1)
  monkeypatch.setattr(program, '_FLAGS', given)
  monkeypatch.setattr(runs_lib, 'Runs', Runs)
  monkeypatch.setattr(faults, 'FAULTS', [_fault(attempt)])
  for _ in range(2):  # the second one deletes what the first one left
    assert program.main({}) == code
  (tmp_path / 'drill/drill.csv').unlink()
  with pytest.raises(ValueError, match='drill is there, but of no drill'):
    program.main({})
  given.config, given.workdir = None, str(tmp_path / 'none')
  with pytest.raises(ValueError, match='none holds no run'):
    program.main({})
