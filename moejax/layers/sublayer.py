"""What a kind of sublayer answers before it has parameters (docs/adding_a_sublayer.md)."""

import collections
import dataclasses


@dataclasses.dataclass(frozen=True)
class Cost:
  """Parameters of a sublayer and its forward FLOPs per token, by kind, as flops.py counts them."""

  params: dict[str, int]
  active: float  # parameters that one token uses
  model_flops: dict[str, float]
  routing_flops: dict[str, float] = dataclasses.field(default_factory=dict)
  # Products in the backward pass for one of the forward pass, by kind of routing; not named: two.
  routing_gradients: dict[str, int] = dataclasses.field(default_factory=dict)


def sums(dicts) -> dict:
  """Numbers of several dicts, added up by name; without zeros."""
  total = collections.Counter()
  for numbers in dicts:
    total.update(numbers)
  return {kind: number for kind, number in total.items() if number}


class Sublayer:
  """A kind of sublayer in a model; `config` is the ModelConfig.

  Every kind has `make` and `cost`. The other answers are those of a layer that looks at one token,
  or at earlier ones of its sequence: override what is different.
  """

  made_of = ()  # further kinds whose answers are this one's as well
  groups = {}  # field -> how many consecutive sequences a microbatch must be cut into
  whole_groups = {}  # of these, the fields whose sequences must lie on one device
  experts = {}  # field -> number of experts, for mesh axis `expert` to divide
  widths = {}  # what mesh axis `tensor` has to divide, and the fields it comes from -> how many
  mixes = False  # whether sequences of a group influence each other at equal positions,
  mixed_sequences = 1  # and how many do, in decoding too

  def __init__(self, config):
    self.config = config

  def make(self, init, rngs):
    """The module, with parameters made by `init` (`common.Initializer`)."""
    raise NotImplementedError

  def cost(self, length) -> Cost:
    """What it costs in sequences of `length` positions."""
    raise NotImplementedError

  def problems(self):
    """Yields one sentence for every combination of values that cannot work."""
    return ()

  def leaks(self):
    """How a token sees later positions, as a sentence; '' if it does not."""
    return ''

  def dropless(self):
    """Sections of the model config without dropped tokens, by name; {} if there are none."""
    return {}

  def remixed(self, mode, group_size):
    """Sections of the model config that mix as a mode of `moejax.evaluate` says; if `mixes`.

    Args:
      mode: one of `evaluate.MODES`.
      group_size: sequences mixed with each other; 0: as in training.

    Raises:
      ValueError: the sublayer cannot be used so.
    """
    del mode, group_size
    return {}
