"""Scaling laws: the training cost of a model and its predicted loss.

Pure arithmetic on floats, numpy or JAX arrays that broadcast; fitting is in fit.py.
Conventions of "Scaling Laws for Fine-Grained Mixture of Experts" (arXiv:2402.07871, Sections 4 to 6
and Appendix E):
- Parameters exclude embeddings, norms and the router. A sparse model has an expansion rate E, the
  parameters of its experts over those of a dense feed-forward layer, and a granularity G, the width
  d_ff = 4 d_model over that of an expert. It has E * G experts, of which a token activates G: the
  active parameters do not depend on E or G.
- A dense model has E = 1 and, to distinguish it from sparse ones, G = 0: it has no router.
- N of the law counts all parameters, not only active ones.
- Losses are in nats per token, and coefficients hold for one corpus and tokenizer.
"""

from typing import NamedTuple

DENSE = 0  # the granularity of a dense model
WIDTH_PER_BLOCK = 64  # compute-optimal shapes have d_model = 64 * blocks

# Training FLOPs per token: 2 per multiply-add, in the forward pass and for both gradients.
MODEL_FLOPS = 6  # per active parameter
ROUTER_FLOPS = 14  # per d_model * E * G: scores 6, dispatch and combine 8 (Appendix E)


class Coefficients(NamedTuple):
  """Of L(N, D, G) = c + (g G^-gamma + a) N^-alpha + b D^-beta; a dense law has no g."""

  c: float
  a: float
  alpha: float
  b: float
  beta: float
  g: float | None = None
  gamma: float | None = None


_FOUR_DIGITS = Coefficients(
  c=0.472, a=18.0712, alpha=0.1146, b=30.8082, beta=0.1465, g=2.076, gamma=0.5843
)
_DENSE = Coefficients(c=0.472, a=16.3, alpha=0.126, b=26.7, beta=0.127)

# Name -> expansion rate (1: dense) -> coefficients, for C4 and GPT-2's tokenizer. `printed`
# are Tables 1 (E = 64, dense) and 8 (E = 16), with the c = 0.472 that they round to 0.47;
# `four_digits` are those of the authors' plotting code, which has no dense law of more digits.
PUBLISHED = {
  'printed': {
    1: _DENSE,
    16: Coefficients(c=0.472, a=19.64, alpha=0.124, b=57.07, beta=0.169, g=1.18, gamma=0.986),
    64: Coefficients(c=0.472, a=18.1, alpha=0.115, b=30.8, beta=0.147, g=2.1, gamma=0.58),
  },
  'four_digits': {1: _DENSE, 64: _FOUR_DIGITS},
}


def loss(coefficients, params, tokens, granularity):
  """The predicted loss in nats per token; a law without g ignores the granularity."""
  c, a, alpha, b, beta, g, gamma = coefficients
  if g is not None:
    a = g * granularity**-gamma + a
  return c + a * params**-alpha + b * tokens**-beta


def active_params(d_model, blocks):
  """Parameters per token: four attention matrices, and two of d_ff = 4 d_model."""
  return 12 * d_model**2 * blocks


def total_params(d_model, blocks, expansion_rate):
  """N of the law."""
  return (4 + 8 * expansion_rate) * d_model**2 * blocks


def flops_per_token(d_model, blocks, expansion_rate, granularity):
  """Training FLOPs per token, router included; attention scores and embeddings excluded."""
  router = d_model * expansion_rate * granularity * blocks
  return MODEL_FLOPS * active_params(d_model, blocks) + ROUTER_FLOPS * router
