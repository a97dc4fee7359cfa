"""Mamba-2: their class Mamba2ForCausalLM, our `mamba2` sublayers alone.

Ours keeps apart what they have in one matrix: the projections into gate and x, b and c, and delta;
and the convolutions of x, and of b and c.
"""

import functools

from moejax.hf import mamba
from moejax.hf.architecture import INPUT, SAME, Architecture, row

_NO_LIMIT = ([0.0, float('inf')], [0.0, {'__float__': 'Infinity'}])  # as it is written in JSON


def _unsupported(options, length):
  del length
  channels = options['num_heads'] * options['head_dim']
  asked = options['expand'] * options['hidden_size']
  if channels != asked:
    yield f'num_heads * head_dim = {channels} must be expand * hidden_size = {asked}.'
  limit = options['time_step_limit']
  if list(limit) not in _NO_LIMIT:
    yield f'time_step_limit = {limit} is not supported, only {_NO_LIMIT[0]}.'


def _inexpressible(model):
  expand, channels = model.mamba2.expand, model.mamba2.inner_width(model.d_model)
  if expand != int(expand) or channels != expand * model.d_model:
    yield (
      f'model.mamba2.expand must be an integer that makes whole heads of {model.mamba2.head_width} '
      f'channels, got {expand} times {model.d_model}.'
    )


def rows(model):
  """Rows of a layer."""
  del model
  for theirs, ours, layout in (
    ('norm.weight', ('norm.scale',), SAME),
    ('mixer.in_proj.weight', _of_layer('w_gate w_in w_bc w_delta'), INPUT),
    ('mixer.conv1d.weight', _of_layer('conv_kernel bc_kernel'), mamba.KERNEL),
    ('mixer.conv1d.bias', _of_layer('conv_bias bc_bias'), SAME),
    ('mixer.dt_bias', _of_layer('delta_bias'), SAME),
    ('mixer.A_log', _of_layer('log_rate'), SAME),
    ('mixer.D', _of_layer('skip'), SAME),
    ('mixer.norm.weight', _of_layer('norm_scale'), SAME),
    ('mixer.out_proj.weight', _of_layer('w_out'), INPUT),
  ):
    yield row(f'backbone.layers.{{}}.{theirs}', [f'mamba2.{name}' for name in ours], layout)


def _of_layer(names):
  return [f'layer.{name}' for name in names.split()]


MAMBA2 = Architecture(
  name='mamba2',
  class_name='Mamba2ForCausalLM',
  config='configs/mamba.py:hf,mamba2',
  layer=('mamba2',),
  needs=mamba.MAMBA.needs,
  same={
    'vocab_size': 'model.vocab_size',
    'hidden_size': 'model.d_model',
    'head_dim': 'model.mamba2.head_width',
    'n_groups': 'model.mamba2.groups',
    'state_size': 'model.mamba2.state_size',
    'conv_kernel': 'model.mamba2.conv_width',
    'layer_norm_epsilon': 'model.norm_eps',
    'tie_word_embeddings': 'model.tie_embeddings',
  },
  only={'use_bias': False, 'hidden_act': 'silu'},
  defaults={
    'expand': 2,
    'num_heads': 128,
    'head_dim': 64,
    'n_groups': 8,
    'state_size': 128,
    'conv_kernel': 4,
    'time_step_limit': _NO_LIMIT[0],
    'layer_norm_epsilon': 1e-5,
    'tie_word_embeddings': False,
    'residual_in_fp32': True,
    'bos_token_id': 0,
    'eos_token_id': 2,
    'pad_token_id': 1,
  },
  fields=functools.partial(mamba.fields, 'mamba2'),
  options=lambda m: mamba.options('mamba2', m) | {'num_heads': m.mamba2.heads(m.d_model)},
  unsupported=_unsupported,
  inexpressible=_inexpressible,
  top=mamba.top,
  rows=rows,
  renamed=mamba.MAMBA.renamed,
  zero=mamba.MAMBA.zero,
)
