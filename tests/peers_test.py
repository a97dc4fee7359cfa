"""benchmarks/peers: what the driver makes of contenders, and that moejax is one of them."""

import csv
import subprocess

import pytest

from benchmarks.peers import __main__ as program, cases, environment
from benchmarks.peers.contenders import moejax as ours

CASES = cases.cases(tiny=True)


def _waiting(name, **changes):
  return cases.Contender(name, 'tests.peers_contender', changes=changes)


def test_contenders_are_compared_within_rounds(tmp_path, capsys):
  contenders = (
    _waiting(cases.BASE, takes=0.01),
    _waiting('slow', takes=0.2),
    _waiting('broken', **{'cannot start': 1}),
    _waiting('mortal', steps=2),
    cases.Contender('of old Python', 'tests.peers_contender', 'none'),
  )
  case = CASES['train dense']._replace(contenders=contenders)
  product = cases.product(tiny=True)._replace(contenders=(_waiting('jax', takes=0.01),))
  program.compare({'a case': case}, product, tmp_path, rounds=2, seconds=0.0)
  with (tmp_path / 'peers.csv').open() as lines:
    base, slow = sorted(csv.DictReader(lines), key=lambda row: row['contender'] != cases.BASE)
  number = lambda row, name: float(row[name])
  assert 0 < number(slow, 'ratio') < 0.7 and number(base, 'ratio') == 1.0
  assert number(slow, 'ratio_low') < number(slow, 'ratio') < number(slow, 'ratio_high')
  assert 0 < number(base, 'tokens_per_second') <= case.work / 0.01
  assert number(slow, 'share') < 0.7 * number(base, 'share')
  assert 1e6 < number(base, 'memory_bytes') < 1e9 and number(base, 'start_seconds') > 0
  page = (tmp_path / 'peers.md').read_text()
  assert f'| a case | {cases.BASE} |' in page and '| a case | slow |' in page
  for contender, log in (('broken', 'nothing works'), ('mortal', 'StopIteration')):
    path = tmp_path / 'logs' / f'a_case_{contender}.log'
    assert f'| a case | {contender} | it ended, see {path} |' in page and log in path.read_text()
  assert '| a case | of old Python | it needs ' in page
  assert 'round 2 of 2' in capsys.readouterr().out


@pytest.fixture(autouse=True)
def requirements(tmp_path, monkeypatch):
  folder = tmp_path / 'requirements'
  folder.mkdir()
  (folder / 'none.txt').write_text('')
  monkeypatch.setattr(environment, '_REQUIREMENTS', folder)
  monkeypatch.setattr(environment, '_OLDEST', {'none': 99})
  return folder


def test_environments_are_made_once(tmp_path, monkeypatch, requirements):
  (requirements / 'some.txt').write_text('torch==2.13.0')
  made, failing, log = [], ['pip'], tmp_path / 'log'

  def run(command, **_):
    if 'venv' in command:
      command[-1].mkdir(exist_ok=True)
      made.append(command[-1])
    return subprocess.CompletedProcess(command, any(name in command for name in failing))

  monkeypatch.setattr(environment.subprocess, 'run', run)
  with pytest.raises(RuntimeError, match=f'could not be made, see {log}'):
    environment.python('some', tmp_path, log)
  failing.clear()
  for _ in range(2):
    assert environment.python('some', tmp_path, log) == made[0] / 'bin' / 'python'
  assert made == [made[0]] * 2  # the one that failed, and again
  (requirements / 'some.txt').write_text('torch==2.14.0')
  environment.python('some', tmp_path, log)
  assert len({*made}) == 2


def test_flags(tmp_path, capsys):
  for argument in ('--only=no such case', '--rounds=0'):
    with pytest.raises(SystemExit):
      program.main([f'--output={tmp_path}', argument])
    assert 'train dense' in capsys.readouterr().err


def test_models_are_the_same_for_all():
  for case in CASES.values():
    model = cases.run_config(case.task).model
    assert model.d_model == case.task['model']['hidden_size'] and case.flops > 0
  moe = cases.run_config(CASES['train moe'].task).model
  assert (moe.moe.num_experts, moe.moe.top_k, moe.moe.capacity_factor) == (8, 2, 0)
  assert CASES['train moe'].flops == CASES['train dense'].flops  # both have equal active widths


@pytest.mark.heavy
def test_moejax_is_a_contender():
  for name in ('train dense', 'decode dense 1'):
    ours.prepare(CASES[name].task | {'changes': {}})()
  ours.prepare(cases.product(tiny=True).task)()
