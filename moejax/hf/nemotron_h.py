"""Nemotron-H with experts: Mamba-2, attention without positions and experts, each a layer."""

from moejax.hf import llama, mamba, mamba2
from moejax.hf.architecture import INPUT, Architecture, row

# Letters of their layers; newer files have a list of names instead.
_KINDS = {'M': 'mamba2', '*': 'attention', 'E': 'moe'}
_NAMES = {'linear_attention': 'M', 'full_attention': '*', 'moe': 'E'}


def _pattern(options):
  """The letters of all layers."""
  names = options.get('layers_block_type')
  return ''.join(_NAMES.get(n, '-') for n in names) if names else options['hybrid_override_pattern']


def _unsupported(options, length):
  del length
  if unknown := {*_pattern(options)} - {*_KINDS}:
    kinds = ', '.join(_KINDS)
    yield f'hybrid_override_pattern: layers {sorted(unknown)} are not supported, only {kinds}.'


def _inexpressible(model):
  if not model.moe.shared_width:
    yield 'model.moe.shared_width must be positive: there is a shared expert in every layer.'


def _fields(options):
  heads, kv_heads = options['num_attention_heads'], options['num_key_value_heads']
  channels = options['mamba_num_heads'] * options['mamba_head_dim']
  return {
    'model.blocks': ((tuple(_KINDS[letter] for letter in _pattern(options)), 1),),
    'model.num_kv_heads': 0 if kv_heads in (None, heads) else kv_heads,
    'model.mamba2.expand': channels / options['hidden_size'],
    'model.moe.granularity': 1,
    'model.moe.capacity_factor': 0.0,
  }


def _options(model):
  letters = {kind: letter for letter, kind in _KINDS.items()}
  return {
    'hybrid_override_pattern': ''.join(letters[kind] for kind in model.kinds),
    'num_key_value_heads': model.num_kv_heads or model.num_heads,
    'head_dim': model.head_width,
    'mamba_num_heads': model.mamba2.heads(model.d_model),
    'moe_intermediate_size': model.moe.expert_width(model.d_ff),
    'n_routed_experts': model.moe.num_experts,
    'num_experts_per_tok': model.moe.top_k,
    'max_position_embeddings': model.max_length,
  }


def _rows(model):
  norm, mixer = 'backbone.layers.{}.norm.weight', 'backbone.layers.{}.mixer.'
  yield from mamba2.rows(model)
  yield from llama.attention(model, norm, mixer)
  yield row(norm, 'moe.norm.scale')
  yield row(mixer + 'gate.weight', 'moe.layer.router', INPUT)
  yield row(mixer + 'gate.e_score_correction_bias', 'moe.layer.balance_bias')
  for theirs, ours in {'up_proj.weight': 'w_in', 'down_proj.weight': 'w_out'}.items():
    names = [f'{mixer}experts.{e}.{theirs}' for e in range(model.moe.num_experts)]
    yield row(names, f'moe.layer.experts.{ours}', INPUT, axis=0)
    yield row(f'{mixer}shared_experts.{theirs}', f'moe.layer.shared.{ours}', INPUT)


NEMOTRON_H = Architecture(
  name='nemotron_h',
  class_name='NemotronHForCausalLM',
  config='configs/like.py:nemotron-3-nano',
  layer=tuple(_KINDS.values()),
  mixed=True,
  needs={
    'model.positions': 'none',
    'model.norm': 'rms_norm',
    'model.final_norm': True,
    'model.activation': 'relu2',
    'model.biases': False,
    'model.qk_norm': False,
    'model.moe.router': 'token_choice',
    'model.moe.scores': 'sigmoid',
    'model.moe.renormalize': True,
    'model.moe.balance_bias': True,
    'model.moe.output_norm': False,
  },
  same={
    'vocab_size': 'model.vocab_size',
    'hidden_size': 'model.d_model',
    'num_attention_heads': 'model.num_heads',
    'head_dim': 'model.head_dim',
    'moe_intermediate_size': 'model.d_ff',
    'n_routed_experts': 'model.moe.expansion_rate',
    'num_experts_per_tok': 'model.moe.experts_per_token',
    'moe_shared_expert_intermediate_size': 'model.moe.shared_width',
    'mamba_head_dim': 'model.mamba2.head_width',
    'n_groups': 'model.mamba2.groups',
    'ssm_state_size': 'model.mamba2.state_size',
    'conv_kernel': 'model.mamba2.conv_width',
    'layer_norm_epsilon': 'model.norm_eps',
    'tie_word_embeddings': 'model.tie_embeddings',
  },
  only={
    'mlp_hidden_act': 'relu2',
    'mamba_hidden_act': 'silu',
    'norm_topk_prob': True,
    'n_shared_experts': 1,
    'n_group': 1,
    'topk_group': 1,
    'routed_scaling_factor': 1.0,  # 2.5 in Nemotron 3 Nano
    'time_step_min': 0.0,  # steps are at least so large; 0.001 there
    'moe_latent_size': None,
    'num_nextn_predict_layers': 0,
    'use_conv_bias': True,
    **dict.fromkeys(('attention_bias', 'mlp_bias', 'mamba_proj_bias', 'use_bias'), False),
    'residual_in_fp32': False,
  },
  defaults={
    'num_hidden_layers': None,
    'hybrid_override_pattern': '',
    'num_key_value_heads': 8,
    'mamba_num_heads': 128,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'pad_token_id': 0,
  },
  fields=_fields,
  options=_options,
  unsupported=_unsupported,
  inexpressible=_inexpressible,
  top=mamba.top,
  rows=_rows,
  renamed=(r'^model\.', 'backbone.'),
)
