"""The loss of the language model, with or without a mesh."""

import functools

import jax
from jax.sharding import PartitionSpec as P

from moejax.ops import cross_entropy
from moejax.sharding import mesh, platform


def next_token_loss(x_BLD, head_DV, targets_BL, weights_BL, *, chunk):
  """`cross_entropy.chunked_cross_entropy`, of its own sequences on every device.

  The partitioner would gather a sharded head, and sum its gradient over devices, for every chunk.
  `chunk=-1` is 0 on accelerators: chunks cost the FLOPs of recomputing their logits.
  """
  if chunk == -1 and platform.current() != 'cpu':
    chunk = 0
  loss = functools.partial(cross_entropy.chunked_cross_entropy, chunk=chunk)
  B, L, _ = x_BLD.shape
  axes = mesh.batch_axes(B)
  on_device = B // mesh.size(*axes)
  if not axes or cross_entropy.positions(chunk, on_device, L, head_DV.shape[1]) == L:
    return loss(x_BLD, head_DV, targets_BL, weights_BL)
  head_DV = head_DV.astype(x_BLD.dtype)  # before the gather; gradients are summed in float32
  sums = jax.shard_map(
    lambda *args: loss(*args)[None],
    in_specs=(P(axes), P(), P(axes), P(axes)),
    out_specs=P(axes),
    axis_names={*axes},  # the vocabulary stays with the partitioner
    check_vma=False,  # the sum starts from a zero that each device makes
  )(x_BLD, head_DV, targets_BL, weights_BL)
  return sums.sum()
