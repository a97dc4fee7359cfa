"""Checkpoints: one folder per step, written in the background and checked before use.

  checkpoints/300/data/          what the loader's `save` wrote, files per process
                  metadata.json  config and fingerprints
                  state/         the arrays, by orbax
                  manifest.json  size and CRC-32 of every file above

They are written in this order. orbax gives `state/` its name when all arrays of all processes are
on disk, so a folder without it is an unfinished save: it is ignored, and removed by the next save.
Deleting starts with metadata.json, so that a half-deleted step does not pass for a complete one.

The manifest exists because orbax keeps no checksums: most flipped bits would silently restore as
wrong weights. A step whose files disagree with its manifest is damaged and never used. A step
without a manifest was interrupted between the last two lines above; it is used, with a warning.
"""

import concurrent.futures
import contextlib
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

_SHOWN = 10  # differing arrays that an error lists
_NONE, _ALL_DAMAGED = -1, -2  # in place of a step


class Checkpoints:
  """The checkpoints of one run. With several processes, all of them make every call.

  At most one save is in progress: the next call waits for it, and raises RuntimeError if it failed.
  """

  def __init__(self, directory, keep: int = 3, always: int = 0):
    """Opens a folder, which need not exist yet, on a disk that all processes share.

    `keep`: how many of the newest steps to keep. `always`: a step to keep beside them.
    """
    self._directory = pathlib.Path(directory).absolute()
    self._link = _link(self._directory)
    self._keep, self._always = keep, always
    logging.get_absl_logger().addFilter(_is_worth_showing)
    self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    self._background = concurrent.futures.ThreadPoolExecutor(1)
    self._pending = None  # step and future of the save in progress

  def check_writable(self, num_bytes: int) -> None:
    """Creates the folder, and checks it before training.

    Args:
      num_bytes: size of the arrays of one checkpoint.

    Raises:
      ValueError: the folder cannot be created or written, its disk has no space for a checkpoint,
        or other processes do not see it.
    """
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      with tempfile.NamedTemporaryFile(dir=self._directory) as probe:
        probe.write(bytes(1 << 16))  # more than fits on a nearly full disk
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

    A step that exists and is intact is left as it is. Once the save is complete, all but the newest
    `keep` steps, and the one to keep always, are deleted, and so are later ones: damaged steps that
    the run resumed before.

    Args:
      step: number of optimizer steps done.
      state: pytree of arrays.
      loader: its `save(directory)` stores the position in the data; or None.
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
      # In another thread, where no mesh is set: under one, jax 0.7 refuses what orbax does to the
      # shards of single devices.
      args = ocp.args.PyTreeSave(tree)
      self._background.submit(self._checkpointer.save, self._state(step), args=args).result()
    self._pending = step, self._background.submit(self._finish, step)

  def latest_step(self) -> int | None:
    """The newest intact step, with a warning if newer ones are damaged; None if nothing was saved.

    Raises:
      ValueError: all steps are damaged, and starting again would overwrite the run.
    """
    self.wait()
    # Process 0 decides for all.
    step, damaged = self._newest() if jax.process_index() == 0 else (_NONE, [])
    step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    if step == _ALL_DAMAGED:
      raise ValueError(
        f'workdir: no checkpoint in {self._directory} is intact: {", ".join(damaged)}. Restore a '
        'backup, or delete this folder to start again from step 0.'
      )
    return None if step == _NONE else step

  def read_newest(self, read) -> tuple:
    """(step, `read(step)`) of the newest intact step; (None, None) if nothing was saved.

    If a running training deletes that step meanwhile, a newer one is read.
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
      loader.load(self._folder(step) / 'data')
    return state

  def restore_params(self, step: int, abstract_params, config: dict | None = None):
    """`restore` of the parameters alone; optimizer arrays are not read."""
    return self._load(step, {'params': abstract_params}, 'params/', config)['params']

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

  def _steps(self):
    """Steps whose saves were finished, sorted, damaged or not."""
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
    """The newest intact step, _NONE or _ALL_DAMAGED; and a description of every damaged one."""
    damaged = []
    for step in reversed(self._steps()):
      folder = self._folder(step)
      if problem := _problem(folder):
        damaged.append(f'{step} ({problem})')
        continue
      if damaged:
        logging.warning(
          f'{self._directory}: skipped damaged checkpoints: {", ".join(damaged)}. Going back to '
          f'step {step}.'
        )
      if not (folder / 'manifest.json').exists():
        logging.warning(
          f'{folder}: used unverified; its save was interrupted before manifest.json.'
        )
      return step, damaged
    return (_ALL_DAMAGED if damaged else _NONE), damaged

  def _problem(self, step):
    """What is wrong with a step, or ''. Process 0 decides for all."""
    problem = _problem(self._folder(step)) if jax.process_index() == 0 else ''
    found = multihost_utils.broadcast_one_to_all(np.int32(bool(problem)))
    return problem or ('process 0 found it damaged' if found else '')

  def _finish(self, step):
    """Waits for the arrays, then writes the manifest and deletes old steps; in the background."""
    self._checkpointer.wait_until_finished()
    if jax.process_index() == 0:
      folder = self._folder(step)
      files.write(folder / 'manifest.json', json.dumps(_manifest(folder)))
      kept = [s for s in self._steps() if s <= step][-self._keep :] + [self._always]
      for other in self._directory.iterdir():
        if other.name.isdecimal() and int(other.name) not in kept:
          _delete(other)

  def wait(self) -> None:
    """Waits for the save in progress; raises RuntimeError if it failed."""
    if self._pending:
      step, future = self._pending
      self._pending = None
      with self._explain_failed_save(step):
        future.result()

  def _explain_failed_save(self, step):
    return one_line_errors(f'workdir: cannot write checkpoint {self._folder(step)}', RuntimeError)

  def _load(self, step, abstract, prefix, config):
    """The arrays of `abstract`, which must be all that the step holds under `prefix`."""
    self.wait()
    folder = self._folder(step)
    if problem := self._problem(step):
      raise ValueError(f'checkpoint {folder} is damaged: {problem}.')
    wanted = by_name(abstract)
    with one_line_errors(f'cannot read checkpoint {folder}'):
      described: Any = self._checkpointer.handler.metadata(epath.Path(self._state(step)))
      stored = by_name(described.tree)
    stored = {name: leaf for name, leaf in stored.items() if name.startswith(prefix)}
    if lines := differences(stored, wanted):
      saved = self.metadata(step).get('config', {})
      raise ValueError(_misfit(folder, lines, changed_fields(saved, config) if config else {}))
    tree = traverse_util.unflatten_dict(wanted, sep='/')
    args = ocp.args.PyTreeRestore(
      item=tree,
      restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
      partial_restore=True,
    )
    with one_line_errors(f'cannot read checkpoint {folder}'):
      loaded = by_name(self._checkpointer.restore(self._state(step), args=args))
    return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[name] for name in wanted])


def _is_worth_showing(record):
  """A logging filter: orbax logs all it does, and also the errors that it raises."""
  return f'orbax{os.sep}checkpoint' not in record.pathname


def _link(directory):
  """The directory itself, or a link to it if orbax would take its path for another, or for none."""
  if str(directory).isprintable() and not set('*?[\\') & set(str(directory)):
    return directory
  link = pathlib.Path(tempfile.mkdtemp(prefix='moejax-')) / 'checkpoints'
  link.symlink_to(directory)
  return link


def exists(directory, step: int | None = None) -> bool:
  """Whether a step, or any, was saved completely; its files may have been damaged since."""
  return any(pathlib.Path(directory).glob(f'{"[0-9]*" if step is None else step}/manifest.json'))


def read_metadata(directory, step: int) -> dict:
  """The metadata given to `Checkpoints.save`; ValueError if they cannot be read."""
  path = pathlib.Path(directory) / str(step) / 'metadata.json'
  with one_line_errors(f'cannot read {path}'):
    return json.loads(path.read_text())


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
  source, target = pathlib.Path(directory, str(step)), pathlib.Path(other, str(step))
  if problem := _problem(source):
    raise ValueError(f'checkpoint {source}: {problem}')
  metadata = read_metadata(directory, step) | changes
  manifest = json.loads((source / 'manifest.json').read_text())
  with files.atomic_output(target) as unfinished:
    shutil.copytree(source, unfinished, copy_function=_share)
    files.write(unfinished / 'metadata.json', json.dumps(metadata))
    manifest |= _checksums(unfinished, ['metadata.json'])
    files.write(unfinished / 'manifest.json', json.dumps(manifest))


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


def by_name(tree):
  """The leaves of a pytree by path, 'params/blocks/0/w'; named tuples look like dicts."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def differences(stored, wanted):
  """Lines of `_differences`, at most _SHOWN, and how many more there are."""
  lines = list(_differences(stored, wanted))
  more = len(lines) - _SHOWN
  return lines[:_SHOWN] + ([f'... and {more} more'] if more > 0 else [])


def _differences(stored, wanted):
  """Yields a line for every array whose shape or dtype differs between two dicts by name."""
  for name in sorted(stored.keys() | wanted.keys()):
    old, new = stored.get(name), wanted.get(name)
    if new is None:
      yield f'{name}: only in the checkpoint, {tuple(old.shape)}'
    elif old is None:
      yield f'{name}: not in the checkpoint, config {tuple(new.shape)}'
    elif tuple(old.shape) != tuple(new.shape):
      yield f'{name}: checkpoint {tuple(old.shape)} vs config {tuple(new.shape)}'
    elif old.dtype != new.dtype:
      yield f'{name}: checkpoint {old.dtype} vs config {new.dtype}'


def changed_fields(old, new):
  """Fields that differ between two nested dicts of a config: (old value, new value) by name."""
  old, new = (
    traverse_util.flatten_dict(json.loads(json.dumps(config)), sep='.') for config in (old, new)
  )
  names = sorted(old.keys() | new.keys())
  return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _misfit(folder, lines, changed):
  text = (
    f'checkpoint {folder} does not fit the model of this config. Use the config that it was '
    'trained with, or another --workdir. Arrays that differ:'
  )
  fields = [f'{name}: checkpoint {old} vs config {new}' for name, (old, new) in changed.items()]
  heading = ['Config fields that differ:'] if fields else []
  return '\n'.join([text, *lines, *heading, *fields])


def _problem(folder):
  """Why a step cannot be used, or ''. Reads every file in its manifest."""
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
  paths = (path for path in folder.rglob('*') if path.is_file())
  return _checksums(folder, sorted(str(path.relative_to(folder)) for path in paths))


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
