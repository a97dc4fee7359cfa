"""A power cut at any file operation of a save leaves the last step or this one, intact.

A save is recorded: every operation on a file or folder, and what is flushed. Then every prefix of
it is replayed onto a new disk, in several ways of losing what was not flushed. Only flushes by
Python count; TensorStore's own, of the arrays, are taken for none.
"""

import collections
import contextlib
import itertools
import json
import os
import random
import stat
import threading

import numpy as np
import pytest

from moejax import checkpoint, files, manifest
from moejax.checkpoint import Checkpoints
from tests import audit

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_OPERATIONS = ('os.rename', 'os.mkdir', 'os.remove', 'os.rmdir', 'os.link', 'os.truncate')


class Recorder:
  """Records moments of a folder: before every operation, what is in memory and what on the disk.

  Files and folders are nodes: a file has bytes, a folder the nodes of its names.
  """

  def __init__(self, root):
    self.root, self.lock = root, threading.RLock()
    self.ids = {}  # (inode, is a folder) -> node
    self.numbers = itertools.count()
    self.memory, self.disk = {}, {}  # node -> bytes, or {name: node}
    self.moments = []
    self.top = self._read(root)
    self.disk = dict(self.memory)  # all is flushed when the recording begins

  @contextlib.contextmanager
  def recording(self, monkeypatch):
    self.fsync = os.fsync
    with monkeypatch.context() as patch, audit.hook(self.before):
      patch.setattr(os, 'fsync', self.flush)
      yield
    self.look()

  def before(self, event, args):
    if event in _OPERATIONS or event == 'open' and (args[2] or 0) & _WRITES:
      self.look()

  def look(self):
    with self.lock:
      self._read(self.root)
      self.moments.append((dict(self.memory), dict(self.disk)))

  def flush(self, descriptor):
    with self.lock:
      self.look()
      self.fsync(descriptor)
      status = os.fstat(descriptor)
      node = self.ids.get((status.st_ino, stat.S_ISDIR(status.st_mode)))
      if node is not None:  # not above the root
        self.disk[node] = self.memory[node]
        self.moments.append((dict(self.memory), dict(self.disk)))

  def _read(self, path):
    """Takes up a file or folder, and returns its node."""
    seen, ids = {}, {}

    def read(path):
      status = path.stat()
      key = status.st_ino, stat.S_ISDIR(status.st_mode)
      node = ids[key] = self.ids[key] if key in self.ids else next(self.numbers)
      seen[node] = {}
      if not key[1]:
        seen[node] = path.read_bytes()
        return node
      for child in sorted(path.iterdir()):
        try:
          seen[node][child.name] = read(child)
        except FileNotFoundError:  # TensorStore renames its own files meanwhile
          pass
      return node

    top = read(path)
    for node in set(self.ids.values()) - seen.keys():
      if isinstance(self.memory[node], dict):
        seen[node] = {}  # a removed folder is empty
    self.ids = ids  # inodes that are free may be used again
    self.memory |= seen
    return top


def nothing(memory, disk):
  return disk


def everything(memory, disk):
  return memory


def names_alone(memory, disk):
  return memory if isinstance(memory, dict) else disk


def zeros(memory, disk):
  return memory if isinstance(memory, dict) or memory == disk else bytes(len(memory))


def chance(seed):
  """Any mixture of old and new names, and of old, new, half and no bytes."""
  random_numbers = random.Random(seed)

  def mix(memory, disk):
    if not isinstance(memory, dict):
      half = memory[: len(memory) // 2]
      return memory if memory == disk else random_numbers.choice([memory, disk, half, b''])
    old, names = disk or {}, {}
    for name in sorted(memory.keys() | old.keys()):
      node = random_numbers.choice([memory, old]).get(name)
      if node is not None:
        names[name] = node
    return names

  return mix


def after_power_cut(moment, top, survives):
  """{path: bytes} of what a disk holds; folders are paths without bytes."""
  memory, disk = moment
  found = {}

  def visit(node, path):
    left = survives(memory[node], disk.get(node))
    found[path] = None if isinstance(memory[node], dict) else left or b''
    for name, child in (left or {}).items() if found[path] is None else ():
      visit(child, f'{path}/{name}')

  visit(top, '.')
  return found


def replace(folder, old, new):
  """Makes what is in a folder `new`; it was `old`."""
  for path in sorted(old, reverse=True):
    if path not in new or (old[path] is None) != (new[path] is None):
      (folder / path).rmdir() if old[path] is None else (folder / path).unlink()
  for path, content in sorted(new.items()):
    if content is None:
      (folder / path).mkdir(parents=True, exist_ok=True)
    elif content != old.get(path):
      (folder / path).write_bytes(content)


def content_of(folder):
  paths = (path for path in folder.rglob('*') if path.is_file())
  return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


STATE = {'params': {'w': np.arange(1024.0, dtype=np.float32).reshape(32, 32)}, 'step': np.int32(0)}


def save(directory, step, keep=1):
  checkpoints = Checkpoints(directory, keep)
  checkpoints.save(step, STATE, None, {'config': {'step': step}})
  checkpoints.close()


def replay(recorder, directory, tmp_path, before, after):
  """Checks the newest step after a power cut at every moment; `before`, `after`: step -> files."""
  known = before | after
  disk, held = tmp_path / 'disk', {}
  checked, outcomes = set(), collections.Counter()
  seeds = [chance(seed) for seed in range(3)]
  for i, moment in enumerate(recorder.moments):
    for survives in (nothing, everything, names_alone, zeros, *seeds):
      found = after_power_cut(moment, recorder.top, survives)
      key = frozenset(found.items())
      if key in checked and i < len(recorder.moments) - 1:
        continue
      checked.add(key)
      replace(disk, held, found)
      held = found
      after_cut = disk / directory.relative_to(recorder.root)
      step, damaged = manifest.newest(after_cut)
      where = f'operation {i} of {len(recorder.moments)}, {survives.__name__}: {step}, {damaged}'
      if step is None:
        assert not before and not damaged, where  # the run starts again
      else:
        assert content_of(after_cut / str(step)) == known[step], where
      if i == len(recorder.moments) - 1:
        assert step in after, where
      outcomes[step] += 1
  return outcomes


def nothing_saved(directory):
  return {}


def a_step(directory):
  save(directory, 1)
  return {1: content_of(directory / '1')}


def a_damaged_step(directory):
  good = a_step(directory)
  save(directory, 2, keep=2)
  (directory / '2' / 'state' / '_METADATA').write_text('{')
  return good


def record_and_replay(tmp_path, monkeypatch, prepare, act):
  """The newest steps after power cuts while `act(directory)` makes step 2, and how often."""
  directory = tmp_path / 'root' / 'run' / 'checkpoints'
  (tmp_path / 'root').mkdir()
  before = prepare(directory)
  recorder = Recorder(tmp_path / 'root')
  with recorder.recording(monkeypatch):
    act(directory)
  after = {2: content_of(directory / '2')}
  outcomes = replay(recorder, directory, tmp_path, before, after)
  assert outcomes.keys() == {2, *(before or [None])}
  return outcomes


@pytest.mark.heavy
@pytest.mark.parametrize('prepare', [nothing_saved, a_step, a_damaged_step])
def test_a_power_cut_leaves_the_last_step_or_this_one(tmp_path, monkeypatch, prepare):
  outcomes = record_and_replay(tmp_path, monkeypatch, prepare, lambda directory: save(directory, 2))
  assert sum(outcomes.values()) > 40


def test_a_power_cut_leaves_a_fork_or_none(tmp_path, monkeypatch):
  save(tmp_path / 'other', 2)
  give = lambda directory: checkpoint.give(tmp_path / 'other', 2, directory, {'origin': 1})
  record_and_replay(tmp_path, monkeypatch, nothing_saved, give)
  metadata = tmp_path / 'root' / 'run' / 'checkpoints' / '2' / 'metadata.json'
  assert json.loads(metadata.read_text()) == {'config': {'step': 2}, 'origin': 1}


@pytest.mark.parametrize('name', ['flush', 'flush_name', '_flush_one'])
def test_the_replay_notices_what_is_not_flushed(tmp_path, monkeypatch, name):
  monkeypatch.setattr(files, name, lambda path: None)
  with pytest.raises(AssertionError, match='operation .*: None'):
    record_and_replay(tmp_path, monkeypatch, nothing_saved, lambda directory: save(directory, 2))
