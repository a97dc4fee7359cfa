"""Files of other people: nothing in them is executed, and no number in them is believed."""

import json
import os
import pathlib
import py_compile
import sys

import numpy as np
import pytest
from flax import traverse_util

import moejax
from moejax import (
  checkpoint,
  cli,
  config as config_lib,
  data,
  fields,
  hf,
  imports,
  run_folder,
  sharding,
  step,
)
from moejax.data import hf_datasets
from moejax.hf import folder
from moejax.scaling_laws import grid, predictions, runtime

ASKED = 'which you have not run before. Look at that file; then --allow_imports'


@pytest.fixture(autouse=True)
def _another_user(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_STATE_HOME', str(tmp_path / 'state'))
  monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])  # as if started in this folder
  monkeypatch.setattr(imports, '_allows_all', False)
  monkeypatch.chdir(tmp_path)
  for record in (imports._used, imports._named, imports._tasks):
    record.clear()


@pytest.fixture
def ran(tmp_path):
  """A file that exists once code of `_code` has been executed."""
  return tmp_path / 'ran'


def _write(path, ran, more=''):
  """A file of Python that says when it is executed."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'import pathlib\npathlib.Path({str(ran)!r}).touch()\n{more}')
  return path


_CONFIG = 'import moejax\n\ndef get_config(arg=None):\n  return moejax.get_config("dense:debug")\n'


def _grid(**changes):
  cell = json.loads(json.dumps(vars(grid.make('laptop')[0])))
  cell['fields'] |= changes.pop('fields', {})
  return [cell | changes]


def _as_grid(cells):
  pathlib.Path('grid.json').write_text(json.dumps(cells))
  return grid.read('grid.json')


def _as_predictions(cells):
  entry = {'cell': cells[0], 'low': 1.0, 'loss': 2.0, 'high': 3.0, 'fitted': False}
  record = {'fit_sha256': '0', 'commit': None, 'date': '2026', 'predictions': [entry]}
  pathlib.Path('predictions.json').write_text(json.dumps(record))
  return predictions.judge('predictions.json', ['.'], 'page.md')


def _as_report(cells):
  command = f'python -m moejax.aot --config={cells[0]["config"]} --topology=v5e:2x2'
  report = {'fits': True, 'command': command, 'step_seconds': 1.0, 'tokens': 9, 'topology': 'v5e'}
  pathlib.Path('report.json').write_text(json.dumps(report))
  return runtime.read(['report.json'])


@pytest.mark.parametrize('read', [_as_grid, _as_predictions, _as_report])
@pytest.mark.parametrize('name', ['evil.py', 'configs/dense.py', 'configs/dense.py:debug'])
def test_a_config_file_that_a_file_names_is_asked_about(name, read, ran):
  _write(pathlib.Path(name.partition(':')[0]), ran, _CONFIG)
  with pytest.raises(ValueError, match=rf'\.json would import .*{name[:8]}.*{ASKED}'):
    read(_grid(config=name))
  assert not ran.exists()
  with imports.allowed(True):
    read(_grid(config=name))
  read(_grid(config=name))  # allowed before


def test_a_config_file_that_the_user_has_run_is_not_asked_about(ran):
  _write(pathlib.Path('own.py'), ran, _CONFIG)
  cli.config_of(['--config=own.py'])
  assert _as_grid(_grid(config='own.py'))


def test_a_bundled_config_is_not_asked_about(tmp_path):
  _as_grid(_grid())
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs/dense.py').write_bytes((cli._BUNDLED / 'dense.py').read_bytes())
  assert _as_grid(_grid())[0].config.startswith('configs/dense.py')


def test_a_task_that_a_grid_names_is_asked_about(ran):
  _write(pathlib.Path('shared/helper.py'), ran)
  with pytest.raises(ValueError, match=f'grid.json would import .*helper.py, {ASKED}'):
    _as_grid(_grid(fields={'data.task': 'shared.helper:x'}))
  assert not ran.exists()


@pytest.mark.parametrize(
  'changes',
  [
    {'name': 'a; touch ran'},
    {'name': '$(touch ran)'},
    {'name': '-rf'},
    {'name': 'a\nb'},
    {'fields': {"x; touch ran # '": "'"}},
    {'command': 'touch ran'},
    {'command': 'python -m moejax.main; touch ran'},
    {'command': 'python evil.py --config=configs/dense.py'},
  ],
)
def test_no_word_of_a_grid_is_a_command(changes):
  """Cells become commands that people give to a shell (--launch)."""
  with pytest.raises(ValueError, match=r'^--grid=grid.json'):
    _as_grid(_grid(**changes))


def _shared(tmp_path, **fields):
  config = moejax.get_config('dense:debug')
  config.update_from_flattened_dict(fields)
  run_folder.write(config, tmp_path / 'run')
  return tmp_path / 'run'


def test_packages_around_an_allowed_module_are_asked_about(tmp_path, ran):
  own = tmp_path / 'own.py'
  own.touch()
  imports.allow_file(own)
  _write(tmp_path / 'shared/__init__.py', ran)
  (tmp_path / 'shared/helper.py').symlink_to(own)
  run = _shared(tmp_path, **{'data.task': 'shared.helper:x', 'data.source': 'seqio'})
  run_folder.read(run)
  with pytest.raises(ValueError, match=f'config.json would import .*__init__.py, {ASKED}'):
    imports.of_task('shared.helper')
  imports.of_run([], run)
  entry = imports._code('shared.helper', own)._asdict()
  with pytest.raises(ValueError, match=f'run would import .*__init__.py, {ASKED}'):
    imports.of_run([entry], run)
  assert not ran.exists()


def test_bytecode_beside_an_allowed_module_is_not_believed(tmp_path, ran):
  """It can be of another source of the same size and time."""
  path = _write(tmp_path / 'shared_helper.py', ran)
  compiled = py_compile.compile(str(path))
  content, time = path.read_bytes(), path.stat().st_mtime
  path.write_bytes(b'#' * (len(content) - 1) + b'\n')
  os.utime(path, (time, time))
  assert compiled and os.path.exists(compiled)
  imports.name_task('shared_helper:x', 'config.json')
  with imports.allowed(True):
    imports.of_task('shared_helper')
  assert sys.modules.pop('shared_helper') and not ran.exists()


@pytest.mark.parametrize('name', ['/etc/a.safetensors', '../a.safetensors', 'a/b'])
def test_an_index_of_tensors_names_files_of_its_own_folder(name, tmp_path):
  index = json.dumps({'weight_map': {'a': name}})
  (tmp_path / 'model.safetensors.index.json').write_text(index)
  with pytest.raises(ValueError, match='index.json: .* is no name of a file in its folder'):
    folder.read_tensors(tmp_path, hf.ARCHITECTURES['gpt2'], {}, {})


def test_pickles_are_no_dataset():
  config = data.DataConfig(source='datasets', task='pandas')
  with pytest.raises(ValueError, match='data.task: .pandas.: pickles can run code'):
    hf_datasets.open_splits(config)


@pytest.mark.parametrize('module', ['', '.shared', 'a/b', 'a b', '..', 'sys.path'])
def test_what_is_no_module_is_one_sentence(module):
  with pytest.raises((ValueError, ModuleNotFoundError)):
    imports.of_task(module)


@pytest.mark.parametrize(
  'entries', [5, {}, 'x', [5], [[]], [{'name': 5, 'path': 5, 'sha256': 5}], [{'name': ''}]]
)
def test_damaged_imports_are_one_sentence(entries):
  with pytest.raises(ValueError, match='config.json is damaged: imports'):
    imports.of_run(entries, 'config.json')


def test_json_that_is_nested_deeply_is_one_sentence(tmp_path):
  for depth in (200, 100_000):
    (tmp_path / 'config.json').write_text('{"model":' + '[' * depth + ']' * depth + '}')
    with pytest.raises(ValueError, match='config.json is damaged .nested more than 100 levels'):
      run_folder.read(tmp_path)


@pytest.mark.parametrize('number', [10**12, 10**400])
def test_no_integer_of_a_config_is_that_large(number):
  for name, field in config_lib.flat_fields().items():
    if field.type is int:
      with pytest.raises(ValueError, match=f'^{name} must be .*at most'):
        fields.checked(name, field, number)


_MOST = 2**31 - 1


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'model.d_model': 2**30, 'model.d_ff': 2**30},
      'model: it would have .* parameters, more than',
    ),
    ({'model.vocab_size': _MOST, 'model.d_model': 2**24}, 'model: it would have'),
    (
      {'model.moe.expansion_rate': _MOST, 'model.moe.capacity_factor': 0, 'model.d_ff': 2**20},
      'model: it would have',
    ),
    ({'data.batch_size': 2**16, 'data.sequence_length': 2**16}, '4294967296 tokens of a step'),
    ({'model.blocks': ((('mlp',), 10**12),)}, 'model.blocks: expected at most 10000 sublayers'),
    ({'model.blocks': ((('mlp',), 10**400),)}, 'more than 300 digits'),
    ({'model.blocks': ((('mlp',), 100),) * 101}, 'got 10100'),
    ({'model.blocks': (('+'.join(['mlp'] * 101), 100),)}, 'model.blocks'),
    ({'optimizer.peak_lr': 1e39}, r'optimizer.peak_lr must be at most 1e\+38'),
    ({'optimizer.peak_lr': 10**400}, 'optimizer.peak_lr must be a finite number'),
    ({'train.profile_steps': f'1:{10**18}'}, 'profile_steps'),
    ({'train.profile_steps': '1:' + '9' * 5000}, 'profile_steps'),
    ({'model.base': 'd_model=' + '9' * 5000}, 'model.base'),
  ],
)
def test_large_numbers_of_a_config_are_one_error(changes, message):
  """Without an endless loop or a large allocation before."""
  saved = traverse_util.flatten_dict(moejax.get_config('moe:debug').to_dict(), sep='.') | changes
  with pytest.raises(ValueError, match=message):
    config_lib.resolve(
      run_folder.from_saved(traverse_util.unflatten_dict(saved, sep='.'), 'config.json')
    )


def test_a_model_larger_than_the_memory_is_one_error():
  config = moejax.get_config('dense:debug')
  config.update_from_flattened_dict({'model.d_model': 2**20, 'model.d_ff': 2**20})
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=-1))
  with pytest.raises(ValueError, match='the model: its arrays take .* GiB, more than the memory'):
    sharding.abstract(step.fresh_state(config_lib.resolve(config)), mesh)


@pytest.mark.parametrize(
  'text', ['(' * 10_000, '-' * 100_000 + '1', '{[]: 1}', '[' * 500, '1e9' * 9]
)
def test_texts_of_tuples_are_one_error(text):
  field = config_lib.flat_fields()['model.blocks']
  with pytest.raises(ValueError, match='model.blocks'):
    fields.read('model.blocks', field, text)


def test_a_checkpoint_of_other_dtypes_is_refused(tmp_path):
  saved = checkpoint.Checkpoints(tmp_path)
  saved.save(1, {'params': {'w': np.zeros(2, np.float16)}}, None, {})
  with pytest.raises(RuntimeError, match=r'params/w is no array of float32, bfloat16'):
    saved.close()
