"""A run under another router: its config, and its state.

Models with experts keep them (`same_experts`); the feed-forward layers of dense ones become experts
(`upcycling`).
"""

from moejax import config as config_lib, same_experts, upcycling

DENSE = 'dense'  # as a router: that of a model without experts, which only such a model can have
ROUTERS = same_experts.ROUTERS


def router_of(config) -> str:
  """The router of a model, by a ConfigDict; one of ROUTERS, or DENSE.

  Raises:
    ValueError: it has several, or nothing that could become experts.
  """
  return DENSE if _is_dense(config) else same_experts.router_of(config)


def with_router(config, router) -> None:
  """Turns the ConfigDict of a model into that of one with another router and equal FLOPs.

  Raises:
    ValueError: no model with this router has its experts, or feed-forward layers.
  """
  if router == router_of(config):
    return
  if router == DENSE:
    raise ValueError('--from: a model with experts does not become a dense one.')
  if _is_dense(config):
    upcycling.make_experts(config, router)
  else:
    same_experts.with_router(config, router)


def convert(source, fresh, old, new):
  """The train state of a model as that of the model that `with_router` makes of it.

  Args:
    source: the state, or a part of it, as a pytree of arrays.
    fresh: a state of the new model; arrays that `source` lacks stay.
    old, new: their ModelConfigs.

  Raises:
    ValueError: an array of `source` has no place in `fresh`.
  """
  if upcycling.is_dense(old) and not upcycling.is_dense(new):
    return upcycling.convert(source, fresh, new)
  return same_experts.convert(source, fresh, old.mot.temperature)


def _is_dense(config):
  return upcycling.is_dense(config_lib.resolve(config).model)
