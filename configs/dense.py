"""The dense baseline of every size: the FLOPs per token of the sparse models' active parameters."""

from configs import common


def get_config(arg=None):
  arg = common.parse_arg(arg, sizes=common.SIZES | common.SCALING_SIZES)
  c = common.sized(arg.size)
  return common.shrink(c) if arg.debug else c
