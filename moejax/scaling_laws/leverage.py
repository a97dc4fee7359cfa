"""Efficiency leverage: how many FLOPs of dense a FLOP of a sparse model is worth.

arXiv:2507.17702, Definition 3.1: the FLOPs that a dense model needs for the loss of a sparse one,
over those of the sparse one. A dense model has leverage 1.
"""

import math

from moejax.scaling_laws import optimal


def by_law(dense, loss, flops):
  """By a law of dense models: (leverage, the compute-optimal dense `optimal.Optimum`), or None.

  None: the loss is below the least of the dense law.
  """
  try:
    same = optimal.solve(dense, 1, loss=loss)
  except ValueError:
    return None
  return same.flops / flops, same


def by_runs(dense, loss, flops):
  """By dense runs, (training FLOPs, final loss) each; None unless their losses enclose this one.

  Between the best run of each budget the logarithm of FLOPs is linear in the loss.
  """
  best = []
  for budget, reached in sorted(dense):
    if not best or reached < best[-1][1]:
      best.append((budget, reached))
  for (less, worse), (more, better) in zip(best, best[1:], strict=False):
    if better <= loss <= worse:
      share = (worse - loss) / (worse - better)
      return math.exp((1 - share) * math.log(less) + share * math.log(more)) / flops
  return None
