"""The folder of a run: its config, what may change when it goes on, and how others open it."""

import functools
import json
import pathlib
import sys

import jax

from moejax import config as config_lib, fields, files, model as model_lib, sharding
from moejax.checkpoint import Checkpoints


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


# Fields that may change when a run goes on: how it is computed, and where its text lies (that the
# text is the same, the corpus' fingerprint in the checkpoint tells).
_FREE = {
  'model': ('remat', 'loss_chunk', 'moe.impl'),
  'data': ('source', 'files', 'field', 'task', 'tfds_data_dir', 'tokenizer'),
}


def check_same_run(config, workdir):
  """Raises ValueError if `workdir` holds a run with another model or other data."""
  if not (pathlib.Path(workdir) / 'config.json').exists():
    return
  old, new = (config_lib.flatten(json.loads(c.to_json())) for c in (read(workdir), config))
  free = {f'{section}.{field}' for section, names in _FREE.items() for field in names}
  differing = [
    f'{name}: {old.get(name)} there, {new.get(name)} here'
    for name in sorted(old.keys() | new.keys())
    if name.startswith(('model.', 'data.')) and name not in free and old.get(name) != new.get(name)
  ]
  if differing:
    raise ValueError(
      f'--workdir={workdir} holds a run with another configuration; choose another folder, or set\n'
      + '\n'.join(differing)
    )


def load_run(workdir, overrides=None):
  """What evaluation and generation need of a finished or interrupted run.

  Args:
    workdir: its folder.
    overrides: of its config, as `config.override` takes them.

  Returns:
    (stages, step, params, mesh); the mesh has all devices here along `fsdp`.

  Raises:
    ValueError: no run, no checkpoint, or a tokenizer that is not the one of the run.
  """
  config = read(workdir)
  config_lib.override(config, overrides or {})
  stages = config_lib.resolve(config)
  checkpoints = Checkpoints(checkpoint_dir(workdir), stages.train.keep_checkpoints)
  step = checkpoints.latest_step()
  if step is None:
    raise ValueError(f'--workdir={workdir}: the run has not written a checkpoint yet.')
  check_tokenizer(checkpoints.metadata(step), stages.tokenizer)
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=-1, expert=1, tensor=1))
  init = functools.partial(model_lib.init_params, stages.model, jax.random.key(0))
  params = checkpoints.restore_params(step, sharding.abstract(init, mesh), config.to_dict())
  checkpoints.close()
  return stages, step, params, mesh
