"""Llama: rotary positions, RMS norms, SwiGLU, keys and values that several heads may share.

What other architectures have in common with it is imported from here.
"""

from moejax.hf.architecture import INPUT, OUTPUT, Architecture, row
from moejax.layers import mlp

NEEDS = {
  'model.positions': 'rope',
  'model.norm': 'rms_norm',
  'model.final_norm': True,
  'model.activation': 'swiglu',
  'model.biases': False,
  'model.qk_norm': False,
}
SAME = {
  'vocab_size': 'model.vocab_size',
  'hidden_size': 'model.d_model',
  'num_attention_heads': 'model.num_heads',
  'rms_norm_eps': 'model.norm_eps',
  'tie_word_embeddings': 'model.tie_embeddings',
}
ONLY = {'hidden_act': 'silu', 'attention_bias': False}
DEFAULTS = {
  'num_key_value_heads': None,
  'rms_norm_eps': 1e-6,
  'tie_word_embeddings': False,
  'rope_theta': 10_000.0,
  'bos_token_id': 1,
  'eos_token_id': 2,
}


def fields(options):
  """Our fields for attention and for the width of a gated feed-forward."""
  heads, kv_heads = options['num_attention_heads'], options['num_key_value_heads']
  head_dim = options.get('head_dim')
  return {
    'model.num_kv_heads': 0 if kv_heads in (None, heads) else kv_heads,
    'model.head_dim': 0 if head_dim in (None, options['hidden_size'] / heads) else head_dim,
    'model.rope_theta': float(_rope(options).get('rope_theta', options['rope_theta'])),
    'model.d_ff': options['intermediate_size'] * 3 // 2,  # ours is that of a layer without a gate
  }


def options(model, d_ff=None):
  """The inverse of `fields`, and what transformers needs besides."""
  return {
    'intermediate_size': mlp.hidden_width(d_ff or model.d_ff, model.activation),
    'num_key_value_heads': model.num_kv_heads or model.num_heads,
    'head_dim': model.head_width,
    'max_position_embeddings': model.max_length,
    'rope_theta': model.rope_theta,  # before transformers 5
    'rope_parameters': {'rope_type': 'default', 'rope_theta': model.rope_theta},
    'attention_dropout': 0.0,
  }


def unsupported(options, length):
  """Yields what this family has in transformers and not here."""
  if not options.get('intermediate_size') or options['intermediate_size'] % 8:
    yield f'intermediate_size = {options.get("intermediate_size")} must be a multiple of 8.'
  kind = _rope(options).get('rope_type', _rope(options).get('type', 'default'))
  if kind != 'default':
    yield f"rope_type = {kind!r} is not supported, only 'default'."
  for name, value in {'partial_rotary_factor': 1.0}.items():
    if (given := options.get(name, _rope(options).get(name))) not in (None, value):
      yield f'{name} = {given} is not supported, only {value}.'
  window = options.get('sliding_window')
  if window is not None and window < length:
    yield (
      f'sliding_window = {window}: attention to a window is not supported; sequences of at most '
      f'{window} positions never leave it: --config.data.sequence_length={window}.'
    )


def _rope(options):
  return options.get('rope_parameters') or options.get('rope_scaling') or {}


def top(model):
  yield row('model.embed_tokens.weight', 'embedding')
  yield row('model.norm.weight', 'final_norm.scale')
  if not model.tie_embeddings:
    yield row('lm_head.weight', 'head', INPUT)


def attention(
  model, norm='model.layers.{}.input_layernorm.weight', block='model.layers.{}.self_attn.'
):
  """Rows of norm and attention."""
  yield row(norm, 'attention.norm.scale')
  q, k, v, out = (f'{block}{name}_proj.weight' for name in 'qkvo')
  if model.num_kv_heads in (0, model.num_heads):
    yield row((q, k, v), 'attention.layer.qkv', INPUT, axis=1)
  else:
    yield row(q, 'attention.layer.q', INPUT)
    yield row((k, v), 'attention.layer.kv', INPUT, axis=1)
  yield row(out, 'attention.layer.out', OUTPUT)


def _rows(model):
  yield from attention(model)
  yield row('model.layers.{}.post_attention_layernorm.weight', 'mlp.norm.scale')
  for theirs, ours in {'gate': 'w_gate', 'up': 'w_in', 'down': 'w_out'}.items():
    yield row(f'model.layers.{{}}.mlp.{theirs}_proj.weight', f'mlp.layer.{ours}', INPUT)


LLAMA = Architecture(
  name='llama',
  class_name='LlamaForCausalLM',
  config='configs/dense.py:llama',
  layer=('attention', 'mlp'),
  needs=NEEDS,
  same=SAME,
  only={**ONLY, 'mlp_bias': False},
  defaults=DEFAULTS,
  fields=fields,
  options=options,
  unsupported=unsupported,
  top=top,
  rows=_rows,
)
