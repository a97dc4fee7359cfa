"""Dispatch, experts and combine in one loop over experts, without arrays of all rows.

The rows of a few experts stay in the cache between their gather, their products and their sum. On a
CPU this is faster than three steps and takes a fraction of the memory, most so with fine-grained
experts. On an accelerator such small steps are slow, and the order of these sums would vary: use
`dispatch` there.
"""

import functools
import typing

import jax
import jax.numpy as jnp

from moejax.ops import grouped_matmul


class Expert(typing.NamedTuple):
  """One expert, which acts on each row alone: y = outer(inner(x_CD, w), weight_C, w).

  `h` between the two, a pytree of arrays [C, ...], is saved for the gradient, so it should be the
  hidden activations before their nonlinearity. `weight_C` multiplies the output. The functions may
  not close over arrays that need a gradient, and should be the same objects from call to call.
  """

  inner: typing.Callable
  outer: typing.Callable
  # y_CD = one_of(x_CD, weight_C, weights, e): expert e of `weights` [E, ...], which it copies in
  # small pieces at most. Used, if it is given, where there are few rows and no gradient.
  one_of: typing.Callable | None = None


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
  """Gradients of one expert by x_CD, weight_C and w; its products are not recomputed."""
  dh, d_weight_C, dw_outer = jax.vjp(expert.outer, h, weight_C, w)[1](dy)
  dx_CD, dw_inner = jax.vjp(expert.inner, x_CD, w)[1](dh)
  return dx_CD, d_weight_C, jax.tree.map(jnp.add, dw_inner, dw_outer)


def _take(tokens, token):
  return tokens.at[token].get(mode='promise_in_bounds')


def _add(y, token, rows, used):
  # No expert holds a token twice, and a CPU adds rows in order: sums are reproducible.
  rows = jnp.where(used[..., None], rows, 0).astype(y.dtype)
  return y.at[token].add(rows, mode='promise_in_bounds')


def _zeros(a):
  """An accumulator, at least float32."""
  return jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32))


def _no_output(expert, x_TD, weights):
  """An accumulator of outputs, which may be of another width than x."""
  w = jax.tree.map(lambda a: a[0], weights)
  one_expert = lambda: expert.outer(expert.inner(x_TD, w), jnp.ones(len(x_TD)), w)
  return _zeros(jax.eval_shape(one_expert))


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

  A step has several small experts to amortise its overhead, but not more weights than the cache.
  """
  E, C = tree[0].shape
  expert_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree[-1])) // E
  most = max(4, _CACHE_BYTES // max(1, expert_bytes))
  fits = lambda n: E % n == 0 and n * C <= 1024 and n <= most
  together = next((n for n in (16, 8, 4, 2) if fits(n)), 1)
  return jax.tree.map(lambda a: a.reshape(E // together, together, *a.shape[1:]), tree)


# Ragged layout: a loop over tiles of rows of one expert, as many as the load of this batch takes.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _map_ragged(expert, x_TD, token, weight, sizes_E, weights):
  if expert.one_of and len(token) <= len(sizes_E):
    return _map_rows(expert, x_TD, token, weight, sizes_E, weights)
  return _map_ragged_forward(expert, x_TD, token, weight, sizes_E, weights)[0]


def _map_rows(expert, x_TD, token, weight, sizes_E, weights):
  """Row by row: where most experts have none or one, as in decoding, tiles would be empty."""
  ends_E = jnp.cumsum(sizes_E)

  def step(i, y):
    expert_of_row = jnp.sum(ends_E <= i)
    row = lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1)
    out_1D = expert.one_of(_take(x_TD, row(token)), row(weight), weights, expert_of_row)
    return y.at[row(token)].add(out_1D.astype(y.dtype), mode='promise_in_bounds')

  y = jax.lax.fori_loop(0, ends_E[-1], step, _no_output(expert, x_TD, weights))
  return y.astype(x_TD.dtype)


def _map_ragged_forward(expert, x_TD, token, weight, sizes_E, weights):
  tiles = grouped_matmul.RowTiles(len(token), sizes_E)
  padded_token, padded_weight = tiles.pad(token), tiles.pad(weight)

  def step(i, carry):
    y, all_h = carry
    token_C, w = tiles.read(i, padded_token), tiles.of_group(i, weights)
    h = expert.inner(_take(x_TD, token_C), w)
    rows = expert.outer(h, tiles.read(i, padded_weight), w)
    return _add(y, token_C, rows, tiles.used(i)), tiles.write(i, all_h, h)

  x_RD = jax.ShapeDtypeStruct((len(padded_token), x_TD.shape[1]), x_TD.dtype)
  h = jax.eval_shape(expert.inner, x_RD, jax.tree.map(lambda a: a[0], weights))
  zeros = _no_output(expert, x_TD, weights), jax.tree.map(jnp.zeros_like, h)
  y, h = jax.lax.fori_loop(0, tiles.number, step, zeros)
  return y.astype(x_TD.dtype), (x_TD, token, weight, h, sizes_E, weights)


def _map_ragged_backward(expert, saved, dy):
  x_TD, token, weight, h, sizes_E, weights = saved
  tiles = grouped_matmul.RowTiles(len(token), sizes_E)
  rows = tiles.pad(token), tiles.pad(weight), h

  def step(i, carry):
    dx_TD, d_weight, dw = carry
    (token_C, weight_C, h), w, used_C = (
      tiles.read(i, rows),
      tiles.of_group(i, weights),
      tiles.used(i),
    )
    dy_rows = jnp.where(used_C[:, None], _take(dy, token_C), 0)
    gradients = _backward(expert, _take(x_TD, token_C), h, weight_C, w, dy_rows)
    dx_CD, d_weight_C, dw_of_tile = gradients
    dw = jax.tree.map(lambda a, b: a.at[tiles.group[i]].add(b.astype(a.dtype)), dw, dw_of_tile)
    return _add(dx_TD, token_C, dx_CD, used_C), tiles.write(i, d_weight, d_weight_C), dw

  zeros = _zeros(x_TD), jnp.zeros_like(rows[1]), jax.tree.map(_zeros, weights)
  dx_TD, d_weight, dw = jax.lax.fori_loop(0, tiles.number, step, zeros)
  dw = jax.tree.map(lambda a, w: a.astype(w.dtype), dw, weights)
  # What the last tile writes beyond the last group is `dy` = 0 times something finite, so 0.
  return dx_TD.astype(x_TD.dtype), None, d_weight[: len(token)], None, dw


_map_ragged.defvjp(_map_ragged_forward, _map_ragged_backward)
