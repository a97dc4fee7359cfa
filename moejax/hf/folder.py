"""Folders of transformers: config.json and safetensors, read and written without PyTorch."""

import contextlib
import importlib
import json
import pathlib
import re
from typing import NamedTuple

import jax
import numpy as np
import safetensors.numpy

from moejax import checkpoint, differences, files

_INDEX = 'model.safetensors.index.json'
_LARGEST_FILE = 5 * 10**9  # bytes, as transformers writes them
# What is downloaded: config, weights, and the files of tokenizers.
_WANTED = ['*.json', 'model*.safetensors', 'merges.txt', '*.jinja']


def find(name):
  """The folder of a model: a path, or a name on Hugging Face's hub, which is downloaded.

  Raises:
    ValueError: it is not found.
  """
  if pathlib.Path(name).is_dir():
    return pathlib.Path(name)
  try:
    hub = importlib.import_module('huggingface_hub')  # an extra
  except ImportError as error:
    raise ValueError(
      f"--model={name}: no such folder. To download it from the hub, pip install 'moejax[hf]'."
    ) from error
  with checkpoint.one_line_errors(
    f'--model={name}: no such folder, and the download from the hub failed'
  ):
    return pathlib.Path(hub.snapshot_download(name, allow_patterns=_WANTED))


def read_options(folder):
  """The content of config.json.

  Raises:
    ValueError: there is none, or it cannot be read.
  """
  path = folder / 'config.json'
  if not path.exists():
    raise ValueError(f'cannot read {path}: {folder} holds no model of transformers.')
  with checkpoint.one_line_errors(f'cannot read {path}'):
    options = files.parse_json(path.read_bytes())
  if not isinstance(options, dict):
    raise ValueError(f'cannot read {path}: it must hold an object, {{...}}.')
  return options


def has_tokenizer(folder):
  """Whether a folder holds a tokenizer that `data.tokenizer` can name."""
  files = ('tokenizer.json',), ('vocab.json', 'merges.txt')
  return any(all((folder / name).is_file() for name in names) for names in files)


class _Stored(NamedTuple):
  """A tensor that has not been read yet."""

  path: pathlib.Path
  name: str  # in the file
  shape: tuple[int, ...]


def read_tensors(folder, architecture, options, expected):
  """The tensors of a model by their current names, in the dtypes of `expected`.

  Args:
    folder: with one safetensors file, or several and their index.
    architecture: of the model; its `zero` tensors may be missing.
    options: the content of config.json.
    expected: shapes and dtypes by name. Nothing is read unless the shapes in the files are these.

  Raises:
    ValueError: a file cannot be read, or names or shapes differ.
  """
  stored = {}
  for path in _files(folder):
    with reading(path) as file:
      for name in file.keys():
        shape = tuple(file.get_slice(name).get_shape())
        stored[architecture.current_name(name, options)] = _Stored(path, name, shape)
  stored.pop('', None)
  zero = [n for n in expected if n not in stored and re.search(architecture.zero, n)]
  found = {
    name: jax.ShapeDtypeStruct(s.shape, expected[name].dtype if name in expected else np.float32)
    for name, s in stored.items()
  }
  check(found | {name: expected[name] for name in zero}, expected, folder)
  tensors = {name: np.zeros(expected[name].shape, expected[name].dtype) for name in zero}
  for path in sorted({s.path for s in stored.values()}):
    with reading(path) as file:
      for name, s in stored.items():
        if s.path == path:
          tensors[name] = file.get_tensor(s.name).astype(expected[name].dtype, copy=False)
  return tensors


def check(tensors, expected, source):
  """Raises ValueError if names, shapes or dtypes differ from those expected."""
  if lines := differences.differences(tensors, expected):
    raise ValueError('\n'.join([f'{source} does not match the model of its config:', *lines]))


@contextlib.contextmanager
def reading(path):
  """An open safetensors file, with one-line errors."""
  with checkpoint.one_line_errors(f'cannot read {path} as safetensors'):
    with safetensors.safe_open(path, 'np') as file:
      yield file


def _files(folder):
  """The safetensors files of a model; raises ValueError if there are none."""
  index = folder / _INDEX
  if index.exists():
    with checkpoint.one_line_errors(f'cannot read {index}'):
      names = sorted({str(n) for n in files.parse_json(index.read_bytes())['weight_map'].values()})
    if outside := [name for name in names if name != pathlib.PurePath(name).name]:
      raise ValueError(f'cannot read {index}: {outside[0]!r} is no name of a file in its folder.')
    return [folder / name for name in names]
  if not (folder / 'model.safetensors').exists():
    raise ValueError(
      f'{folder} has no model.safetensors. A pytorch_model.bin cannot be read without PyTorch; '
      'convert it with AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW).'
    )
  return [folder / 'model.safetensors']


def write_tensors(tensors, folder, largest_file=_LARGEST_FILE):
  """Writes tensors to model.safetensors, or to several files and their index."""
  files, sizes = [{}], [0]
  for name, tensor in tensors.items():
    tensor = np.asarray(tensor, order='C')  # safetensors stores the buffer, ignoring its strides
    if files[-1] and sizes[-1] + tensor.nbytes > largest_file:
      files.append({})
      sizes.append(0)
    files[-1][name] = tensor
    sizes[-1] += tensor.nbytes
  names = ['model.safetensors']
  if len(files) > 1:
    names = [f'model-{i + 1:05}-of-{len(files):05}.safetensors' for i in range(len(files))]
    weight_map = {t: name for name, part in zip(names, files, strict=True) for t in part}
    index = {'metadata': {'total_size': sum(sizes)}, 'weight_map': weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2))
  for name, part in zip(names, files, strict=True):
    safetensors.numpy.save_file(part, folder / name, {'format': 'pt'})
