"""OLMoE: Mixtral with norms of queries and keys; a token's weights are renormalised or not."""

from moejax.hf import llama, mixtral
from moejax.hf.architecture import Architecture, row


def rows(model):
  """Rows of a layer; those of Qwen3 have the same names."""
  yield from mixtral.rows(model, 'mlp', 'gate_proj', 'up_proj', 'down_proj')
  for name in 'qk':
    ours = f'attention.layer.{name}_norm.scale'
    yield row(f'model.layers.{{}}.self_attn.{name}_norm.weight', ours)


OLMOE = Architecture(
  name='olmoe',
  class_name='OlmoeForCausalLM',
  config='configs/moe.py:olmoe',
  layer=('attention', 'moe'),
  needs=llama.NEEDS
  | mixtral.NEEDS
  | {'model.qk_norm': True, 'model.qk_norm_per_head': False, 'model.head_dim': 0},
  same=llama.SAME | {'norm_topk_prob': 'model.moe.renormalize'},
  only=llama.ONLY | {'clip_qkv': None},
  defaults=llama.DEFAULTS
  | {
    'rms_norm_eps': 1e-5,
    'num_experts_per_tok': 8,
    'num_experts': 64,
    'norm_topk_prob': False,
    'bos_token_id': None,
    'eos_token_id': 50279,
    'pad_token_id': 1,
  },
  fields=lambda o: mixtral.fields(o, 'num_experts'),
  options=lambda m: mixtral.options(m, 'num_experts'),
  unsupported=lambda o, length: mixtral.unsupported(o, length, 'num_experts'),
  top=llama.top,
  rows=rows,
)
