"""Qwen3's mixtures of experts: OLMoE with norms of each head, experts of their own option."""

from moejax.hf import llama, mixtral, olmoe
from moejax.hf.architecture import Architecture


def _as_mixtral(options):
  """Their options under the names that mixtral.py reads; the window is that of other models."""
  return options | {
    'intermediate_size': options['moe_intermediate_size'],
    'num_experts': options.get('num_local_experts', options['num_experts']),  # transformers 5
    'sliding_window': None,
  }


def _options(model):
  found = mixtral.options(model, 'num_experts')
  return found | {'moe_intermediate_size': found['intermediate_size'], 'sliding_window': None}


QWEN3_MOE = Architecture(
  name='qwen3_moe',
  class_name='Qwen3MoeForCausalLM',
  config='configs/like.py:qwen3-30b-a3b',
  layer=('attention', 'moe'),
  needs=llama.NEEDS | mixtral.NEEDS | {'model.qk_norm': True, 'model.qk_norm_per_head': True},
  same=olmoe.OLMOE.same,
  only=llama.ONLY | {'use_sliding_window': False, 'decoder_sparse_step': 1, 'mlp_only_layers': []},
  defaults=llama.DEFAULTS
  | {
    'num_key_value_heads': 4,
    'moe_intermediate_size': 768,
    'num_experts_per_tok': 8,
    'num_experts': 128,
    'norm_topk_prob': False,
    'bos_token_id': None,
    'eos_token_id': None,
  },
  fields=lambda o: mixtral.fields(_as_mixtral(o), 'num_experts'),
  options=_options,
  unsupported=lambda o, length: mixtral.unsupported(_as_mixtral(o), length, 'num_experts'),
  top=llama.top,
  rows=olmoe.rows,
)
