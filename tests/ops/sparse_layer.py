"""Sparse layers made of ops, in every way in which a plan can be run."""

import functools

import jax
import jax.numpy as jnp

from moejax.ops import dispatch, expert_loop, grouped_matmul, routing


def relu(h, weight):
  return jax.nn.relu(h) * weight[..., None].astype(h.dtype)


def swiglu(h, weight):
  gate, up = jnp.split(h, 2, axis=-1)
  return jax.nn.silu(gate) * up * weight[..., None].astype(h.dtype)


def _in_three_steps(impl, activation, x_TD, plan, w):
  if plan.ragged:
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


# The name of a backend makes a difference for ragged plans only.
WAYS = {'loop': _in_a_loop} | {
  impl: functools.partial(_in_three_steps, impl) for impl in ('tiled', 'ragged_dot')
}


def layer(x_GTD, router_DE, w_in_EDF, w_out_EFD, *, route, way, activation=relu):
  """y_GTD; `route` makes a plan of logits, `way` names one of WAYS."""
  plan = route(routing.router_logits(x_GTD, router_DE))
  x_TD = x_GTD.reshape(-1, x_GTD.shape[-1])
  return WAYS[way](activation, x_TD, plan, (w_in_EDF, w_out_EFD)).reshape(x_GTD.shape)


@functools.partial(jax.jit, static_argnames=('route', 'ways', 'activation'))
def value_and_gradients(args, dy_GTD, valid_GT, *, route, ways=('loop', 'tiled'), activation=relu):
  """For every way, y and the gradients of sum(y * dy) by x, router, w_in and w_out."""
  route = functools.partial(route, valid_GT=valid_GT)

  def run(way):
    y_GTD, backward = jax.vjp(
      functools.partial(layer, route=route, way=way, activation=activation), *args
    )
    return y_GTD, *backward(dy_GTD)

  return {way: run(way) for way in ways}
