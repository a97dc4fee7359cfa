r"""Converts models to and from other formats: safetensors, and for Mamba, transformers folders.

  python -m moejax.convert to_safetensors --workdir=RUN --output=model.safetensors
  python -m moejax.convert from_safetensors --input=model.safetensors --workdir=NEW
  python -m moejax.convert to_hf --workdir=RUN --output=FOLDER
  python -m moejax.convert from_hf --model=FOLDER --workdir=NEW --config=configs/mamba.py

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
  files,
  hf_mamba,
  model as model_lib,
  run_folder,
  step as step_lib,
)
from moejax.optimizer import make_optimizer


def to_safetensors(workdir, output):
  """Writes the latest checkpoint of a run to one file; returns a summary."""
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
  """Makes a run from a file that `to_safetensors` wrote; returns a summary.

  `tokenizer` replaces data.tokenizer of the config, for files that have moved.
  """
  workdir = _new_path(workdir)
  tensors, metadata = _read(path)
  if metadata.get('format') != 'moejax':
    raise ValueError(
      f'{path} has no config in its metadata. Expected a file that to_safetensors wrote; from_hf '
      'reads models of transformers.'
    )
  config = run_folder.from_saved(run_folder.parse_json(metadata['config'], path), path)
  if tokenizer:
    config.update_from_flattened_dict({'data.tokenizer': tokenizer})
  run_config = config_lib.resolve(config)
  run_folder.check_tokenizer(metadata, run_config.tokenizer)
  abstract = abstract_params(run_config.model)
  _check(tensors, jax.eval_shape(to_tensors, abstract), path)
  return write_run(config, run_config, from_tensors(tensors, abstract), workdir)


def to_hf(workdir, output):
  """Writes a folder that transformers' MambaForCausalLM loads; returns a summary."""
  output = _new_path(output)
  run_config, step, params, _ = run_folder.load_run(workdir)
  options = hf_mamba.export_options(run_config.model, run_config.data, run_config.tokenizer)
  tensors = hf_mamba.export_tensors(to_tensors(jax.device_get(params)), run_config.model)
  with _output(output) as path:
    path.mkdir()
    _write(tensors, {'format': 'pt'}, path / 'model.safetensors')
    (path / 'config.json').write_text(json.dumps(options, indent=2))
  return f'written to {output}: config.json, model.safetensors of step {step}'


def from_hf(config, model, workdir):
  """Makes a run from a Mamba of transformers; returns a summary.

  Args:
    config: everything but the model: data, tokenizer, optimizer, dtypes.
    model: a folder with config.json and model.safetensors, or a name on Hugging Face's hub.
    workdir: the run to create. Its token ids are those of the model.
  """
  workdir = _new_path(workdir)
  folder = hf_mamba.folder(model)
  options = hf_mamba.read_options(folder / 'config.json')
  hf_mamba.import_options(options, config)
  run_config = config_lib.resolve(config)
  abstract = abstract_params(run_config.model)
  export = lambda params: hf_mamba.export_tensors(to_tensors(params), run_config.model)
  expected = jax.eval_shape(export, abstract)
  tensors = {}
  for file in hf_mamba.files(folder):
    tensors |= _read(file, run_config.model.param_dtype)[0]
  tensors = hf_mamba.complete(tensors, options, expected)
  _check(tensors, expected, folder)
  params = from_tensors(hf_mamba.import_tensors(tensors, run_config.model), abstract)
  return write_run(config, run_config, params, workdir)


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


def _check(tensors, expected, source):
  """Raises ValueError if names, shapes or dtypes differ from those expected."""
  lines = checkpoint.differences(tensors, expected)
  if lines:
    raise ValueError('\n'.join([f'{source} does not match the model of its config:', *lines]))


def _read(path, dtype=None):
  """Reads tensors, converted to `dtype` if given, and metadata of a safetensors file."""
  with checkpoint.one_line_errors(f'cannot read {path} as safetensors'):
    with safetensors.safe_open(path, 'np') as file:
      tensors = {name: file.get_tensor(name) for name in file.keys()}
      metadata = file.metadata() or {}
  return {n: t.astype(dtype or t.dtype, copy=False) for n, t in tensors.items()}, metadata


def _write(tensors, metadata, path):
  # In C order: safetensors stores the buffer of an array, ignoring its strides.
  tensors = {name: np.asarray(tensor, order='C') for name, tensor in tensors.items()}
  safetensors.numpy.save_file(tensors, path, metadata)


def write_run(config, run_config, params, workdir):
  """Writes a run at step 0, in the format of training; returns a summary.

  Args:
    config: the run's ConfigDict.
    run_config: what it resolves to.
    params: nested dict of arrays.
    workdir: the folder, which must not exist.
  """
  optimizer = make_optimizer(run_config.optimizer, run_config.train.steps)
  state = step_lib.new_state(jax.tree.map(jnp.asarray, params), optimizer)
  metadata = {
    'config': config.to_dict(),
    'corpus': None,  # no data was read
    'tokenizer': run_config.tokenizer.fingerprint,
  }
  with _output(workdir) as path:
    path.mkdir()
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
