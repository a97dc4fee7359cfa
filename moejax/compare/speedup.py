"""How many times fewer tokens a model needs than a baseline; two definitions.

Both read a ratio off a curve of the baseline or the model at some loss. That loss is uncertain by
the noise of seeds, and the ends of a ratio's interval are the ratios at the ends of that of the
loss. A ratio of infinity or 0 is beyond what was measured.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import optimize

from moejax import seeds

_RATE, _FRACTION = 1 / 1000, 1 / 20

BySeed = dict[Hashable, float]


def matched_schedule(
  losses: BySeed, tokens: float, durations: dict[float, BySeed], paired: bool = False
) -> seeds.Estimate:
  """The tokens that the baseline needs to a model's final loss, over the model's tokens.

  Each duration of the baseline is a run of its own that decays its learning rate to its end: a
  curve in mid-schedule has not had its decay, and says too little. Between durations, losses are
  interpolated in the logarithm of tokens, also those of each seed, for their noise.

  Args:
    losses: final losses of the model.
    tokens: with which it was trained.
    durations: final losses of the baseline by its tokens; at least two durations.
    paired: as of `seeds.difference`, where seeds are the same.

  Returns:
    The ratio; infinity if the longest duration does not reach the loss, 0 if the shortest does.
  """
  places = sorted(durations)
  means = [seeds.mean([*durations[place].values()]).value for place in places]
  loss = seeds.mean([*losses.values()]).value
  place = np.clip(tokens_to_reach(loss, places, means), places[0], places[-1])
  ratio = lambda loss: tokens_to_reach(loss, places, means) / tokens
  return _at(ratio, loss, _difference(losses, _interpolated(durations, places, place), paired))


def _interpolated(durations, places, place):
  """The baseline's losses at a number of tokens, of seeds that both durations around it have."""
  after = min(max(int(np.searchsorted(places, place)), 1), len(places) - 1)
  ends = places[after - 1], places[after]
  share = math.log(place / ends[0]) / math.log(ends[1] / ends[0])
  parts = {end: part for end, part in zip(ends, (1 - share, share), strict=True) if part}
  shared = set.intersection(*({*durations[end]} for end in parts))
  return {s: sum(part * durations[end][s] for end, part in parts.items()) for s in shared}


def _difference(a, b, paired):
  """`seeds.difference` of numbers by seed; paired if their seeds are the same."""
  if not b:
    return seeds.Estimate(math.nan)
  if paired and a.keys() == b.keys():
    return seeds.difference([*a.values()], [b[seed] for seed in a], paired=True)
  return seeds.difference([*a.values()], [*b.values()])


def _at(ratio, loss, noise):
  """A falling function of a loss, with an interval by that of a difference of losses."""
  if not noise.has_interval:
    return seeds.Estimate(ratio(loss))
  half = noise.high - noise.value
  return seeds.Estimate(ratio(loss), ratio(loss + half), ratio(loss - half))


def tokens_to_reach(loss: float, places: Sequence[float], losses) -> float:
  """Tokens at which final losses reach `loss`; infinity or 0 if that is beyond all of them.

  Args:
    loss: to reach.
    places: tokens, in rising order.
    losses: at these; noise that makes a longer duration worse is averaged out.
  """
  falling = optimize.isotonic_regression(losses, increasing=False).x
  if loss > falling[0] or loss < falling[-1]:
    return 0.0 if loss > falling[0] else math.inf
  return float(np.exp(np.interp(-loss, -falling, np.log(places))))


def mid_schedule(
  baseline: dict[Hashable, list], model: dict[Hashable, list], paired: bool = False
) -> seeds.Estimate:
  """The part of its steps in which a model reaches the baseline's last training loss, inverted.

  The measure of MoE-Mamba (arXiv:2401.04081) and Mixture of Tokens: smoothed training loss, in
  mid-schedule. Decay lowers the baseline's last loss, which the model has not had when it gets
  there, so in short runs this measure is nearly blind. Noise is that of the last losses.

  Args:
    baseline, model: training curves of (step, loss) by seed, over the same tokens.
    paired: as of `seeds.difference`, where seeds are the same.

  Returns:
    The ratio; 0 if the model does not reach that loss.
  """
  ours, theirs = ({s: smoothed(curve) for s, curve in of.items()} for of in (model, baseline))
  last = lambda curves: {seed: curve[-1, 1] for seed, curve in curves.items()}
  steps = next(iter(ours.values()))[:, 0]
  mean = np.mean([np.interp(steps, *curve.T) for curve in ours.values()], axis=0)
  curve = np.stack([steps, mean], axis=1)

  def ratio(excess):
    needed = steps_to_reach(target - excess, curve)
    return steps[-1] / needed if needed else 0.0

  target = seeds.mean([*last(theirs).values()]).value
  return _at(ratio, 0.0, _difference(last(ours), last(theirs), paired))


def smoothed(curve) -> np.ndarray:
  """A curve of (step, loss), averaged exponentially as in arXiv:2401.04081: rate 0.001 per step.

  In runs below 20,000 steps the average spans a twentieth of them.
  """
  curve = np.array(curve, float)
  rate = max(_RATE, 1 / (_FRACTION * curve[-1, 0]))
  kept = np.exp(-rate * np.diff(curve[:, 0], prepend=0.0))  # of the average so far, at each point
  total = weight = 0.0
  for point, keep in zip(curve, kept, strict=True):
    total, weight = keep * total + (1 - keep) * point[1], keep * weight + (1 - keep)
    point[1] = total / weight
  return curve


def steps_to_reach(loss: float, curve) -> float | None:
  """Steps until a curve of (step, loss) first reaches `loss`, or None if it never does.

  Interpolates linearly between measurements.
  """
  steps, losses = np.asarray(curve, float).T
  reached = losses <= loss
  if not reached.any():
    return None
  i = int(np.argmax(reached))
  if i == 0:
    return float(steps[0])
  return float(np.interp(loss, losses[[i, i - 1]], steps[[i, i - 1]]))
