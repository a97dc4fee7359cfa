"""Mamba with experts in place of some of its projections (arXiv:2401.04081, table 3).

Each projection has a router of its own, or all share one, which looks at the input of the layer
(`shared_router`; Routing Mamba, arXiv:2506.18145). Both are causal as the router and Mamba are.
"""

import functools

from moejax.layers.mamba import MambaSublayer
from moejax.layers.mamba2 import Mamba2Sublayer
from moejax.layers.moe import MoESublayer
from moejax.layers.sublayer import Cost, Sublayer, sums


class MoEInMambaSublayer(Sublayer):
  """`moe_in_mamba` in `model.blocks`, configured by `model.mamba` and `model.moe`."""

  inner: type[MambaSublayer | Mamba2Sublayer] = MambaSublayer
  made_of = (inner, MoESublayer)
  section = 'mamba'

  @property
  def _mamba(self):
    return getattr(self.config, self.section)

  def make(self, init, rngs):
    shared, D, E = self._mamba.shared_router, self.config.d_model, self.config.moe.num_experts
    make = functools.partial(MoESublayer(self.config).make, init, rngs, routes=not shared)
    router = init(rngs, D, E, fan_in=D) if shared else None
    return self.inner(self.config).make(init, rngs, experts=make, router=router)

  def terms(self):
    return MoESublayer(self.config).terms()

  def problems(self):
    projections = self._mamba.projections(self.config.d_model)
    sparse = self._mamba.sparse_projections
    if not set(sparse) <= set(projections) or len(set(sparse)) < len(sparse):
      yield (
        f'model.{self.section}.moe_in must be some of {", ".join(projections)}, joined by + '
        f'(such as conv+out); got {self._mamba.moe_in!r}.'
      )
    if self.config.moe.shared_width:
      yield (
        f'model.moe.shared_width = {self.config.moe.shared_width}: moe_in_{self.section} has no '
        'shared expert; set it to 0.'
      )
    if self._mamba.shared_router and self.config.moe.jitter:
      yield (
        f'model.moe.jitter = {self.config.moe.jitter}: a router that projections share (model.'
        f'{self.section}.shared_router) has no noise; set it to 0.'
      )

  def cost(self, length):
    mamba, moe = self.inner(self.config), MoESublayer(self.config)
    sparse, shared = self._mamba.sparse_projections, self._mamba.shared_router
    shapes = self._mamba.projections(self.config.d_model)
    routed = (moe.cost(length, *shapes[name], routes=not shared) for name in sparse)
    router = self.config.d_model * self.config.moe.num_experts * shared
    one = Cost({'router': router}, router, model_flops={}, routing_flops={'router': 2 * router})
    parts = [mamba.cost(length, sparse), one, *routed]
    return Cost(
      params=sums(part.params for part in parts),
      active=sum(part.active for part in parts),
      model_flops=sums(part.model_flops for part in parts),
      routing_flops=sums(part.routing_flops for part in parts),
      routing_gradients={k: n for part in parts for k, n in part.routing_gradients.items()},
    )


class MoEInMamba2Sublayer(MoEInMambaSublayer):
  """`moe_in_mamba2` in `model.blocks`, configured by `model.mamba2` and `model.moe`."""

  inner = Mamba2Sublayer
  made_of = (inner, MoESublayer)
  section = 'mamba2'
