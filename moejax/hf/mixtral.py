"""Mixtral: Llama with token choice, whose weights are renormalised, in place of feed-forwards."""

from moejax.hf import llama
from moejax.hf.architecture import INPUT, Architecture, row

# Experts drop no token there. Without a capacity neither do ours; decoding never drops.
NEEDS = {
  'model.moe.router': 'token_choice',
  'model.moe.scores': 'softmax',
  'model.moe.balance_bias': False,
  'model.moe.shared_width': 0,
  'model.moe.output_norm': False,
}


_MOST_EXPERTS = 10_000  # a larger number is a mistake, and would take forever to check


def unsupported(options, length, experts):
  """As `llama.unsupported`; `experts` is their option for the number of these."""
  yield from llama.unsupported(options, length)
  if not 1 <= options[experts] <= _MOST_EXPERTS:
    yield f'{experts} = {options[experts]} must be 1 to {_MOST_EXPERTS}.'


def fields(options, experts):
  """Our fields for attention and experts."""
  return llama.fields(options) | {
    'model.moe.expansion_rate': options[experts],
    'model.moe.granularity': 1,
    'model.moe.experts_per_token': options['num_experts_per_tok'],
    'model.moe.capacity_factor': 0.0,
  }


def options(model, experts):
  """The inverse of `fields`."""
  return llama.options(model, model.moe.expert_width(model.d_ff)) | {
    experts: model.moe.num_experts,
    'num_experts_per_tok': model.moe.top_k,
  }


def rows(model, block, gate, up, down):
  """Rows of a layer: the names of its block, and of the matrices of an expert there."""
  yield from llama.attention(model)
  yield row('model.layers.{}.post_attention_layernorm.weight', 'moe.norm.scale')
  yield row(f'model.layers.{{}}.{block}.gate.weight', 'moe.layer.router', INPUT)
  for theirs, ours in {gate: 'w_gate', up: 'w_in', down: 'w_out'}.items():
    experts = range(model.moe.num_experts)
    names = [f'model.layers.{{}}.{block}.experts.{e}.{theirs}.weight' for e in experts]
    yield row(names, f'moe.layer.experts.{ours}', INPUT, axis=0)


MIXTRAL = Architecture(
  name='mixtral',
  class_name='MixtralForCausalLM',
  config='configs/moe.py:mixtral',
  layer=('attention', 'moe'),
  needs=llama.NEEDS | NEEDS | {'model.moe.renormalize': True},
  same=llama.SAME,
  only={'hidden_act': 'silu'},
  defaults=llama.DEFAULTS
  | {
    'num_key_value_heads': 8,
    'rms_norm_eps': 1e-5,
    'rope_theta': 1e6,
    'num_experts_per_tok': 2,
    'num_local_experts': 8,
  },
  fields=lambda o: fields(o, 'num_local_experts'),
  options=lambda m: options(m, 'num_local_experts') | {'sliding_window': None},
  unsupported=lambda o, length: unsupported(o, length, 'num_local_experts'),
  top=llama.top,
  rows=lambda m: rows(m, 'block_sparse_moe', 'w1', 'w3', 'w2'),
)
