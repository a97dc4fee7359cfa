"""The default folder of a run; programs by their names."""

import datetime
import os
import pathlib
import subprocess
import sys
import types

import jax
import pytest

from moejax import __main__ as programs, main

ROOT = pathlib.Path(__file__).parent.parent

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
  clock = types.SimpleNamespace(now=lambda: NOW)
  monkeypatch.setattr(main, 'datetime', types.SimpleNamespace(datetime=clock))
  monkeypatch.chdir(tmp_path)


def test_runs_of_the_same_second_get_separate_folders_and_empty_ones_are_removed(tmp_path):
  with main._new_folder() as first, main._new_folder() as second, main._new_folder() as third:
    (second / 'config.json').touch()
  assert [p.name for p in (first, second, third)] == [
    '2026-01-02_030405',
    '2026-01-02_030405-2',
    '2026-01-02_030405-3',
  ]
  assert list((tmp_path / 'runs').iterdir()) == [tmp_path / second]


def test_several_processes_require_a_folder(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(ValueError, match='--workdir is required for a multi-process run'):
    with main._new_folder():
      pass


def _moejax(*words):
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  command = [sys.executable, '-m', 'moejax', *words]
  return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_every_program_has_a_name():
  """Also in the list of `moejax --help`, with nothing of JAX imported."""
  package, end = ROOT / 'moejax', "\nif __name__ == '__main__':"
  found = [path for path in package.glob('*.py') if end in path.read_text()]
  found += [p.parent for p in package.glob('*/__main__.py')]
  modules = {module for module, _ in programs.PROGRAMS.values()}
  assert {path.stem for path in found} - {'__main__'} == modules
  listed = _moejax('--help')
  assert listed.returncode == 0 and not listed.stderr
  assert all(f'\n  {name} ' in listed.stdout for name in programs.PROGRAMS)


def test_a_program_is_run_by_its_name():
  done = _moejax('scaling_laws', 'plan', '--help')
  assert done.returncode == 0 and '--target_loss: ' in done.stdout and not done.stderr
  unknown = _moejax('tran')
  assert unknown.returncode == 2 and unknown.stderr.startswith('error: expected one of train, eval')
  assert unknown.stderr.endswith("got 'tran'; did you mean 'train'?\n")


def test_without_a_name_it_trains(monkeypatch):
  ran = []
  monkeypatch.setattr(programs.runpy, 'run_module', lambda module, **_: ran.append(module))
  for words in ([], ['--config=mot.py'], ['train', '--config=mot.py'], ['evaluate', '--workdir=a']):
    monkeypatch.setattr(sys, 'argv', ['moejax', *words])
    programs.run()
  assert ran == ['moejax.main'] * 3 + ['moejax.evaluate'] and sys.argv == ['moejax', '--workdir=a']
