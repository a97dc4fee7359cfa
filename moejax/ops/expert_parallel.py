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

from moejax.ops import dispatch, routing
from moejax.sharding import exchange, mesh
from moejax.sharding.mesh import BATCH_AXES

EXPERT_AXIS = 'expert'
FSDP_AXIS = 'fsdp'
HIDDEN_AXIS = 'tensor'


class Experts(NamedTuple):
  """What to do with tokens and rows; `weights` are arrays [E, ...] by name."""

  route: Callable[..., jax.Array]  # (x_TD, plan, weights) -> y, [T, ...]
  rows: Callable[..., jax.Array]  # (rows_ECD, weight_EC, weights) -> rows


class Routed(NamedTuple):
  """What became of the tokens of all groups."""

  y: Any  # array [G, T, width of the experts' output]
  counts_GE: Any  # int32 [G, E]: choices per expert, before drops
  number_GT: Any  # int32 [G, T]: experts that a token reached


def route_groups(make_plan, experts, x_GTD, logits_GTE, valid_GT, weights, specs, *, packed):
  """Routes groups of tokens and runs their experts.

  Args:
    make_plan: function of logits_GTE, valid_GT and `packed` that returns a Plan.
    experts: an `Experts`.
    x_GTD, logits_GTE, valid_GT: tokens, router scores, and which tokens are not padding.
    weights: of all experts, [E, ...] each.
    specs: the PartitionSpec by which each of the weights lies; what is split along FSDP_AXIS is
      gathered, what is split along HIDDEN_AXIS are hidden widths.
    packed: whether the experts of one device prefer packed plans.

  Returns:
    A Routed.
  """
  rows = mesh.batch_axes(x_GTD.shape[0])
  parts = {name: mesh.split_dim(spec, (FSDP_AXIS,)) for name, spec in specs.items()}
  used = {axis for spec in specs.values() for axes in spec for axis in mesh.names(axes)}
  ways = mesh.size(EXPERT_AXIS) if EXPERT_AXIS in used else 1
  hidden = HIDDEN_AXIS if HIDDEN_AXIS in used and mesh.size(HIDDEN_AXIS) > 1 else None

  def on_a_device(x_GTD, logits_GTE, valid_GT, weights):
    weights = {name: _gather(w, parts[name]) for name, w in weights.items()}
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
    return Routed(y, plan.counts_GE, number_GT)

  if mesh.size(*BATCH_AXES, HIDDEN_AXIS) == 1:
    routed = on_a_device(x_GTD, logits_GTE, valid_GT, weights)
  else:
    groups = P(rows)
    routed = jax.shard_map(
      on_a_device,
      in_specs=(groups, groups, groups, specs),
      out_specs=Routed(P(hidden, rows), groups, groups),
      check_vma=False,  # loops start from zeros that every device makes for itself
    )(x_GTD, logits_GTE, valid_GT, weights)
  # Outside, where the gradient of a sum over devices needs no collective.
  return routed._replace(y=routed.y.sum(axis=0))


def _gather(w, dim):
  """The weights of a device's experts from their parts; their gradient is summed into the parts."""
  return w if dim is None else jax.lax.all_gather(w, FSDP_AXIS, axis=dim, tiled=True)


def _all_to_all(experts, x_TD, plan, weights):
  def swap(a, split_axis, concat_axis):
    a = jax.lax.all_to_all(a, EXPERT_AXIS, split_axis, concat_axis, tiled=True)
    return checkpoint_name(a, exchange.RECEIVED)

  to_experts = functools.partial(swap, split_axis=0, concat_axis=1)
  rows_ECD, weight_EC = to_experts(dispatch.dispatch(x_TD, plan)), to_experts(plan.weight)
  rows = experts.rows(rows_ECD, weight_EC, weights)
  return dispatch.combine(swap(rows, split_axis=1, concat_axis=0), plan)


def _ring(make_plan, experts, x_GTD, logits_GTE, valid_GT, weights):
  gather = functools.partial(jax.lax.all_gather, axis_name=EXPERT_AXIS, tiled=True)
  x_TD = gather(x_GTD).reshape(-1, x_GTD.shape[-1])
  plan = make_plan(gather(logits_GTE), gather(valid_GT))
  number = jax.tree.leaves(weights)[0].shape[0]
  plan = routing.own_experts(plan, jax.lax.axis_index(EXPERT_AXIS) * number, number)
  y = experts.route(x_TD, plan, weights)
  return jax.lax.psum_scatter(y, EXPERT_AXIS, scatter_dimension=0, tiled=True)
