"""Damaged files, and files made to do harm, given to whatever reads files of other people.

  python -m benchmarks.hostile_files                               10 MB of them for every loader
  python -m benchmarks.hostile_files --only=safetensors --megabytes=100
  python -m benchmarks.hostile_files --only=safetensors --seed=17  that try alone, and its error

A try damages one of the files that a line of `loaders.LOADERS` writes, and reads them: as if
nothing had happened, or with one error for the user. Anything else is a failure: an error of
another kind, more than SECONDS of a CPU, more than MEMORY bytes, the death of the process. What
reads is another process, so that the next try follows in any case. tests/hostile_files_test.py
makes some tries for every line.
"""

import contextlib
import json
import os
import pathlib
import random as random_lib
import resource
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app, flags

from benchmarks.hostile_files.damage import damage_one
from benchmarks.hostile_files.loaders import LOADERS, attempt

SECONDS = 10
MEMORY = 2**30  # bytes
_SILENCE = 300  # seconds after which a process that reads hangs


def random_of(name: str, seed: int) -> random_lib.Random:
  return random_lib.Random(f'{name} {seed}')


@contextlib.contextmanager
def _folders(loader):
  """Yields a folder of good files, and where to damage them."""
  with tempfile.TemporaryDirectory() as parent:
    good = pathlib.Path(parent, 'good')
    good.mkdir()
    loader.write(good)
    loader.read(good)
    yield good, pathlib.Path(parent, 'bad')


def _work(name, seed):
  """Tries from `seed` on; prints what came of each."""
  loader = LOADERS[name]
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # of libraries in other languages
  with _folders(loader) as (good, bad):
    size = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    while True:
      size, began = damage_one(loader, good, bad, random_of(name, seed)), time.process_time()
      signal.setitimer(signal.ITIMER_PROF, SECONDS)  # which kills the process
      try:
        outcome, why = ('read' if attempt(loader, bad) else 'refused'), ''
      except BaseException as error:  # a panic of Rust is no Exception
        outcome, why = 'failed', f'{type(error).__name__}: {error}'.partition('\n')[0][:150]
      record = {'seed': seed, 'bytes': size, 'outcome': outcome, 'why': why}
      print(json.dumps(record | {'seconds': time.process_time() - began}), flush=True)
      seed += 1


class _Worker:
  """A process that tries from a seed on."""

  def __init__(self, name, seed):
    command = [
      sys.executable,
      '-m',
      'benchmarks.hostile_files',
      f'--only={name}',
      f'--worker={seed}',
    ]
    self._process = subprocess.Popen(command, stdout=subprocess.PIPE)

  def next(self) -> dict[str, Any] | str:
    """What came of the next try, or why there is no answer."""
    output = self._process.stdout
    assert output
    if not select.select([output], [], [], _SILENCE)[0]:
      return f'hangs for {_SILENCE} s'
    if line := output.readline():
      return json.loads(line)
    code = self._process.wait()
    return f'more than {SECONDS} s' if code == -signal.SIGPROF else f'the process died: {code}'

  def close(self):
    self._process.kill()
    self._process.communicate()


def fuzz(name: str, megabytes: float) -> dict[str, Any]:
  """Tries until so much was damaged; returns counts, failures by seed, the longest time."""
  seed = num_bytes = 0
  counts, failures, slowest = {'read': 0, 'refused': 0, 'failed': 0}, {}, 0.0
  worker = _Worker(name, 0)
  while num_bytes < megabytes * 1e6:
    record = worker.next()
    if isinstance(record, str):
      worker.close()
      worker = _Worker(name, seed + 1)
      record = {'bytes': 0, 'outcome': 'failed', 'why': record, 'seconds': 0.0}
    counts[record['outcome']] += 1
    if record['why']:
      failures[seed] = record['why']
    slowest = max(slowest, record['seconds'])
    num_bytes, seed = num_bytes + record['bytes'] + 1, seed + 1
  worker.close()
  return {'tries': seed, **counts, 'slowest': slowest, 'failures': failures}


def _show(name, seed):
  """Makes one try here; what it raises is seen."""
  with _folders(LOADERS[name]) as (good, bad):
    damage_one(LOADERS[name], good, bad, random_of(name, seed))
    for path in sorted(bad.iterdir()):
      is_new = not path.is_file() or path.read_bytes() != (good / path.name).read_bytes()
      if is_new:
        print(path.name, path.read_bytes()[:2000] if path.is_file() else 'is a folder')
    LOADERS[name].read(bad)


def main(_):
  values = flags.FLAGS
  names = [name for name in LOADERS if values.only in name]
  names = [values.only] if values.only in LOADERS else names
  if values.worker is not None:
    return _work(names[0], values.worker)
  if values.seed is not None:
    return _show(names[0], values.seed)
  failed = False
  print(f'{"loader":32} {"tries":>7} {"read":>7} {"refused":>8} {"failed":>7} {"slowest":>9}')
  for name in names:
    found = fuzz(name, values.megabytes)
    print(
      f'{name:32} {found["tries"]:7} {found["read"]:7} {found["refused"]:8} {found["failed"]:7} '
      f'{found["slowest"]:8.2f}s',
      flush=True,
    )
    first = {why: seed for seed, why in reversed(found['failures'].items())}
    for why, seed in first.items():
      print(f'  --only={shlex.quote(name)} --seed={seed}: {why}')
    failed |= bool(first)
  return int(failed)


if __name__ == '__main__':
  flags.DEFINE_float('megabytes', 10, 'Of damaged files, for each loader.')
  flags.DEFINE_string('only', '', 'Loaders whose name contains this.')
  flags.DEFINE_integer('seed', None, 'Makes this try alone, and shows its error.')
  flags.DEFINE_integer('worker', None, 'Tries from this one on; for its own use.')
  app.run(main)
