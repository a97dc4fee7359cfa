"""Checkpoints in memory: what is kept, found again and forgotten."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from moejax import cli, metrics, run_folder, train
from moejax.checkpoint import Checkpoints
from moejax.memory_checkpoint import MemoryCheckpoints
from tests import train_test

CONFIG = {'model': {'d_model': 8}}


class Loader:
  """Has a position, in a file below its folder."""

  position = 0

  def save(self, directory):
    (directory / 'below').mkdir()
    (directory / 'below' / 'position').write_text(str(self.position))

  def load(self, directory):
    self.position = int((directory / 'below' / 'position').read_text())


@pytest.fixture
def mesh():
  return Mesh(np.array(jax.devices()).reshape(4, 2), ('a', 'b'))


@pytest.fixture
def make(tmp_path, mesh):
  """Makes what a process of the run has, with some of it changed."""

  def make(config=CONFIG, mesh=mesh, folder=tmp_path):
    return MemoryCheckpoints(folder, tmp_path / 'run' / 'checkpoints', config, mesh)

  return make


def _state(mesh, seed):
  draw = lambda i, shape: jax.random.normal(jax.random.key(seed + i), shape)
  leaves = {
    'split': (draw(0, (8, 6)), P('a', 'b')),
    'half': (draw(1, (8, 3)).astype(jnp.bfloat16), P('b')),
    'whole': (draw(2, (5,)), P()),
    'step': (jnp.int32(seed), P()),
  }
  return {name: jax.device_put(x, NamedSharding(mesh, spec)) for name, (x, spec) in leaves.items()}


def _abstract(state):
  describe = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return jax.tree.map(describe, state)


def _save(memory, mesh, *steps):
  memory.begin(_abstract(_state(mesh, 0)))
  for step in steps:
    loader = Loader()
    loader.position = step + 7
    memory.save(step, _state(mesh, step), loader, {'corpus': 'c', 'step': step})


def _files(tmp_path):
  return sorted(path for path in tmp_path.glob('moejax-*/*/*/*') if path.is_file())


def test_the_newest_step_comes_back(make, mesh, tmp_path):
  assert make().newest() is None
  _save(make(), mesh, 1, 2, 3)
  memory, loader = make(), Loader()
  assert memory.newest() == 3
  assert memory.metadata(3) == {'corpus': 'c', 'step': 3}
  expected = _state(mesh, 3)
  restored = memory.restore(3, _abstract(expected), loader)
  assert loader.position == 10
  for name, array in expected.items():
    assert restored[name].sharding == array.sharding and restored[name].dtype == array.dtype
    np.testing.assert_array_equal(restored[name], array)
  assert [path.name.split('-')[1] for path in _files(tmp_path)] == ['2', '3']  # older are forgotten


@pytest.mark.parametrize('damage', ['flipped', 'cut', 'empty', 'missing'])
def test_a_damaged_part_is_not_used(make, mesh, tmp_path, damage):
  _save(make(), mesh, 1, 2)
  newest = _files(tmp_path)[-1]
  content = bytearray(newest.read_bytes())
  content[len(content) // 2] ^= 1
  damaged = {'flipped': content, 'cut': content[:100], 'empty': b''}
  if damage == 'missing':
    newest.unlink()
  else:
    newest.write_bytes(damaged[damage])
  assert make().newest() == 1


def test_only_the_same_run_on_the_same_devices_uses_a_step(make, mesh, tmp_path):
  _save(make(), mesh, 1)
  assert make().newest() == 1
  assert make(config={'model': {'d_model': 16}}).newest() is None
  assert make(mesh=Mesh(mesh.devices.T, ('a', 'b'))).newest() is None
  assert make(mesh=Mesh(mesh.devices[:2], ('a', 'b'))).newest() is None
  (unfinished := _files(tmp_path)[0].with_name('.7-0-2-abc')).touch()
  shutil.rmtree(tmp_path / 'run')  # somebody starts again
  memory = make()
  assert memory.newest() is None
  _save(memory, mesh, 5)
  assert len(_files(tmp_path)) == 1 and not unfinished.exists()
  assert make().newest() == 5


def test_later_steps_or_all_are_forgotten(make, mesh, tmp_path):
  memory = make()
  _save(memory, mesh, 4, 6)
  memory.discard_after(4)
  assert make().newest() == 4
  memory.clear()
  assert make().newest() is None and not _files(tmp_path)


def test_there_must_be_room(make, mesh, tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=500))
  message = r'train\.memory_checkpoint: 2 parts of 0\.0 MB .* 0\.0 MB left.*train\.memory_folder'
  with pytest.raises(ValueError, match=message):
    make().begin(_abstract(_state(mesh, 0)))


def test_the_folder_must_be_writable_and_of_this_user(make, tmp_path):
  for folder in (tmp_path / 'missing', pathlib.Path('/proc')):
    with pytest.raises(ValueError, match=f'train.memory_folder: cannot write to {folder}: '):
      make(folder=folder)
  make()
  (private,) = tmp_path.glob('moejax-*')
  private.rename(tmp_path / 'other')
  private.symlink_to(tmp_path / 'other')
  with pytest.raises(ValueError, match='belongs to somebody else'):
    make()


def test_full_memory_ends_no_run(make, mesh, caplog, monkeypatch):
  memory = make()
  _save(memory, mesh, 1)

  def fail(path, content):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr('moejax.files.write', fail)
    memory.save(2, _state(mesh, 2), Loader(), {})
  assert 'no checkpoint in memory of step 2' in caplog.text
  assert make().newest() == 1


@pytest.mark.heavy
def test_a_run_that_dies_goes_on_from_memory(tmp_path, monkeypatch, capfd):
  config = train_test._debug_config()
  memory = {'memory_checkpoint': 2, 'memory_folder': str(tmp_path), 'checkpoint_interval': 6}
  config.train.update(memory)
  straight, killed = tmp_path / 'straight', tmp_path / 'killed'
  assert train.train(config, straight) == cli.OK

  class Death(Exception):
    pass

  def dies(self, step):
    if step == 5:
      raise Death

  with monkeypatch.context() as patch, pytest.raises(Death):
    patch.setattr(train.Interrupt, 'reached', dies)
    train.train(config, killed)
  assert Checkpoints(run_folder.checkpoint_dir(killed)).latest_step() is None
  assert train.train(config, killed) == cli.OK
  assert 'resuming from step 4 in memory' in capfd.readouterr().out
  assert not _files(tmp_path)
  for name in ('loss', 'grad_norm', 'validation/loss'):
    assert metrics.loss_curve(killed, name) == metrics.loss_curve(straight, name) != []
  params = [train_test._params_of(folder) for folder in (straight, killed)]
  jax.tree.map(np.testing.assert_array_equal, *params)

  left = []  # as if it had died between its last words and forgetting its parts
  with monkeypatch.context() as patch:
    patch.setattr(MemoryCheckpoints, 'clear', lambda memory: left.append(memory))
    assert train.train(config, killed) == cli.OK
  assert left
