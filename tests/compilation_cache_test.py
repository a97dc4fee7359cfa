"""Where compiled programs are kept."""

import os
import pathlib
import sys
import types
import warnings

import pytest

from moejax import compilation_cache


@pytest.fixture
def settings(monkeypatch, tmp_path):
  """What is set in JAX, by a user without settings of their own."""
  changed = {}
  config = types.SimpleNamespace(update=changed.__setitem__)
  monkeypatch.setitem(sys.modules, 'jax', types.SimpleNamespace(config=config))
  for name in [name for name in os.environ if name.startswith(('JAX_COMP', 'JAX_PERS'))]:
    monkeypatch.delenv(name)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  with warnings.catch_warnings():
    yield changed


def test_programs_are_kept_in_a_private_folder_of_the_user(settings, tmp_path, monkeypatch):
  compilation_cache.enable()
  folder = pathlib.Path(settings['jax_compilation_cache_dir'])
  assert folder.parent == tmp_path / 'moejax' / 'xla'
  assert folder.stat().st_mode & 0o777 == 0o700
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  compilation_cache.enable()
  assert f'{tmp_path}/home/.cache/moejax/xla/' in settings['jax_compilation_cache_dir']


def test_it_is_set_before_jax_is_imported(settings, monkeypatch):
  monkeypatch.delitem(sys.modules, 'jax')
  monkeypatch.setattr(os, 'environ', dict(os.environ))
  compilation_cache.enable()
  assert not settings
  assert 'moejax/xla' in os.environ['JAX_COMPILATION_CACHE_DIR']
  assert os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] == '0.1'


@pytest.mark.parametrize('folder', ['', '/elsewhere'])  # empty: off
def test_settings_of_jax_win(settings, monkeypatch, folder):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', folder)
  compilation_cache.enable()
  assert not settings


@pytest.mark.parametrize('home', ['/proc/nobody', 'relative'])
def test_without_a_folder_that_can_be_written_there_is_no_cache(settings, monkeypatch, home):
  monkeypatch.setenv('XDG_CACHE_HOME', home)
  compilation_cache.enable()
  assert not settings


def test_damage_is_no_concern_of_the_user(settings):
  with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter('always')
    compilation_cache.enable()
    warnings.warn('Error reading persistent compilation cache entry for x: y', stacklevel=1)
    warnings.warn('another', stacklevel=1)
  assert [str(warning.message) for warning in seen] == ['another']


def test_the_oldest_programs_are_deleted_when_there_are_too_many(tmp_path, monkeypatch):
  monkeypatch.setattr(compilation_cache, '_MAX_BYTES', 100)
  for age in range(10):
    (tmp_path / f'{age}').write_bytes(b'x' * 10)
    os.utime(tmp_path / f'{age}', (1e9 - age, 1e9 - age))
  compilation_cache._prune(tmp_path)
  assert len(list(tmp_path.iterdir())) == 10
  (tmp_path / 'new').write_bytes(b'x' * 10)
  compilation_cache._prune(tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {'new', '0', '1', '2', '3'}
