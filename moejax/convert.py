r"""Converts models to and from other formats: safetensors, and folders of transformers.

  python -m moejax.convert to_safetensors --workdir=RUN --output=model.safetensors
  python -m moejax.convert from_safetensors --input=model.safetensors --workdir=NEW
  python -m moejax.convert to_hf --workdir=RUN --output=FOLDER
  python -m moejax.convert from_hf --model=FOLDER --workdir=NEW --config=configs/dense.py

In a safetensors file, a tensor's name is the path of the parameter, joined by dots. A stack of
blocks, one array with a leading axis here, becomes one tensor per block, with the block's index
after the stack's name: `stack_1.0.1_mot.layer.controller` is the controller in the first block of
stack_1, in the block's sublayer 1. Other tools expect this: layers that can be listed, compared and
read one by one. Shapes are otherwise the same, dtypes are kept. The metadata hold the config as
JSON, the step, and the fingerprint of the tokenizer.

A run made from a model is at step 0, with a fresh optimizer and no data position. docs/convert.md
shows how to train it further.
"""

import contextlib
import functools
import json
import pathlib
import shlex
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import flags
from flax import traverse_util

from moejax import (
  checkpoint,
  cli,
  config as config_lib,
  differences,
  fields,
  files,
  hf,
  model as model_lib,
  optimizer as optimizer_lib,
  report,
  run_folder,
  step as step_lib,
)
from moejax.hf import card, folder as folder_lib


def to_safetensors(workdir, output):
  """Writes the latest checkpoint of a run to one file.

  Returns a summary, as the other conversions do.
  """
  output = _new_path(output)
  run_config, step, params, _ = run_folder.load_run(workdir)
  tensors = to_tensors(jax.device_get(params))
  metadata = {
    'format': 'moejax',
    'config': json.dumps(run_folder.read(workdir).to_dict()),
    'step': str(step),
    'tokenizer': run_config.tokenizer.fingerprint,
  }
  with _output(output) as path:
    _write(tensors, metadata, path)
  return f'written to {output}: {len(tensors)} tensors of step {step}'


def from_safetensors(path, workdir, tokenizer=None):
  """Makes a run from a file that `to_safetensors` wrote.

  `tokenizer` replaces data.tokenizer of the config, for files that have moved.
  """
  workdir = _new_path(workdir)
  tensors, metadata = _read(path)
  if metadata.get('format') != 'moejax':
    raise ValueError(
      f'{path} has no config in its metadata. Expected a file that to_safetensors wrote; from_hf '
      'reads models of transformers.'
    )
  config = run_folder.from_saved(run_folder.parse_json(metadata.get('config', ''), path), path)
  if tokenizer:
    config.update_from_flattened_dict({'data.tokenizer': tokenizer})
  run_config = config_lib.resolve(config)
  run_folder.check_tokenizer(metadata, run_config.tokenizer)
  abstract = abstract_params(run_config.model)
  folder_lib.check(tensors, jax.eval_shape(to_tensors, abstract), path)
  return write_run(config, run_config, from_tensors(tensors, abstract), workdir)


def to_hf(workdir, output):
  """Writes a folder that transformers loads without moejax."""
  output = _new_path(output)
  run_config, step, params, _ = run_folder.load_run(workdir)
  architecture = hf.of_run(run_config)
  tensors = architecture.to_theirs(to_tensors(jax.device_get(params)), run_config.model)
  notes = card.notes(run_config)
  with _output(output) as path:
    path.mkdir()
    folder_lib.write_tensors(tensors, path)
    options = architecture.write(run_config)
    (path / 'config.json').write_text(json.dumps(options, indent=2))
    try:
      run_config.tokenizer.save_pretrained(path)
    except ValueError as error:
      notes.append(f'No tokenizer is in the folder: {error}')
    summary = report.read_summary(workdir)
    given, defaults = run_folder.read(workdir).to_dict(), config_lib.baseline().to_dict()
    changed = {n: new for n, (_, new) in differences.changed_fields(defaults, given).items()}
    text = card.text(architecture, run_config, changed, step, summary, output.name, notes)
    (path / 'README.md').write_text(text)
  notes = [f'note: {note}' for note in notes]
  return '\n'.join([f'written to {output}: {architecture.class_name} of step {step}', *notes])


def from_hf(config, model, workdir):
  """Makes a run from a model of transformers.

  Args:
    config: everything but the model: data, optimizer, dtypes, and the tokenizer if the model comes
      without one.
    model: a folder with config.json and model.safetensors, or a name on Hugging Face's hub.
    workdir: the run to create. Its token ids are those of the model.
  """
  workdir = _new_path(workdir)
  folder = folder_lib.find(model)
  options = folder_lib.read_options(folder)
  with _naming(folder / 'config.json'):
    architecture = hf.of_options(options)
    known = config_lib.flat_fields()
    values = architecture.read(options, config.data.sequence_length)
    config.update_from_flattened_dict(
      {name: fields.checked(name, known[name], value) for name, value in values.items()}
    )
  own_tokenizer = folder_lib.has_tokenizer(folder)
  if own_tokenizer:
    config.data.tokenizer = str(folder)
  run_config = config_lib.resolve(config)
  abstract = abstract_params(run_config.model)
  export = lambda params: architecture.to_theirs(to_tensors(params), run_config.model)
  expected = jax.eval_shape(export, abstract)
  theirs = folder_lib.read_tensors(folder, architecture, options, expected)
  ours = architecture.to_ours(theirs, jax.eval_shape(to_tensors, abstract), run_config.model)
  if own_tokenizer:
    config.data.tokenizer = str(workdir / 'tokenizer')
  tokenizer = run_config.tokenizer if own_tokenizer else None
  return write_run(config, run_config, from_tensors(ours, abstract), workdir, tokenizer)


@contextlib.contextmanager
def _naming(path):
  """Names the file in every line of a ValueError."""
  try:
    yield
  except ValueError as error:
    raise ValueError('\n'.join(f'{path}: {line}' for line in str(error).splitlines())) from error


def to_tensors(params):
  """Converts parameters to tensors by name, one per block; numpy arrays become views."""
  tensors = {}
  flat: dict[str, Any] = traverse_util.flatten_dict(params, sep='.')
  for path, array in flat.items():
    parts = array if _is_stacked(path) else [array]
    tensors |= zip(_names(path, array), parts, strict=True)
  return tensors


def from_tensors(tensors, abstract):
  """The inverse of `to_tensors`; `abstract` has the structure and the shapes of the parameters."""
  params = {}
  for path, leaf in traverse_util.flatten_dict(abstract, sep='.').items():
    parts = [tensors[name] for name in _names(path, leaf)]
    params[path] = np.stack(parts) if _is_stacked(path) else parts[0]
  return traverse_util.unflatten_dict(params, sep='.')


def _is_stacked(path):
  return path.startswith('stack_')


def _names(path, leaf):
  stack, _, rest = path.partition('.')
  return [f'{stack}.{i}.{rest}' for i in range(leaf.shape[0])] if _is_stacked(path) else [path]


def abstract_params(model):
  """Shapes and dtypes of the parameters of a ModelConfig."""
  return jax.eval_shape(functools.partial(model_lib.init_params, model), jax.random.key(0))


def _read(path):
  """Reads the tensors and the metadata of a safetensors file."""
  with folder_lib.reading(path) as file:
    return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def _write(tensors, metadata, path):
  # In C order: safetensors stores the buffer of an array, ignoring its strides.
  tensors = {name: np.asarray(tensor, order='C') for name, tensor in tensors.items()}
  safetensors.numpy.save_file(tensors, path, metadata)


def write_run(config, run_config, params, workdir, tokenizer=None):
  """Writes a run at step 0, in the format of training; returns a summary.

  Args:
    config: the run's ConfigDict.
    run_config: what it resolves to.
    params: nested dict of arrays.
    workdir: the folder, which must not exist.
    tokenizer: a Tokenizer to be written to the folder `tokenizer` of the run.
  """
  optimizer = optimizer_lib.of_run(run_config)
  state = step_lib.new_state(jax.tree.map(jnp.asarray, params), optimizer)
  metadata = {
    'config': config.to_dict(),
    'corpus': None,  # no data was read
    'tokenizer': run_config.tokenizer.fingerprint,
  }
  with _output(workdir) as path:
    path.mkdir()
    if tokenizer:
      tokenizer.save_pretrained(path / 'tokenizer')
    run_folder.write(config, path)
    checkpoints = checkpoint.Checkpoints(run_folder.checkpoint_dir(path))
    checkpoints.save(0, state, None, metadata)
    checkpoints.close()
  flags = shlex.join([f'--config=configs/run.py:{workdir}', f'--workdir={workdir}'])
  return f'written to {workdir}: a run at step 0. To train it: python -m moejax.main {flags}'


def _new_path(path):
  """The absolute path of an output; raises ValueError if it exists, unless as an empty folder."""
  path = pathlib.Path(path).expanduser().absolute()
  if path.exists() and not (path.is_dir() and not any(path.iterdir())):
    raise ValueError(f'{path} already exists and is not overwritten. Choose another name.')
  return path


@contextlib.contextmanager
def _output(target):
  """`files.atomic_output` with one-line errors."""
  with (
    checkpoint.one_line_errors(f'cannot write {target}', RuntimeError),
    files.atomic_output(target) as temporary,
  ):
    yield temporary


def _command(convert, needs_config=False, optional=(), **texts):
  """A command whose flags are the arguments of `convert`, in order."""

  def define():
    for name, text in texts.items():
      cli.define_path(name, None, text, required=name not in optional)

  def main(*config):
    print(convert(*config, *(flags.FLAGS[name].value for name in texts)))
    return cli.OK

  main.__name__, main.__doc__ = convert.__name__, convert.__doc__
  return cli.Command(define, main, needs_config)


_RUN = 'Folder of the run.'
_NEW = 'Folder of the run to create; must not exist.'
_FILE = 'The file to write; must not exist.'
_MODEL = "A folder with config.json and model.safetensors, or a name on Hugging Face's hub."
COMMANDS = {
  'to_safetensors': _command(to_safetensors, workdir=_RUN, output=_FILE),
  'from_safetensors': _command(
    from_safetensors,
    input='A file that to_safetensors wrote.',
    workdir=_NEW,
    tokenizer='Its tokenizer, as in data.tokenizer, if the files have moved.',
    optional=['tokenizer'],
  ),
  'to_hf': _command(to_hf, workdir=_RUN, output='The folder to write; must not exist.'),
  'from_hf': _command(from_hf, needs_config=True, model=_MODEL, workdir=_NEW),
}


if __name__ == '__main__':
  cli.run_command(COMMANDS)
