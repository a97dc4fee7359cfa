"""Statistics over seeds: what a few runs of the same model say about its mean.

Samples are lists of numbers, one per seed. Every answer is an `Estimate`, whose interval is NaN
where a single seed leaves nothing to say.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
_DRAWS = 2000


class Estimate(NamedTuple):
  """A number and the ends of its interval of CONFIDENCE; f'{estimate:.4f}' is '1.1930 ± 0.0126'."""

  value: float
  low: float = math.nan
  high: float = math.nan

  @property
  def has_interval(self) -> bool:
    return not math.isnan(self.low)

  def excludes(self, number: float) -> bool:
    """Whether the interval does not cover a number; never without an interval."""
    return self.low > number or self.high < number

  def __format__(self, spec: str) -> str:
    value = format(self.value, spec)
    if not self.has_interval:
      return value
    if math.isclose(self.high - self.value, self.value - self.low, rel_tol=1e-6):
      return f'{value} ± {self.high - self.value:{spec.removeprefix("+")}}'
    return f'{value} ({self.low:{spec}} to {self.high:{spec}})'


class Noise(NamedTuple):
  """The standard deviation over seeds, and the degrees of freedom that it was estimated with."""

  deviation: float
  freedom: int


def noise(*samples: Sequence[float]) -> Noise | None:
  """The deviation within all samples together; None if none has two seeds.

  Assumes that all have the same noise. Worth it where each has two or three seeds: so few know
  their own deviation badly.
  """
  repeated = [sample for sample in samples if len(sample) > 1]
  if not repeated:
    return None
  squares = sum(np.var(sample) * len(sample) for sample in repeated)
  freedom = sum(len(sample) - 1 for sample in repeated)
  return Noise(math.sqrt(squares / freedom), freedom)


def mean(sample: Sequence[float], known: Noise | None = None) -> Estimate:
  """The mean, with Student's t-interval.

  Args:
    sample: a number per seed.
    known: the noise, where it is known better than from this sample.

  Raises:
    ValueError: the sample is empty.
  """
  value = _mean(sample)
  known = known or noise(sample)
  if known is None:
    return Estimate(value)
  half = _quantile(known.freedom) * known.deviation / math.sqrt(len(sample))
  return Estimate(value, value - half, value + half)


def difference(
  a: Sequence[float], b: Sequence[float], *, paired: bool = False, known: Noise | None = None
) -> Estimate:
  """The mean of `a` minus the mean of `b`, with its interval.

  Args:
    a, b: a number per seed.
    paired: a[i] and b[i] have the same seed and saw the same batches: what a seed does to both
      cancels. Otherwise Welch's t-interval, which lets each have its own noise.
    known: the noise of both, where it is known better than from these samples; not with `paired`.

  Raises:
    ValueError: a sample is empty, or pairs are incomplete.
  """
  if paired:
    if len(a) != len(b):
      raise ValueError(f'pairs need as many numbers on both sides, got {len(a)} and {len(b)}.')
    return mean(np.subtract(a, b).tolist())
  value = _mean(a) - _mean(b)
  if known:
    error, freedom = known.deviation * math.sqrt(1 / len(a) + 1 / len(b)), known.freedom
  elif min(len(a), len(b)) < 2:
    return Estimate(value)
  else:
    squares = [np.var(sample, ddof=1) / len(sample) for sample in (a, b)]
    error = math.sqrt(sum(squares))
    parts = [square**2 / (len(s) - 1) for square, s in zip(squares, (a, b), strict=True)]
    freedom = error**4 / sum(parts) if error else 1.0
  half = _quantile(freedom) * error
  return Estimate(value, value - half, value + half)


def of_means(
  function: Callable[[np.ndarray], float],
  samples: Sequence[Sequence[float]],
  known: Sequence[Noise | None] | None = None,
) -> Estimate:
  """A function of several means, with its interval where no formula holds.

  A parametric bootstrap: draws every mean from its t-distribution, and takes the quantiles of the
  function. For a single mean that is the t-interval; resampling two or three seeds themselves would
  cover the truth much too rarely.

  Args:
    function: of an array of means [samples] to a number; infinities are fine, NaN is not.
    samples: independent ones, a number per seed each.
    known: the noise of every sample, where it is known better than from it.

  Raises:
    ValueError: a sample is empty.
  """
  means = np.array([_mean(sample) for sample in samples])
  value = float(function(means))
  maybe = [k or noise(s) for k, s in zip(known or [None] * len(samples), samples, strict=True)]
  noises = [n for n in maybe if n]
  if len(noises) < len(samples):
    return Estimate(value)
  rng = np.random.default_rng(0)
  errors = [n.deviation / math.sqrt(len(s)) for n, s in zip(noises, samples, strict=True)]
  draws = rng.standard_t([n.freedom for n in noises], (_DRAWS, len(samples))) * errors + means
  results = [function(draw) for draw in draws]
  tail = (1 - CONFIDENCE) / 2
  low, high = np.quantile(results, (tail, 1 - tail), method='inverted_cdf')  # inf must not mix
  return Estimate(value, float(low), float(high))


def lowest(places: Sequence[float], losses: Sequence[float] | np.ndarray) -> float:
  """Where a curve is lowest: the vertex of the parabola through the lowest point and its neighbors.

  If the lowest point is an end of the curve, that end: the minimum may be beyond.

  Args:
    places: in rising order, on the scale on which a parabola fits, such as the log of a rate.
    losses: at these places.
  """
  i = int(np.argmin(losses))
  if i in (0, len(losses) - 1):
    return places[i]
  (x0, x1, x2), (y0, y1, y2) = places[i - 1 : i + 2], losses[i - 1 : i + 2]
  left, right = (y0 - y1) / (x1 - x0), (y2 - y1) / (x2 - x1)  # both slopes, not negative
  if left + right == 0:
    return x1
  return 0.5 * ((x0 + x1) * right + (x1 + x2) * left) / (left + right)


def _mean(sample):
  if not len(sample):
    raise ValueError('a mean needs at least one seed.')
  return float(np.mean(sample))


def _quantile(freedom):
  return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
