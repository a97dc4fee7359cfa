"""Mamba with experts in place of some of its projections (arXiv:2401.04081, table 3)."""

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
    experts = functools.partial(MoESublayer(self.config).make, init, rngs)
    return self.inner(self.config).make(init, rngs, experts)

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

  def cost(self, length):
    mamba, moe = self.inner(self.config), MoESublayer(self.config)
    sparse = self._mamba.sparse_projections
    shapes = self._mamba.projections(self.config.d_model)
    parts = [mamba.cost(length, sparse), *(moe.cost(length, *shapes[name]) for name in sparse)]
    return Cost(
      params=sums(part.params for part in parts),
      active=sum(part.active for part in parts),
      model_flops=sums(part.model_flops for part in parts),
      routing_flops=sums(part.routing_flops for part in parts),
    )


class MoEInMamba2Sublayer(MoEInMambaSublayer):
  """`moe_in_mamba2` in `model.blocks`, configured by `model.mamba2` and `model.moe`."""

  inner = Mamba2Sublayer
  made_of = (inner, MoESublayer)
  section = 'mamba2'
