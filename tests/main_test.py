"""The default folder of a run."""

import datetime
import types

import jax
import pytest

from moejax import main

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
