"""The catalogue of scaling laws: the predicted loss of a model, and its training cost.

`Coefficients` are of the fine-grained law and, without g, of a dense or Chinchilla law; `Joint` are
of the joint law of active parameters, tokens and experts. Pure arithmetic on floats, numpy or JAX
arrays that broadcast; fitting is in fit.py.
Conventions of "Scaling Laws for Fine-Grained Mixture of Experts" (arXiv:2402.07871, Sections 4 to 6
and Appendix E):
- Parameters exclude embeddings, norms and the router. A sparse model has an expansion rate E, the
  parameters of its experts over those of a dense feed-forward layer, and a granularity G, the width
  d_ff = 4 d_model over that of an expert. It has E * G experts, of which a token activates G: the
  active parameters do not depend on E or G.
- A dense model has E = 1 and, to distinguish it from sparse ones, G = 0: it has no router.
- N of the law counts all parameters, not only active ones; that of the joint law only active ones.
- Losses are in nats per token, and coefficients hold for one corpus and tokenizer.
"""

import math
from typing import NamedTuple

DENSE = 0  # the granularity of a dense model
WIDTH_PER_BLOCK = 64  # compute-optimal shapes have d_model = 64 * blocks

CACHE_TOKENS = 16_384  # of serving_bytes
_BFLOAT16 = 2  # bytes

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

  # None: N counts all parameters. A number: active ones, with embedding and head of so many tokens.
  vocabulary = None


class OfActive(Coefficients):
  """The same law with N the active parameters."""

  vocabulary = 0


class OfActiveAndEmbeddings(OfActive):
  """The same law with N the active parameters, embedding and head of GPT-2's tokenizer."""

  vocabulary = 50_257


class Joint(NamedTuple):
  """Of L(N, D, E) = c + a X^delta N^(alpha + gamma ln X) + b X^omega D^(beta + zeta ln X).

  N counts active parameters, X = `effective_experts(E)`; signs as in arXiv:2502.05172, equation 6.
  """

  c: float
  a: float
  alpha: float
  delta: float
  gamma: float
  b: float
  beta: float
  omega: float
  zeta: float

  def at(self, experts, kind=OfActive):
    """The law for one number of experts, as `Coefficients` of a kind."""
    x = effective_experts(experts)
    return kind(
      c=self.c,
      a=self.a * x**self.delta,
      alpha=-(self.alpha + self.gamma * math.log(x)),
      b=self.b * x**self.omega,
      beta=-(self.beta + self.zeta * math.log(x)),
    )


def effective_experts(experts):
  """X of the joint law: from E_start for one expert to at most E_max, the values of Table 3."""
  return 1 / (1 / (experts - 1 + 1 / (1 / 2.0732 - 1 / 290.4521)) + 1 / 290.4521)


_FOUR_DIGITS = Coefficients(
  c=0.472, a=18.0712, alpha=0.1146, b=30.8082, beta=0.1465, g=2.076, gamma=0.5843
)
_DENSE = Coefficients(c=0.472, a=16.3, alpha=0.126, b=26.7, beta=0.127)

# arXiv:2502.05172, Table 3: FineWeb-Edu, GPT-2's tokenizer. docs/scaling_laws.md has the check.
JOINT = Joint(
  c=1.3637,
  a=35.91,
  alpha=-0.1889,
  delta=-0.2285,
  gamma=0.0098,
  b=35.98,
  beta=-0.1775,
  omega=0.5529,
  zeta=-0.0259,
)

# Name -> expansion rate (1: dense) -> coefficients. `printed` are Tables 1 (E = 64, dense) and 8
# (E = 16), with the c = 0.472 that they round to 0.47; `four_digits` are those of the authors'
# plotting code, which has no dense law of more digits. Both are for C4 and GPT-2's tokenizer.
PUBLISHED = {
  'printed': {
    1: _DENSE,
    16: Coefficients(c=0.472, a=19.64, alpha=0.124, b=57.07, beta=0.169, g=1.18, gamma=0.986),
    64: Coefficients(c=0.472, a=18.1, alpha=0.115, b=30.8, beta=0.147, g=2.1, gamma=0.58),
  },
  'four_digits': {1: _DENSE, 64: _FOUR_DIGITS},
  'joint': {E: JOINT.at(E, OfActiveAndEmbeddings) for E in (1, 2, 4, 8, 16, 32)},
}


def loss(coefficients, params, tokens, granularity):
  """The predicted loss in nats per token; a law without g ignores the granularity.

  `params` are counted as the law counts them: see `counted_params`.
  """
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


def counted_params(coefficients, d_model, blocks, expansion_rate):
  """N as a law counts it."""
  if coefficients.vocabulary is None:
    return total_params(d_model, blocks, expansion_rate)
  return active_params(d_model, blocks) + embeddings(coefficients, d_model)


def embeddings(coefficients, d_model):
  """Parameters of embedding and head, if a law counts them and their FLOPs."""
  return 2 * (coefficients.vocabulary or 0) * d_model


def loss_of(coefficients, run):
  """The predicted loss of a `collect.Run`, whose shape is taken to be compute-optimal."""
  if coefficients.vocabulary is None:
    params = run.params
  else:
    d_model = (run.active_params * WIDTH_PER_BLOCK / active_params(1, 1)) ** (1 / 3)
    params = run.active_params + embeddings(coefficients, d_model)
  return loss(coefficients, params, run.tokens, run.granularity)


def flops_per_token(d_model, blocks, expansion_rate, granularity):
  """Training FLOPs per token, router included; attention scores and embeddings excluded."""
  router = d_model * expansion_rate * granularity * blocks
  return MODEL_FLOPS * active_params(d_model, blocks) + ROUTER_FLOPS * router


def serving_bytes(d_model, blocks, expansion_rate, vocabulary):
  """Memory of a model that generates: weights and a cache of CACHE_TOKENS tokens, in bfloat16."""
  weights = total_params(d_model, blocks, expansion_rate) + 2 * vocabulary * d_model
  return _BFLOAT16 * (weights + 2 * CACHE_TOKENS * blocks * d_model)
