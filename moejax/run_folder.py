"""The folder of a run: its config, what may change when it goes on, and how others open it."""

import functools
import json
import pathlib

import jax
import ml_collections

from moejax import config as config_lib, files, model as model_lib, sharding
from moejax.checkpoint import Checkpoints


def write(config, workdir, corpus=None):
  """Writes `config.json`, from which `read` makes the same ConfigDict.

  `corpus`, the fingerprint of the text, stands beside its sections for those who read the file.
  """
  text = json.dumps({'corpus': corpus, **config.to_dict()}, indent=2)
  files.write(pathlib.Path(workdir) / 'config.json', text)


def read(workdir):
  """The ConfigDict of a run.

  Raises:
    ValueError: there is no run in `workdir`.
  """
  path = pathlib.Path(workdir) / 'config.json'
  if not path.exists():
    raise ValueError(f'--workdir={workdir} holds no run: {path} does not exist.')
  return parse(path.read_text())


def parse(text):
  """The ConfigDict that was written as JSON."""
  fields = json.loads(text)
  fields.pop('corpus', None)
  fields['model']['blocks'] = _tuples(fields['model']['blocks'])
  fields['optimizer'].setdefault('moment_dtype', '')  # in runs from before there was a choice
  for name in ('eos_id', 'bos_id', 'pad_id'):
    fields['data'].setdefault(name, -1)
  fields['model']['moe'].pop('balance_convention', None)  # in runs from before it went
  return ml_collections.ConfigDict(fields)


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
  free = {f'{section}.{field}' for section, fields in _FREE.items() for field in fields}
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


def _tuples(value):
  return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
