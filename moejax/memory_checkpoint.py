"""Checkpoints in the memory of hosts: every process keeps its own part, and that of the one before.

The memory is a folder of a file system without a disk, which outlives the processes but not their
host. When processes die, and a host with them, the others still have all parts, and a restart loses
a few steps and reads no bucket. What is kept is of one config on one layout of devices: with any
other, a run resumes from the checkpoints of its folder.

  FOLDER/moejax-UID/RUN/HOLDER/OWNER-STEP-KEY     RUN is of the run's folder, KEY of what must not
                                                  have changed
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
import struct
import tempfile
import uuid
import zlib

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from moejax import files, process_exchange
from moejax.differences import by_name

_KEPT = 2  # steps: the newest may not be complete yet
_HEAD = struct.Struct('<IQ')  # CRC-32 of what follows, length of the header in JSON
_NONE = -1  # in place of a step


class MemoryCheckpoints:
  """The newest steps of a run, in memory. With several processes, all of them make every call."""

  def __init__(self, folder, checkpoints, config: dict, mesh):
    """
    Args:
      folder: in memory.
      checkpoints: the folder of the run's checkpoints, which may be in a bucket.
      config: all that the run computes follows from it.
      mesh: of the run.

    Raises:
      ValueError: the folder does not exist or is not writable, or belongs to somebody else.
    """
    self._mark = files.absolute(checkpoints) / 'memory'
    self._config, self._mesh = json.dumps(config, sort_keys=True), mesh
    self._process, self._number = jax.process_index(), jax.process_count()
    run = hashlib.sha256(str(self._mark).encode()).hexdigest()[:16]
    self._run_folder = _private(folder) / run
    self._mine = self._run_folder / str(self._process)
    self._holders = {}  # of the parts of `newest`, by owner
    self._header, self._body = {}, b''  # of this process's part, once it was read

  def newest(self) -> int | None:
    """The newest step of which every part is held somewhere, undamaged; None if there is none."""
    held = self._held()
    table = np.full((self._number, _KEPT + 1), _NONE, np.int32)
    for owner in range(self._number):
      steps = sorted((step for o, step in held if o == owner), reverse=True)[: _KEPT + 1]
      table[owner, : len(steps)] = steps
    tables = multihost_utils.process_allgather(table).reshape(self._number, *table.shape)
    has = lambda owner, step: [p for p in range(self._number) if step in tables[p, owner]]
    for step in sorted({int(s) for s in tables.flat} - {_NONE}, reverse=True):
      if all(has(owner, step) for owner in range(self._number)):
        self._holders = {
          o: o if o in (found := has(o, step)) else found[0] for o in range(self._number)
        }
        self._read(step, held)
        return step
    return None

  def metadata(self, step: int) -> dict:
    """The metadata given to `save`; `newest` has found the step."""
    assert step == self._header['step']
    return self._header['metadata']

  def restore(self, step: int, abstract_state, loader, config=None):
    """The state of the step that `newest` has found; the loader goes to its position."""
    del config  # it is that of the run
    assert step == self._header['step']
    pieces, start = {}, 0
    for key, shape, dtype in _pieces(abstract_state):
      size = int(np.prod(shape)) * dtype.itemsize
      pieces[key] = np.frombuffer(self._body[start : start + size], dtype).reshape(shape)
      start += size

    def load(name, leaf):
      piece = lambda index: pieces[name, _start(index)]
      return jax.make_array_from_callback(leaf.shape, leaf.sharding, piece)

    arrays = [load(name, leaf) for name, leaf in by_name(abstract_state).items()]
    self._restore_loader(loader, self._body[start:])
    self._body = b''
    return jax.tree.unflatten(jax.tree.structure(abstract_state), arrays)

  def begin(self, abstract_state) -> None:
    """Makes sure that there is room, and forgets what is no part of this run.

    Raises:
      ValueError: there is not enough memory.
    """
    size = sum(int(np.prod(shape)) * dtype.itemsize for _, shape, dtype in _pieces(abstract_state))
    parts = _KEPT * min(self._number, 2)
    kept = {path for path, _, _ in self._found(self._mine)}
    for path in self._mine.glob('*'):
      if path not in kept:
        path.unlink()
    free = shutil.disk_usage(self._run_folder.parent).free
    free += sum(path.stat().st_size for path in kept)
    if free < parts * size:
      raise ValueError(
        f'train.memory_checkpoint: {parts} parts of {size / 1e6:.1f} MB will be in '
        f'{self._run_folder.parent}, which has {free / 1e6:.1f} MB left. Give it more memory '
        '(containers: a larger /dev/shm), name another folder by train.memory_folder, or set '
        'train.memory_checkpoint = 0.'
      )
    if self._process == 0 and not files.exists(self._mark):
      files.write(self._mark, uuid.uuid4().hex)
    multihost_utils.sync_global_devices('memory checkpoints: run marked')
    self._keys = self._make_keys()

  def save(self, step: int, state, loader, metadata: dict) -> None:
    """Keeps this step beside the one before it, and forgets older ones.

    A part that cannot be written is missing, with a message: no run ends for it.
    """
    mine = self._pack(step, state, loader, metadata)
    parts = {self._process: mine}
    if self._number > 1:
      parts[(self._process - 1) % self._number] = process_exchange.from_neighbour(mine)
    try:
      for owner, part in parts.items():
        files.write(self._mine / f'{owner}-{step}-{self._keys[owner]}', part)
    except OSError as error:
      logging.warning(f'no checkpoint in memory of step {step}: {self._mine}: {error.strerror}')
      return
    kept = sorted({other for _, _, other in self._found(self._mine) if other <= step})[-_KEPT:]
    for path, _, other in self._found(self._mine):
      if other not in kept:
        path.unlink()

  def discard_after(self, step: int) -> None:
    """Forgets all later steps."""
    for path, _, other in self._found(self._mine):
      if other > step:
        path.unlink()

  def clear(self) -> None:
    """Forgets all: the run has saved its last step in its folder."""
    shutil.rmtree(self._mine, ignore_errors=True)

  def _make_keys(self):
    """What must be the same for a part to be used, by owner; None without a run."""
    mark = files.read(self._mark) if self._process == 0 and files.exists(self._mark) else b''
    mark = process_exchange.from_process(0, mark)
    devices = [device.process_index for device in self._mesh.devices.flat]
    layout = [dict(self._mesh.shape), devices, self._config, mark.decode()]
    key = lambda owner: hashlib.sha256(json.dumps([owner, *layout]).encode()).hexdigest()[:16]
    return [key(owner) for owner in range(self._number)] if mark else []

  def _found(self, *folders):
    """Yields path, owner and step of every part of this run in folders of holders."""
    for path in sorted(path for folder in folders for path in folder.glob('*')):
      if match := re.fullmatch('([0-9]+)-([0-9]+)-([0-9a-f]+)', path.name):
        owner, step = int(match[1]), int(match[2])
        if match[3] in self._keys[owner : owner + 1]:
          yield path, owner, step

  def _held(self):
    """The paths of all undamaged parts on this host, by owner and step."""
    self._keys = self._make_keys()
    folders = list(self._run_folder.glob('*'))
    return {(owner, step): path for path, owner, step in self._found(*folders) if _is_whole(path)}

  def _read(self, step, held):
    """Reads this process's part of a step, its own or from a process that holds it."""
    read = lambda owner: held[owner, step].read_bytes()
    for owner, holder in self._holders.items():
      if owner == holder:
        part = read(owner) if owner == self._process else b''
      else:
        part = process_exchange.from_process(
          holder, read(owner) if holder == self._process else b''
        )
      if owner == self._process:
        _, length = _HEAD.unpack_from(part)
        self._header = json.loads(part[_HEAD.size : _HEAD.size + length])
        self._body = part[_HEAD.size + length :]

  def _pack(self, step, state, loader, metadata):
    """This process's part of a step, as bytes."""
    arrays = {}
    for name, array in by_name(state).items():
      for shard in array.addressable_shards:
        arrays.setdefault((name, _start(shard.index)), shard.data)
    body = [np.asarray(arrays[key]).tobytes() for key, _, _ in _pieces(state)]
    with tempfile.TemporaryDirectory() as folder:
      loader.save(pathlib.Path(folder))
      of_loader = {name: pathlib.Path(folder, name).read_bytes() for name in files.names(folder)}
    sizes = {name: len(content) for name, content in of_loader.items()}
    header = json.dumps({'step': step, 'metadata': metadata, 'files': sizes}).encode()
    rest = b''.join([header, *body, *of_loader.values()])
    return _HEAD.pack(zlib.crc32(rest, len(header)), len(header)) + rest

  def _restore_loader(self, loader, mine):
    """Gives the loader the files of all processes."""
    with tempfile.TemporaryDirectory() as folder:
      for owner in range(self._number):
        sizes = json.loads(
          process_exchange.from_process(owner, json.dumps(self._header['files']).encode())
        )
        content = process_exchange.from_process(owner, mine) if sizes else b''
        for name, size in sizes.items():
          path = pathlib.Path(folder, name)
          path.parent.mkdir(parents=True, exist_ok=True)
          path.write_bytes(content[:size])
          content = content[size:]
      loader.load(pathlib.Path(folder))


def _private(folder):
  """A folder of this user below `folder`.

  Raises:
    ValueError: there is none.
  """
  private = pathlib.Path(folder, f'moejax-{os.getuid()}')
  try:
    private.mkdir(mode=0o700, exist_ok=True)
    if private.stat().st_uid != os.getuid() or private.is_symlink():
      raise PermissionError(0, f'{private} belongs to somebody else')
    files.try_to_write(private)
  except OSError as error:
    raise ValueError(
      f'train.memory_folder: cannot write to {folder}: {error.strerror}. Name a folder in memory '
      '(on Linux /dev/shm, or a mounted tmpfs).'
    ) from error
  return private


def _is_whole(path):
  content = path.read_bytes()
  if len(content) < _HEAD.size:
    return False
  crc32, length = _HEAD.unpack_from(content)
  return crc32 == zlib.crc32(memoryview(content)[_HEAD.size :], length)


def _pieces(tree):
  """(name, start), shape and dtype of all different pieces that this process has, in order.

  `tree`: of arrays, or of their shapes, dtypes and shardings.
  """
  pieces = []
  for name, leaf in by_name(tree).items():
    indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    shape = leaf.sharding.shard_shape(leaf.shape)
    starts = sorted({_start(index) for index in indices})
    pieces += [((name, start), shape, np.dtype(leaf.dtype)) for start in starts]
  return pieces


def _start(index):
  """Where a piece begins in its array."""
  return tuple(part.start or 0 for part in index)
