"""The Mixture-of-Tokens layer."""

from moejax.layers import common, experts
from moejax.ops import mixing, routing


class MixtureOfTokens(common.Stateless):
  """Continuous mixture of experts over examples (arXiv:2310.15961).

  Input and output x_BLD, any float dtype; controller scores and weights in float32. M = group_size
  consecutive examples of the batch form a group. At every position each of the E experts sees one
  mixture of the group's M tokens, weighted by a softmax over those tokens, and its output returns
  to them with the same weights. Padding (segment 0) never enters a mixture.

  Leaks: causal, but the examples of a group see each other's tokens at the same position.
  `aux['mot/entropy']`: entropy of the merge weights over log M, mean over experts; 1 is uniform.

  Compute per token of the experts is that of a dense layer of width E * expert_width / M;
  controller, merge and emit add 6 * D * E FLOPs forward.
  """

  def __init__(
    self, *, d_model, num_experts, expert_width, group_size, temperature, activation, init, rngs
  ):
    self.group_size = group_size
    self.temperature = temperature
    self.controller = init(rngs, d_model, num_experts, fan_in=d_model)
    self.experts = experts.Experts(
      num_experts=num_experts,
      d_model=d_model,
      expert_width=expert_width,
      activation=activation,
      init=init,
      rngs=rngs,
    )

  def __call__(self, x_BLD, tokens):
    B, L, D = x_BLD.shape
    M = self.group_size
    if B % M:
      raise ValueError(
        f'model.mot.group_size = {M} must divide the number of sequences mixed together, got {B}. '
        'Change the group size, or the batch (data.batch_size / optimizer.accumulation).'
      )
    G = B // M
    x_GMLD = x_BLD.reshape(G, M, L, D)
    logits_GMLE = routing.router_logits(x_GMLD, self.controller[...])
    valid_GML = (tokens.segments > 0).reshape(G, M, L)
    weights_GMLE = mixing.merge_weights(logits_GMLE, valid_GML, self.temperature)
    mixtures_EGLD = mixing.merge(x_GMLD, weights_GMLE)
    E = mixtures_EGLD.shape[0]
    out_EGLD = self.experts(mixtures_EGLD.reshape(E, G * L, D)).reshape(E, G, L, D)
    y_BLD = mixing.emit(out_EGLD, weights_GMLE).reshape(B, L, D)
    return y_BLD, {'mot/entropy': mixing.normalized_entropy(weights_GMLE).mean()}
