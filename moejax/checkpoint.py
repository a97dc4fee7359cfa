"""Checkpoints: one folder per step, written in the background and checked before use.

  checkpoints/300/data/          what the loader's `save` wrote, files per process
                  metadata.json  config and fingerprints
                  state/         the arrays, by orbax
                  manifest.json  size and CRC-32 of every file above, and its own

They are written in this order; the last one is the commit (`moejax/manifest.py`). The manifest
exists because orbax keeps no checksums: most flipped bits would silently restore as wrong weights.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import logging as python_logging
import math
import os
import pathlib
import shlex
import shutil
import sys
import tempfile
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from moejax import buckets, files, group, manifest, orbax_leaks
from moejax.differences import by_name, changed_fields, differences, misfit
from moejax.exit_codes import RESUMABLE

_AT_ONCE = 1 << 28  # bytes of arrays that are read back at a time
_LARGEST = 1 << 32  # larger arrays are not read back: their hosts may not have room for all shards
_NONE, _ALL_DAMAGED = -1, -2  # in place of a step
_DTYPES = ('float32', 'bfloat16', 'float64', 'int32', 'uint32', 'int64', 'bool')  # that we save
# Failures of a disk that may pass, unlike a folder that cannot be written.
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


class SaveFailed(RuntimeError):
  """A save failed after others of this process, which a restart resumes from."""

  exit_code = RESUMABLE


class Checkpoints:
  """The checkpoints of one run. With several processes, all of them make every call.

  At most one save is in progress: the next call waits for it, and raises RuntimeError if it failed.
  """

  def __init__(self, directory, keep: int = 3, always: int = 0):
    """Opens a folder, which need not exist yet, in a bucket or on a disk that all processes share.

    `keep`: how many of the newest steps to keep. `always`: a step to keep beside them.
    """
    self._directory = files.absolute(directory)
    self._link = _link(self._directory)
    self._keep, self._always = keep, always
    logging.get_absl_logger().addFilter(_is_worth_showing)
    sys.unraisablehook = _report_unraisable
    orbax_leaks.stop()
    self._checkpointer = ocp.AsyncCheckpointer(
      ocp.PyTreeCheckpointHandler(), temporary_path_class=_temporary_path_class(directory)
    )
    self._background = concurrent.futures.ThreadPoolExecutor(1)
    self._pending = None  # step and future of the save in progress
    self._has_saved = False

  def check_writable(self, num_bytes: int, saves: int = 1) -> None:
    """Creates the folder, removes what failed saves left there, and checks it before training.

    Args:
      num_bytes: size of the arrays of one checkpoint.
      saves: how many the run will save. An old one is deleted once a new one is complete.

    Raises:
      ValueError: the folder cannot be created or written, or other processes do not see it.
      RuntimeError: its disk fails, or has no space for the checkpoints.
    """
    try:
      files.make_folder(self._directory)
      if jax.process_index() == 0:
        self._delete_all_but(manifest.steps(self._directory))
      files.try_to_write(self._directory)
    except OSError as error:
      kind = RuntimeError if error.errno in _PASSING else ValueError
      raise kind(
        f'workdir: cannot write checkpoints to {self._directory}: {error.strerror}. Give --workdir '
        'a folder that can be written, on a disk with free space.'
      ) from error
    most = self._keep + bool(self._always) + 1
    more = min(saves, max(1, most - len(manifest.steps(self._directory))))
    free = files.free_bytes(self._directory)
    if free < more * num_bytes:
      raise RuntimeError(
        f'workdir: {more} more checkpoints of {num_bytes / 1e6:.1f} MB will be on the disk of '
        f'{self._directory}, which has only {free / 1e6:.1f} MB left. Make room, lower '
        'train.keep_checkpoints, or choose another folder.'
      )
    if not self._is_shared():
      raise ValueError(
        f'workdir: not all processes see the same folder {self._directory}. Give --workdir a '
        'folder on a disk that all hosts share.'
      )

  def save(self, step: int, state, loader, metadata: dict) -> None:
    """Starts to save a step; `state` may be donated as soon as this returns.

    A step that exists and is intact is left as it is. Once the save is complete, all but the newest
    `keep` steps, and the one to keep always, are deleted, and so are later ones: damaged steps that
    the run resumed before.

    Args:
      step: number of optimizer steps done.
      state: pytree of arrays. Those of the first save are read back before it counts.
      loader: its `save(directory)` stores the position in the data; or None.
      metadata: anything that JSON can hold; the run's config under 'config'.
    """
    self.wait()
    if not self._problem(step):
      return
    folder = self._folder(step)
    with self._explain_failed_save(step):
      if jax.process_index() == 0:
        manifest.begin(folder)
      multihost_utils.sync_global_devices(f'checkpoint {step}: folder cleared')
      with files.to_fill(folder / 'data') as data:
        if loader is not None:
          loader.save(data)
      if jax.process_index() == 0:
        (folder / 'metadata.json').write_text(json.dumps(metadata))  # flushed by the commit
      arrays = by_name(state)
      tree = traverse_util.unflatten_dict(arrays, sep='/')
      # In another thread, where no mesh is set: under one, jax 0.7 refuses what orbax does to the
      # shards of single devices.
      args = ocp.args.PyTreeSave(tree)
      self._background.submit(self._checkpointer.save, self._state(step), args=args).result()
      written = (
        {name: _Written.of(array) for name, array in arrays.items()} if not self._has_saved else {}
      )
    self._pending = step, self._background.submit(self._finish, step, written)

  def last(self) -> int:
    """The newest step, intact or not; -1 if nothing was saved."""
    last = max(manifest.steps(self._directory), default=_NONE) if jax.process_index() == 0 else 0
    return int(multihost_utils.broadcast_one_to_all(np.int32(last)))

  def latest_step(self, at_most: int | None = None) -> int | None:
    """The newest intact step, with a warning if newer ones are damaged; None if nothing was saved.

    `at_most`: leaves out later steps.

    Raises:
      ValueError: all steps are damaged, and starting again would overwrite the run.
    """
    self.wait()
    # Process 0 decides for all.
    step, damaged = None, {}
    if jax.process_index() == 0:
      step, damaged = manifest.newest(self._directory, at_most)
    code = (_ALL_DAMAGED if damaged else _NONE) if step is None else step
    code = int(multihost_utils.broadcast_one_to_all(np.int32(code)))
    described = ', '.join(f'{step} ({why})' for step, why in damaged.items())
    if code == _ALL_DAMAGED:
      raise ValueError(
        f'workdir: no checkpoint in {self._directory} is intact: {described}.'
        f'{self._how_to_accept(damaged)} Restore a backup, or delete this folder to start again '
        'from step 0.'
      )
    if damaged:
      logging.warning(
        f'{self._directory}: skipped damaged checkpoints: {described}. Going back to step {code}.'
      )
    return None if code == _NONE else code

  def _how_to_accept(self, damaged):
    for step in damaged:
      if manifest.is_unverifiable(self._folder(step)):
        workdir = shlex.quote(f'--workdir={self._directory.parent}')
        return (
          f' Whether step {step} is whole cannot be told; to use it unverified, run python -m '
          f'moejax.verify {workdir} --accept={step}.'
        )
    return ''

  def discard_after(self, step: int) -> None:
    """Deletes all later steps, the newest first."""
    self.wait()
    if jax.process_index() == 0:
      for later in reversed(manifest.steps(self._directory)):
        if later > step:
          manifest.delete(self._folder(later))
    multihost_utils.sync_global_devices(f'checkpoints after {step}: deleted')

  def read_newest(self, read) -> tuple:
    """(step, `read(step)`) of the newest intact step; (None, None) if nothing was saved.

    If a running training deletes that step meanwhile, a newer one is read.
    """
    while (step := self.latest_step()) is not None:
      is_deleted = lambda step=step: not files.exists(self._folder(step) / 'metadata.json')
      try:
        result = read(step)
      except ValueError:
        if not is_deleted():
          raise
      else:
        if not is_deleted():
          return step, result
    return None, None

  def metadata(self, step: int) -> dict:
    """The metadata given to `save`."""
    return read_metadata(self._directory, step)

  def restore(self, step: int, abstract_state, loader=None, config: dict | None = None):
    """Loads the state of a step, on any mesh.

    Args:
      step: which one.
      abstract_state: pytree of jax.ShapeDtypeStruct with the shardings to load to.
      loader: its `load(directory)` restores the position in the data; or None.
      config: of the run that restores, for errors: where it differs from the saved one.

    Returns:
      A pytree of arrays like `abstract_state`.

    Raises:
      ValueError: the step is missing or damaged, or its arrays have other names, shapes or dtypes.
    """
    state = self._load(step, abstract_state, '', config)
    if loader is not None:
      with files.on_disk(self._folder(step) / 'data') as data:
        loader.load(data)
    return state

  def restore_params(self, step: int, abstract_params, config: dict | None = None):
    """`restore` of the parameters alone; optimizer arrays are not read."""
    return self._load(step, {'params': abstract_params}, 'params/', config)['params']

  def arrays(self, step: int, names=None):
    """Yields name and NumPy array of all arrays of a step, or some; for this process alone."""
    stored = self._stored(step)
    for part in _parts({name: stored[name] for name in (stored if names is None else names)}):
      nested = lambda leaves: traverse_util.unflatten_dict(leaves, sep='/')
      args = ocp.args.PyTreeRestore(
        nested(part),
        restore_args=nested(dict.fromkeys(part, ocp.RestoreArgs(restore_type=np.ndarray))),
        partial_restore=True,
      )
      # Not by the checkpointer, which would wait for the other processes.
      tree = self._checkpointer.handler.restore(epath.Path(self._state(step)), args=args)
      yield from by_name(tree).items()

  def close(self) -> None:
    """Waits for the save in progress, then frees the threads."""
    try:
      self.wait()
    finally:
      self._background.shutdown()
      self._checkpointer.close()
      if self._link != self._directory:
        shutil.rmtree(self._link.parent)

  def _folder(self, step):
    return self._directory / str(step)

  def _state(self, step):
    """Path of the arrays of a step, for orbax."""
    return self._link / str(step) / 'state'

  def _is_shared(self):
    """Whether every process sees a file that process 0 writes."""
    mark = self._directory / 'shared'
    if jax.process_index() == 0:
      files.write(mark, '')
    multihost_utils.sync_global_devices('checkpoints: mark written')
    seen = multihost_utils.process_allgather(np.int32(files.exists(mark)))
    if jax.process_index() == 0:
      files.delete(mark)
    return seen.all()

  def _problem(self, step):
    """What is wrong with a step, or ''. Process 0 decides for all."""
    problem = manifest.problem(self._folder(step)) if jax.process_index() == 0 else ''
    found = multihost_utils.broadcast_one_to_all(np.int32(bool(problem)))
    return problem or ('process 0 found it damaged' if found else '')

  def _finish(self, step, written):
    """Waits for the arrays, commits the step and deletes old ones; in the background."""
    self._checkpointer.wait_until_finished()
    if jax.process_index() == 0:
      if written:
        self._check_written(step, written)
      manifest.commit(self._folder(step))
      saved = [s for s in manifest.steps(self._directory) if s <= step]
      self._delete_all_but([*saved[-self._keep :], self._always])
    self._has_saved = True
    group.note_save()

  def _delete_all_but(self, steps):
    for name in files.children(self._directory):
      if manifest.is_step(name) and int(name) not in steps:
        manifest.delete(self._directory / name)

  def _check_written(self, step, written):
    """Raises ValueError unless the arrays of a step can be read, and are those given to `save`."""
    if not files.exists(self._folder(step) / manifest.ARRAYS):
      raise ValueError('its arrays do not read back: there is no list of them')
    if lines := differences(self._stored(step), written):
      raise ValueError(f'its arrays do not read back: {lines[0]}')
    read = [name for name, leaf in written.items() if _size(leaf) <= _LARGEST]
    for name, array in self.arrays(step, read):
      if not written[name].is_like(array):
        raise ValueError(f'its array {name} does not read back as it was')

  def wait(self) -> None:
    """Waits for the save in progress; raises RuntimeError if it failed."""
    if self._pending:
      step, future = self._pending
      self._pending = None
      with self._explain_failed_save(step):
        future.result()

  def _explain_failed_save(self, step):
    kind = SaveFailed if self._has_saved else RuntimeError
    return one_line_errors(f'workdir: cannot write checkpoint {self._folder(step)}', kind)

  def _stored(self, step):
    """Shapes and dtypes of the arrays of a step, by name."""
    described: Any = self._checkpointer.handler.metadata(epath.Path(self._state(step)))
    stored = by_name(described.tree)
    for name, leaf in stored.items():
      if str(getattr(leaf, 'dtype', None)) not in _DTYPES:
        raise ValueError(f'{name} is no array of {", ".join(_DTYPES)}')
    return stored

  def _load(self, step, abstract, prefix, config):
    """The arrays of `abstract`, which must be all that the step holds under `prefix`."""
    self.wait()
    folder = self._folder(step)
    if problem := self._problem(step):
      raise ValueError(f'checkpoint {folder} is damaged: {problem}.')
    wanted = by_name(abstract)
    with one_line_errors(f'cannot read checkpoint {folder}'):
      stored = self._stored(step)
    stored = {name: leaf for name, leaf in stored.items() if name.startswith(prefix)}
    if lines := differences(stored, wanted):
      saved = self.metadata(step).get('config', {})
      raise ValueError(misfit(folder, lines, changed_fields(saved, config) if config else {}))
    tree = traverse_util.unflatten_dict(wanted, sep='/')
    args = ocp.args.PyTreeRestore(
      item=tree,
      restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
      partial_restore=True,
    )
    with one_line_errors(f'cannot read checkpoint {folder}'):
      loaded = by_name(self._checkpointer.restore(self._state(step), args=args))
    return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[name] for name in wanted])


@dataclasses.dataclass(frozen=True)
class _Written:
  """What is known of an array that was saved."""

  shape: tuple
  dtype: Any
  crc32: list  # of the shards of this process: (index, checksum of the bytes)

  @classmethod
  def of(cls, array):
    shards = [((), array)]
    if isinstance(array, jax.Array):
      shards = [(s.index, s.data) for s in array.addressable_shards if s.replica_id == 0]
    return cls(array.shape, array.dtype, [(index, _crc32(data)) for index, data in shards])

  def is_like(self, array):
    return all(_crc32(array[index]) == crc32 for index, crc32 in self.crc32)


def _crc32(array):
  return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)


def _is_worth_showing(record):
  """A logging filter: orbax logs all it does, and also the errors that it raises."""
  return (
    f'orbax{os.sep}checkpoint' not in record.pathname or record.levelno == python_logging.WARNING
  )


_report = sys.unraisablehook


def _report_unraisable(unraisable):
  """Passes over the reads that orbax leaves behind when another one of them failed."""
  if str(unraisable.exc_value) != 'Event loop is closed':
    _report(unraisable)


def _link(directory):
  """The directory itself, or a link to it if orbax would take its path for another, or for none."""
  path = str(directory)
  if buckets.is_bucket(path):
    return directory
  if path.isprintable() and not set('*?[\\') & set(path) and ':/' not in path:
    return directory
  link = pathlib.Path(tempfile.mkdtemp(prefix='moejax-')) / 'checkpoints'
  link.symlink_to(directory)
  return link


def _temporary_path_class(directory):
  """How orbax makes a folder appear as a whole; in a bucket it must not rename one."""
  if not buckets.is_bucket(directory):
    return None
  buckets.let_orbax_write_s3()
  return ocp.path.atomicity.CommitFileTemporaryPath


def exists(directory, step: int | None = None) -> bool:
  """Whether a step, or any, was saved completely; its files may have been damaged since."""
  saved = manifest.steps(files.path(directory))
  return bool(saved) if step is None else step in saved


def read_metadata(directory, step: int) -> dict:
  """The metadata given to `Checkpoints.save`; ValueError if they cannot be read."""
  path = files.path(directory) / str(step) / 'metadata.json'
  with one_line_errors(f'cannot read {path}'):
    metadata = files.parse_json(files.read(path))
    if not isinstance(metadata, dict):
      raise ValueError('expected an object, {...}')
  return metadata


def give(directory, step: int, other, changes: dict) -> None:
  """Gives another run the checkpoint of a step; the files of arrays are shared, on one disk.

  Args:
    directory: of the checkpoints.
    step: which one.
    other: the folder of the other run's checkpoints.
    changes: of the metadata.

  Raises:
    ValueError: the step is missing or damaged.
    OSError: `other` cannot be written; it has no new step.
  """
  source, target = files.path(directory) / str(step), files.path(other) / str(step)
  if problem := manifest.problem(source):
    raise ValueError(f'checkpoint {source}: {problem}')
  metadata, entries = read_metadata(directory, step) | changes, manifest.read(source)
  with _unfinished(target) as unfinished:
    if buckets.is_bucket(source) or buckets.is_bucket(target):
      for name in entries:
        files.copy(source / name, unfinished / name)
    else:
      shutil.copytree(source, unfinished, copy_function=_share)
    files.write(unfinished / 'metadata.json', json.dumps(metadata))
    manifest.write(unfinished, entries | manifest.checksums(unfinished, ['metadata.json']))
  files.flush_name(target)


@contextlib.contextmanager
def _unfinished(target):
  """A folder that becomes the step `target` at the end, or itself: the manifest tells."""
  if buckets.is_bucket(target):
    manifest.begin(target)
    yield target
  else:
    with files.atomic_output(target) as unfinished:
      yield unfinished


def _share(source, target):
  """Links a file, which saves never change; copies it to another disk."""
  try:
    os.link(source, target)
  except OSError:
    shutil.copy2(source, target)


@contextlib.contextmanager
def one_line_errors(what, kind: type[Exception] = ValueError):
  """Shortens any error to one line: orbax raises many kinds, some of a thousand lines."""
  try:
    yield
  except Exception as error:
    line, *_ = str(error).strip().splitlines() or [type(error).__name__]
    line = line if len(line) < 400 else f'{line[:200]} ... {line[-200:]}'
    raise kind(f'{what}: {line}') from error


def _size(leaf):
  return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def _parts(leaves):
  """Splits arrays by name into dicts that fit into memory; each has at least one."""
  part, size = {}, 0
  for name, leaf in leaves.items():
    part[name] = leaf
    size += _size(leaf)
    if size > _AT_ONCE:
      yield part
      part, size = {}, 0
  if part:
    yield part
