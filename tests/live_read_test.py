"""Reading a run that saves and deletes checkpoints meanwhile: a whole step, or the next one."""

import contextlib
import itertools
import shutil
import threading

import jax
import numpy as np
import pytest

from moejax import manifest
from moejax.checkpoint import Checkpoints
from tests import audit


def state_of(step):
  return {'params': {'w': np.full((16, 16), step, np.float32), 'b': np.full(3, step, np.float32)}}


def delete(folder):
  manifest.delete(folder)


def begin_to_delete(folder):
  (folder / 'metadata.json').unlink()
  shutil.rmtree(folder / 'state' / 'd')


class Run:
  """Commits step 2 and deletes step 1 at one of the file operations of a reader."""

  def __init__(self, directory, delete, at):
    self.directory, self.delete, self.at = directory, delete, at
    self.count, self.lock = 0, threading.RLock()
    (directory / '2').rename(directory.parent / 'next')
    if at % 2:  # the save has begun
      shutil.copytree(directory.parent / 'next', directory / '2')
      (directory / '2' / 'manifest.json').write_text('{"finished": false}')

  def before(self, event, args):
    if event in ('open', 'os.scandir', 'os.listdir') and str(self.directory) in str(args[0]):
      with self.lock:
        self.count += 1
        if self.count == self.at:
          self.go_on()

  def go_on(self):
    done, new = self.directory.parent / 'next', self.directory / '2'
    if new.exists():
      (done / 'manifest.json').replace(new / 'manifest.json')
    else:
      done.rename(new)
    self.delete(self.directory / '1')


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Checkpoints of the steps 0, which is kept for always, 1 and 2."""
  folder = tmp_path_factory.mktemp('saved')
  checkpoints = Checkpoints(folder)
  for step in (0, 1, 2):
    checkpoints.save(step, state_of(step), None, {'step': step})
  checkpoints.close()
  return folder


def read(directory):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  describe = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
  abstract = jax.tree.map(describe, state_of(0)['params'])
  with contextlib.closing(Checkpoints(directory)) as checkpoints:
    return checkpoints.read_newest(lambda step: checkpoints.restore_params(step, abstract))


@pytest.mark.heavy
@pytest.mark.parametrize('delete', [delete, begin_to_delete])
def test_a_step_that_is_deleted_at_any_operation_of_a_reader(tmp_path, saved, delete):
  seen = set()
  for at in itertools.count(1):
    directory = shutil.copytree(saved, tmp_path / str(at) / 'checkpoints')
    run = Run(directory, delete, at)
    with audit.hook(run.before):
      step, params = read(directory)
    if run.count < at:
      break
    assert step in (1, 2), at
    for name, array in state_of(step)['params'].items():
      np.testing.assert_array_equal(params[name], array)
    seen.add(step)
  assert at > 20 and 2 in seen
