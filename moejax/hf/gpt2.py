"""GPT-2: learned positions, layer norms and biases everywhere; its matrices are [in, out]."""

from moejax.hf.architecture import INPUT, Architecture, layout, row

_FROM = layout(lambda w: w.reshape(w.shape[0], -1), transposed=False)
_TO = layout(lambda w: w.reshape(-1, w.shape[-1]), transposed=False)
_FLAT = layout(lambda b: b.reshape(-1), transposed=False)
_ACTIVATIONS = {'gelu_new': 'gelu', 'gelu_pytorch_tanh': 'gelu', 'relu': 'relu'}


def _unsupported(options, length):
  del length
  if options['activation_function'] not in _ACTIVATIONS:
    yield (
      f'activation_function = {options["activation_function"]!r} is not supported, only '
      f'{", ".join(_ACTIVATIONS)}.'
    )


def _top(model):
  yield row('transformer.wte.weight', 'embedding')
  yield row('transformer.wpe.weight', 'position_embedding')
  yield row('transformer.ln_f.weight', 'final_norm.scale')
  yield row('transformer.ln_f.bias', 'final_norm.bias')
  if not model.tie_embeddings:
    yield row('lm_head.weight', 'head', INPUT)


def _rows(model):
  del model
  for theirs, ours, kept in (
    ('ln_1.weight', 'attention.norm.scale', _FLAT),
    ('ln_1.bias', 'attention.norm.bias', _FLAT),
    ('attn.c_attn.weight', 'attention.layer.qkv', _FROM),
    ('attn.c_attn.bias', 'attention.layer.qkv_bias', _FLAT),
    ('attn.c_proj.weight', 'attention.layer.out', _TO),
    ('attn.c_proj.bias', 'attention.layer.out_bias', _FLAT),
    ('ln_2.weight', 'mlp.norm.scale', _FLAT),
    ('ln_2.bias', 'mlp.norm.bias', _FLAT),
    ('mlp.c_fc.weight', 'mlp.layer.w_in', _FROM),
    ('mlp.c_fc.bias', 'mlp.layer.bias_in', _FLAT),
    ('mlp.c_proj.weight', 'mlp.layer.w_out', _TO),
    ('mlp.c_proj.bias', 'mlp.layer.bias_out', _FLAT),
  ):
    yield row(f'transformer.h.{{}}.{theirs}', ours, kept)


GPT2 = Architecture(
  name='gpt2',
  class_name='GPT2LMHeadModel',
  config='configs/dense.py:gpt2',
  layer=('attention', 'mlp'),
  depth='n_layer',
  needs={
    'model.positions': 'learned',
    'model.norm': 'layer_norm',
    'model.final_norm': True,
    'model.activation': ('gelu', 'relu'),
    'model.biases': True,
    'model.qk_norm': False,
    'model.num_kv_heads': 0,
    'model.head_dim': 0,
  },
  same={
    'vocab_size': 'model.vocab_size',
    'n_embd': 'model.d_model',
    'n_head': 'model.num_heads',
    'n_positions': 'data.sequence_length',
    'layer_norm_epsilon': 'model.norm_eps',
    'tie_word_embeddings': 'model.tie_embeddings',
  },
  only={
    'scale_attn_weights': True,
    'scale_attn_by_inverse_layer_idx': False,
    'reorder_and_upcast_attn': False,
    'add_cross_attention': False,
  },
  defaults={
    'n_positions': 1024,
    'n_inner': None,
    'activation_function': 'gelu_new',
    'layer_norm_epsilon': 1e-5,
    'tie_word_embeddings': True,
    'bos_token_id': 50256,
    'eos_token_id': 50256,
  },
  fields=lambda o: {
    'model.d_ff': o['n_inner'] or 4 * o['n_embd'],
    'model.activation': _ACTIVATIONS[o['activation_function']],
  },
  options=lambda m: {
    'n_inner': m.d_ff,
    'activation_function': {'gelu': 'gelu_new', 'relu': 'relu'}[m.activation],
    **dict.fromkeys(('attn_pdrop', 'embd_pdrop', 'resid_pdrop'), 0.0),
  },
  unsupported=_unsupported,
  top=_top,
  rows=_rows,
  renamed=(r'^(wte|wpe|h|ln_f)\.', r'transformer.\1.'),
  ignored=r'\.attn\.(masked_)?bias$',  # causal masks
)
