"""Mamba in the package transformers (MambaForCausalLM): names, layouts and options.

Converts tensors by name: between theirs and those of moejax.convert. Checkpoints of Mamba-1 that
contain `backbone.embeddings.weight` have their format, such as those whose names on Hugging Face's
hub end in -hf.
"""

import importlib
import json
import pathlib

import jax.numpy as jnp
import numpy as np

from moejax import checkpoint
from moejax.layers import mamba

# Layouts of their parameters: the conversion to theirs, and to ours.
_SAME = (lambda a: a, lambda a: a)
_MATRIX = (lambda w: w.T, lambda w: w.T)  # PyTorch's are [out, in]
_KERNEL = (lambda kernel_WI: kernel_WI.T[:, None], lambda kernel: kernel[:, 0].T)
# A layer: their name, its layout, and our names, of which several are concatenated.
_LAYER = (
  ('norm.weight', _SAME, 'norm.scale'),
  ('mixer.in_proj.weight', _MATRIX, 'layer.w_in', 'layer.w_gate'),
  ('mixer.conv1d.weight', _KERNEL, 'layer.conv_kernel'),
  ('mixer.conv1d.bias', _SAME, 'layer.conv_bias'),
  ('mixer.x_proj.weight', _MATRIX, 'layer.w_select'),
  ('mixer.dt_proj.weight', _MATRIX, 'layer.w_delta'),
  ('mixer.dt_proj.bias', _SAME, 'layer.delta_bias'),
  ('mixer.A_log', _SAME, 'layer.a_log'),
  ('mixer.D', _SAME, 'layer.skip'),
  ('mixer.out_proj.weight', _MATRIX, 'layer.w_out'),
)
# Options that have one value here, and the defaults of transformers for the others.
_FIXED = {'use_bias': False, 'hidden_act': 'silu', 'layer_norm_epsilon': 1e-5}
_DEFAULTS = {
  'expand': 2,
  'state_size': 16,
  'conv_kernel': 4,
  'time_step_rank': 'auto',
  'use_conv_bias': True,
  'tie_word_embeddings': True,
  'residual_in_fp32': True,
  'bos_token_id': 0,
  'eos_token_id': 0,
  'pad_token_id': 0,
}
_SPECIAL = ('bos', 'eos', 'pad')


def export_tensors(tensors, model):
  """Converts our tensors to theirs; `model` is a ModelConfig that `export_options` accepts."""
  join = lambda names: jnp.concatenate([tensors[name] for name in names], axis=-1)
  return {name: to_theirs(join(ours)) for name, (to_theirs, _), *ours in _table(model)}


def import_tensors(tensors, model):
  """The inverse of `export_tensors`, on numpy arrays."""
  found = {}
  for name, (_, to_ours), *ours in _table(model):
    found |= zip(ours, np.split(to_ours(tensors[name]), len(ours), axis=-1), strict=True)
  return found


def _table(model):
  """Yields entries like those of _LAYER for a whole model."""
  yield 'backbone.embeddings.weight', _SAME, 'embedding'
  for i, layer in enumerate(_layers(model)):
    for name, layout, *ours in _LAYER:
      yield f'backbone.layers.{i}.{name}', layout, *(f'{layer}.{part}' for part in ours)
  yield 'backbone.norm_f.weight', _SAME, 'final_norm.scale'
  if not model.tie_embeddings:
    yield 'lm_head.weight', _MATRIX, 'head'


def _layers(model):
  """Yields our names of all sublayers, in order."""
  for stack, (pattern, repeats) in enumerate(model.blocks):
    for block in range(repeats):
      for i, kind in enumerate(pattern):
        yield f'stack_{stack}.{block}.{i}_{kind}'


def export_options(model, data, tokenizer):
  """The content of their config.json.

  Args:
    model: a ModelConfig.
    data: the DataConfig, which keeps the special ids of a converted model.
    tokenizer: the source of the special ids otherwise.

  Raises:
    ValueError: transformers cannot express the model.
  """
  problems = []
  needed = {'positions': 'none', 'norm': 'rms_norm', 'final_norm': True}
  for name, value in needed.items():
    if getattr(model, name) != value:
      problems.append(f'model.{name} must be {value}, got {getattr(model, name)}.')
  if {kind for pattern, _ in model.blocks for kind in pattern} != {'mamba'}:
    problems.append(f'model.blocks must consist of mamba sublayers, got {model.blocks}.')
  if model.mamba.expand != int(model.mamba.expand):
    problems.append(f'model.mamba.expand must be an integer, got {model.mamba.expand}.')
  if problems:
    heading = 'transformers cannot express this model. Train a run with the fields that it needs:'
    raise ValueError('\n'.join([heading, *problems]))
  return {
    **_FIXED,
    'architectures': ['MambaForCausalLM'],
    'model_type': 'mamba',
    'dtype': model.param_dtype,
    'vocab_size': model.vocab_size,
    'hidden_size': model.d_model,
    'num_hidden_layers': len(list(_layers(model))),
    'expand': int(model.mamba.expand),
    'state_size': model.mamba.state_size,
    'conv_kernel': model.mamba.conv_width,
    'time_step_rank': mamba.delta_rank(model.d_model),
    'use_conv_bias': True,
    'tie_word_embeddings': model.tie_embeddings,
    'residual_in_fp32': model.residual_float32 or model.dtype == 'float32',
    **_special_ids(data, tokenizer),
  }


def _special_ids(data, tokenizer):
  """Their options for special ids."""
  kept = {name: getattr(data, f'{name}_id') for name in _SPECIAL}
  if set(kept.values()) == {-1}:
    kept |= {'eos': tokenizer.eos_id, 'pad': tokenizer.pad_id}
  return {f'{name}_token_id': None if i < 0 else i for name, i in kept.items()}


def read_options(path):
  """Their config.json, completed with defaults.

  Raises:
    ValueError: it cannot be read, or its model is not supported.
  """
  with checkpoint.one_line_errors(f'cannot read {path}'):
    options = _FIXED | _DEFAULTS | json.loads(path.read_text())
  if options.get('model_type') != 'mamba':
    raise ValueError(
      f'{path}: model_type must be mamba, got {options.get("model_type")}. Checkpoints of the '
      'package mamba_ssm have none; on the hub, those for transformers have -hf in their names.'
    )
  missing = {'vocab_size', 'hidden_size', 'num_hidden_layers'} - options.keys()
  if missing:
    raise ValueError(f'{path}: {", ".join(sorted(missing))} must be given.')
  known = {name: [value] for name, value in _FIXED.items()}
  known['time_step_rank'] = ['auto', mamba.delta_rank(options['hidden_size'])]
  problems = [
    f'{path}: {name} = {options[name]!r} is not supported, only {values[-1]!r}.'
    for name, values in known.items()
    if options[name] not in values
  ]
  if problems:
    raise ValueError('\n'.join(problems))
  return options


def import_options(options, config):
  """Sets the model and the special ids of a config from what `read_options` returned."""
  for name in _SPECIAL:
    ids = options[f'{name}_token_id']  # of several end ids, the first
    first = ids[0] if isinstance(ids, list) and ids else ids
    config.data[f'{name}_id'] = -1 if first in (None, []) else first
  section = config.model
  section.update(
    blocks=((('mamba',), options['num_hidden_layers']),),
    vocab_size=options['vocab_size'],
    d_model=options['hidden_size'],
    positions='none',
    norm='rms_norm',
    final_norm=True,
    tie_embeddings=options['tie_word_embeddings'],
    residual_float32=options['residual_in_fp32'],
  )
  section.mamba.update(
    expand=float(options['expand']),
    state_size=options['state_size'],
    conv_width=options['conv_kernel'],
  )


def complete(tensors, options, expected):
  """Their tensors, normalised: an old name renamed, missing biases 0, a tied head dropped.

  Args:
    tensors: by name, as in the file.
    options: `read_options`.
    expected: a dict with the shapes of all names.
  """
  tensors = dict(tensors)
  old = 'backbone.embedding.weight'
  if old in tensors:
    tensors['backbone.embeddings.weight'] = tensors.pop(old)
  if options['tie_word_embeddings']:
    tensors.pop('lm_head.weight', None)
  if not options['use_conv_bias']:
    names = [name for name in expected if name.endswith('.conv1d.bias')]
    tensors |= {name: np.zeros(expected[name].shape, expected[name].dtype) for name in names}
  return tensors


def folder(name):
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
    wanted = ['config.json', '*.safetensors', '*.safetensors.index.json']
    return pathlib.Path(hub.snapshot_download(name, allow_patterns=wanted))


def files(folder):
  """The safetensors files of a model, of which there may be several.

  Raises:
    ValueError: there are none.
  """
  index = folder / 'model.safetensors.index.json'
  if index.exists():
    with checkpoint.one_line_errors(f'cannot read {index}'):
      return [folder / n for n in sorted(set(json.loads(index.read_text())['weight_map'].values()))]
  if not (folder / 'model.safetensors').exists():
    raise ValueError(
      f'{folder} has no model.safetensors. A pytorch_model.bin cannot be read without PyTorch; '
      'convert it with MambaForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW).'
    )
  return [folder / 'model.safetensors']
