"""Miniatures of known mixtures of experts, shape-true, and the models themselves.

  python -m moejax.main --config=configs/like.py:olmoe
  python -m moejax.aot --config=configs/like.py:olmoe,full --topology=v5p:4x4x4

  olmoe            OLMoE-1B-7B (arXiv:2409.02060), the default
  mixtral          Mixtral 8x7B (arXiv:2401.04088)
  qwen3-30b-a3b    Qwen3-30B-A3B (arXiv:2505.09388)
  nemotron-3-nano  Nemotron 3 Nano 30B-A3B (arXiv:2512.20848)

A miniature keeps the number of experts, how many a token uses, the shared expert, the router and
its losses, norms, positions, the heads that share keys and values, and the order of sublayers. Its
widths are those of the model over 32 (Mixtral: over 128), and it has fewer blocks. It trains like
the other laptop models; its learning rate is not tuned. `full` is the published size, in batches of
1024 x 4096 tokens (OLMoE's) of C4; the rest of the recipe is ours. docs/miniatures.md has the
numbers of both.

Different from the models, besides initial values, optimizer, data and context:
  olmoe            z_loss is the paper's; its code divides it by the 8 experts of a token
  mixtral          balance_loss is twice that of config.json, which counts both experts of a token
  qwen3-30b-a3b    likewise 8 times; it is of a microbatch, the paper's of the whole batch
  nemotron-3-nano  the outputs of experts are not multiplied by 2.5 (routed_scaling_factor)
                   the two shared experts are one, twice as wide, as in its config.json
                   steps of Mamba-2 may be smaller than 0.001 (time_step_min)
"""

from moejax import variants

_SHARED = {
  'model.norm': 'rms_norm',
  'model.final_norm': True,
  'model.activation': 'swiglu',  # of width 2/3 d_ff
  'model.positions': 'rope',
  'model.moe.granularity': 1,
  'model.moe.capacity_factor': 0.0,  # no token is dropped
  'model.moe.group_size': 1,
}
_LAYERS = ('attention', 'moe')
_MEM = ('mamba2', 'moe') * 2
# M: Mamba, E: experts, *: attention; 'MEMEM*E' five times, 'MEMEMEM*E', 'ME' four times.
_NEMOTRON = (
  (*_MEM, 'mamba2', 'attention', 'moe'),
  (*_MEM, *_MEM[:2], 'mamba2', 'attention', 'moe'),
)

# Fields of each model, and those in which its miniature differs.
MODELS = {
  'olmoe': (
    {
      'model.blocks': ((_LAYERS, 16),),
      'model.d_model': 2048,
      'model.num_heads': 16,
      'model.d_ff': 1536,
      'model.qk_norm': True,
      'model.vocab_size': 50_304,
      'model.moe.expansion_rate': 64,
      'model.moe.experts_per_token': 8,
      'model.moe.balance_loss': 0.01,
      'model.moe.z_loss': 0.001,
    },
    {
      'model.blocks': ((_LAYERS, 4),),
      'model.d_model': 64,
      'model.num_heads': 4,
      'model.d_ff': 48,
      'optimizer.peak_lr': 3e-3,
    },
  ),
  'mixtral': (
    {
      'model.blocks': ((_LAYERS, 32),),
      'model.d_model': 4096,
      'model.num_heads': 32,
      'model.num_kv_heads': 8,
      'model.d_ff': 21_504,
      'model.rope_theta': 1e6,
      'model.vocab_size': 32_000,
      'model.moe.expansion_rate': 8,
      'model.moe.experts_per_token': 2,
      'model.moe.renormalize': True,
      'model.moe.balance_loss': 0.04,
    },
    {
      'model.blocks': ((_LAYERS, 4),),
      'model.d_model': 32,
      'model.num_heads': 4,
      'model.num_kv_heads': 1,
      'model.d_ff': 168,
      'optimizer.peak_lr': variants.LAPTOP_SPARSE_LR,
    },
  ),
  'qwen3-30b-a3b': (
    {
      'model.blocks': ((_LAYERS, 48),),
      'model.d_model': 2048,
      'model.num_heads': 32,
      'model.num_kv_heads': 4,
      'model.head_dim': 128,
      'model.d_ff': 1152,
      'model.qk_norm': True,
      'model.qk_norm_per_head': True,
      'model.norm_eps': 1e-6,
      'model.rope_theta': 1e6,
      'model.vocab_size': 151_936,
      'model.moe.expansion_rate': 128,
      'model.moe.experts_per_token': 8,
      'model.moe.renormalize': True,
      'model.moe.balance_loss': 0.008,
    },
    {
      'model.blocks': ((_LAYERS, 4),),
      'model.d_model': 64,
      'model.num_heads': 8,
      'model.num_kv_heads': 1,
      'model.head_dim': 16,
      'model.d_ff': 36,
      'optimizer.peak_lr': 3e-3,
    },
  ),
  'nemotron-3-nano': (
    {
      'model.blocks': ((_NEMOTRON[0], 5), (_NEMOTRON[1], 1), (_MEM, 2)),
      'model.d_model': 2688,
      'model.num_heads': 32,
      'model.num_kv_heads': 2,
      'model.head_dim': 128,
      'model.positions': 'none',
      'model.d_ff': 1856,
      'model.activation': 'relu2',
      'model.vocab_size': 131_072,
      'model.moe.expansion_rate': 128,
      'model.moe.experts_per_token': 6,
      'model.moe.shared_width': 3712,
      'model.moe.scores': 'sigmoid',
      'model.moe.renormalize': True,
      'model.moe.balance_bias': True,
      'model.moe.balance_loss': 1e-4,
      'model.mamba2.expand': 4096 / 2688,
      'model.mamba2.head_width': 64,
      'model.mamba2.groups': 8,
      'model.mamba2.state_size': 128,
    },
    {
      'model.blocks': ((_NEMOTRON[0], 1), (_MEM[:2], 1)),
      'model.d_model': 84,
      'model.num_heads': 16,
      'model.num_kv_heads': 1,
      'model.head_dim': 8,
      'model.d_ff': 56,  # not 58: torch multiplies rows of 16 bytes
      'model.moe.shared_width': 112,
      'model.mamba2.head_width': 8,
      'model.mamba2.groups': 2,
      'model.mamba2.state_size': 16,
      'optimizer.peak_lr': 3e-3,
    },
  ),
}


def get_config(arg=None):
  arg = variants.parse_arg(arg, sizes=('laptop', 'full'), **dict.fromkeys(MODELS, False))
  names = [name for name in MODELS if getattr(arg, name)] or ['olmoe']
  if len(names) > 1:
    raise ValueError(f'--config=...: a model is one of {", ".join(MODELS)}; remove the others.')
  published, miniature = MODELS[names[0]]
  c = variants.sized('laptop')
  if arg.size == 'full':
    variants.c4(c)
    c.model.init_scale = 1.0  # standard deviations of 0.02
    c.model.loss_chunk = 512
    c.data.sequence_length, c.data.batch_size = 4096, 1024
    miniature = {}
  else:
    miniature = {'model.vocab_size': 0} | miniature
  c.update_from_flattened_dict(_SHARED | published | miniature)
  return _shrink(c) if arg.debug else c


def _shrink(c):
  c = variants.shrink(c)
  c.model.vocab_size, c.model.moe.experts_per_token, c.model.mamba2.groups = 0, 2, 1
  return c
