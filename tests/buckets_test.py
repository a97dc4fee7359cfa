"""Runs in gs:// and s3://: what folders do holds there, after kills and damage too."""

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moejax import (
  buckets as buckets_lib,
  checkpoint,
  cli,
  data,
  files,
  group,
  lease,
  manifest,
  metrics,
  report,
  run_folder,
  runner,
  tokenize,
)
from moejax.checkpoint import Checkpoints
from moejax.data import tokenizer as tokenizer_lib
from moejax.scaling_laws import collect, grid
from tests import buckets
from tests.tiny import Counter

STATE = {'params': {'w': jnp.arange(24.0).reshape(6, 4)}, 'step': jnp.int32(3)}
ABSTRACT = jax.tree.map(
  lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), STATE
)


@pytest.fixture(scope='module')
def services():
  with pytest.MonkeyPatch.context() as patch, buckets.gcs(patch) as gcs, buckets.s3(patch):
    yield gcs


@pytest.fixture(params=['gs', 's3'])
def folder(request, services, tmp_path, monkeypatch):
  """A new folder of a bucket; nothing is written to this disk."""
  monkeypatch.chdir(tmp_path)
  yield files.path(f'{request.param}://bucket/{tmp_path.name}')
  assert not list(tmp_path.iterdir())


@pytest.fixture
def opened():
  """`opened(folder)` returns Checkpoints, closed at the end."""
  found = []

  def open_(folder, keep=3):
    found.append(Checkpoints(folder, keep))
    return found[-1]

  yield open_
  for one in found:
    one.close()


def test_paths_in_buckets(monkeypatch):
  assert not buckets_lib.is_bucket('gs:/x') and not buckets_lib.is_bucket('runs/gs://x')
  assert files.path('gs:/x') == pathlib.Path('gs:/x')
  for text in ('gs://', 's3:///run', 'gs://bucket/lr[3e-4]', 'gs://b/a*', 'gs://b/a/../c'):
    with pytest.raises(ValueError, match='expected .*://BUCKET/FOLDER without any of'):
      cli.path(text, bucket=True)
  with pytest.raises(ValueError, match='expected a local path, or one in gs:// or s3://, got az:'):
    cli.path('az://bucket/run', bucket=True)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r"in a bucket: pip install 'moejax\[gcs\]', or mount"):
    cli.path('gs://bucket/run', bucket=True)


def test_files(folder, tmp_path_factory):
  path = folder / 'a' / 'text'
  assert not files.exists(path) and not files.children(folder) and not files.names(folder)
  files.write(path, 'é\n')
  files.write(folder / 'b', b'1' * 100)
  assert files.read(path).decode() == 'é\n' and b''.join(files.chunks(path)) == files.read(path)
  assert files.exists(folder / 'a') and files.children(folder) == {'a', 'b'}
  assert files.names(folder) == {'a/text', 'b'} and files.names(folder / 'a') == {'text'}
  with files.atomic_output(folder / 'plot.png') as temporary:
    assert temporary.suffix == '.png'
    temporary.write_text('2')
  with pytest.raises(KeyboardInterrupt), files.atomic_output(folder / 'b') as temporary:
    temporary.write_text('half')
    raise KeyboardInterrupt
  with files.to_fill(folder / 'new') as disk:
    files.write(disk / 'c' / 'd', '3')
  with files.on_disk(folder) as disk:
    assert (disk / 'b').read_bytes() == b'1' * 100 and (disk / 'new' / 'c' / 'd').exists()
  files.copy(folder / 'new' / 'c' / 'd', folder / 'e')
  assert files.read(folder / 'e') == b'3' and files.read(folder / 'plot.png') == b'2'
  files.delete(folder / 'a')
  files.delete(folder / 'b')
  files.delete(folder / 'b')
  assert files.children(folder) == {'e', 'new', 'plot.png'}
  with pytest.raises(FileNotFoundError):
    files.read(path)
  missing = files.path(str(folder).replace('//bucket', '//none'))
  with pytest.raises(ValueError, match='there is no bucket none'):
    files.write(missing / 'x', '')


def test_a_service_that_fails_is_no_missing_file(monkeypatch):
  pytest.importorskip('gcsfs', reason='gcsfs is not installed')
  folder = buckets_lib.path('gs://bucket/run')

  def fail(protocol):
    raise ConnectionError('Connection\nreset')

  monkeypatch.setattr('fsspec.filesystem', fail)
  for use in (files.exists, files.names, files.children, files.read, manifest.steps):
    with pytest.raises(buckets_lib.Failed, match='the storage service failed: Connection reset'):
      use(folder)


def save(checkpoints, step, count=0):
  state = STATE | {'step': jnp.int32(step)}
  checkpoints.save(step, state, Counter(count), {'config': {}, 'corpus': 'abc'})
  checkpoints.wait()


def test_checkpoints_are_saved_restored_and_deleted(folder, opened):
  checkpoints = opened(folder, keep=1)
  checkpoints.check_writable(1000)
  for step in (3, 6):
    save(checkpoints, step, step)
  assert files.children(folder) == {'6'} and not [n for n in files.names(folder) if 'tmp' in n]
  checkpoints, loader = opened(folder), Counter()
  assert checkpoints.latest_step() == 6 and checkpoints.metadata(6)['corpus'] == 'abc'
  restored = checkpoints.restore(6, ABSTRACT, loader)
  np.testing.assert_array_equal(restored['params']['w'], STATE['params']['w'])
  assert restored['step'] == 6 and loader.count == 6
  checkpoint.give(folder, 6, folder / 'other', {'corpus': 'def'})
  assert opened(folder / 'other').metadata(6)['corpus'] == 'def'
  assert not manifest.problem(folder / 'other' / '6')


def test_damaged_objects_are_noticed(services, opened):
  folder = files.path('gs://bucket/damaged')
  checkpoints = opened(folder)
  save(checkpoints, 3)
  save(checkpoints, 6)
  arrays = max(name for name in files.names(folder / '6') if '/d/' in name)
  for name, damage in (
    (arrays, lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    (arrays, lambda content: content[:-1]),
    (arrays, None),
    ('manifest.json', lambda content: content.replace(b'3', b'4', 1)),
    ('manifest.json', None),
  ):
    content = files.read(folder / '6' / name)
    files.delete(folder / '6' / name)
    if damage:
      files.write(folder / '6' / name, damage(content))
    assert checkpoints.latest_step() == 3
    with pytest.raises(ValueError, match='6 is damaged'):
      checkpoints.restore(6, ABSTRACT)
    files.write(folder / '6' / name, content)
  assert checkpoints.latest_step() == 6


def test_a_kill_between_any_two_requests_leaves_an_intact_step(services, opened, monkeypatch):
  """All writes and deletions of a save that deletes an older step are repeated, one by one."""
  folder = files.path('gs://bucket/killed')
  checkpoints = opened(folder, keep=1)
  checkpoints.check_writable(1000)
  save(checkpoints, 3)
  for name in files.names(folder):
    files.write(folder.with_name('replayed') / name, files.read(folder / name))
  requests, create, delete = [], services.create_file, services.delete_file

  def recorded_create(bucket, name, content, *args):
    requests.append((name, content))
    return create(bucket, name, content, *args)

  def recorded_delete(bucket, name):
    requests.append((name, None))
    return delete(bucket, name)

  with monkeypatch.context() as patch:
    patch.setattr(services, 'create_file', recorded_create)
    patch.setattr(services, 'delete_file', recorded_delete)
    save(checkpoints, 6)
  assert len(requests) > 20
  replayed, seen = files.path('gs://bucket/replayed'), []
  for number, (name, content) in enumerate(requests):
    path = replayed / name.removeprefix('killed/')
    files.delete(path) if content is None else files.write(path, content)
    if number % 3 and not name.endswith('.json'):
      continue  # to save time
    seen.append(manifest.newest(replayed))
    assert seen[-1] in ((3, {}), (6, {}))
  steps = [step for step, _ in seen]
  assert steps == sorted(steps) and steps[-1] == 6  # never back
  again = opened(replayed)
  again.check_writable(1000)
  assert again.latest_step() == 6 and int(again.restore(6, ABSTRACT)['step']) == 6


def on_all_devices(step):
  """A state of many arrays, whose values tell the step."""
  types = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((jax.device_count(),), ('fsdp',), axis_types=types)
  value = np.arange(64, dtype=np.float32).reshape(16, 4) + step

  def array(*spec):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

  return {'params': {str(i): array('fsdp') if i % 3 else array() for i in range(30)}}


WRITER = """
import sys
import jax
folder, address, index = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
from tests.buckets_test import Checkpoints, files, on_all_devices
checkpoints = Checkpoints(files.path(folder), keep=2)
checkpoints.check_writable(1000)
for step in range(1, 1000):
  checkpoints.save(step, on_all_devices(step), None, {})
  checkpoints.wait()
  print('saved', step, flush=True)
"""


@pytest.mark.heavy
def test_two_processes_that_are_killed_leave_a_step_for_one(services, opened, tmp_path):
  folder = files.path('gs://bucket/two')
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  environment = os.environ | {
    'PYTHONPATH': str(pathlib.Path(__file__).parent.parent),
    'JAX_NUM_CPU_DEVICES': '2',
  }
  with contextlib.ExitStack() as stack, (tmp_path / 'log').open('w+') as log:
    processes = []
    for index in (0, 1):
      command = [sys.executable, '-c', WRITER, str(folder), address, str(index)]
      process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
      )
      processes.append(stack.enter_context(process))
      stack.callback(process.kill)
    was_saved = 'saved 2\n' in iter(processes[0].stdout.readline, '')
    for process in processes:
      process.send_signal(signal.SIGKILL)
    log.seek(0)
    assert was_saved, log.read()
  checkpoints = opened(folder)
  step = checkpoints.latest_step()
  assert step in (2, 3)
  expected = on_all_devices(step)
  shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
  restored = checkpoints.restore(step, jax.tree.map(shape, expected))
  jax.tree.map(np.testing.assert_array_equal, restored, expected)
  checkpoints.check_writable(1000)
  assert files.children(folder) <= {'1', '2', '3'}


OTHER = json.dumps({'process': 5, 'host': 'b', 'machine': 'other'}).encode()


@pytest.fixture
def quick(monkeypatch):
  """Times of leases; S3 gives times in seconds."""
  monkeypatch.setattr(lease, '_RENEWAL', 1.0)
  monkeypatch.setattr(lease, '_EXPIRY', 2.5)


def take(folder):
  with contextlib.suppress(lease.Held):
    return lease._take(folder / 'lease')


def test_a_folder_has_one_writer(folder, quick):
  with lease.held(folder):
    with pytest.raises(lease.Held, match=f'^process {os.getpid()} on .*, since 20'):
      lease._take(folder / 'lease')
  with concurrent.futures.ThreadPoolExecutor(4) as pool:  # it was released
    assert sum(map(bool, pool.map(take, [folder] * 4))) == 1
  assert len(files.children(folder / 'lease')) == 1


def test_a_writer_elsewhere_is_alive_as_long_as_it_renews_its_lease(folder, quick, capsys):
  path = folder / 'lease' / '7'
  files.write(path, OTHER)
  renewing = threading.Timer(1.2, files.write, (path, OTHER))
  renewing.start()
  assert take(folder) is None
  renewing.join()
  assert 'process 5 on b' in capsys.readouterr().out
  assert take(folder) == folder / 'lease' / '8'
  assert files.children(folder / 'lease') == {'8'}


def test_a_writer_whose_lease_was_taken_ends(folder, monkeypatch):
  said = []
  monkeypatch.setattr(group, 'end_all', lambda message, code: said.append(message))
  with lease.held(folder):
    lease._held[-1]._renew()
    assert not said
    files.write(folder / 'lease' / '2', OTHER)
    lease._held[-1]._renew()
    assert 'was taken over by process 5 on b' in said.pop()
    files.delete(folder / 'lease')
    lease._held[-1]._renew()
    assert said == [f'{folder} is gone. This process ends, and writes no more.']
  assert not files.children(folder / 'lease')


def cell(steps):
  fields = {'train.steps': str(steps)}
  size = {'d_model': 16, 'blocks': 2, 'heads': 2, 'expansion_rate': 1, 'granularity': 0}
  return grid.Cell(
    name=f'steps-{steps}', config='configs/dense.py:debug', fields=fields, steps=steps,
    tokens=512 * steps, params=6144, active_params=6144, flops=1e6 * steps, **size,
  )  # fmt: skip


def test_a_grid(folder, monkeypatch, tmp_path_factory, capsys):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
  monkeypatch.setattr(runner, '_BUCKET_SECONDS', 0.01)
  monkeypatch.setattr(runner, '_backend', lambda: 'cpu')
  codes = [65, 0]

  class Process:
    """A run of a cell that ends at once, without training."""

    def __init__(self, command, stdout, **options):
      flags = dict(flag.split('=', 1) for flag in command[3:])
      of_cell = cell(int(flags['--config.train.steps']))
      workdir = files.path(flags['--workdir'])
      assert workdir == folder / of_cell.name
      if self.poll():
        return
      config = cli.config_of(of_cell.arguments[2:])
      run_folder.write(config, workdir)
      validation = {'loss': 3.0}
      report.write_summary(
        workdir,
        {'finished': True, 'config': config.to_dict(), 'tokens_seen': 7, 'validation': validation}
        | {'parameters': {'by_kind': {'mlp': 10}}},
      )

    def poll(self):
      return self.returncode

    returncode = property(lambda self: codes[0] if codes else 0)

  monkeypatch.setattr(subprocess, 'Popen', Process)
  cells = [cell(2), cell(4)]
  assert runner.run(cells[:1], folder) == 65
  log = runner.log(folder, 'steps-2')
  assert log.exists() and f'steps-2 failed: see the end of {log}' in capsys.readouterr().err
  codes.clear()
  assert runner.run(cells, folder) == cli.OK
  runs, excluded = collect.collect([folder])
  assert [run.name for run in runs] == ['steps-2', 'steps-4'] and not excluded
  with runner._lock(folder):
    with pytest.raises(ValueError, match='another program is training cells there'):
      runner.run(cells, folder)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('elsewhere')))
    with pytest.raises(ValueError, match=f'process {os.getpid()} on .* is training cells there'):
      runner.run(cells, folder)


def test_token_files_and_tokenizers(folder, monkeypatch, tmp_path_factory):
  cache = tmp_path_factory.mktemp('cache')
  monkeypatch.setenv('XDG_CACHE_HOME', str(cache))
  for number in range(40):
    files.write(folder / 'texts' / f'{number}.txt', f'text {number}\n' * 9)
  files.write(folder / 'texts' / 'other', 'no text')
  tokenizer_lib.BytesTokenizer().save_pretrained(local := tmp_path_factory.mktemp('bytes'))
  files.upload(local, folder / 'bytes')
  config = data.DataConfig(
    source='text',
    files=f'{folder}/texts/*.txt',
    tokenizer=f'{folder}/bytes',
    sequence_length=8,
    batch_size=4,
  )
  load = lambda of: data.make_loader(of, 'train')
  said = tokenize.tokenize(config, str(folder / 'tokens'))
  assert f'--config.data.tokenizer={folder}/tokens/tokenizer' in said
  with pytest.raises(ValueError, match='already exists'):
    tokenize.tokenize(config, str(folder / 'tokens'))
  of_tokens = dataclasses.replace(
    config, source='tokens', files=f'{folder}/tokens', tokenizer=f'{folder}/tokens/tokenizer'
  )
  assert load(config).fingerprint == load(of_tokens).fingerprint
  np.testing.assert_array_equal(load(config).batch(0)['inputs'], load(of_tokens).batch(0)['inputs'])
  copies = [path for path in cache.rglob('*') if path.suffix == '.bin']
  assert len(copies) == 2
  written = [path.stat().st_ino for path in copies]
  load(of_tokens)
  assert written == [path.stat().st_ino for path in copies]  # not copied again
  name = 'tokens/train.bin'
  content = files.read(folder / name)
  files.write(folder / name, content[:-1] + b'\7')
  with pytest.raises(ValueError, match='was changed after it was written'):
    for step in range(load(of_tokens).num_batches):
      load(of_tokens).batch(step)
  files.delete(folder / name)
  with pytest.raises(ValueError, match='has 0 bytes, its index says'):
    load(of_tokens)
  monkeypatch.setattr(files, 'free_bytes', lambda folder: 1)
  files.write(folder / name, content)
  with pytest.raises(ValueError, match='MB are to be copied to .* Make room'):
    load(of_tokens)
  with pytest.raises(ValueError, match='no file matches'):
    load(dataclasses.replace(config, files=f'{folder}/none/*.txt'))


def test_lines_of_metrics_are_there_once_after_a_kill(folder, monkeypatch, capsys):
  writer = metrics.MetricsWriter(folder, 0)
  for step in (1, 2, 3):
    writer.write(step, {'loss': step / 2})
    if step == 2:
      writer.sync()  # and a checkpoint
  assert [entry['step'] for entry in metrics.read_metrics(folder)] == [1, 2]
  writer = metrics.MetricsWriter(folder, 2)  # the first one was killed
  with monkeypatch.context() as patch:
    patch.setattr(buckets_lib, 'write', fail_to_write)
    patch.setattr(buckets_lib, '_SECONDS', -1)
    writer.write(3, {'loss': 1.5})
    writer.sync()
    writer.write(4, {'loss': 2})
  assert capsys.readouterr().out.count('it fails; lines are kept to be written later') == 1
  writer.close()
  lines = files.read(folder / 'metrics.jsonl').decode().splitlines()
  assert list(map(json.loads, lines)) == [{'step': i, 'loss': i / 2} for i in (1, 2, 3, 4)]


def fail_to_write(path, content):
  raise buckets_lib.Failed('it fails')
