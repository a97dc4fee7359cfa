"""Properties of a kind of sublayer that need no parameters (docs/adding_a_sublayer.md)."""

import collections
import dataclasses


@dataclasses.dataclass(frozen=True)
class Cost:
  """Parameters of a sublayer and its forward FLOPs per token, by kind, counted as in flops.py."""

  params: dict[str, int]
  active: float  # parameters that one token uses
  model_flops: dict[str, float]
  routing_flops: dict[str, float] = dataclasses.field(default_factory=dict)
  # Products in the backward pass per product of the forward pass, by kind of routing; default: two.
  routing_gradients: dict[str, int] = dataclasses.field(default_factory=dict)


def sums(dicts) -> dict:
  """Numbers of several dicts, added up by name; without zeros."""
  total = collections.Counter()
  for numbers in dicts:
    total.update(numbers)
  return {kind: number for kind, number in total.items() if number}


class Sublayer:
  """A kind of sublayer in a model; `config` is the ModelConfig.

  Every kind has `make` and `cost`. The other defaults are those of a layer that sees one token and
  earlier ones of its sequence: override what is different.
  """

  made_of = ()  # further kinds whose properties this one has as well
  groups = {}  # field -> number of consecutive sequences that must divide a microbatch
  whole_groups = {}  # those of `groups` that must be on one device
  experts = {}  # field -> number of experts, which mesh axis `expert` must divide
  widths = {}  # description with fields -> number, which mesh axis `tensor` must divide
  mixes = False  # whether sequences of a group influence each other at equal positions,
  mixed_sequences = 1  # and how many do, in decoding too
  anneals = False  # whether it has temperatures that fall until the last step

  def __init__(self, config):
    self.config = config

  def make(self, init, rngs):
    """The module; `init` (`common.Initializer`) makes its parameters."""
    raise NotImplementedError

  def cost(self, length) -> Cost:
    """Its cost in sequences of `length` positions."""
    raise NotImplementedError

  def terms(self):
    """`parameterization.Terms` by the end of a path, of parameters that are no plain matrices."""
    return {}

  def problems(self):
    """Yields one sentence per invalid combination of values."""
    return ()

  def leaks(self):
    """How a token sees later positions, as a sentence; '' if it does not."""
    return ''

  def dropless(self):
    """Sections of the model config without dropped tokens, by name; {} if there are none."""
    return {}

  def remixed(self, mode, group_size):
    """Sections of the model config, changed to mix as in a mode of `moejax.evaluate`; if `mixes`.

    Args:
      mode: one of `evaluate.MODES`.
      group_size: sequences mixed with each other; 0: as in training.

    Raises:
      ValueError: the sublayer does not support the mode.
    """
    del mode, group_size
    return {}


def sees_the_future(field, causal) -> str:
  """The sentence of `Sublayer.leaks` for a value of a field, beside one that is causal."""
  return (
    f'{field} lets tokens see the future: the loss is too good, and generation does not reach it. '
    f'{causal} is causal.'
  )
