"""Sparse layers made of ops, in every way in which a plan can be run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moejax.ops import dispatch, expert_loop, grouped_matmul, routing


def relu(h, weight):
  return jax.nn.relu(h) * weight[..., None].astype(h.dtype)


def swiglu(h, weight):
  gate, up = jnp.split(h, 2, axis=-1)
  return jax.nn.silu(gate) * up * weight[..., None].astype(h.dtype)


def _in_three_steps(impl, activation, x_TD, plan, w):
  if plan.packed:
    product = lambda x, w: grouped_matmul.grouped_matmul(x, w, plan.sizes_E, impl)
  else:
    product = lambda x, w: jnp.einsum('ECD,EDF->ECF', x, w)
  h = activation(product(dispatch.dispatch(x_TD, plan), w[0]), plan.weight)
  return dispatch.combine(product(h, w[1]), plan)


def _in_a_loop(activation, x_TD, plan, w):
  expert = expert_loop.Expert(
    inner=lambda x_CD, w: x_CD @ w[0], outer=lambda h, weight_C, w: activation(h, weight_C) @ w[1]
  )
  return expert_loop.map_experts(expert, x_TD, plan, w)


# Compiled once for each layout and size; the plan is an argument.
WAYS = {'loop': jax.jit(_in_a_loop, static_argnums=0)} | {
  impl: jax.jit(functools.partial(_in_three_steps, impl), static_argnums=0)
  for impl in ('blocked', 'ragged_dot', 'reference')
}


def ways_for(packed):
  """The backends of the grouped product make a difference for packed plans only."""
  return WAYS if packed else {name: WAYS[name] for name in ('loop', 'blocked')}


def layer(x_GTD, router_DE, w_in_EDF, w_out_EFD, *, route, way, activation=relu):
  plan = route(routing.router_logits(x_GTD, router_DE))
  x_TD = x_GTD.reshape(-1, x_GTD.shape[-1])
  return way(activation, x_TD, plan, (w_in_EDF, w_out_EFD)).reshape(x_GTD.shape)


def value_and_gradients(function, args, dy):
  """y and a dict of the gradients of sum(y * dy) by the arguments of `layer`."""
  y, backward = jax.vjp(function, *args)
  return y, dict(zip(('x', 'router', 'w_in', 'w_out'), backward(dy), strict=True))


def relative_error(got, expected):
  return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()
