"""Mamba-1: their class MambaForCausalLM, our `mamba` sublayers alone.

Checkpoints that contain `backbone.embeddings.weight` have this format, such as those whose names on
Hugging Face's hub end in -hf.
"""

import functools

from moejax.hf.architecture import INPUT, SAME, Architecture, Layout, row
from moejax.layers import mamba

KERNEL = Layout(lambda kernel_WI: kernel_WI.T[:, None], lambda kernel, _: kernel[:, 0].T)


def _unsupported(options, length):
  del length
  rank = mamba.delta_rank(options['hidden_size'])
  if options['time_step_rank'] not in ('auto', rank):
    yield f'time_step_rank = {options["time_step_rank"]!r} is not supported, only {rank}.'


def _inexpressible(model):
  if model.mamba.expand != int(model.mamba.expand):
    yield f'model.mamba.expand must be an integer, got {model.mamba.expand}.'


def top(model):
  """Rows outside of layers, of both Mambas."""
  yield row('backbone.embeddings.weight', 'embedding')
  yield row('backbone.norm_f.weight', 'final_norm.scale')
  if not model.tie_embeddings:
    yield row('lm_head.weight', 'head', INPUT)


def _rows(model):
  del model
  for theirs, ours, layout in (
    ('norm.weight', ('norm.scale',), SAME),
    ('mixer.in_proj.weight', ('layer.w_in', 'layer.w_gate'), INPUT),
    ('mixer.conv1d.weight', ('layer.conv_kernel',), KERNEL),
    ('mixer.conv1d.bias', ('layer.conv_bias',), SAME),
    ('mixer.x_proj.weight', ('layer.w_select',), INPUT),
    ('mixer.dt_proj.weight', ('layer.w_delta',), INPUT),
    ('mixer.dt_proj.bias', ('layer.delta_bias',), SAME),
    ('mixer.A_log', ('layer.a_log',), SAME),
    ('mixer.D', ('layer.skip',), SAME),
    ('mixer.out_proj.weight', ('layer.w_out',), INPUT),
  ):
    yield row(f'backbone.layers.{{}}.{theirs}', [f'mamba.{name}' for name in ours], layout)


def fields(section, options):
  """Fields of both kinds of Mamba by their options; `section` of ours is `mamba` or `mamba2`."""
  return {
    f'model.{section}.expand': float(options['expand']),
    'model.residual_float32': options['residual_in_fp32'],
  }


def options(section, model):
  """Their options of both kinds of Mamba."""
  return {
    'expand': int(getattr(model, section).expand),
    'use_conv_bias': True,
    'residual_in_fp32': model.residual_float32 or model.dtype == 'float32',
  }


MAMBA = Architecture(
  name='mamba',
  class_name='MambaForCausalLM',
  config='configs/mamba.py:hf',
  layer=('mamba',),
  needs={'model.positions': 'none', 'model.norm': 'rms_norm', 'model.final_norm': True},
  same={
    'vocab_size': 'model.vocab_size',
    'hidden_size': 'model.d_model',
    'expand': 'model.mamba.expand',
    'state_size': 'model.mamba.state_size',
    'conv_kernel': 'model.mamba.conv_width',
    'layer_norm_epsilon': 'model.norm_eps',
    'tie_word_embeddings': 'model.tie_embeddings',
  },
  only={'use_bias': False, 'hidden_act': 'silu'},
  defaults={
    'expand': 2,
    'state_size': 16,
    'conv_kernel': 4,
    'time_step_rank': 'auto',
    'layer_norm_epsilon': 1e-5,
    'tie_word_embeddings': True,
    'residual_in_fp32': True,
    'bos_token_id': 0,
    'eos_token_id': 0,
    'pad_token_id': 0,
  },
  fields=functools.partial(fields, 'mamba'),
  options=lambda m: options('mamba', m) | {'time_step_rank': mamba.delta_rank(m.d_model)},
  unsupported=_unsupported,
  inexpressible=_inexpressible,
  top=top,
  rows=_rows,
  renamed=(r'^backbone\.embedding\.', 'backbone.embeddings.'),
  zero=r'\.conv1d\.bias$',  # with `use_conv_bias` = False
)
