"""Checking a run's checkpoints, and making intact steps of those that lost their manifest."""

import shutil
import types

import numpy as np
import pytest

from moejax import checkpoint, cli, verify
from moejax.checkpoint import Checkpoints

STATE = {'params': {'w': np.arange(64.0, dtype=np.float32), 'b': np.ones(3, np.float32)}}


@pytest.fixture
def directory(tmp_path):
  """Checkpoints of steps 1 and 2."""
  directory = tmp_path / 'lr[3e-4]' / 'checkpoints'
  save(directory, 1, 2)
  return directory


def save(directory, *steps):
  checkpoints = Checkpoints(directory)
  for step in steps:
    checkpoints.save(step, STATE, None, {'config': {}})
  checkpoints.close()


def assert_whole(directory, step):
  checkpoints = Checkpoints(directory)
  assert checkpoints.latest_step() == step
  arrays = dict(checkpoints.arrays(step))
  checkpoints.close()
  assert arrays.keys() == {'params/w', 'params/b'}
  for name, array in arrays.items():
    np.testing.assert_array_equal(array, STATE['params'][name.removeprefix('params/')])


def test_a_step_without_manifest_is_accepted_if_nothing_else_is_left(directory):
  (directory / '2' / 'manifest.json').unlink()
  assert verify.verdicts(directory) == {1: '', 2: 'manifest.json is missing'}
  with pytest.raises(ValueError, match='--accept=2: step 1 is intact, and programs use it'):
    verify.accept(directory, 2)
  with pytest.raises(ValueError, match='--accept=1: it is intact'):
    verify.accept(directory, 1)
  shutil.rmtree(directory / '1')
  verify.accept(directory, 2)
  assert verify.verdicts(directory) == {2: ''}
  assert_whole(directory, 2)


def test_arrays_that_earlier_versions_did_not_list_are_found(directory, monkeypatch):
  monkeypatch.setattr(checkpoint, '_link', lambda directory: directory)
  monkeypatch.setattr(Checkpoints, '_check_written', lambda *_: None)
  shutil.rmtree(directory)
  save(directory, 2)
  assert verify.verdicts(directory) == {2: 'state/manifest.ocdbt is missing'}
  monkeypatch.undo()
  verify.accept(directory, 2)
  assert_whole(directory, 2)


def test_a_step_that_cannot_be_read_is_not_accepted(directory):
  shutil.rmtree(directory / '1')
  (directory / '2' / 'manifest.json').write_text('{}')
  (largest,) = [p for p in (directory / '2' / 'state' / 'd').iterdir()]
  largest.write_bytes(largest.read_bytes()[:-1])
  with pytest.raises(ValueError, match='--accept=2: .* cannot be read'):
    verify.accept(directory, 2)
  assert verify.verdicts(directory)[2]


def test_damage_is_not_accepted(directory):
  shutil.rmtree(directory / '1')
  (directory / '2' / 'state' / '_METADATA').write_text('{}')
  with pytest.raises(ValueError, match='--accept=2: state/_METADATA is not as it was saved'):
    verify.accept(directory, 2)


def test_the_program(directory, monkeypatch, capsys):
  def run(accept=None):
    flags = types.SimpleNamespace(workdir=str(directory.parent), accept=accept)
    monkeypatch.setattr(verify.flags, 'FLAGS', flags)
    return verify.main(), capsys.readouterr().out

  code, output = run()
  assert code == cli.OK and 'step 2  intact: ' in output
  shutil.rmtree(directory / '1')
  (directory / '2' / 'manifest.json').unlink()
  assert run() == (cli.FAILED, 'step 2  damaged: manifest.json is missing\n')
  code, output = run(accept=2)
  assert code == cli.OK and 'step 2  intact: ' in output
  shutil.rmtree(directory)
  with pytest.raises(ValueError, match='there is no checkpoint in'):
    run()
