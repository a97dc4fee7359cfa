"""Fine-grained experts under expert choice (arXiv:2402.07871).

  python -m moejax.main --config=configs/fine_grained.py
  python -m moejax.main --config=configs/fine_grained.py:25M,granularity=8,expansion_rate=64

Every feed-forward layer has expansion_rate * granularity experts of width d_ff / granularity. They
choose among the tokens of 256 sequences at one position; the output is layer-normed. Sizes are from
the paper's appendix A; configs/dense.py has dense models of the same names. The laptop default has
granularity 4 and expansion rate 8.
"""

from moejax import variants


def get_config(arg=None):
  sizes = ('laptop', *variants.SCALING_SIZES)
  arg = variants.parse_arg(arg, sizes=sizes, granularity=0, expansion_rate=0)
  c = variants.sized(arg.size)
  laptop = arg.size == 'laptop'
  ((_, blocks),) = c.model.blocks
  c.model.blocks = ((('attention', 'moe'), blocks),)
  c.model.moe.router = 'expert_choice'
  c.model.moe.granularity = arg.granularity or (4 if laptop else 8)
  c.model.moe.expansion_rate = arg.expansion_rate or (8 if laptop else 64)
  c.model.moe.capacity_factor = 1.0
  c.model.moe.group_size = 16 if laptop else 256
  c.model.moe.balance_loss = 0.0
  c.model.moe.output_norm = True
  if laptop:
    c.optimizer.peak_lr = variants.LAPTOP_SPARSE_LR
  return variants.shrink(c) if arg.debug else c
