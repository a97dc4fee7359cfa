"""Transformer-MoE: token choice (Switch) in every block, rotary positions.

  python -m moejax.main --config=configs/moe.py
  python -m moejax.main --config=configs/moe.py:25M

The sizes are the Transformer-MoE baselines of MoE-Mamba (arXiv:2401.04081, tables 5 and 6): 32
experts, top 1, capacity factor 1, on C4 with context 1024. Final log-perplexity there (table 1):
25M 3.23, 100M 2.88.
"""

from configs import common

# name: d_model, blocks, heads, peak learning rate, batch, steps.
SIZES = {
  '25M': (512, 8, 8, 5e-4, 64, 150_000),
  '100M': (768, 16, 12, 2.5e-4, 1024, 30_000),
}


def get_config(arg=None):
  arg = common.parse_arg(arg, sizes=('laptop', *SIZES), experts=0, top_k=1)
  c = common.baseline() if arg.size == 'laptop' else _paper(*SIZES[arg.size])
  ((_, blocks),) = c.model.blocks
  c.model.blocks = ((('attention', 'moe'), blocks),)
  c.model.moe.expansion_rate = arg.experts or c.model.moe.expansion_rate
  c.model.moe.experts_per_token = arg.top_k
  return common.shrink(c) if arg.debug else c


def _paper(d_model, blocks, heads, peak_lr, batch_size, steps):
  c = common.baseline()
  common.c4(c)
  c.model.positions = 'rope'
  c.model.d_model, c.model.num_heads, c.model.d_ff = d_model, heads, 4 * d_model
  c.model.blocks = ((('attention', 'mlp'), blocks),)
  c.model.moe.expansion_rate = 32
  c.model.moe.capacity_factor = 1.0
  c.data.sequence_length = 1024
  c.data.batch_size = batch_size
  c.optimizer.peak_lr = peak_lr
  c.optimizer.warmup_steps = steps // 100
  c.train.steps = steps
  return c
