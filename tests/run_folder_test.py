"""Runs of other versions open, or say in one sentence why not."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re

import numpy as np
import pytest

from configs import moe
from moejax import config as config_lib, fields, run_folder
from moejax.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path):
  """A folder of a run, and `change(function)` of what its config.json holds."""
  run_folder.write(moe.get_config('debug'), tmp_path, corpus='123')

  def change(function):
    path = tmp_path / 'config.json'
    saved = json.loads(path.read_text())
    function(saved)
    path.write_text(json.dumps(saved))
    return tmp_path

  return change


def test_a_config_is_read_as_it_was_written(run):
  assert run_folder.read(run(lambda _: None)) == moe.get_config('debug')


@pytest.mark.parametrize('name', config_lib.flat_fields())
def test_a_field_that_came_later_has_its_default(run, name):
  *sections, last = name.split('.')

  def remove(saved):
    for section in sections:
      saved = saved[section]
    del saved[last]

  folder = run(remove)
  expected = moe.get_config('debug')
  expected.update_from_flattened_dict({name: config_lib.flat_fields()[name].default})
  assert run_folder.read(folder) == expected
  run_folder.check_same_run(expected, folder)  # it goes on


@pytest.mark.parametrize('damage', [b'[1]', b'{"model": {"d_mo', bytes(99), b'\xff\xfe', b''])
def test_a_damaged_config_is_rebuilt_from_a_checkpoint(run, capsys, damage):
  folder = run(lambda _: None)
  (folder / 'config.json').write_bytes(damage)
  with pytest.raises(ValueError, match='config.json is damaged'):
    run_folder.read(folder)
  config = moe.get_config('debug')
  with contextlib.closing(Checkpoints(run_folder.checkpoint_dir(folder))) as checkpoints:
    checkpoints.save(3, {'a': np.zeros(2)}, None, {'config': config.to_dict()})
  assert run_folder.read(folder) == config
  said = capsys.readouterr().err
  assert 'config.json is damaged' in said and 'the config of checkpoint 3 is used' in said


def test_a_folder_in_place_of_the_config_is_named(tmp_path):
  (tmp_path / 'config.json').mkdir()
  with pytest.raises(ValueError, match='config.json cannot be read: Is a directory'):
    run_folder.read(tmp_path)


def test_a_section_that_came_later_has_its_defaults(run):
  config = run_folder.read(run(lambda saved: saved['model'].pop('mamba')))
  assert config == moe.get_config('debug')


def test_another_value_of_a_later_field_is_another_run(run):
  folder = run(lambda saved: saved['model'].pop('final_norm'))
  config = moe.get_config('debug')
  config.model.final_norm = True
  with pytest.raises(ValueError, match='model.final_norm: False there, True here'):
    run_folder.check_same_run(config, folder)


def test_a_toy_field_does_not_stop_an_older_run(run, monkeypatch):
  @dataclasses.dataclass(frozen=True)
  class ToyConfig(config_lib.DataConfig):
    toy: int = fields.default(3, 'a field of tomorrow')

  folder = run(lambda _: None)
  monkeypatch.setitem(config_lib.SECTIONS, 'data', ToyConfig)
  assert run_folder.read(folder).data.toy == 3
  run_folder.check_same_run(moe.get_config('debug'), folder)


def test_a_field_that_is_gone_and_changes_nothing_is_left_out(run, capsys):
  folder = run(lambda saved: saved['model']['moe'].update(balance_convention='uniform_is_1'))
  assert run_folder.read(folder) == moe.get_config('debug')
  assert capsys.readouterr().err == (
    f'note: {folder}/config.json: model.moe.balance_convention was removed; all runs behave so.\n'
  )


@pytest.mark.parametrize(
  ('change', 'messages'),
  [
    (
      lambda saved: saved['model']['moe'].update(balance_convention='uniform_is_k'),
      [
        "model.moe.balance_convention = 'uniform_is_k' was removed; multiply model.moe.balance_loss"
      ],
    ),
    (
      lambda saved: saved['model'].update(sinks=True, heads={'kv': 2}),
      ['model.sinks = True is not known', 'model.heads.kv = 2 is not known to this version'],
    ),
    (lambda saved: saved.update(lora={'rank': 3}), ['lora.rank = 3 is not known']),
    (lambda saved: saved.update(model=3), ['model = 3 is not known']),
    (
      lambda saved: saved['model'].update(d_model='x'),
      ["model.d_model must be an integer, got 'x'"],
    ),
    (lambda saved: saved['model'].update(d_model=None), ['model.d_model must be an integer']),
    (lambda saved: saved['model'].update(blocks=4), ['model.blocks must be a tuple, got 4']),
    (lambda saved: saved['model'].update(norm='new_norm'), ["norm must be one of .* 'new_norm'"]),
    (lambda saved: saved['train'].update(steps=-1), ['train.steps must be at least 1 and at']),
    (lambda saved: saved.clear(), ['this is no config of moejax']),
  ],
)
def test_what_this_version_cannot_take_is_named(run, change, messages):
  folder = run(change)
  with pytest.raises(ValueError) as raised:
    run_folder.read(folder)
  lines = str(raised.value).splitlines()
  for line, message in zip(lines, messages, strict=True):
    assert line.startswith(f'{folder}/config.json: ') and re.search(message, line)


@pytest.mark.parametrize(
  'content',
  [b'', b'{"model": {"d_mo', b'[]', b'3', b'\xff\xfe{}', b'null', b'[' * 100_000],
  ids=['empty', 'cut off', 'list', 'number', 'UTF-16', 'null', 'deep'],
)
def test_damaged_files_are_named(tmp_path, content):
  (tmp_path / 'config.json').write_bytes(content)
  with pytest.raises(ValueError, match=re.escape(f'{tmp_path}/config.json is damaged')) as raised:
    run_folder.read(tmp_path)
  assert '\n' not in str(raised.value)


def test_a_folder_in_place_of_the_file(tmp_path):
  (tmp_path / 'config.json').mkdir()
  with pytest.raises(ValueError, match='config.json cannot be read: Is a directory'):
    run_folder.read(tmp_path)
  with pytest.raises(ValueError, match='holds no run'):
    run_folder.read(tmp_path / 'nothing')


def test_one_program_trains_in_a_folder(tmp_path):
  folder = tmp_path / 'new' / 'run'
  with run_folder.lock(folder):
    holder = f'process {os.getpid()} on .*, since 20.* ago, is training there. Wait for it'
    with pytest.raises(ValueError, match=f'^--workdir={folder}: {holder}'):
      with run_folder.lock(folder):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='workdir: cannot write to .*file/run: Not a directory'):
    with run_folder.lock(tmp_path / 'file' / 'run'):
      pass


@pytest.mark.parametrize(
  'changes, step, message',
  [
    ({}, 6, None),
    ({'train.log_interval': 5, 'mesh.tensor': 2, 'optimizer.accumulation': 1}, 6, None),
    ({'train.steps': 9, 'optimizer.peak_lr': 1.0}, 6, None),
    (
      {'optimizer.peak_lr': 1.0},
      6,
      'trained with other.*\noptimizer.peak_lr: 0.006 there, 1.0 here',
    ),
    ({'optimizer.peak_lr': 1.0}, 5, None),
    ({'train.steps': 4}, 4, 'trained with other.*\ntrain.steps: 6 there, 4 here'),
    ({'train.steps': 4}, 5, 'train.steps = 4: the run in .* is at step 5 already'),
    ({'train.seed': 1}, 0, 'began with another seed'),
  ],
)
def test_what_may_change_when_a_run_is_resumed(changes, step, message):
  saved, config = moe.get_config('debug'), moe.get_config('debug')
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
    run_folder.check_resume(saved, config, step, 'folder')


def test_an_imported_model_has_no_seed():
  config = moe.get_config('debug')
  config.train.seed = 1
  run_folder.check_resume(moe.get_config('debug'), config, 0, 'folder', imported=True)
