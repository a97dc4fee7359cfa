"""Dispatch, experts and combine in one loop over experts, without arrays of all rows.

The rows of a few experts stay in the cache between their gather, their products and their sum. On a
CPU this is faster than the same in three steps and takes a fraction of the memory; the finer the
experts, the more. On an accelerator, which has no use for so many small steps, `dispatch` is the
way; there the order of the sums here would vary as well.
"""

import functools
import typing

import jax
import jax.numpy as jnp

from moejax.ops import grouped_matmul


class Expert(typing.NamedTuple):
  """One expert, every row by itself: y = outer(inner(x_CD, w), weight_C, w).

  What is between the two (`h`, a pytree of arrays [C, ...]) is kept for the gradient, so it should
  be the hidden activations before their nonlinearity. `weight_C` multiplies the output; hidden
  activations are the narrowest place to do so. The functions may not close over arrays that need a
  gradient, and should be the same objects from call to call.
  """

  inner: typing.Callable
  outer: typing.Callable


def map_experts(expert, x_TD, plan, weights) -> jax.Array:
  """The same as combine(expert(dispatch(x_TD, plan)), plan) for all experts.

  Args:
    expert: an Expert.
    x_TD: tokens.
    plan: a Plan; a ragged one leaves out empty slots, which is faster where experts have many.
    weights: a pytree of arrays [E, ...]; an expert sees its own [...].

  Returns:
    y [T, width of an expert's output], in the dtype of x. Tokens without an expert get 0.
  """
  if plan.ragged:
    return _map_ragged(expert, x_TD, plan.token, plan.weight, plan.sizes_E, weights)
  return _map_capacity(expert, x_TD, plan.token, plan.weight, plan.used, weights)


def _backward(expert, x_CD, h, weight_C, w, dy):
  """Gradients of one expert by x_CD, weight_C and w; its products are not computed again."""
  dh, d_weight_C, dw_outer = jax.vjp(expert.outer, h, weight_C, w)[1](dy)
  dx_CD, dw_inner = jax.vjp(expert.inner, x_CD, w)[1](dh)
  return dx_CD, d_weight_C, jax.tree.map(jnp.add, dw_inner, dw_outer)


def _take(tokens, token):
  return tokens.at[token].get(mode='promise_in_bounds')


def _add(y, token, rows, used):
  # No expert holds a token twice, and a CPU adds rows in their order: sums do not vary.
  rows = jnp.where(used[..., None], rows, 0).astype(y.dtype)
  return y.at[token].add(rows, mode='promise_in_bounds')


def _zeros(a):
  """An accumulator, at least float32."""
  return jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32))


def _no_output(expert, x_TD, weights):
  """An accumulator of outputs, which may be of another width than x."""

  def one_expert(x_TD, weights):
    w = jax.tree.map(lambda a: a[0], weights)
    return expert.outer(expert.inner(x_TD, w), jnp.ones(len(x_TD)), w)

  return _zeros(jax.eval_shape(one_expert, x_TD, weights))


# Capacity layout: a scan over experts.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _map_capacity(expert, *args):
  return _map_capacity_forward(expert, *args)[0]


def _map_capacity_forward(expert, x_TD, token, weight, used, weights):
  def step(y, xs):
    token_EC, weight_EC, used_EC, w = xs
    h = jax.vmap(expert.inner)(_take(x_TD, token_EC), w)
    return _add(y, token_EC, jax.vmap(expert.outer)(h, weight_EC, w), used_EC), h

  xs = _few_at_a_time((token, weight, used, weights))
  y, h = jax.lax.scan(step, _no_output(expert, x_TD, weights), xs)
  return y.astype(x_TD.dtype), (x_TD, xs, h)


def _map_capacity_backward(expert, saved, dy):
  x_TD, xs, h = saved

  def step(dx_TD, xs_and_h):
    (token_EC, weight_EC, used_EC, w), h = xs_and_h
    dy_rows = jnp.where(used_EC[..., None], _take(dy, token_EC), 0)
    dx_ECD, d_weight_EC, dw = jax.vmap(functools.partial(_backward, expert))(
      _take(x_TD, token_EC), h, weight_EC, w, dy_rows
    )
    return _add(dx_TD, token_EC, dx_ECD, used_EC), (d_weight_EC, dw)

  dx_TD, gradients = jax.lax.scan(step, _zeros(x_TD), (xs, h))
  d_weight, dw = jax.tree.map(lambda a: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]), gradients)
  return dx_TD.astype(x_TD.dtype), None, d_weight, None, dw


_map_capacity.defvjp(_map_capacity_forward, _map_capacity_backward)


_CACHE_BYTES = 2**21  # of a core, more or less


def _few_at_a_time(tree):
  """Splits the leading axis in two: steps of the loop, and the experts of one step.

  Small experts go several at a time, so that a step does enough to be worth its overhead; not so
  many that the weights of a step leave the cache.
  """
  E, C = tree[0].shape
  expert_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree[-1])) // E
  most = max(4, _CACHE_BYTES // max(1, expert_bytes))
  fits = lambda n: E % n == 0 and n * C <= 1024 and n <= most
  together = next((n for n in (16, 8, 4, 2) if fits(n)), 1)
  return jax.tree.map(lambda a: a.reshape(E // together, together, *a.shape[1:]), tree)


# Ragged layout: a loop over blocks of rows of one expert, as many as the load of this batch takes.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _map_ragged(expert, *args):
  return _map_ragged_forward(expert, *args)[0]


def _map_ragged_forward(expert, x_TD, token, weight, sizes_E, weights):
  block = _Block(token.shape[0], sizes_E)
  x_CD = jax.ShapeDtypeStruct((block.size, x_TD.shape[1]), x_TD.dtype)
  h_of_a_block = jax.eval_shape(expert.inner, x_CD, jax.tree.map(lambda a: a[0], weights))
  long_token, long_weight = block.lengthen(token), block.lengthen(weight)

  def step(i, carry):
    y, all_h = carry
    token_C, w = block.read(i, long_token), block.of_group(i, weights)
    h = expert.inner(_take(x_TD, token_C), w)
    rows = expert.outer(h, block.read(i, long_weight), w)
    return _add(y, token_C, rows, block.used(i)), block.write(i, all_h, h)

  no_h = jax.tree.map(
    lambda a: jnp.zeros((long_token.shape[0], *a.shape[1:]), a.dtype), h_of_a_block
  )
  no_y = _no_output(expert, x_TD, weights)
  y, h = jax.lax.fori_loop(0, block.number, step, (no_y, no_h))
  return y.astype(x_TD.dtype), (x_TD, token, weight, h, sizes_E, weights)


def _map_ragged_backward(expert, saved, dy):
  x_TD, token, weight, h, sizes_E, weights = saved
  block = _Block(token.shape[0], sizes_E)
  long_token, long_weight = block.lengthen(token), block.lengthen(weight)

  def step(i, carry):
    dx_TD, d_weight, dw = carry
    token_C, used_C = block.read(i, long_token), block.used(i)
    dy_rows = jnp.where(used_C[:, None], _take(dy, token_C), 0)
    dx_CD, d_weight_C, dw_block = _backward(
      expert,
      _take(x_TD, token_C),
      block.read(i, h),
      block.read(i, long_weight),
      block.of_group(i, weights),
      dy_rows,
    )
    group = block.blocks.group[i]
    dw = jax.tree.map(lambda a, b: a.at[group].add(b.astype(a.dtype)), dw, dw_block)
    return _add(dx_TD, token_C, dx_CD, used_C), block.write(i, d_weight, d_weight_C), dw

  zeros = _zeros(x_TD), jnp.zeros_like(long_weight), jax.tree.map(_zeros, weights)
  dx_TD, d_weight, dw = jax.lax.fori_loop(0, block.number, step, zeros)
  dw = jax.tree.map(lambda a, w: a.astype(w.dtype), dw, weights)
  # What the last block wrote beyond the last group is `dy` = 0 times something finite, so 0.
  return dx_TD.astype(x_TD.dtype), None, d_weight[: token.shape[0]], None, dw


_map_ragged.defvjp(_map_ragged_forward, _map_ragged_backward)


class _Block:
  """Block i of the rows of a ragged plan.

  A block may reach beyond its group. What it writes there, the first block of the next group
  writes again; arrays are `size` rows longer than the plan, so that the last one has room.
  """

  def __init__(self, num_rows, sizes_E):
    self.size = grouped_matmul.block_size(num_rows / sizes_E.shape[0])
    self.blocks = grouped_matmul.blocks_of_groups(sizes_E, self.size, num_rows)
    self.number = self.blocks.number

  def lengthen(self, a):
    return jnp.pad(a, (0, self.size))

  def used(self, i):
    row_C = self.blocks.first[i] + jnp.arange(self.size, dtype=self.blocks.first.dtype)
    return row_C < self.blocks.end[i]

  def of_group(self, i, tree):
    return jax.tree.map(lambda a: a[self.blocks.group[i]], tree)

  def read(self, i, tree):
    read = lambda a: jax.lax.dynamic_slice_in_dim(a, self.blocks.first[i], self.size, axis=0)
    return jax.tree.map(read, tree)

  def write(self, i, tree, rows):
    write = lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, self.blocks.first[i], axis=0)
    return jax.tree.map(write, tree, rows)
