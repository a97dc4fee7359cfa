"""Mamba with experts in place of some of its projections (arXiv:2401.04081, table 3)."""

import functools

from moejax.layers.mamba import Mamba, MambaSublayer
from moejax.layers.moe import MoESublayer
from moejax.layers.sublayer import Cost, Sublayer, sums


class MoEInMambaSublayer(Sublayer):
  """`moe_in_mamba` in `model.blocks`, configured by `model.mamba` and `model.moe`."""

  made_of = (MambaSublayer, MoESublayer)

  def make(self, init, rngs):
    experts = functools.partial(MoESublayer(self.config).make, init, rngs)
    c = self.config
    return Mamba(c.mamba, d_model=c.d_model, init=init, rngs=rngs, experts=experts)

  def terms(self):
    return MoESublayer(self.config).terms()

  def problems(self):
    c, projections = self.config, self.config.mamba.projections(self.config.d_model)
    sparse = c.mamba.sparse_projections
    if not set(sparse) <= set(projections) or len(set(sparse)) < len(sparse):
      yield (
        f'model.mamba.moe_in must be some of {", ".join(projections)}, joined by + '
        f'(such as conv+out); got {c.mamba.moe_in!r}.'
      )
    if c.moe.shared_width:
      yield (
        f'model.moe.shared_width = {c.moe.shared_width}: moe_in_mamba has no shared expert; set it '
        'to 0.'
      )

  def cost(self, length):
    mamba, moe = MambaSublayer(self.config), MoESublayer(self.config)
    sparse = self.config.mamba.sparse_projections
    shapes = self.config.mamba.projections(self.config.d_model)
    parts = [mamba.cost(length, sparse), *(moe.cost(length, *shapes[name]) for name in sparse)]
    return Cost(
      params=sums(part.params for part in parts),
      active=sum(part.active for part in parts),
      model_flops=sums(part.model_flops for part in parts),
      routing_flops=sums(part.routing_flops for part in parts),
    )
