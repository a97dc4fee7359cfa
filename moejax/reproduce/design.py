"""What a reproduction is: models to train, and criteria that stand before they are trained.

The files of the three claims fill these in; the rest of the package knows no claim.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

from moejax.reproduce.criteria import Criterion
from moejax.sweep import axes
from moejax.text import duration, short
from moejax.transfer.search import RATE, SEED

UNIT = 1000  # steps; smaller ones make a small form of a design
DECAY = 0.2  # of the steps of a run, its last; runs of other lengths share the steps before
_EVALUATED = 2**19  # tokens, the same for all models
_CELL_SECONDS = 20  # of one core, to start, compile and evaluate a run


class Model(NamedTuple):
  """A model to train, with every seed."""

  name: str
  config: str  # as --config takes it
  rates: tuple[float, ...]  # peak learning rates to try; a single one was found before
  steps: tuple[int, ...]  # lengths of its runs; each decays its learning rate to its own end
  speed: float  # tokens per second of a core or a chip, for the estimate of hours
  fields: dict[str, str] = {}
  seeds: tuple[int, ...] = ()  # in place of those of the design
  is_predicted: bool = False  # trained last, after a law of the other models predicts its losses


class Tuned(NamedTuple):
  """Mixture-of-Tokens runs that are trained further as sparse ones, for a tenth of their steps."""

  name: str
  source: str
  steps: int  # of the source's runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
  """The models that are compared, and how; all see the same data in the same order."""

  setting: str
  fields: dict[str, str]  # of all models
  models: tuple[Model, ...]
  rate_steps: int  # length of the runs, of the first seed, that find learning rates
  comparisons: dict[str, tuple[str, ...]]  # names of models, the baseline first
  criteria: tuple[Criterion, ...]
  seeds: tuple[int, ...] = (0, 1, 2)
  tuned: tuple[Tuned, ...] = ()

  def seeds_of(self, model: Model) -> tuple[int, ...]:
    return model.seeds or self.seeds

  def source_of(self, tuned: Tuned) -> Model:
    return next(model for model in self.models if model.name == tuned.source)


class Claim(NamedTuple):
  """What a paper claims."""

  title: str
  says: str  # the claim and its setting
  design: Callable[[str, bool, int], Design]  # of a scale, whether it is quick, a unit of steps
  published: tuple[str, ...]  # configs of the paper's own runs
  panel: tuple[str, str]  # of the figure of all claims: its title, and a comparison


def fields(batch, length, source, **more) -> dict[str, str]:
  """Fields that all models of a design share; `more`: section__field=value."""
  never = 10**9
  shared = {
    'data.batch_size': batch,
    'data.sequence_length': length,
    'data.source': source,
    'optimizer.schedule': 'wsd',
    'optimizer.lr_decay_fraction': DECAY,
    'train.log_interval': 25,
    'train.eval_interval': never,
    'train.final_eval_batches': _EVALUATED // (batch * length),
    'train.checkpoint_interval': 2000,
    'train.sample_length': 0,
    'train.trackers': '',
  }
  shared |= {name.replace('__', '.'): value for name, value in more.items()}
  return {name: str(value) for name, value in shared.items()}


def cell(design: Design, model: Model, rate: float, seed: int, steps: int) -> axes.Cell:
  """One run."""
  values = {'train.steps': str(steps), RATE: f'{rate:g}', SEED: str(seed)}
  axis = axes.Axis(tuple(values), (tuple(values.values()),))
  (made,) = axes.make_cells(model.config, design.fields | model.fields, [axis])
  return dataclasses.replace(made, name=f'{model.name}-{steps}-{rate:g}-s{seed}')


def runs(design: Design, rates: dict[str, float], model: Model) -> dict[int, list[axes.Cell]]:
  """The runs of a model at its best rate: a cell per seed, by their steps."""
  return {
    steps: [cell(design, model, rates[model.name], seed, steps) for seed in design.seeds_of(model)]
    for steps in model.steps
  }


def describe_cost(design: Design, scale: str, cores: int) -> str:
  """How many runs, tokens and hours the whole design takes, by the speeds of its models."""
  number, tokens, seconds = cost(design)
  time, where = duration(seconds), 'an H100, by speeds that are not measured yet'
  if scale == 'laptop':
    time, where = duration(seconds / cores), f'{cores} core{"s" if cores > 1 else ""} like ours'
  done = 'less what is trained already'
  return f'{number} runs, {short(tokens)} tokens: about {time} on {where}; {done}'


def cost(design: Design) -> tuple[int, int, float]:
  """Of the whole design, about: runs, tokens, seconds of one core or chip."""
  number = sum(len(design.seeds_of(design.source_of(tuned))) for tuned in design.tuned)
  tokens, seconds = 0, 0.0
  per_step = int(design.fields['data.batch_size']) * int(design.fields['data.sequence_length'])
  for model in design.models:
    tried = len(model.rates) - (design.rate_steps in model.steps) if len(model.rates) > 1 else 0
    seeds = len(design.seeds_of(model))
    ends = [0, *sorted(model.steps)]
    own = [steps - round(before * (1 - DECAY)) for before, steps in itertools.pairwise(ends)]
    seen = per_step * (sum(own) * seeds + tried * design.rate_steps)
    runs_ = len(own) * seeds + tried
    number, tokens = number + runs_, tokens + seen
    seconds += seen / model.speed + runs_ * _CELL_SECONDS
  return number, tokens, seconds
