"""The folder of a run: its lease, its config, what may change on resuming, opening it."""

import contextlib
import functools
import json
import sys
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from moejax import (
  checkpoint,
  cli,
  config as config_lib,
  fields,
  files,
  imports,
  lease,
  manifest,
  metrics,
  model as model_lib,
  optimizer,
  sharding,
)
from moejax.checkpoint import Checkpoints
from moejax.differences import changed_fields


@contextlib.contextmanager
def lock(workdir):
  """A context in which no other run writes to this folder; process 0 holds its `lease`.

  Raises:
    ValueError: another program holds the folder, or it cannot be written.
  """
  workdir = files.path(workdir)
  with contextlib.ExitStack() as stack:
    holder = ''
    if jax.process_index() == 0:
      try:
        stack.enter_context(lease.held(workdir))
      except lease.Held as held:
        holder = str(held)
      except OSError as error:
        raise ValueError(
          f'workdir: cannot write to {workdir}: {error.strerror}. Give --workdir a folder that can '
          'be written.'
        ) from error
    if multihost_utils.broadcast_one_to_all(np.int32(bool(holder))):
      raise ValueError(
        f'--workdir={workdir}: {holder or "another program"} is training there. Wait for it, or '
        'choose another folder.'
      )
    yield


def write(config, workdir, corpus=None):
  """Writes `config.json` for `read`; the fingerprint `corpus` is there for people only."""
  of_own = {'imports': code} if (code := imports.remembered()) else {}
  text = json.dumps({'corpus': corpus, **of_own, **config.to_dict()}, indent=2)
  files.write(files.path(workdir) / 'config.json', text)


def read(workdir, flag='--workdir'):
  """The ConfigDict of a run; fields that are newer than the run have their default.

  If config.json is damaged, the newest intact checkpoint says what it was. Imports the user's own
  code that the run needs (`moejax.imports`).

  `flag`: the flag that named the folder, for errors.

  Raises:
    ValueError: there is no run in `workdir`, this version cannot read its config, or the code is
      missing or not allowed.
  """
  path = files.path(workdir) / 'config.json'
  if not files.exists(path):
    raise ValueError(f'{flag}={workdir} holds no run: {path} does not exist.')
  try:
    saved = read_json(path)
  except ValueError as error:
    step, _ = manifest.newest(checkpoint_dir(workdir))
    if step is None or path.is_dir():
      raise
    saved = checkpoint.read_metadata(checkpoint_dir(workdir), step).get('config')
    if not isinstance(saved, dict):
      raise
    print(f'note: {error} Until then, the config of checkpoint {step} is used.', file=sys.stderr)
  imports.of_run(saved.get('imports', []), path)
  return from_saved(saved, path)


def read_json(path):
  """The object in a JSON file of a run; ValueError if it cannot be read or is not an object."""
  try:
    content = files.read(path)
  except OSError as error:
    raise ValueError(f'{path} cannot be read: {error.strerror}.') from error
  return parse_json(content, path)


def parse_json(content, source):
  """The JSON object in `content`, the bytes or text of the file `source`."""
  try:
    saved = files.parse_json(content)
  except ValueError as error:
    raise ValueError(f'{source} is damaged ({error}). Copy it again, or take a backup.') from error
  if not isinstance(saved, dict):
    raise ValueError(f'{source} is damaged: it must hold an object, {{...}}.')
  return saved


# Removed fields: the value that every run now has, and what to do about any other.
_REMOVED = {
  'model.moe.balance_convention': (
    'uniform_is_1',
    'multiply model.moe.balance_loss by the experts of a token',
  )
}


def from_saved(saved, source):
  """The ConfigDict of nested dicts that any version saved in the file `source`.

  Missing fields have their default; removed fields are dropped if they change nothing.

  Raises:
    ValueError: one line for every field that is unknown to this version, or has a bad value.
  """
  known, values, problems = config_lib.flat_fields(), {}, []
  if not saved.keys() & config_lib.SECTIONS.keys():
    problems.append('this is no config of moejax.')
  for name, value in flatten_dict(saved, sep='.').items():
    if name in known:
      try:
        values[name] = fields.checked(name, known[name], value)
      except ValueError as error:
        problems.append(str(error))
    elif name in _REMOVED:
      now, advice = _REMOVED[name]
      if value == now:
        print(f'note: {source}: {name} was removed; all runs behave so.', file=sys.stderr)
      else:
        problems.append(f'{name} = {value!r} was removed; {advice} and remove it.')
    elif name not in ('corpus', 'imports'):
      problems.append(
        f'{name} = {value!r} is not known to this version of moejax. Use the later version that '
        'wrote it, or remove it if it does not matter.'
      )
  if problems:
    raise ValueError('\n'.join(f'{source}: {problem}' for problem in problems))
  config = config_lib.baseline()
  config.update_from_flattened_dict(values)
  imports.name_task(config.data.task, source)
  return config


def checkpoint_dir(workdir):
  """The folder of a run's checkpoints."""
  return files.path(workdir) / 'checkpoints'


def checkpoints(workdir, run_config):
  """The checkpoints of a run, to be closed."""
  keep, always = run_config.train.keep_checkpoints, optimizer.shared_steps(run_config)
  return Checkpoints(checkpoint_dir(workdir), keep, always)


def check_tokenizer(metadata, tokenizer):
  """Raises ValueError if the metadata of a checkpoint name another tokenizer."""
  if (saved := metadata.get('tokenizer')) != tokenizer.fingerprint:
    raise ValueError(
      f'data.tokenizer: the checkpoint was trained with tokenizer {saved}, but the '
      f'config names one with fingerprint {tokenizer.fingerprint}. Give the original file.'
    )


def fork(source, step, config, workdir):
  """Begins a run at a step of another one, whose steps until then it shares.

  It has the metrics until then, the checkpoint, and `origin` in its summary. A fork that is
  interrupted is no run yet: fork again.

  Args:
    source: the folder of the other run, which may be in training.
    step: of a checkpoint.
    config: the ConfigDict of the new run; trained with it, the other would be the same at `step`.
    workdir: the folder of the new run, which has no checkpoint.

  Raises:
    ValueError: the checkpoint is missing or damaged.
    OSError: `workdir` cannot be written.
  """
  source, workdir = files.path(source), files.path(workdir)
  taken = checkpoint_dir(source)
  write(config, workdir, checkpoint.read_metadata(taken, step).get('corpus'))
  metrics.copy(source, workdir, step)
  changes = {'config': config.to_dict(), 'origin': {'forked_from': source.name, 'step': step}}
  checkpoint.give(taken, step, checkpoint_dir(workdir), changes)


# Fields that may always change on resuming: how to compute, and where to find the text, whose
# fingerprint is in the checkpoint.
RESUMABLE_FIELDS = {'model.remat', 'model.loss_chunk', 'model.moe.impl', 'optimizer.accumulation'}
_TEXT_FIELDS = ('source', 'files', 'validation_files', 'field', 'task', 'tfds_data_dir')
_TEXT_FIELDS += ('tokenizer',)
RESUMABLE_FIELDS |= {f'data.{name}' for name in _TEXT_FIELDS}


def check_same_run(config, workdir):
  """Raises ValueError if `workdir` holds a run with another model or other data."""
  if files.exists(files.path(workdir) / 'config.json'):
    what = f'--workdir={workdir} holds a run with another configuration'
    _check_unchanged(read(workdir), config, ('model.', 'data.'), what)


def check_resume(saved, config, step, workdir, imported=False):
  """Raises ValueError if a run would claim settings that it was not trained with.

  Args:
    saved: the ConfigDict that it was trained with until now.
    config: the one to resume with.
    step: of its checkpoint.
    workdir: its folder.
    imported: its parameters do not come from its seed.
  """
  if config.train.steps < step:
    raise ValueError(
      f'train.steps = {config.train.steps}: the run in {workdir} is at step {step} already. Raise '
      'it, or choose another folder.'
    )
  if config.train.steps == step:  # nothing would be trained with the new settings
    what = f'--workdir={workdir} holds a finished run that was trained with other'
    _check_unchanged(saved, config, ('optimizer.', 'train.steps', 'train.seed'), what)
  if not imported:
    what = f'--workdir={workdir} holds a run that began with another seed'
    _check_unchanged(saved, config, ('train.seed',), what)


def _check_unchanged(old, new, prefixes, what):
  """Raises ValueError if fields with these prefixes differ, other than RESUMABLE_FIELDS."""
  lines = [
    f'{name}: {there} there, {here} here'
    for name, (there, here) in changed_fields(old.to_dict(), new.to_dict()).items()
    if name.startswith(prefixes) and name not in RESUMABLE_FIELDS
  ]
  if lines:
    raise ValueError('\n'.join([f'{what}; choose another folder, or set', *lines]))


class SavedRun(NamedTuple):
  """A run opened at its newest checkpoint."""

  config: ml_collections.ConfigDict
  run_config: Any  # of the config
  checkpoints: Checkpoints  # to be closed
  step: int


def open_run(workdir, overrides=None, flag='--workdir'):
  """Opens the run in a folder.

  Args:
    workdir: the folder.
    overrides: of its config, as `config.override` takes them.
    flag: the flag that named the folder, for errors.

  Raises:
    ValueError: there is no run or no checkpoint, or the tokenizer is not the run's.
  """
  config = read(workdir, flag)
  config_lib.override(config, overrides or {})
  run_config = config_lib.resolve(config)
  opened = checkpoints(workdir, run_config)
  step, metadata = opened.read_newest(opened.metadata)
  if step is None:
    raise ValueError(f'{flag}={workdir}: the run has not written a checkpoint yet.')
  check_tokenizer(metadata, run_config.tokenizer)
  return SavedRun(config, run_config, opened, step)


def abstract_params(model, mesh):
  """Shapes, dtypes and shardings of the parameters of a ModelConfig."""
  init = functools.partial(model_lib.init_params, model, jax.random.key(0))
  return sharding.abstract(init, mesh)


def load_run(workdir, overrides=None):
  """Opens a run as `open_run` does, and loads its parameters.

  Returns:
    (run_config, step, params, mesh); the mesh has all devices along `fsdp`.
  """
  config, run_config, saved, _ = open_run(workdir, overrides)
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=-1, expert=1, tensor=1))
  abstract = abstract_params(run_config.model, mesh)
  restore = lambda step: saved.restore_params(step, abstract, config.to_dict())
  with contextlib.closing(saved), cli.waiting_for('reading the checkpoint', file=sys.stderr):
    step, params = saved.read_newest(restore)
  return run_config, step, params, mesh
