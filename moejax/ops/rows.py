"""Products of rows and a matrix, with gradients as XLA's CPU backend computes them fast.

The gradient of the matrix sums over all rows: x^T dy. XLA hands such a product to another routine
than that of x w, which takes up to 1.8 times as long as transposing the smaller factor first.
"""

import jax
import jax.numpy as jnp


def reference(x, w):
  """Sums over all axes of x but its first, rows, and as many of w, its first ones.

  Returns:
    An array of rows and the other axes of w.
  """
  return jnp.tensordot(x, w, x.ndim - 1)


@jax.custom_vjp
def product(x, w):
  """`reference`, with its gradients in another order of products; for CPUs."""
  return reference(x, w)


def _forward(x, w):
  return reference(x, w), (x, w)


def _backward(saved, dy):
  x, w = saved
  summed, kept = x.ndim - 1, dy.ndim - 1
  axes = tuple(range(1, dy.ndim)), tuple(range(summed, w.ndim))
  dx = jnp.tensordot(dy, w, axes)
  # Without barriers XLA turns both into the product that they replace.
  rows_last = lambda a: jax.lax.optimization_barrier(jnp.moveaxis(a, 0, -1))
  if x.size <= dy.size:
    return dx, jnp.tensordot(rows_last(x), dy, 1)
  transposed = jax.lax.optimization_barrier(jnp.tensordot(rows_last(dy), x, 1))
  return dx, jnp.moveaxis(transposed, range(kept), range(-kept, 0))


product.defvjp(_forward, _backward)
