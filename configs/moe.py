"""Transformer-MoE: token choice (Switch) in every block, rotary positions.

  python -m moejax.main --config=configs/moe.py
  python -m moejax.main --config=configs/moe.py:25M

Sizes are the Transformer-MoE baselines of MoE-Mamba (arXiv:2401.04081, tables 5 and 6): 32 experts,
top 1, capacity factor 1, on C4 with context 1024; the variant `dense` is the Transformer without
experts. Final log-perplexity in the paper (table 1): 25M 3.23, dense 3.43; 100M 2.88. 3M is our own
miniature, and the laptop default has 8 experts. The variants `mixtral` (two experts per token) and
`olmoe` are models that transformers has too (docs/convert.md).

As in the paper, the tokens of a device's batch share the slots of an expert: 64 sequences, 256 at
100M. Such a group lies on one device; on machines whose devices hold fewer sequences lower
model.moe.group_size, to 8 for example, for somewhat more dropped tokens.

Different from the paper: documents do not see each other within a packed sequence
(model.document_mask); slots are rounded up, and the later tokens are dropped rather than arbitrary
ones; attention scores are bfloat16 with a float32 softmax; feed-forward layers have no biases.
"""

from moejax import variants

_LIKE = ('mixtral', 'olmoe')


def get_config(arg=None):
  sizes = ('laptop', *variants.MOE_MAMBA_SIZES)
  arg = variants.parse_arg(
    arg, sizes=sizes, experts=0, top_k=0, dense=False, **dict.fromkeys(_LIKE, False)
  )
  like = [name for name in _LIKE if getattr(arg, name)]
  if len(like) + arg.dense > 1:
    raise ValueError('--config=...: a model is one of dense, mixtral and olmoe; remove the others.')
  c = variants.moe_mamba_run(arg.size)
  if arg.size != 'laptop':
    c.model.moe.expansion_rate = 32
    c.model.moe.capacity_factor = 1.0
  if arg.dense and (arg.experts or arg.top_k):
    raise ValueError('--config=...:dense has no experts; remove experts= and top_k=.')
  if not arg.dense:
    ((_, blocks),) = c.model.blocks
    c.model.blocks = ((('attention', 'moe'), blocks),)
    if arg.size == 'laptop':
      c.optimizer.peak_lr = variants.LAPTOP_SPARSE_LR
  c.model.moe.expansion_rate = arg.experts or c.model.moe.expansion_rate
  c.model.moe.experts_per_token = arg.top_k or (2 if arg.mixtral else 1)
  for name in like:
    variants.like(c, name)
  return variants.shrink(c) if arg.debug else c
