"""Dense baselines of every size, equal to the sparse models in FLOPs per token."""

from moejax import variants


def get_config(arg=None):
  arg = variants.parse_arg(arg, sizes=variants.SIZES | variants.SCALING_SIZES)
  c = variants.sized(arg.size)
  return variants.shrink(c) if arg.debug else c
