"""Parameterizations: how initial values, learning rates and outputs follow the size of a model.

Under `standard`, only initial values do, by the fan-in. Under `mup` and `completep` all of them
change with size such that the best learning rate does not: docs/concepts/parameterization.md
derives the rules. A rule is a function of ratios between a model and its base shape, so that at the
base shape all parameterizations are the same, bit for bit.
"""

from typing import NamedTuple

from moejax import parameters

NAMES = ('standard', 'mup', 'completep')


class Terms(NamedTuple):
  """What the product with a matrix sums over, for one entry of an output; or ratios of these.

  `aligned`: the sum of the weights of all terms, which after an update point in one direction.
  `random`: the sum of their squares, for initial values have random signs. `init`: the fan-in from
  which `standard` has the initial standard deviation. Of a plain matrix, all three are the fan-in.
  `rank`: the smaller one of its numbers of inputs and outputs, whatever is summed.
  """

  aligned: float
  random: float
  init: float
  rank: float = 1.0


class Scales(NamedTuple):
  """Factors of a parameter on top of `standard`: of its initial values and of its learning rate.

  `orthogonal_rate`: that of updates which are orthogonal matrices, as Muon's, of AdamW's size.
  Weight decay has the unscaled rate: it takes the same fraction of a parameter at every size.
  """

  init: float = 1.0
  rate: float = 1.0
  orthogonal_rate: float = 1.0


# Kind of a parameter -> its Scales, from the ratios of its Terms to those in the base shape.
KINDS = {
  'vector': lambda ratio: Scales(),  # every number acts on its own coordinate
  'embedding': lambda ratio: Scales(ratio.init**0.5),
  'head': lambda ratio: Scales(ratio.init**0.5),  # and `output_scale`, for it may be the embedding
  'matrix': lambda ratio: _moved(ratio, (ratio.init / ratio.random) ** 0.5),
  # From all coordinates to a few scores: these start at 0 in a wide model, or the gradient that
  # comes back through them would outgrow that of all else.
  'readout': lambda ratio: _moved(ratio, ratio.init**0.5 / ratio.aligned),
}


def _moved(ratio, init):
  # The sum grows by the direction of an update that lines up with a token. Nearly all of Adam's
  # update lies in it; Muon's is spread evenly over `rank` directions.
  return Scales(init, 1 / ratio.aligned, ratio.rank**0.5 / ratio.aligned)


def scales(terms, base_terms):
  """The Scales of parameters by path, from their Terms by path, here and in the base shape."""
  ratios = {
    path: Terms(*(n / base for n, base in zip(terms[path], base_terms[path], strict=True)))
    for path in terms
  }
  return {path: KINDS[parameters.of(path).kind](ratio) for path, ratio in ratios.items()}


def output_scale(model):
  """Factor of the activations that the output projection of a ModelConfig reads."""
  return 1.0 if model.parameterization == 'standard' else model.base_model.d_model / model.d_model


def score_scale(model):
  """Factor of attention scores, beside 1/sqrt(P): in all, they fall as 1/P for heads of width P.

  Queries and keys are aligned after training, so that their product grows with P, not sqrt(P).
  """
  if model.parameterization == 'standard':
    return 1.0
  return (model.base_model.head_width / model.head_width) ** 0.5


def branch_scale(model):
  """Factor of the output of every sublayer, before it is added (arXiv:2505.01618, alpha = 1)."""
  if model.parameterization != 'completep':
    return 1.0
  return len(model.base_model.kinds) / len(model.kinds)


def gradient_scale(model):
  """Size of gradients over that in the base shape; epsilon of Adam must shrink with them."""
  return output_scale(model) * branch_scale(model)
