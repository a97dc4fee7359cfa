"""Checkpoints: one folder per step, written in the background and checked before use.

  checkpoints/300/data/          what the loader's `save` wrote, files per process
                  metadata.json  config and fingerprints
                  state/         the arrays, by orbax
                  manifest.json  size and CRC-32 of every file above

This is also the order of writing. orbax gives `state/` its name when all arrays of all processes
are on disk, so a folder without it is a save that never finished: it is passed over, and removed by
the next save. Deleting starts with metadata.json, so that a half-deleted step is not taken for a
whole one.

The manifest exists because orbax keeps no checksums: most flipped bits restore as wrong weights
without a word. A step whose files disagree with its manifest is damaged and never used. A step
without one was cut off between the last two lines above; nothing says that it is damaged, so it
counts, with a warning.
"""

import concurrent.futures
import contextlib
import glob
import json
import os
import pathlib
import shutil
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

from moejax import files

_SHOWN = 10  # differing parameters that an error lists
_NONE, _ALL_DAMAGED = -1, -2  # in place of a step


class Checkpoints:
  """The checkpoints of one run. With several processes, all of them make every call.

  At most one save is under way: the next call waits for it, and raises RuntimeError if it failed.
  """

  def __init__(self, directory, keep: int = 3):
    """Opens a folder of checkpoints, which need not exist yet.

    Args:
      directory: the folder, on a disk that all processes share.
      keep: how many of the newest steps to keep.
    """
    self._directory = pathlib.Path(directory).absolute()
    self._link = _link(self._directory)
    self._keep = keep
    logging.get_absl_logger().addFilter(_is_worth_showing)
    self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    self._background = concurrent.futures.ThreadPoolExecutor(1)
    self._pending = None  # step and future of the save under way

  def check_writable(self, num_bytes: int) -> None:
    """Creates the folder, to find out before training that it can be.

    Args:
      num_bytes: size of the arrays of one checkpoint.

    Raises:
      ValueError: the folder cannot be created, or not be written, or its disk has no room for a
        checkpoint, or other processes do not see it.
    """
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      with tempfile.NamedTemporaryFile(dir=self._directory) as probe:
        probe.write(bytes(1 << 16))  # more than a nearly full disk still takes
    except OSError as error:
      raise ValueError(
        f'workdir: cannot write checkpoints to {self._directory}: {error.strerror}. Give --workdir '
        'a folder that can be written, on a disk with free space.'
      ) from error
    free = shutil.disk_usage(self._directory).free
    if free < num_bytes:
      raise ValueError(
        f'workdir: a checkpoint of this model takes {num_bytes / 1e6:.1f} MB, but the disk of '
        f'{self._directory} has only {free / 1e6:.1f} MB left. Make room, or choose another folder.'
      )
    if not self._is_shared():
      raise ValueError(
        f'workdir: not all processes see the same folder {self._directory}. Give --workdir a '
        'folder on a disk that all hosts share.'
      )

  def save(self, step: int, state, loader, metadata: dict) -> None:
    """Starts to save a step; `state` may be donated as soon as this returns.

    A step that is there already and intact is kept: the run went through it before. Once the save
    is complete, all but the newest `keep` steps are deleted, and so are steps beyond this one,
    which are the damaged ones that the run was set back from.

    Args:
      step: number of optimizer steps done.
      state: pytree of arrays.
      loader: its `save(directory)` stores the position in the data; None if there is no loader.
      metadata: anything that JSON can hold; the run's config under 'config'.
    """
    self.wait()
    if not self._problem(step):
      return
    folder = self._folder(step)
    if jax.process_index() == 0:
      _delete(folder)
    multihost_utils.sync_global_devices(f'checkpoint {step}: folder cleared')
    with self._explain_failed_save(step):
      data = folder / 'data'
      data.mkdir(parents=True, exist_ok=True)
      if loader is not None:
        loader.save(data)
      if jax.process_index() == 0:
        files.write(folder / 'metadata.json', json.dumps(metadata))
      tree = traverse_util.unflatten_dict(by_name(state), sep='/')
      # In a thread of its own, which has no mesh set: under one, jax 0.7 refuses what orbax does to
      # the shards of single devices.
      args = ocp.args.PyTreeSave(tree)
      self._background.submit(self._checkpointer.save, self._state(step), args=args).result()
    self._pending = step, self._background.submit(self._finish, step)

  def latest_step(self) -> int | None:
    """The newest intact step, with a warning if newer ones are damaged; None if nothing was saved.

    Raises:
      ValueError: all steps are damaged, and starting again would overwrite the run.
    """
    self.wait()
    # Process 0 looks, so that all processes decide alike.
    step, damaged = self._newest() if jax.process_index() == 0 else (-1, [])
    step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    if step == _ALL_DAMAGED:
      raise ValueError(
        f'workdir: no checkpoint in {self._directory} is intact: {", ".join(damaged)}. Bring back '
        'a copy, or delete this folder to start again from step 0.'
      )
    return None if step == _NONE else step

  def read_newest(self, read) -> tuple:
    """(step, `read(step)`) of the newest intact step; (None, None) if nothing was saved.

    It is read again, from a newer step, if a run that goes on deleted the step meanwhile.
    """
    while True:
      steps = self._steps()
      try:
        step = self.latest_step()
        return step, None if step is None else read(step)
      except ValueError:
        if self._steps() == steps:
          raise

  def metadata(self, step: int) -> dict:
    """What `save` was given as metadata."""
    path = self._folder(step) / 'metadata.json'
    with explain(f'cannot read {path}'):
      return json.loads(path.read_text())

  def restore(self, step: int, abstract_state, loader=None, config: dict | None = None):
    """Loads a whole step, on any mesh.

    Args:
      step: which one.
      abstract_state: pytree of jax.ShapeDtypeStruct with the shardings to load to.
      loader: its `load(directory)` takes up the position in the data.
      config: of the run that restores; an error then says where it differs from the saved one.

    Returns:
      A pytree of arrays like `abstract_state`.

    Raises:
      ValueError: the step is missing or damaged, or its arrays have other names, shapes or dtypes.
    """
    state = self._load(step, abstract_state, '', config)
    if loader is not None:
      loader.load(self._folder(step) / 'data')
    return state

  def restore_params(self, step: int, abstract_params, config: dict | None = None):
    """Like `restore`, of the parameters alone: optimizer arrays are not loaded."""
    return self._load(step, {'params': abstract_params}, 'params/', config)['params']

  def close(self) -> None:
    """Waits for the save under way, then frees the threads."""
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
    """The arrays of a step, where orbax finds them."""
    return self._link / str(step) / 'state'

  def _steps(self):
    """Steps whose saves were finished, in order, damaged or not."""
    return sorted(
      int(folder.name)
      for folder in self._directory.glob('*')  # none if there is no directory yet
      if folder.name.isdecimal()
      and ((folder / 'state').exists() or (folder / 'manifest.json').exists())
    )

  def _is_shared(self):
    """Whether every process sees a file that process 0 writes."""
    mark = self._directory / 'shared'
    if jax.process_index() == 0:
      mark.touch()
    multihost_utils.sync_global_devices('checkpoints: mark written')
    seen = multihost_utils.process_allgather(np.int32(mark.exists()))
    if jax.process_index() == 0:
      mark.unlink()
    return seen.all()

  def _newest(self):
    """The newest intact step, or why there is none; and a description of every damaged one."""
    damaged = []
    for step in reversed(self._steps()):
      problem = _problem(self._folder(step))
      if not problem:
        self._warn(step, damaged)
        return step, damaged
      damaged.append(f'{step} ({problem})')
    return (_ALL_DAMAGED if damaged else _NONE), damaged

  def _problem(self, step):
    """What is wrong with a step, or ''. Process 0 looks, so that all processes decide alike."""
    problem = _problem(self._folder(step)) if jax.process_index() == 0 else ''
    found = multihost_utils.broadcast_one_to_all(np.int32(bool(problem)))
    return problem or ('process 0 found it damaged' if found else '')

  def _warn(self, step, damaged):
    if damaged:
      logging.warning(
        '%s: skipped damaged checkpoints: %s. Going back to step %d.',
        self._directory,
        ', '.join(damaged),
        step,
      )
    if not (self._folder(step) / 'manifest.json').exists():
      logging.warning(
        '%s: used unverified; it has no manifest.json, as its save was cut off at the very end.',
        self._folder(step),
      )

  def _finish(self, step):
    """What follows when the arrays are on disk; runs in the background."""
    self._checkpointer.wait_until_finished()
    if jax.process_index() == 0:
      folder = self._folder(step)
      files.write(folder / 'manifest.json', json.dumps(_manifest(folder)))
      kept = [s for s in self._steps() if s <= step][-self._keep :]
      for other in self._directory.iterdir():
        if other.name.isdecimal() and int(other.name) not in kept:
          _delete(other)

  def wait(self) -> None:
    """Waits for the save under way; raises RuntimeError if it failed."""
    if self._pending:
      step, future = self._pending
      self._pending = None
      with self._explain_failed_save(step):
        future.result()

  def _explain_failed_save(self, step):
    return explain(f'workdir: cannot write checkpoint {self._folder(step)}', RuntimeError)

  def _load(self, step, abstract, prefix, config):
    """The arrays of `abstract`, which are all that the step holds under `prefix`."""
    self.wait()
    folder = self._folder(step)
    problem = self._problem(step)
    if problem:
      raise ValueError(f'checkpoint {folder} is damaged: {problem}.')
    wanted = by_name(abstract)
    with explain(f'cannot read checkpoint {folder}'):
      described: Any = self._checkpointer.handler.metadata(epath.Path(self._state(step)))
      stored = by_name(described.tree)
    stored = {name: leaf for name, leaf in stored.items() if name.startswith(prefix)}
    lines = differences(stored, wanted)
    if lines:
      saved = self.metadata(step).get('config', {})
      raise ValueError(_misfit(folder, lines, changed_fields(saved, config) if config else {}))
    tree = traverse_util.unflatten_dict(wanted, sep='/')
    args = ocp.args.PyTreeRestore(
      item=tree,
      restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
      partial_restore=True,
    )
    with explain(f'cannot read checkpoint {folder}'):
      loaded = by_name(self._checkpointer.restore(self._state(step), args=args))
    return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[name] for name in wanted])


def _is_worth_showing(record):
  """A logging filter: orbax reports all it does, and logs the errors that it raises as well."""
  return f'orbax{os.sep}checkpoint' not in record.pathname


def _link(directory):
  """The directory itself, or a link to it if its path holds what orbax takes for a pattern."""
  if directory == pathlib.Path(glob.escape(str(directory))):
    return directory
  link = pathlib.Path(tempfile.mkdtemp(prefix='moejax-')) / 'checkpoints'
  link.symlink_to(directory)
  return link


@contextlib.contextmanager
def explain(what, kind: type[Exception] = ValueError):
  """Turns any error into one line: orbax raises many kinds, some of them a thousand lines long."""
  try:
    yield
  except Exception as error:
    line, *_ = str(error).strip().splitlines() or [type(error).__name__]
    line = line if len(line) < 400 else f'{line[:200]} ... {line[-200:]}'
    raise kind(f'{what}: {line}') from error


def by_name(tree):
  """The leaves of a pytree by path: 'params/blocks/0/w'. Named tuples and dicts look the same."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def differences(stored, wanted):
  """The lines of `_differences`, at most _SHOWN of them and how many there are more."""
  lines = list(_differences(stored, wanted))
  more = len(lines) - _SHOWN
  return lines[:_SHOWN] + ([f'... and {more} more'] if more > 0 else [])


def _differences(stored, wanted):
  """One line for every array that two dicts, from name to shape and dtype, disagree on."""
  for name in sorted(stored.keys() | wanted.keys()):
    if name not in wanted:
      yield f'{name}: only in the checkpoint, {tuple(stored[name].shape)}'
    elif name not in stored:
      yield f'{name}: not in the checkpoint, config {tuple(wanted[name].shape)}'
    elif tuple(stored[name].shape) != tuple(wanted[name].shape):
      shapes = tuple(stored[name].shape), tuple(wanted[name].shape)
      yield f'{name}: checkpoint {shapes[0]} vs config {shapes[1]}'
    elif stored[name].dtype != wanted[name].dtype:
      yield f'{name}: checkpoint {stored[name].dtype} vs config {wanted[name].dtype}'


def changed_fields(old, new):
  """Fields that two nested dicts of a config have different: (old value, new value) by name."""
  old, new = (
    traverse_util.flatten_dict(json.loads(json.dumps(config)), sep='.') for config in (old, new)
  )
  names = sorted(old.keys() | new.keys())
  return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _misfit(folder, lines, changed):
  fields = [f'{name}: checkpoint {old} vs config {new}' for name, (old, new) in changed.items()]
  return '\n'.join(
    [
      f'checkpoint {folder} does not fit the model of this config. Use the config that it was '
      'trained with, or another --workdir. Arrays that differ:',
      *lines,
      *(['Config fields that differ:', *fields] if fields else []),
    ]
  )


def _problem(folder):
  """Why a step cannot be used, or ''. Reads every file that its manifest names."""
  for name in ('metadata.json', 'state'):
    if not (folder / name).exists():
      return f'{name} is missing'
  path = folder / 'manifest.json'
  if not path.exists():
    return '' if (folder / 'data').exists() else 'data is missing'
  try:
    expected = json.loads(path.read_bytes())
    found = _checksums(folder, expected)
  except (OSError, ValueError) as error:
    return f'the check against its manifest.json failed: {error}'
  changed = [name for name in expected if found[name] != expected[name]]
  return f'{changed[0]} is not as it was saved' if changed else ''


def _manifest(folder):
  files = (path for path in folder.rglob('*') if path.is_file())
  return _checksums(folder, sorted(str(path.relative_to(folder)) for path in files))


def _checksums(folder, names):
  """Size and CRC-32 of files, by name."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return dict(zip(names, pool.map(lambda name: _checksum(folder / name), names), strict=True))


def _checksum(path):
  size = crc = 0
  with path.open('rb') as file:
    while chunk := file.read(1 << 20):
      size, crc = size + len(chunk), zlib.crc32(chunk, crc)
  return {'size': size, 'crc32': crc}


def _delete(folder):
  if folder.is_file():
    folder.unlink()
  with contextlib.suppress(OSError):
    (folder / 'metadata.json').unlink()
  shutil.rmtree(folder, ignore_errors=True)
