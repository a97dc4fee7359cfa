"""Compute-optimal model and training duration for a budget, by a law.

All models have the shape d_model = 64 * blocks. Width and tokens are continuous, granularities are
powers of two, as in the paper (arXiv:2402.07871, Section 6).
"""

import dataclasses
import math
from typing import Any

from scipy import optimize

from moejax.scaling_laws import laws

GRANULARITIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Search ranges, far beyond what is trained in practice.
_LOG_WIDTH = (math.log(2**2), math.log(2**24))
_NARROWEST = 32  # of a model that must fit into memory
_LOG_FLOPS = (math.log(1e6), math.log(1e36))


@dataclasses.dataclass(frozen=True)
class Optimum:
  """The choice with the lowest loss for its FLOPs."""

  flops: float  # of training, by laws.flops_per_token
  d_model: float
  granularity: int
  params: float  # all of them, without embeddings
  active_params: float
  tokens: float
  loss: float

  @property
  def blocks(self):
    return self.d_model / laws.WIDTH_PER_BLOCK


def _choice(coefficients, expansion_rate, granularity, flops, d_model):
  blocks = d_model / laws.WIDTH_PER_BLOCK
  params = laws.counted_params(coefficients, d_model, blocks, expansion_rate)
  tokens = flops / flops_per_token(coefficients, d_model, blocks, expansion_rate, granularity)
  return Optimum(
    flops=flops,
    d_model=d_model,
    granularity=granularity,
    params=laws.total_params(d_model, blocks, expansion_rate),
    active_params=laws.active_params(d_model, blocks),
    tokens=tokens,
    loss=laws.loss(coefficients, params, tokens, granularity),
  )


def flops_per_token(coefficients, d_model, blocks, expansion_rate, granularity):
  """As laws.flops_per_token, with embedding and head if the law counts them."""
  embeddings = laws.MODEL_FLOPS * laws.embeddings(coefficients, d_model)
  return laws.flops_per_token(d_model, blocks, expansion_rate, granularity) + embeddings


def best_width(coefficients, expansion_rate, granularity, flops, widest=math.inf):
  """The `Optimum` for one granularity, of at most a width."""

  def choice(log_width):
    return _choice(coefficients, expansion_rate, granularity, flops, math.exp(log_width))

  low, high = _LOG_WIDTH
  high = min(high, math.log(widest))
  log_width = optimize.fminbound(lambda x: choice(x).loss, low, high, xtol=1e-8)
  return choice(log_width)


def best(coefficients, expansion_rate, flops, widest=math.inf):
  """The `Optimum` over all granularities; for a dense law, the dense one."""
  return min(
    (
      best_width(coefficients, expansion_rate, granularity, flops, widest)
      for granularity in granularities(coefficients, expansion_rate)
    ),
    key=lambda optimum: optimum.loss,
  )


def in_memory(coefficients, flops, memory, vocabulary):
  """The `Optimum` that fits into memory, for every expansion rate of which a model does.

  Args:
    coefficients: by expansion rate.
    flops: of training.
    memory: bytes, as laws.serving_bytes counts.
    vocabulary: of embedding and head.
  """
  found = {}
  for rate, law in coefficients.items():

    def excess(log_width, rate=rate):
      width = math.exp(log_width)
      blocks = width / laws.WIDTH_PER_BLOCK
      return laws.serving_bytes(width, blocks, rate, vocabulary) - memory

    narrow, wide = math.log(_NARROWEST), _LOG_WIDTH[1]
    if excess(narrow) < 0:
      widest: Any = optimize.brentq(excess, narrow, wide) if excess(wide) > 0 else wide
      found[rate] = best(law, rate, flops, math.exp(widest))
  return found


def granularities(coefficients, expansion_rate):
  """Those that a law compares; one without g is of dense models, or of experts of full width."""
  if coefficients.g is not None:
    return GRANULARITIES
  return (laws.DENSE,) if expansion_rate == 1 else (1,)


def solve(coefficients, expansion_rate, **target):
  """The `Optimum` with a given `flops`, `loss`, `active_params` or `tokens`, such as `flops=1e21`.

  Where the best granularity changes, width and tokens jump, so no optimum or two may have the given
  value. The result is for the granularity that is closest to optimal at its own FLOPs.

  Raises:
    ValueError: no budget reaches the value.
  """
  ((quantity, value),) = target.items()
  if quantity == 'flops' and _LOG_FLOPS[0] <= math.log(value) <= _LOG_FLOPS[1]:
    return best(coefficients, expansion_rate, value)
  reached = [
    found
    for granularity in granularities(coefficients, expansion_rate)
    if (found := _with_granularity(coefficients, expansion_rate, granularity, quantity, value))
  ]
  if not reached:
    raise ValueError(
      f'no budget between 1e6 and 1e36 FLOPs has an optimum with {quantity} = {value:.4g}'
      + (f'; the law does not fall below {coefficients.c:.3g}.' if quantity == 'loss' else '.')
    )

  def excess(found):
    return found.loss - best(coefficients, expansion_rate, found.flops).loss

  return min(reached, key=excess)


def _with_granularity(coefficients, expansion_rate, granularity, quantity, value):
  """The optimum for one granularity that has the value, or None."""

  def at(log_flops):
    return best_width(coefficients, expansion_rate, granularity, math.exp(log_flops))

  def distance(log_flops):
    return math.log(getattr(at(log_flops), quantity) / value)

  if distance(_LOG_FLOPS[0]) * distance(_LOG_FLOPS[1]) > 0:
    return None
  return at(optimize.brentq(distance, *_LOG_FLOPS, xtol=1e-9))
