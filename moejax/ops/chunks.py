"""Long sequences as a leading axis of chunks, for loops over them."""

import jax.numpy as jnp


def split(a, size):
  """[B, L, ...] -> [chunks, B, size, ...], with zeros at the end."""
  padded = jnp.pad(a, [(0, 0), (0, -a.shape[1] % size)] + [(0, 0)] * (a.ndim - 2))
  return jnp.moveaxis(padded.reshape(len(a), -1, size, *a.shape[2:]), 1, 0)
