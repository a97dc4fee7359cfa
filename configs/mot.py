"""Mixture of Tokens (arXiv:2310.15961); configs/dense.py is its dense baseline of equal FLOPs.

  python -m moejax.main --config=configs/mot.py
  python -m moejax.main --config=configs/mot.py:medium,experts=32,mixtures=16

The paper's MoT-Size/kE/m is `size,experts=k,mixtures=m`: groups of k sequences, k*m experts of
width d_ff/m. As in the paper's second version, the second half of the blocks mixes tokens; `mini`
is the proof of concept of its first version, 32E/16 in all blocks. The laptop default is 32E/2 in
all blocks.

Different from the paper: documents do not see each other within a packed sequence
(model.document_mask); initialisation 1.0 for `mini` and its dense baseline alike, where the paper
publishes only that of MoT; in `large` d_ff is 4 * d_model, which the authors' file halves; peak
learning rates of `small` and `large` are ours; attention scores are bfloat16 with a float32
softmax, and feed-forward layers have no biases.
"""

from moejax import variants

# Peak learning rates where they differ from the dense model's; the paper's but for the laptop.
PEAK_LR = {'laptop': variants.LAPTOP_SPARSE_LR, 'mini': 2e-3, 'base': 2e-4}


def get_config(arg=None):
  arg = variants.parse_arg(arg, experts=0, mixtures=0)
  c = variants.sized(arg.size)
  default_experts, default_mixtures = {'laptop': (32, 2), 'mini': (32, 16)}.get(arg.size, (32, 1))
  experts, mixtures = arg.experts or default_experts, arg.mixtures or default_mixtures
  c.model.mot.group_size = experts
  c.model.mot.num_experts = experts * mixtures
  c.optimizer.peak_lr = PEAK_LR.get(arg.size, c.optimizer.peak_lr)
  ((_, blocks),) = c.model.blocks
  if arg.size in ('laptop', 'mini'):
    c.model.blocks = ((('attention', 'mot'), blocks),)
  else:
    c.model.blocks = (
      (('attention', 'mlp'), blocks // 2),
      (('attention', 'mot'), blocks - blocks // 2),
    )
  return variants.shrink(c) if arg.debug else c
