"""Mamba as the package transformers has it (MambaForCausalLM): names, layouts and options.

Both sides are tensors by name: theirs, and those of moejax.convert. Checkpoints of Mamba-1 that
begin with `backbone.embeddings.weight` are of this kind, among them those whose names on Hugging
Face's hub end in -hf.
"""

import importlib
import json
import pathlib

import jax.numpy as jnp
import numpy as np

from moejax import checkpoint
from moejax.layers import mamba

# How a parameter is laid out there: the way there, the way back.
_SAME = (lambda a: a, lambda a: a)
_MATRIX = (lambda w: w.T, lambda w: w.T)  # PyTorch's are [out, in]
_KERNEL = (lambda kernel_WI: kernel_WI.T[:, None], lambda kernel: kernel[:, 0].T)
# A layer: name there, layout, and ours, of which several stand side by side.
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
# Options that have one value here, and what transformers takes others for if its config is silent.
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
  """Their tensors from ours; `model` is a ModelConfig for which `export_options` does not raise."""
  join = lambda names: jnp.concatenate([tensors[name] for name in names], axis=-1)
  return {name: there(join(ours)) for name, (there, _), *ours in _table(model)}


def import_tensors(tensors, model):
  """The inverse of `export_tensors`, on numpy arrays."""
  found = {}
  for name, (_, back), *ours in _table(model):
    found |= zip(ours, np.split(back(tensors[name]), len(ours), axis=-1), strict=True)
  return found


def _table(model):
  """Rows as in _LAYER for a whole model."""
  yield 'backbone.embeddings.weight', _SAME, 'embedding'
  for i, layer in enumerate(_layers(model)):
    for name, layout, *ours in _LAYER:
      yield f'backbone.layers.{i}.{name}', layout, *(f'{layer}.{part}' for part in ours)
  yield 'backbone.norm_f.weight', _SAME, 'final_norm.scale'
  if not model.tie_embeddings:
    yield 'lm_head.weight', _MATRIX, 'head'


def _layers(model):
  """Our names of all sublayers in order."""
  for stack, (pattern, repeats) in enumerate(model.blocks):
    for block in range(repeats):
      for i, kind in enumerate(pattern):
        yield f'stack_{stack}.{block}.{i}_{kind}'


def export_options(model, data, tokenizer):
  """The content of their config.json.

  Args:
    model: a ModelConfig.
    data: the DataConfig, which keeps the special ids of a converted model.
    tokenizer: whose ids they are otherwise.

  Raises:
    ValueError: `model` is not a Mamba as theirs.
  """
  problems = []
  needed = {'positions': 'none', 'norm': 'rms_norm', 'final_norm': True}
  for name, value in needed.items():
    if getattr(model, name) != value:
      problems.append(f'model.{name} must be {value}, got {getattr(model, name)}.')
  if {kind for pattern, _ in model.blocks for kind in pattern} != {'mamba'}:
    problems.append(f'model.blocks must hold mamba sublayers alone, got {model.blocks}.')
  if model.mamba.expand != int(model.mamba.expand):
    problems.append(f'model.mamba.expand must be a whole number, got {model.mamba.expand}.')
  if problems:
    heading = 'transformers has no such Mamba. Train a run with the fields that it needs:'
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
  """Their options for ids that are no text."""
  kept = {name: getattr(data, f'{name}_id') for name in _SPECIAL}
  if set(kept.values()) == {-1}:
    kept |= {'eos': tokenizer.eos_id, 'pad': tokenizer.pad_id}
  return {f'{name}_token_id': None if i < 0 else i for name, i in kept.items()}


def read_options(path):
  """Their config.json, completed with defaults.

  Raises:
    ValueError: it cannot be read, or it describes another model than we have.
  """
  with checkpoint.explain(f'cannot read {path}'):
    options = _FIXED | _DEFAULTS | json.loads(path.read_text())
  if options.get('model_type') != 'mamba':
    raise ValueError(
      f'{path}: model_type must be mamba, got {options.get("model_type")}. Checkpoints of the '
      'package mamba_ssm say none; on the hub, names with -hf are those made for transformers.'
    )
  missing = {'vocab_size', 'hidden_size', 'num_hidden_layers'} - options.keys()
  if missing:
    raise ValueError(f'{path}: {", ".join(sorted(missing))} must be given.')
  known = {name: [value] for name, value in _FIXED.items()}
  known['time_step_rank'] = ['auto', mamba.delta_rank(options['hidden_size'])]
  problems = [
    f'{path}: {name} = {options[name]!r} does not exist here, only {values[-1]!r}.'
    for name, values in known.items()
    if options[name] not in values
  ]
  if problems:
    raise ValueError('\n'.join(problems))
  return options


def import_options(options, config):
  """Sets the model of a config, and its special ids, to what `read_options` returned."""
  for name in _SPECIAL:
    ids = options[f'{name}_token_id']  # of several ends of a text, the first
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
  """Their tensors with what they may have in other ways: an old name, no bias, a head twice.

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
  """The folder of a model: a path, or a name on Hugging Face's hub, from which it is fetched.

  Raises:
    ValueError: there is none.
  """
  if pathlib.Path(name).is_dir():
    return pathlib.Path(name)
  try:
    hub = importlib.import_module('huggingface_hub')  # an extra
  except ImportError as error:
    raise ValueError(
      f"--model={name} is no folder here. To look for it on the hub, pip install 'moejax[hf]'."
    ) from error
  with checkpoint.explain(f'--model={name} is no folder here, and the hub does not give it'):
    wanted = ['config.json', '*.safetensors', '*.safetensors.index.json']
    return pathlib.Path(hub.snapshot_download(name, allow_patterns=wanted))


def files(folder):
  """The safetensors files of a model, which may be in several.

  Raises:
    ValueError: there are none.
  """
  index = folder / 'model.safetensors.index.json'
  if index.exists():
    with checkpoint.explain(f'cannot read {index}'):
      return [folder / n for n in sorted(set(json.loads(index.read_text())['weight_map'].values()))]
  if not (folder / 'model.safetensors').exists():
    raise ValueError(
      f'{folder} holds no model.safetensors. A pytorch_model.bin is for PyTorch alone; write it '
      'anew, with MambaForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) of transformers.'
    )
  return [folder / 'model.safetensors']
