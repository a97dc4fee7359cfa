"""The dense baseline of every size: the FLOPs per token of the sparse models' active parameters."""

from moejax import variants


def get_config(arg=None):
  arg = variants.parse_arg(arg, sizes=variants.SIZES | variants.SCALING_SIZES)
  c = variants.sized(arg.size)
  return variants.shrink(c) if arg.debug else c
