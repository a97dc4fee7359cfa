"""Sparse experts on a mesh: every device routes its own groups, and transports move the rows.

Left to the partitioner, the sorts and gathers of a plan make it collect the whole batch on every
device. Here each device plans for the routing groups it holds, which is what the plan of the whole
batch says about them, so results and drops do not depend on the mesh. Where experts are spread over
EXPERT_AXIS, one of two transports brings tokens and experts together:

  all_to_all  the slots of every expert go to its device and come back. Shapes are static; what
              moves is a row for every slot. For plans with few slots per token.
  ring        the tokens of all devices along the axis are gathered, every device runs its own
              experts on them, and the outputs are summed where the tokens came from. What moves is
              every token to every device, whatever the plan: for packed plans, whose experts may
              get any number of tokens, and where a token has more slots than there are devices.

Hidden widths of experts may be split over HIDDEN_AXIS: all its devices do the same with the same
tokens, each in its part of the width, and their outputs add up.

The reference of all this is the plan of the whole batch on one device.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from moejax.ops import dispatch, mesh, routing

EXPERT_AXIS = 'expert'
HIDDEN_AXIS = 'tensor'


class Experts(NamedTuple):
  """What to do with tokens and rows; `weights` is a pytree of arrays [E, ...]."""

  route: Callable[..., jax.Array]  # (x_TD, plan, weights) -> y, [T, ...]
  rows: Callable[..., jax.Array]  # (rows_ECD, weight_EC, weights) -> rows
  hidden: Any  # which dimension of each of the weights is the hidden width


class Routed(NamedTuple):
  """What became of the tokens of all groups."""

  y: jax.Array  # [G, T, width of the experts' output]
  counts_GE: jax.Array  # int32: choices per expert, before drops
  number_GT: jax.Array  # int32: experts that a token reached


def route_groups(make_plan, experts, x_GTD, logits_GTE, valid_GT, weights, *, packed):
  """Routes groups of tokens and runs their experts.

  Args:
    make_plan: function of logits_GTE, valid_GT and `packed` that returns a Plan.
    experts: an `Experts`.
    x_GTD, logits_GTE, valid_GT: tokens, router scores, and which tokens are not padding.
    weights: of all experts, [E, ...] each.
    packed: whether the experts of one device prefer packed plans.

  Returns:
    A Routed.
  """
  rows = mesh.batch_axes(x_GTD.shape[0])
  ways, parts = mesh.size(EXPERT_AXIS), mesh.size(HIDDEN_AXIS)

  def on_a_device(x_GTD, logits_GTE, valid_GT, weights):
    plan = make_plan(logits_GTE, valid_GT, packed=packed and ways == 1)
    x_TD = x_GTD.reshape(-1, x_GTD.shape[-1])
    if ways == 1:
      y = experts.route(x_TD, plan, weights)
    elif plan.packed or plan.token.size > ways * x_TD.shape[0]:
      make_whole_plan = functools.partial(make_plan, packed=packed)
      y = _ring(make_whole_plan, experts, x_GTD, logits_GTE, valid_GT, weights)
    else:
      y = _all_to_all(experts, x_TD, plan, weights)
    y, number_GT = y.reshape(1, *valid_GT.shape, -1), plan.number.reshape(valid_GT.shape)
    return y, plan.counts_GE, number_GT

  run = on_a_device
  if rows or ways > 1 or parts > 1:
    groups, hidden = P(rows), HIDDEN_AXIS if parts > 1 else None

    def of_a_device(dimension):
      spec = [EXPERT_AXIS if ways > 1 else None, None, None]
      spec[dimension] = hidden
      return P(*spec)

    run = jax.shard_map(
      on_a_device,
      in_specs=(groups, groups, groups, jax.tree.map(of_a_device, experts.hidden)),
      out_specs=(P(hidden, rows), groups, groups),
      check_vma=False,  # loops start from zeros that every device makes for itself
    )
  parts_of_y, counts_GE, number_GT = run(x_GTD, logits_GTE, valid_GT, weights)
  # Summed out here, where the gradient of a sum over devices needs no collective.
  return Routed(parts_of_y.sum(axis=0), counts_GE, number_GT)


def _all_to_all(experts, x_TD, plan, weights):
  def exchange(a, split_axis, concat_axis):
    a = jax.lax.all_to_all(a, EXPERT_AXIS, split_axis, concat_axis, tiled=True)
    return checkpoint_name(a, mesh.RECEIVED)

  to_experts = functools.partial(exchange, split_axis=0, concat_axis=1)
  rows_ECD, weight_EC = to_experts(dispatch.dispatch(x_TD, plan)), to_experts(plan.weight)
  rows = experts.rows(rows_ECD, weight_EC, weights)
  return dispatch.combine(exchange(rows, split_axis=1, concat_axis=0), plan)


def _ring(make_plan, experts, x_GTD, logits_GTE, valid_GT, weights):
  gather = functools.partial(jax.lax.all_gather, axis_name=EXPERT_AXIS, tiled=True)
  x_TD = gather(x_GTD).reshape(-1, x_GTD.shape[-1])
  plan = make_plan(gather(logits_GTE), gather(valid_GT))
  number = jax.tree.leaves(weights)[0].shape[0]
  plan = routing.own_experts(plan, jax.lax.axis_index(EXPERT_AXIS) * number, number)
  y = experts.route(x_TD, plan, weights)
  return jax.lax.psum_scatter(y, EXPERT_AXIS, scatter_dimension=0, tiled=True)
