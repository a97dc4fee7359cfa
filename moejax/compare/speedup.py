"""How many times fewer tokens a model needs than a baseline; two definitions.

Losses are samples: a number per seed. A ratio of infinity or 0 is beyond what was measured.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize

from moejax import seeds

_RATE, _FRACTION = 1 / 1000, 1 / 20


def matched_schedule(
  losses: Sequence[float], tokens: float, durations: dict[float, Sequence[float]]
) -> seeds.Estimate:
  """The tokens that the baseline needs to a model's final loss, over the model's tokens.

  Each duration of the baseline is a run of its own that decays its learning rate to its end: a
  curve in mid-schedule has not had its decay, and says too little. Between durations, losses are
  interpolated in the logarithm of tokens. Their noise is estimated from all durations together.

  Args:
    losses: final losses of the model.
    tokens: with which it was trained.
    durations: final losses of the baseline by its tokens; at least two durations.

  Returns:
    The ratio; infinity if the longest duration does not reach the loss, 0 if the shortest does.
  """
  places = sorted(durations)
  samples = [durations[place] for place in places]
  ratio = lambda means: tokens_to_reach(means[0], places, means[1:]) / tokens
  return seeds.of_means(ratio, [losses, *samples], [None, *[seeds.noise(*samples)] * len(samples)])


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


def mid_schedule(baseline: list, model: list) -> seeds.Estimate:
  """The part of its steps in which a model reaches the baseline's last training loss, inverted.

  The measure of MoE-Mamba (arXiv:2401.04081) and Mixture of Tokens: smoothed training loss, in
  mid-schedule. Decay lowers the baseline's last loss, which the model has not had when it gets
  there, so in short runs this measure is nearly blind. Its noise is taken as a shift of curves.

  Args:
    baseline, model: training curves of (step, loss), one per seed, over the same tokens.

  Returns:
    The ratio; 0 if the model does not reach that loss.
  """
  finals = [smoothed(curve)[-1, 1] for curve in baseline]
  curves = [smoothed(curve) for curve in model]
  steps = curves[0][:, 0]
  mean = np.mean([np.interp(steps, *curve.T) for curve in curves], axis=0)
  ends = [curve[-1, 1] for curve in curves]
  curve = np.stack([steps, mean], axis=1)

  def ratio(means):
    needed = steps_to_reach(means[0] - (means[1] - np.mean(ends)), curve)
    return steps[-1] / needed if needed else 0.0

  return seeds.of_means(ratio, [finals, ends])


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
