"""The Mixture-of-Tokens layer."""

import dataclasses

import jax.numpy as jnp

from moejax.layers import common, experts
from moejax.ops import mixing, routing

ROUTING = ('softmax', 'discrete', 'uniform')


@dataclasses.dataclass(frozen=True)
class MoTConfig:
  """Section `model.mot`. In the paper's names, MoT-Size/kE/m has k = group_size and k*m experts."""

  num_experts: int
  group_size: int
  expert_width: int  # 0: as many FLOPs per token as a dense layer of width d_ff
  routing: str
  temperature: float

  def width(self, d_ff):
    """Hidden width of one expert; E * width / group_size = d_ff matches a dense layer's FLOPs."""
    if self.expert_width:
      return self.expert_width
    return d_ff * self.group_size // self.num_experts

  def problems(self, d_ff):
    """Yields one sentence per impossible value."""
    for name in ('num_experts', 'group_size'):
      if getattr(self, name) < 1:
        yield f'model.mot.{name} must be at least 1, got {getattr(self, name)}.'
        return
    if self.routing not in ROUTING:
      yield f'model.mot.routing must be one of {", ".join(ROUTING)}; got {self.routing!r}.'
    if self.temperature <= 0:
      yield f'model.mot.temperature must be positive, got {self.temperature}.'
    if self.expert_width < 0:
      yield f'model.mot.expert_width must be positive, or 0 to match d_ff, got {self.expert_width}.'
    elif not self.expert_width and d_ff * self.group_size % self.num_experts:
      yield (
        f'model.mot.num_experts = {self.num_experts} must divide d_ff * group_size = '
        f'{d_ff * self.group_size} for experts of equal FLOPs; change it or set expert_width.'
      )


class MixtureOfTokens(common.Stateless):
  """Continuous mixture of experts over examples (arXiv:2310.15961).

  Input and output x_BLD, any float dtype; controller scores and weights in float32. M = group_size
  consecutive examples of the batch form a group. At every position each of the E experts sees one
  mixture of the group's M tokens, weighted by a softmax over those tokens, and its output returns
  to them with the same weights. Padding (segment 0) never enters a mixture.

  `routing`: 'softmax'; 'discrete', where an expert sees the token of the largest weight alone and
  returns to it with weight 1 (or several that tie); 'uniform', where all tokens weigh the same.

  Leaks: causal, but the examples of a group see each other's tokens at the same position.
  `aux['mot/entropy']`: entropy of the merge weights over log M, mean over experts; 1 is uniform.

  Compute per token of the experts is that of a dense layer of width E * expert_width / M;
  controller, merge and emit add 6 * D * E FLOPs forward.
  """

  def __init__(self, config, *, d_model, d_ff, activation, init, rngs):
    self.config = config
    self.controller = init(rngs, d_model, config.num_experts, fan_in=d_model)
    self.experts = experts.Experts(
      num_experts=config.num_experts,
      d_model=d_model,
      expert_width=config.width(d_ff),
      activation=activation,
      init=init,
      rngs=rngs,
    )

  def __call__(self, x_BLD, tokens):
    B, L, D = x_BLD.shape
    M = self.config.group_size
    if B % M:
      raise ValueError(
        f'model.mot.group_size = {M} must divide the number of sequences mixed together, got {B}. '
        'Change the group size, or the batch (data.batch_size / optimizer.accumulation).'
      )
    G = B // M
    x_GMLD = x_BLD.reshape(G, M, L, D)
    logits_GMLE = routing.router_logits(x_GMLD, self.controller[...])
    valid_GML = (tokens.segments > 0).reshape(G, M, L)
    if self.config.routing == 'uniform':
      logits_GMLE = jnp.zeros_like(logits_GMLE)
    weights_GMLE = mixing.merge_weights(logits_GMLE, valid_GML, self.config.temperature)
    if self.config.routing == 'discrete':
      weights_GMLE = mixing.one_hot(weights_GMLE, valid_GML, axis=1)
    mixtures_EGLD = mixing.merge(x_GMLD, weights_GMLE)
    E = mixtures_EGLD.shape[0]
    out_EGLD = self.experts(mixtures_EGLD.reshape(E, G * L, D)).reshape(E, G, L, D)
    y_BLD = mixing.emit(out_EGLD, weights_GMLE).reshape(B, L, D)
    return y_BLD, {'mot/entropy': mixing.normalized_entropy(weights_GMLE).mean()}
