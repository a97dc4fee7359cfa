"""What is installed: one package, which includes the config files and needs no checkout."""

import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest
import setuptools

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
  """A folder like site-packages after an installation."""
  folder = tmp_path_factory.mktemp('installed')
  command = [sys.executable, '-W', 'ignore', 'setup.py', '-q', 'build_py', f'--build-lib={folder}']
  subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
  return folder


@pytest.fixture
def main(installed, tmp_path):
  """`main(*args)` runs the installed program in a folder with another package named configs."""
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / '__init__.py').write_text('')
  environment = {**os.environ, 'PYTHONPATH': str(installed)}

  def run(*args):
    command = [sys.executable, '-m', 'moejax.main', *args]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

  return run


def test_one_package_is_installed(installed):
  assert [path.name for path in installed.iterdir()] == ['moejax']
  bundled = {path.name for path in (installed / 'moejax' / 'configs').iterdir()}
  assert bundled == {path.name for path in (ROOT / 'configs').glob('*.py')}


@pytest.mark.parametrize('config', ['configs/mot.py:mini', 'mot.py:mini'])
def test_bundled_configs_are_found_without_a_checkout(main, config):
  printed = main(f'--config={config}', '--print_config')
  assert printed.returncode == 0 and 'd_model: 256' in printed.stdout, printed.stderr


def test_a_file_of_that_name_elsewhere_is_not_the_bundled_one(main):
  failed = main('--config=my/mot.py', '--print_config')
  assert failed.returncode == 2 and '--config=my/mot.py: no such file' in failed.stderr


def test_a_users_own_file_needs_the_package_only(main, tmp_path):
  mine = tmp_path / 'mine.py'
  mine.write_text(
    'from moejax import config\n\n\ndef get_config():\n'
    '  c = config.baseline()\n  c.model.d_ff = 123\n  return c\n'
  )
  printed = main('--config=mine.py', '--print_config')
  assert printed.returncode == 0 and 'd_ff: 123' in printed.stdout, printed.stderr
  mine.write_text('from configs import older\n')
  failed = main('--config=mine.py')
  assert failed.returncode == 2 and failed.stderr.count('\n') == 1
  assert failed.stderr.startswith("error: --config: cannot import name 'older' from 'configs'")
  assert failed.stderr.endswith('; what config files share is in moejax.variants.\n')
  mine.write_text('')
  failed = main('--config=mine.py')
  assert failed.returncode == 2
  assert failed.stderr.startswith('error: --config: the file must have a function get_config')


def test_the_core_needs_no_tensorflow(monkeypatch):
  given = {}
  monkeypatch.setattr(setuptools, 'setup', lambda **kwargs: given.update(kwargs))
  runpy.run_path(str(ROOT / 'setup.py'))
  names = lambda needed: {re.match(r'[\w-]+', one)[0] for one in needed}
  tensorflow, core = names(given['extras_require']['seqio']), names(given['install_requires'])
  assert tensorflow == {'seqio', 'tensorflow', 'tensorflow-datasets'}
  assert 'tokenizers' in core and not tensorflow & core
  assert tensorflow <= names(given['extras_require']['test'])
