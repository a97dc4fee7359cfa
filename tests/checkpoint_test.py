"""Checkpoints come back bitwise, on any mesh, and damaged ones are never used."""

import json
import logging as python_logging
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import types
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from moejax import manifest
from moejax.checkpoint import Checkpoints, SaveFailed, _parts, _Written
from tests.tiny import Counter

CONFIG = {'model': {'d_model': 16, 'blocks': [['mlp', 2]]}, 'train': {'steps': 9}}
METADATA = {'config': CONFIG, 'corpus': 'abc'}
OPTIMIZER = optax.chain(
  optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mask={'w': True, 'b': False})
)


class Stateless:
  """A loader without a state."""

  def save(self, directory):
    pass

  def load(self, directory):
    pass


def mesh_of(num_devices):
  devices = jax.devices()[:num_devices]
  return jax.make_mesh((num_devices,), ('fsdp',), devices=devices, axis_types=(AxisType.Auto,))


def abstract_of(state, num_devices=1):
  """What `state` looks like, sharded over the first dimension of its matrices."""
  mesh = mesh_of(num_devices)

  def describe(leaf):
    spec = P('fsdp') if leaf.ndim == 2 else P()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree.map(describe, state)


def make_state(seed=0, width=16, num_devices=1, dtype=np.float32):
  """A train state of random numbers, with an optax state as in training."""
  random_numbers = np.random.default_rng(seed)

  def fill(leaf):
    return random_numbers.standard_normal(leaf.shape).astype(leaf.dtype)

  params = {'w': jnp.zeros((width, 64), dtype), 'b': jnp.zeros(8, dtype)}
  state = {'params': params, 'optimizer': OPTIMIZER.init(params), 'step': jnp.int32(0)}
  state = jax.tree.map(fill, state) | {'step': np.int32(seed)}
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_of(state, num_devices))
  return jax.device_put(state, shardings)


def save(directory, *steps, keep=3, loader=None):
  """Saves `make_state(step)` for every step, and waits."""
  checkpoints = Checkpoints(directory, keep)
  for step in steps:
    checkpoints.save(step, make_state(step), loader or Counter(step), METADATA)
  checkpoints.close()


def assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def files_of(directory):
  return sorted(path for path in directory.rglob('*') if path.is_file())


def step_names(directory):
  return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def opened():
  """`Checkpoints` that are closed when the test ends."""
  made = []

  def make(*args, **kwargs):
    made.append(Checkpoints(*args, **kwargs))
    return made[-1]

  yield make
  for checkpoints in made:
    checkpoints.close()


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_state_loader_and_metadata_come_back_bitwise(tmp_path, opened, dtype):
  state = make_state(7, dtype=dtype)
  checkpoints = opened(tmp_path / 'new' / 'checkpoints')
  assert checkpoints.latest_step() is None
  checkpoints.save(7, state, Counter(7), METADATA)
  assert checkpoints.latest_step() == 7  # waits for the save

  loader = Counter()
  again = opened(tmp_path / 'new' / 'checkpoints')
  restored = again.restore(again.latest_step(), abstract_of(state), loader)
  assert_same(restored, state)
  assert loader.count == 7
  assert again.metadata(7) == METADATA


def test_state_may_be_donated_once_save_returns(tmp_path, opened):
  clear = jax.jit(lambda state: jax.tree.map(jnp.zeros_like, state), donate_argnums=0)
  state = make_state(3, width=4096, num_devices=4)
  expected = jax.tree.map(np.array, state)
  checkpoints = opened(tmp_path)
  checkpoints.save(3, state, Stateless(), METADATA)
  jax.block_until_ready(clear(clear(state)))
  assert_same(checkpoints.restore(3, abstract_of(expected, 4), Stateless()), expected)


@pytest.mark.parametrize('num_devices', [1, 4, 8])
def test_restores_on_another_mesh(tmp_path, opened, num_devices):
  state = make_state(1, num_devices=8)
  checkpoints = opened(tmp_path)
  checkpoints.save(1, state, None, METADATA)
  abstract = abstract_of(state, num_devices)
  restored = checkpoints.restore(1, abstract)
  assert_same(restored, state)
  assert restored['params']['w'].sharding == abstract['params']['w'].sharding


def test_parameters_alone(tmp_path, opened):
  save(tmp_path, 5)
  params = make_state(5)['params']
  checkpoints = opened(tmp_path)
  assert_same(checkpoints.restore_params(5, abstract_of(params)), params)


def test_parameters_alone_leave_optimizer_arrays_on_disk(tmp_path, opened, monkeypatch):
  save(tmp_path, 5)
  checkpoints = opened(tmp_path)
  asked = []
  restore = checkpoints._checkpointer.restore

  def spy(path, args):
    asked.append(args.item)
    return restore(path, args=args)

  monkeypatch.setattr(checkpoints._checkpointer, 'restore', spy)
  checkpoints.restore_params(5, abstract_of(make_state(5)['params']))
  assert [list(item) for item in asked] == [['params']]


def test_keeps_the_newest_steps_with_their_data(tmp_path):
  save(tmp_path, 1, 2, 3, 4, 5, keep=2)
  assert step_names(tmp_path) == ['4', '5']
  assert (tmp_path / '4' / 'data' / 'p00000.count').read_text() == '4'


def test_saving_an_intact_step_again_keeps_it(tmp_path):
  save(tmp_path, 1)
  before = {path: path.stat().st_mtime_ns for path in files_of(tmp_path)}
  save(tmp_path, 1)
  assert {path: path.stat().st_mtime_ns for path in files_of(tmp_path)} == before


def unfinished(folder):
  (folder / 'manifest.json').write_text('{"finished": false}')


def unfinished_by_an_earlier_version(folder):
  (folder / 'manifest.json').unlink()
  (folder / 'state').rename(folder / 'state.orbax-checkpoint-tmp')


@pytest.mark.parametrize('leave', [unfinished, unfinished_by_an_earlier_version])
def test_unfinished_saves_are_passed_over_and_removed(tmp_path, opened, caplog, leave):
  save(tmp_path, 1)
  shutil.copytree(tmp_path / '1', tmp_path / '2')
  leave(tmp_path / '2')
  assert opened(tmp_path).latest_step() == 1
  assert not warnings_in(caplog)
  save(tmp_path, 3)
  assert step_names(tmp_path) == ['1', '3']


def test_a_file_in_place_of_a_step_is_replaced(tmp_path, opened):
  save(tmp_path, 1)
  (tmp_path / '2').write_text('')
  assert opened(tmp_path).latest_step() == 1
  save(tmp_path, 2)
  assert opened(tmp_path).latest_step() == 2


def warnings_in(caplog):
  return [r.getMessage() for r in caplog.records if r.levelno >= python_logging.WARNING]


def flip_bit(path, random_numbers):
  content = bytearray(path.read_bytes())
  content[random_numbers.randrange(len(content))] ^= 1 << random_numbers.randrange(8)
  path.write_bytes(content)


def test_flipped_bits_are_never_silently_wrong(tmp_path, opened):
  save(tmp_path, 1, 2)
  state = make_state(2)
  abstract = abstract_of(state)
  random_numbers = random.Random(0)
  files = [path for path in files_of(tmp_path / '2') if path.stat().st_size]
  sizes = [path.stat().st_size for path in files]
  checkpoints = opened(tmp_path)
  detected = 0
  for trial in range(20):
    path = random_numbers.choices(files, sizes if trial % 2 else None)[0]
    original = path.read_bytes()
    flip_bit(path, random_numbers)
    try:
      loader = Counter()
      assert_same(checkpoints.restore(2, abstract, loader), state)
      assert loader.count == 2
    except ValueError as error:
      assert len(str(error).splitlines()) == 1
      assert checkpoints.latest_step() == 1
      detected += 1
    path.write_bytes(original)
  assert detected > 15  # the others hit white space of the manifest
  assert checkpoints.latest_step() == 2


def delete(path):
  return shutil.rmtree(path) if path.is_dir() else path.unlink()


def truncate(path):
  for file in files_of(path):
    if file.parent.name == 'd':  # the arrays
      file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
  'damage, name',
  [
    (delete, 'metadata.json'),
    (delete, 'state'),
    (delete, 'state/_METADATA'),
    (delete, 'data'),
    (truncate, 'state'),
  ],
)
def test_falls_back_from_a_damaged_step_with_one_warning(tmp_path, opened, caplog, damage, name):
  save(tmp_path, 1, 2)
  damage(tmp_path / '2' / name)
  checkpoints = opened(tmp_path)
  assert checkpoints.latest_step() == 1
  (warning,) = warnings_in(caplog)
  assert 'skipped damaged checkpoints: 2 (' in warning and 'Going back to step 1' in warning
  with pytest.raises(ValueError, match='checkpoint .*2 is damaged'):
    checkpoints.restore(2, abstract_of(make_state(2)), Counter())


def test_damaged_step_is_replaced_when_the_run_gets_there_again(tmp_path, opened):
  save(tmp_path, 1, 2)
  truncate(tmp_path / '2' / 'state')
  checkpoints = opened(tmp_path)
  checkpoints.save(2, make_state(2), Counter(2), METADATA)
  assert checkpoints.latest_step() == 2
  assert_same(checkpoints.restore(2, abstract_of(make_state(2)), Counter()), make_state(2))


def test_damaged_steps_do_not_crowd_out_good_ones(tmp_path, opened):
  save(tmp_path, 10, 20, 30, keep=3)
  truncate(tmp_path / '30' / 'state')
  save(tmp_path, 25, keep=1)
  assert step_names(tmp_path) == ['25']
  assert opened(tmp_path).latest_step() == 25


def test_a_step_that_a_run_deletes_while_it_is_read_is_read_from_the_next(tmp_path, opened):
  save(tmp_path, 1, keep=1)
  checkpoints, seen = opened(tmp_path), []

  def read(step):
    seen.append(step)
    if step == 1:
      save(tmp_path, 2, keep=1)
    return checkpoints.restore(step, abstract_of(make_state(step)))

  step, state = checkpoints.read_newest(read)
  assert seen == [1, 2] and step == 2
  assert_same(state, make_state(2))
  truncate(tmp_path / '2' / 'state')
  with pytest.raises(ValueError, match='no checkpoint in .* is intact'):
    checkpoints.read_newest(read)


def test_refuses_to_start_again_over_damaged_steps(tmp_path, opened):
  save(tmp_path, 1)
  truncate(tmp_path / '1' / 'state')
  with pytest.raises(ValueError, match='no checkpoint in .* is intact: 1 .*delete this folder'):
    opened(tmp_path).latest_step()


def lose_manifest(folder):
  (folder / 'manifest.json').unlink()


def empty_manifest(folder):
  (folder / 'manifest.json').write_text('{}')


def forget_in_manifest(folder):
  content = json.loads((folder / 'manifest.json').read_text())
  content['files'].popitem()
  (folder / 'manifest.json').write_text(json.dumps(content))


@pytest.mark.parametrize('lose', [lose_manifest, empty_manifest, forget_in_manifest])
def test_a_step_without_its_manifest_is_never_used(tmp_path, opened, caplog, lose):
  save(tmp_path, 1, 2)
  lose(tmp_path / '2')
  checkpoints = opened(tmp_path)
  assert checkpoints.latest_step() == 1
  assert 'skipped damaged checkpoints: 2 (manifest.json ' in warnings_in(caplog)[0]
  with pytest.raises(ValueError, match='checkpoint .*2 is damaged: manifest.json '):
    checkpoints.restore(2, abstract_of(make_state(2)), Counter())
  shutil.rmtree(tmp_path / '1')
  with pytest.raises(ValueError, match='no checkpoint .*; to use it unverified, run .* --accept=2'):
    checkpoints.latest_step()


def test_manifests_of_earlier_versions_name_every_file(tmp_path, opened):
  save(tmp_path, 1)
  path = tmp_path / '1' / 'manifest.json'
  entries = json.loads(path.read_text())['files']
  path.write_text(json.dumps(entries))
  (tmp_path / '1' / 'data' / '.DS_Store').touch()
  checkpoints = opened(tmp_path)
  assert_same(checkpoints.restore(1, abstract_of(make_state(1))), make_state(1))
  for name in entries:
    path.write_text(json.dumps({n: entry for n, entry in entries.items() if n != name}))
    with pytest.raises(ValueError, match=f'does not name {name}'):
      checkpoints.restore(1, abstract_of(make_state(1)))


def test_misfit_names_parameters_and_config_fields(tmp_path, opened):
  save(tmp_path, 1)
  config = {**CONFIG, 'model': {'d_model': 32, 'blocks': (('mlp', 2),)}}
  abstract = abstract_of(make_state(1, width=32))
  abstract['params']['new'] = abstract['params'].pop('b')
  with pytest.raises(ValueError) as error:
    opened(tmp_path).restore(1, abstract, Counter(), config=config)
  lines = str(error.value).splitlines()
  assert 'params/w: checkpoint (16, 64) vs config (32, 64)' in lines
  assert 'params/b: only in the checkpoint, (8,)' in lines
  assert 'params/new: not in the checkpoint, config (8,)' in lines
  assert lines[-1] == 'model.d_model: checkpoint 16 vs config 32'
  assert any(line.startswith('optimizer/') and line.endswith('(32, 64)') for line in lines)


def test_misfit_names_dtypes(tmp_path, opened):
  save(tmp_path, 1)
  params = make_state(1, dtype=jnp.bfloat16)['params']
  with pytest.raises(ValueError, match='params/w: checkpoint float32 vs config bfloat16'):
    opened(tmp_path).restore_params(1, abstract_of(params))


def test_missing_step(tmp_path, opened):
  checkpoints = opened(tmp_path)
  with pytest.raises(ValueError, match=r'cannot read .*4/metadata\.json'):
    checkpoints.metadata(4)
  with pytest.raises(ValueError, match=r'metadata\.json is missing'):
    checkpoints.restore(4, abstract_of(make_state()), None)


def test_unwritable_folder_is_named_at_once(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='workdir: cannot write checkpoints to .*file/checkpoints'):
    Checkpoints(tmp_path / 'file' / 'checkpoints').check_writable(0)


def test_a_disk_without_room_for_a_checkpoint_is_refused_at_once(tmp_path):
  Checkpoints(tmp_path).check_writable(1)
  with pytest.raises(RuntimeError, match='1 more .* of 1000000000000.0 MB .* has only'):
    Checkpoints(tmp_path).check_writable(10**18)


def test_there_must_be_room_for_all_checkpoints_that_will_be_kept_and_one_more(
  tmp_path, monkeypatch
):
  disk = types.SimpleNamespace(free=3.5e6)
  monkeypatch.setattr('moejax.checkpoint.shutil.disk_usage', lambda folder: disk)
  Checkpoints(tmp_path).check_writable(10**6, saves=3)
  with pytest.raises(RuntimeError, match='4 more checkpoints of 1.0 MB .*has only 3.5 MB left'):
    Checkpoints(tmp_path, keep=3).check_writable(10**6, saves=4)
  save(tmp_path, 1)
  Checkpoints(tmp_path, keep=3).check_writable(10**6, saves=4)


def test_what_a_failed_save_left_is_removed_before_there_must_be_room(tmp_path, monkeypatch):
  save(tmp_path, 1)
  shutil.copytree(tmp_path / '1', tmp_path / '2')
  (tmp_path / '2' / 'manifest.json').unlink()
  (tmp_path / '2' / 'state').rename(tmp_path / '2' / 'state.orbax-checkpoint-tmp')
  free = lambda folder: types.SimpleNamespace(free=0 if (folder / '2').exists() else 10)
  monkeypatch.setattr('moejax.checkpoint.shutil.disk_usage', free)
  Checkpoints(tmp_path).check_writable(10)
  assert step_names(tmp_path) == ['1']


@pytest.mark.parametrize('number, kind', [(28, RuntimeError), (5, RuntimeError), (13, ValueError)])
def test_a_disk_that_fails_may_recover_and_a_folder_without_permission_not(
  tmp_path, monkeypatch, number, kind
):
  def fail(**_):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr('moejax.checkpoint.tempfile.NamedTemporaryFile', fail)
  with pytest.raises(kind, match=f'cannot write checkpoints to .*: {os.strerror(number)}'):
    Checkpoints(tmp_path).check_writable(1)


def test_a_failed_save_is_resumable_if_an_earlier_one_was_complete(tmp_path, monkeypatch):
  def fail(folder, names):
    raise OSError(28, 'No space left on device')

  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, make_state(1), None, METADATA)
  checkpoints.wait()
  monkeypatch.setattr('moejax.manifest.checksums', fail)
  checkpoints.save(2, make_state(2), None, METADATA)
  with pytest.raises(SaveFailed, match='cannot write checkpoint .*2: .*No space left on device'):
    checkpoints.close()


@pytest.mark.parametrize(
  'error, message',
  [
    (OSError(28, 'No space left on device'), '.*No space left on device'),
    (OSError(122, 'Disk quota exceeded'), '.*Disk quota exceeded'),
    (TypeError('no array'), 'no array'),  # nothing about the disk
  ],
)
def test_failed_save_is_reported_by_the_next_call(tmp_path, monkeypatch, error, message):
  checkpoints = Checkpoints(tmp_path)

  def fail(folder, names):
    raise error

  monkeypatch.setattr('moejax.manifest.checksums', fail)
  checkpoints.save(1, make_state(1), None, METADATA)
  with pytest.raises(RuntimeError, match=f'workdir: cannot write checkpoint .*1: {message}$'):
    checkpoints.close()


@pytest.mark.parametrize(
  'name', ['lr[3e-4]', 'a[b]/run', 'what?', '*', 'a\\b', 'gs:/run', '\udcff']
)
def test_every_path_can_hold_checkpoints(tmp_path, opened, name):
  save(tmp_path / name / 'checkpoints', 1)
  assert [path.name for path in tmp_path.iterdir()] == name.split('/')[:1]
  (tmp_path / name).rename(tmp_path / 'renamed')
  restored = opened(tmp_path / 'renamed' / 'checkpoints').restore(1, abstract_of(make_state(1)))
  assert_same(restored, make_state(1))
  (tmp_path / 'renamed').rename(tmp_path / name)
  checkpoints = Checkpoints(tmp_path / name / 'checkpoints')
  assert_same(checkpoints.restore(1, abstract_of(make_state(1))), make_state(1))
  link = checkpoints._link
  checkpoints.close()
  assert not link.exists() and checkpoints.latest_step() == 1


def test_the_first_save_is_read_back_before_it_counts(tmp_path, opened, monkeypatch):
  checkpoints, finish = opened(tmp_path), ocp.PyTreeCheckpointHandler.finalize

  def write_badly(handler, directory):
    finish(handler, directory)
    path = max((directory / 'd').iterdir(), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])

  monkeypatch.setattr(ocp.PyTreeCheckpointHandler, 'finalize', write_badly)
  checkpoints.save(1, make_state(1), None, METADATA)
  with pytest.raises(RuntimeError, match='cannot write checkpoint'):
    checkpoints.wait()
  assert checkpoints.latest_step() is None


def test_a_disk_that_fails_to_flush_is_noticed(tmp_path, opened, monkeypatch):
  checkpoints = opened(tmp_path)

  def fail(descriptor):
    raise OSError(5, 'Input/output error')

  checkpoints.save(1, make_state(1), None, METADATA)
  checkpoints.wait()
  begin = manifest.begin

  def begin_and_fail_later(folder):
    begin(folder)
    monkeypatch.setattr(os, 'fsync', fail)

  monkeypatch.setattr(manifest, 'begin', begin_and_fail_later)
  checkpoints.save(2, make_state(2), None, METADATA)
  with pytest.raises(RuntimeError, match='cannot write checkpoint .*2: .*Input/output error'):
    checkpoints.wait()
  assert checkpoints.latest_step() == 1


def test_large_states_are_read_back_in_parts():
  leaves = {name: np.zeros(2**20, np.uint8) for name in 'abcde'}
  with unittest.mock.patch('moejax.checkpoint._AT_ONCE', 1.5 * 2**20):
    assert [list(part) for part in _parts(leaves)] == [['a', 'b'], ['c', 'd'], ['e']]


def test_arrays_that_are_written_wrongly_do_not_count(tmp_path, opened, monkeypatch):
  checkpoints, state = opened(tmp_path), make_state(1, num_devices=8)
  assert len(_Written.of(state['params']['w']).crc32) == 8
  save = checkpoints._checkpointer.save

  def save_another(path, args):
    args.item['params']['w'] = args.item['params']['w'].at[3, 3].add(1)
    save(path, args=args)

  monkeypatch.setattr(checkpoints._checkpointer, 'save', save_another)
  checkpoints.save(1, state, None, METADATA)
  with pytest.raises(RuntimeError, match='array params/w does not read back as it was'):
    checkpoints.wait()
  assert checkpoints.latest_step() is None


def test_an_unreadable_first_save_below_a_path_with_brackets(tmp_path, opened, monkeypatch, caplog):
  monkeypatch.setattr('moejax.checkpoint._link', lambda directory: directory)
  checkpoints = opened(tmp_path / 'lr[3e-4]')
  checkpoints.save(1, make_state(1), None, METADATA)
  with pytest.raises(RuntimeError, match='cannot write checkpoint'):
    checkpoints.wait()
  assert checkpoints.latest_step() is None
  assert any('Skipping merge' in warning for warning in warnings_in(caplog))


def test_orbax_is_silent(tmp_path, opened, caplog):
  with caplog.at_level(python_logging.INFO):
    save(tmp_path, 1)
    opened(tmp_path).restore(1, abstract_of(make_state(1)), Counter())
  assert not caplog.records


SAVE_FOREVER = """
import sys
import jax, jax.numpy as jnp
from moejax.checkpoint import Checkpoints
add_one = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
state = {'params': {'w': jnp.zeros((1000, 1000))}, 'step': jnp.int32(0)}
checkpoints = Checkpoints(sys.argv[1], keep=2)
for step in range(1, 10**6):
  state = add_one(state)
  checkpoints.save(step, state, None, {'config': {}})
  print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize('saves, delay', [(4, 0.0), (6, 0.03)])
def test_kill_during_a_save_leaves_an_exact_step(tmp_path, opened, saves, delay):
  root = str(pathlib.Path(__file__).parent.parent)
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': root}
  command = [sys.executable, '-c', SAVE_FOREVER, str(tmp_path)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
    for _ in range(saves):
      process.stdout.readline()
    try:
      process.wait(delay)
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGKILL)
  checkpoints = opened(tmp_path)
  step = checkpoints.latest_step()
  assert step >= saves - 2
  expected = {'params': {'w': np.full((1000, 1000), step, np.float32)}, 'step': np.int32(step)}
  assert_same(checkpoints.restore(step, abstract_of(expected), None), expected)
  assert json.loads((tmp_path / str(step) / 'metadata.json').read_text()) == {'config': {}}
