"""Dense baselines of every size, equal to the sparse models in FLOPs per token.

  python -m moejax.main --config=configs/dense.py:llama

What differs from the papers' dense models is what configs/mot.py says of its own.
The variants `llama` and `gpt2` are models that transformers has too (docs/convert.md).
"""

from moejax import variants


def get_config(arg=None):
  sizes = variants.SIZES | variants.SCALING_SIZES
  arg = variants.parse_arg(arg, sizes=sizes, llama=False, gpt2=False)
  if arg.llama and arg.gpt2:
    raise ValueError('--config=...:llama,gpt2: a model is one or the other; remove one of them.')
  c = variants.sized(arg.size)
  for name in ('llama', 'gpt2'):
    c = variants.like(c, name) if getattr(arg, name) else c
  return variants.shrink(c) if arg.debug else c
