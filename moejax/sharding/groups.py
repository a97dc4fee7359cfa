"""Mixing groups: the tokens of M sequences at one position, whichever devices hold them.

On a mesh every device holds some sequences of the batch. Where a group is not on one device, an
all-to-all gives each device all sequences of its groups and a share of the positions, and another
returns the results. A group is thus always mixed by one device, in one order, on every mesh.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from moejax.sharding import exchange, mesh
from moejax.sharding.mesh import BATCH_AXES


def check(field, size, batch):
  """Raises ValueError unless groups of `size`, of a config field, divide `batch` sequences."""
  if batch % size:
    raise ValueError(
      f'{field} = {size} must divide the number of sequences of a microbatch, got {batch}. '
      'Change the group size, or the batch (data.batch_size / optimizer.accumulation).'
    )


@dataclasses.dataclass(frozen=True)
class Groups:
  """How B sequences of L positions form groups of M tokens at one position.

  Groups are consecutive sequences of the batch, after a permutation by `order_B` if there is one.
  """

  batch: int
  length: int
  size: int
  order_B: Any = None  # int32: a permutation of the sequences

  def split(self, a):
    """[B, L, ...] to [C, M, ...]: all groups, in any order; C >= B * L / M.

    Positions are padded with zeros to a multiple of the devices that exchange them.
    """
    axes = self._exchanged()
    padding = [(0, 0), (0, -self.length % mesh.size(*axes))] + [(0, 0)] * (a.ndim - 2)
    order_B = None if self.order_B is None else jnp.asarray(self.order_B)

    def on_a_device(a, order_B):
      if axes:
        a = jax.lax.all_to_all(a, axes, split_axis=1, concat_axis=0, tiled=True)
        a = checkpoint_name(a, exchange.RECEIVED)
      if order_B is not None:
        a = a[order_B]
      return _swapped(a, self.size).reshape(-1, self.size, *a.shape[2:])

    return self._on_each_device(on_a_device, jnp.pad(a, padding), order_B)

  def join(self, a):
    """[C, M, ...] back to [B, L, ...]."""
    axes = self._exchanged()
    positions = -(-self.length // mesh.size(*axes))  # of one device
    order_B = None if self.order_B is None else jnp.argsort(self.order_B)

    def on_a_device(a, order_B):
      a = _swapped(a, positions).reshape(-1, positions, *a.shape[2:])
      if order_B is not None:
        a = a[order_B]
      if axes:
        a = jax.lax.all_to_all(a, axes, split_axis=0, concat_axis=1, tiled=True)
      return a

    return self._on_each_device(on_a_device, a, order_B)[:, : self.length]

  def _on_each_device(self, f, a, order_B):
    if not self._is_spread():
      return f(a, order_B)
    spec = P(BATCH_AXES)
    return jax.shard_map(f, in_specs=(spec, P()), out_specs=spec)(a, order_B)

  def _is_spread(self):
    shards = mesh.size(*BATCH_AXES)
    return shards > 1 and self.batch % shards == 0

  def _exchanged(self):
    """The mesh axes to exchange along: the fewest, from the innermost out, that complete groups.

    A permutation may need sequences from every device.
    """
    if not self._is_spread():
      return ()
    if self.order_B is not None:
      return BATCH_AXES
    sequences = self.batch // mesh.size(*BATCH_AXES)
    candidates = (BATCH_AXES[i:] for i in range(len(BATCH_AXES), -1, -1))
    return next(axes for axes in candidates if sequences * mesh.size(*axes) % self.size == 0)


@dataclasses.dataclass(frozen=True)
class WholeSequences:
  """Groups of all tokens of `size` sequences, earlier positions first; nothing is exchanged."""

  size: int

  def split(self, a):
    """[B, L, ...] to [B / size, L * size, ...]."""
    return _swapped(a, self.size).reshape(len(a) // self.size, -1, *a.shape[2:])

  def join(self, a):
    """[B / size, L * size, ...] back to [B, L, ...]."""
    length = a.shape[1] // self.size
    by_position = a.reshape(-1, self.size, *a.shape[2:])
    return _swapped(by_position, length).reshape(-1, length, *a.shape[2:])


def _swapped(a, size):
  """[n * size, L, ...] to [n, L, size, ...]."""
  return jnp.swapaxes(a.reshape(-1, size, *a.shape[1:]), 1, 2)


def to_experts(a_ECD):
  """Mixtures to the devices that hold their experts: one all-to-all along mesh axis `expert`."""
  return _exchange(exchange.to_experts, a_ECD, P(None, BATCH_AXES), P('expert', BATCH_AXES[:-1]))


def from_experts(a_ECD):
  """Outputs of experts back to the devices of their groups."""
  return _exchange(exchange.from_experts, a_ECD, P('expert', BATCH_AXES[:-1]), P(None, BATCH_AXES))


def _exchange(swap, a_ECD, before, after):
  if mesh.size('expert') == 1 or a_ECD.shape[1] % mesh.size(*BATCH_AXES):
    return a_ECD
  return jax.shard_map(swap, in_specs=before, out_specs=after)(a_ECD)
