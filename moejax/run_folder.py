"""The folder of a run: who writes it, its config, what may change on resuming, opening it."""

import contextlib
import datetime
import fcntl
import functools
import json
import os
import pathlib
import socket
import sys
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from moejax import config as config_lib, fields, files, model as model_lib, sharding
from moejax.checkpoint import Checkpoints, changed_fields


@contextlib.contextmanager
def lock(workdir):
  """A context in which this run, in all its processes, is the only one that writes to its folder.

  Process 0 holds a lock of the operating system, which ends with it, however it ends.

  Raises:
    ValueError: another program holds the lock, or the folder cannot be written.
  """
  path = pathlib.Path(workdir) / 'lock'
  with contextlib.ExitStack() as stack:
    holder = _take(path, stack) if jax.process_index() == 0 else ''
    if multihost_utils.broadcast_one_to_all(np.int32(bool(holder))):
      raise ValueError(
        f'--workdir={workdir}: {holder or "another program"} is training there. Wait for it, or '
        'choose another folder.'
      )
    yield


def _take(path, stack):
  """Locks a file until `stack` is closed, or returns who has."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context(path.open('a+'))
  except OSError as error:
    raise ValueError(
      f'workdir: cannot write to {path.parent}: {error.strerror}. Give --workdir a folder that can '
      'be written.'
    ) from error
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.seek(0)
    return file.read() or 'another program'
  except OSError as error:  # some shared disks have no locks
    print(f'warning: {path} cannot be locked ({error.strerror}): run one program at a time there.')
  now = f'{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}'
  file.truncate(0)
  file.write(f'process {os.getpid()} on {socket.gethostname()}, since {now},')
  file.flush()
  return ''


def write(config, workdir, corpus=None):
  """Writes `config.json`, from which `read` makes the same ConfigDict.

  `corpus`, the fingerprint of the text, stands beside its sections for those who read the file.
  """
  text = json.dumps({'corpus': corpus, **config.to_dict()}, indent=2)
  files.write(pathlib.Path(workdir) / 'config.json', text)


def read(workdir):
  """The ConfigDict of a run, with today's defaults for fields that are newer than the run.

  Raises:
    ValueError: there is no run in `workdir`, or this version cannot read its config.
  """
  path = pathlib.Path(workdir) / 'config.json'
  if not path.exists():
    raise ValueError(f'--workdir={workdir} holds no run: {path} does not exist.')
  return from_saved(read_json(path), path)


def read_json(path):
  """The object in a JSON file of a run; ValueError if it cannot be read, or is none."""
  try:
    content = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise ValueError(f'{path} cannot be read: {error.strerror}.') from error
  return parse_json(content, path)


def parse_json(content, source):
  """The object that is written in `content`, bytes or text of the file `source`."""
  try:
    saved = json.loads(content.decode() if isinstance(content, bytes) else content)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{source} is damaged ({error}). Copy it again, or take a backup.') from error
  if not isinstance(saved, dict):
    raise ValueError(f'{source} is damaged: it must hold an object, {{...}}.')
  return saved


# Fields that are gone: the value that every run now has, and what to do about another.
_GONE = {
  'model.moe.balance_convention': (
    'uniform_is_1',
    'multiply model.moe.balance_loss by the experts of a token',
  )
}


def from_saved(saved, source):
  """The ConfigDict of a config that any version saved, as nested dicts, in the file `source`.

  Fields that it lacks have their default. One that is gone is left out if it changes nothing.

  Raises:
    ValueError: one line for every field that this version does not know, or cannot take.
  """
  known, values, problems = config_lib.flat_fields(), {}, []
  if not saved.keys() & config_lib.SECTIONS.keys():
    problems.append('this is no config of moejax.')
  for name, value in config_lib.flatten(saved).items():
    if name in known:
      try:
        values[name] = fields.checked(name, known[name], value)
      except ValueError as error:
        problems.append(str(error))
    elif name in _GONE:
      now, advice = _GONE[name]
      if value == now:
        print(f'note: {source}: {name} is gone; all runs are as it says.', file=sys.stderr)
      else:
        problems.append(f'{name} = {value!r} is gone; {advice} and remove it.')
    elif name != 'corpus':
      problems.append(
        f'{name} = {value!r} is not known to this version of moejax. Use the later version that '
        'wrote it, or remove it if it does not matter.'
      )
  if problems:
    raise ValueError('\n'.join(f'{source}: {problem}' for problem in problems))
  config = config_lib.baseline()
  config.update_from_flattened_dict(values)
  return config


def checkpoint_dir(workdir):
  """Where the checkpoints of a run lie."""
  return pathlib.Path(workdir) / 'checkpoints'


def check_tokenizer(metadata, tokenizer):
  """Raises ValueError if a checkpoint's metadata speak of another tokenizer."""
  if metadata['tokenizer'] != tokenizer.fingerprint:
    raise ValueError(
      f'data.tokenizer: the checkpoint was trained with tokenizer {metadata["tokenizer"]}, but the '
      f'config names one with fingerprint {tokenizer.fingerprint}. Give the original file.'
    )


# Fields that may always change on resuming: how it is computed, and where its text lies (that the
# text is the same, the corpus' fingerprint in the checkpoint tells).
RESUMABLE_FIELDS = {
  'model': ('remat', 'loss_chunk', 'moe.impl'),
  'data': ('source', 'files', 'field', 'task', 'tfds_data_dir', 'tokenizer'),
  'optimizer': ('accumulation',),
}


def check_same_run(config, workdir):
  """Raises ValueError if `workdir` holds a run with another model or other data."""
  if (pathlib.Path(workdir) / 'config.json').exists():
    changed = _changed(read(workdir), config, ('model.', 'data.'))
    _refuse(f'--workdir={workdir} holds a run with another configuration', changed)


def check_resume(saved, config, step, workdir, imported=False):
  """Raises ValueError if a run would claim settings that it was not trained with.

  Args:
    saved: the ConfigDict that it was trained with until now.
    config: the one that it shall resume with.
    step: where it is.
    workdir: its folder.
    imported: its parameters come from elsewhere, not from its seed.
  """
  if config.train.steps < step:
    raise ValueError(
      f'train.steps = {config.train.steps}: the run in {workdir} is at step {step} already. Raise '
      'it, or choose another folder.'
    )
  if config.train.steps == step:  # nothing will be trained with what is new
    changed = _changed(saved, config, ('optimizer.', 'train.steps', 'train.seed'))
    _refuse(f'--workdir={workdir} holds a finished run that was trained with other', changed)
  if not imported:
    changed = _changed(saved, config, ('train.seed',))
    _refuse(f'--workdir={workdir} holds a run that began with another seed', changed)


def _changed(old, new, prefixes):
  free = {f'{section}.{field}' for section, names in RESUMABLE_FIELDS.items() for field in names}
  changed = changed_fields(old.to_dict(), new.to_dict())
  return {
    name: values
    for name, values in changed.items()
    if name.startswith(prefixes) and name not in free
  }


def _refuse(what, changed):
  if changed:
    lines = [f'{name}: {there} there, {here} here' for name, (there, here) in changed.items()]
    raise ValueError('\n'.join([f'{what}; choose another folder, or set', *lines]))


class SavedRun(NamedTuple):
  """A run that others open, at its newest checkpoint."""

  config: ml_collections.ConfigDict
  stages: Any  # of the config
  checkpoints: Checkpoints  # to be closed
  step: int


def open_run(workdir, overrides=None, flag='--workdir'):
  """Opens the run in a folder.

  Args:
    workdir: the folder.
    overrides: of its config, as `config.override` takes them.
    flag: that names the folder, for errors.

  Raises:
    ValueError: no run, no checkpoint, or a tokenizer that is not the one of the run.
  """
  config = read(workdir)
  config_lib.override(config, overrides or {})
  stages = config_lib.resolve(config)
  checkpoints = Checkpoints(checkpoint_dir(workdir), stages.train.keep_checkpoints)
  step, metadata = checkpoints.read_newest(checkpoints.metadata)
  if step is None:
    raise ValueError(f'{flag}={workdir}: the run has not written a checkpoint yet.')
  check_tokenizer(metadata, stages.tokenizer)
  return SavedRun(config, stages, checkpoints, step)


def load_run(workdir, overrides=None):
  """What evaluation and generation need of a finished or interrupted run: `open_run`, loaded.

  Returns:
    (stages, step, params, mesh); the mesh has all devices here along `fsdp`.
  """
  config, stages, checkpoints, _ = open_run(workdir, overrides)
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=-1, expert=1, tensor=1))
  init = functools.partial(model_lib.init_params, stages.model, jax.random.key(0))
  abstract = sharding.abstract(init, mesh)
  restore = lambda step: checkpoints.restore_params(step, abstract, config.to_dict())
  with contextlib.closing(checkpoints):
    step, params = checkpoints.read_newest(restore)
  return stages, step, params, mesh
