"""The user's own code: remembered by runs, imported by every program, never without permission."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import moejax
from moejax import imports, run_folder, runner
from moejax.layers import moe

ROOT = pathlib.Path(__file__).parent.parent

ROUTER = """
from moejax.layers import moe

moe.ROUTERS['own'] = moe.token_choice
"""
CONFIG = """
import moejax

def get_config(arg=None):
  c = moejax.get_config(f'moe:{arg or ""}')
  c.model.moe.router = 'own'
  return c
"""


def _forget():
  """As in a new process."""
  imports._used.clear()
  imports._named.clear()
  imports._tasks.clear()
  moe.ROUTERS.pop('own', None)


@pytest.fixture(autouse=True)
def forgetful(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_STATE_HOME', str(tmp_path / 'state'))
  monkeypatch.setattr(imports, '_allows_all', False)
  monkeypatch.setattr(sys, 'path', list(sys.path))
  _forget()
  yield
  _forget()


@pytest.fixture
def own(tmp_path):
  """A config file that registers a router."""
  path = tmp_path / 'own.py'
  path.write_text(ROUTER + CONFIG)
  return path


@pytest.fixture
def run(own, tmp_path):
  """The folder of a run with that router, as another process left it."""
  run_folder.write(moejax.get_config(f'{own}:debug'), tmp_path / 'run')
  _forget()
  return tmp_path / 'run'


def _as_another_user(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_STATE_HOME', str(tmp_path / 'another'))


def test_a_run_imports_the_config_file_that_registered_its_router(run):
  with pytest.raises(ValueError, match="router must be one of .*; got 'own'.* --imports=FILE"):
    run_folder.from_saved(run_folder.read_json(run / 'config.json'), 'config.json')
  assert run_folder.read(run).model.moe.router == 'own'
  assert 'own' in moe.ROUTERS


def test_the_config_of_a_run_brings_its_imports(run, own, tmp_path):
  config = moejax.get_config(f'run:{run}')
  assert config.model.moe.router == 'own'
  run_folder.write(config, tmp_path / 'further')
  saved = run_folder.read_json(tmp_path / 'further/config.json')
  assert [entry['path'] for entry in saved['imports']] == [str(own)]


def test_a_config_file_that_registers_nothing_is_not_remembered(tmp_path):
  (tmp_path / 'plain.py').write_text(CONFIG.replace("'own'", "'expert_choice'"))
  run_folder.write(moejax.get_config(f'{tmp_path}/plain.py:debug'), tmp_path / 'run')
  assert 'imports' not in run_folder.read_json(tmp_path / 'run/config.json')


def test_a_shared_folder_runs_no_code_unless_it_is_allowed(run, own, tmp_path, monkeypatch):
  _as_another_user(monkeypatch, tmp_path)
  own.write_text(f'import pathlib\npathlib.Path({str(tmp_path)!r}, "ran").touch()\n' + ROUTER)
  for _ in range(2):
    with pytest.raises(ValueError, match=rf'would import {own}, which .*--allow_imports'):
      run_folder.read(run)
  assert not (tmp_path / 'ran').exists()
  with imports.allowed(True):
    run_folder.read(run)
  assert (tmp_path / 'ran').exists()
  _forget()
  run_folder.read(run)  # as allowed before


def test_changed_code_needs_to_be_allowed_again(run, own, capsys):
  own.write_text(own.read_text() + '# changed\n')
  with pytest.raises(ValueError, match='own.py, which has changed since the run was trained'):
    run_folder.read(run)
  with imports.allowed(True):
    run_folder.read(run)
  assert 'note: ' in (err := capsys.readouterr().err) and 'has changed since' in err
  _forget()
  run_folder.read(run)


def test_renamed_code_is_named_by_the_user(run, own, tmp_path):
  own.rename(tmp_path / 'new.py')
  with pytest.raises(ValueError, match=r'own.py, which does not exist here.* --imports=FILE'):
    run_folder.read(run)
  imports.use(str(tmp_path / 'new.py'))
  run_folder.read(run)
  _forget()
  (tmp_path / 'new.py').write_text(ROUTER)  # changed, too
  imports.use(str(tmp_path / 'new.py'))
  assert run_folder.read(run).model.moe.router == 'own'


def test_a_module_is_found_from_another_folder(tmp_path, monkeypatch):
  package = tmp_path / 'own_package'
  package.mkdir()
  (package / '__init__.py').touch()
  (package / 'routers.py').write_text(ROUTER)
  monkeypatch.syspath_prepend(str(tmp_path))
  imports.use('own_package.routers')
  config = moejax.get_config('moe:debug')
  config.model.moe.router = 'own'
  run_folder.write(config, tmp_path / 'run')
  _forget()
  sys.path.remove(str(tmp_path))
  for name in ('own_package', 'own_package.routers'):
    del sys.modules[name]
  assert run_folder.read(tmp_path / 'run').model.moe.router == 'own'


def test_the_cells_of_a_sweep_import_what_its_user_named(own):
  cell = runner.Cell(name='a', config='moe', fields={}, steps=1, params=1, flops=1.0)
  assert '--imports' not in cell.command
  imports.use(str(own))
  assert cell.command.endswith(f' --imports={own}')


def test_looking_for_a_module_imports_nothing(tmp_path, monkeypatch):
  package = tmp_path / 'never_imported'
  package.mkdir()
  (package / '__init__.py').write_text('raise AssertionError')
  (package / 'inner.py').touch()
  monkeypatch.syspath_prepend(str(tmp_path))
  assert imports._find('never_imported.inner') == str(package / 'inner.py')
  assert imports._find('never_imported.nothing') is None


def test_a_task_that_only_a_run_names_is_not_imported(tmp_path, monkeypatch):
  (tmp_path / 'own_task_module.py').write_text('')
  monkeypatch.syspath_prepend(str(tmp_path))
  config = moejax.get_config('moe:debug')
  config.data.source, config.data.task = 'seqio', 'own_task_module:task'
  run_folder.write(config, tmp_path / 'run')
  run_folder.read(tmp_path / 'run')
  with pytest.raises(ValueError, match='would import .*own_task_module.py, which you have not run'):
    imports.of_task('own_task_module')
  assert 'own_task_module' not in sys.modules
  imports._tasks.clear()
  imports.name_task(config.data.task)  # the user names it, and trains with it
  run_folder.read(tmp_path / 'run')
  imports.of_task('own_task_module')
  del sys.modules['own_task_module']
  imports._tasks.clear()
  run_folder.read(tmp_path / 'run')
  imports.of_task('own_task_module')  # in a later process


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('nowhere.py', "cannot import 'nowhere.py': no such file"),
    ('no_such_module', "cannot import 'no_such_module': no module of this name"),
    ('needs', "cannot import 'needs': .*, or name its file: --imports=needs.py"),
    ('needs.py', 'needs.py: No module named .not_there.* PYTHONPATH'),
    ('wrong.py', r'wrong.py, line 2: NameError\("name .unknown. is not defined"\)'),
    ('typo.py', r'typo.py, line 1: SyntaxError\(.*'),
  ],
)
def test_what_cannot_be_imported_is_one_sentence(name, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  pathlib.Path('needs.py').write_text('import not_there')
  pathlib.Path('wrong.py').write_text('x = 1\nunknown.y = x\n')
  pathlib.Path('typo.py').write_text('def f(:\n')
  with pytest.raises(ValueError, match=message):
    imports.use(name)


def test_damaged_entries_are_said(run):
  saved = json.loads((run / 'config.json').read_text())
  (run / 'config.json').write_text(json.dumps(saved | {'imports': [{'file': 'x'}]}))
  with pytest.raises(ValueError, match='config.json is damaged: imports'):
    run_folder.read(run)


def test_a_home_that_cannot_be_written_is_a_warning(own, monkeypatch, capsys):
  monkeypatch.setenv('XDG_STATE_HOME', '/dev/null')
  imports.use(str(own))
  assert 'warning: ' in capsys.readouterr().err


@pytest.mark.heavy
def test_programs_import_the_code_of_a_run_from_any_folder(own, tmp_path):
  """Trained by main, then generated from in another folder, once that is allowed."""

  def program(name, *arguments, folder):
    words = [sys.executable, '-m', f'moejax.{name}', *arguments]
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run(
      words, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    return done.returncode, done.stdout + done.stderr

  small = [
    '--config.train.steps=1',
    '--config.train.eval_batches=1',
    '--config.train.sample_length=0',
  ]
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  code, said = program('main', '--config=own.py:debug', '--workdir=run', *small, folder=tmp_path)
  assert code == 0, said
  arguments = [f'--workdir={tmp_path}/run', '--prompt=a', '--length=2']
  shutil.rmtree(tmp_path / 'state')
  code, said = program('generate', *arguments, folder=elsewhere)
  assert code == 2 and f'would import {own}' in said and '--allow_imports' in said
  code, said = program('generate', *arguments, '--allow_imports', folder=elsewhere)
  assert code == 0, said
