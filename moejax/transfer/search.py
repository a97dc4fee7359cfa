"""Which runs find the best learning rate of a model, and their losses."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

from moejax import cli, report, runner
from moejax.sweep import axes
from moejax.sweep.axes import Axis

RATE, SEED = 'optimizer.peak_lr', 'train.seed'
_DIVERGED = 'error: training diverged'  # what `train.train` raises, in the log of a cell


@dataclasses.dataclass(eq=False)
class Curve:
  """The losses of one model at several learning rates."""

  variant: dict[str, str]  # its fields and the texts of their flags, those not of its size,
  size: dict[str, str]  # and those of its size
  rates: list[float]  # rising
  seeds: list[int]
  losses: dict[tuple[float, int], float] = dataclasses.field(default_factory=dict)  # inf: diverged
  added: int = 0  # rates beyond those that were asked for

  @property
  def label(self) -> str:
    """Its size."""
    field, value = next(iter(self.size.items()))
    return f'{field}={value}'

  def wanted(self) -> list[tuple[float, int]]:
    """Rates and seeds to train: the first seed everywhere, the others around the minimum."""
    first = [(rate, self.seeds[0]) for rate in self.rates]
    if not all(run in self.losses for run in first):
      return first
    i = self.lowest()
    around = [(rate, s) for rate in self.rates[max(0, i - 1) : i + 2] for s in self.seeds]
    return [*dict.fromkeys(first + around)]

  def lowest(self) -> int:
    """The index of the best rate, among those with all seeds if there are any."""
    full = [rate for rate in self.rates if len(self.at(rate)) == len(self.seeds)]
    mean = lambda rate: sum(self.at(rate)) / len(self.at(rate))
    return self.rates.index(min(full or self.rates, key=mean))

  def at(self, rate) -> list[float]:
    """The losses at a rate, of the seeds that were trained."""
    return [self.losses[rate, seed] for seed in self.seeds if (rate, seed) in self.losses]

  def extend(self) -> bool:
    """Adds the next rate if the best one is the smallest or the largest; whether it did."""
    i, rates = self.lowest(), self.rates
    if 0 < i < len(rates) - 1:
      return False
    end, neighbor, which = (
      (rates[0], rates[1], 'smallest') if i == 0 else (rates[-1], rates[-2], 'largest')
    )
    new = float(f'{end * end / neighbor:.2g}')
    model = [*(f'{field}={value}' for field, value in self.variant.items()), self.label]
    print(
      f'{", ".join(model)}: the best {RATE}, {end:g}, is the {which}; {new:g} is added', flush=True
    )
    self.rates = sorted([*rates, new])
    self.added += 1
    return True


def numbers(flag, texts) -> list[float]:
  """The values of a flag, rising; raises ValueError unless they are three positive numbers."""
  try:
    found = sorted({float(text) for text in texts})
  except ValueError:
    found = []
  if len(found) < max(3, len(texts)) or found[0] <= 0 or not all(map(math.isfinite, found)):
    given = ','.join(texts)
    raise ValueError(
      f'--{flag}: expected three or more different positive numbers, such as 3e-3,6e-3,1.2e-2; '
      f'got {given!r}.'
    )
  return found


def make_curves(sizes: Axis, variants: list[Axis], rates, seeds) -> list[Curve]:
  """A curve for every size of every combination of variants."""
  points = itertools.product(*(axis.points for axis in variants))
  fields = [field for axis in variants for field in axis.fields]
  return [
    Curve(
      dict(zip(fields, itertools.chain(*point), strict=True)),
      dict(zip(sizes.fields, size, strict=True)),
      list(rates),
      seeds,
    )
    for point in points
    for size in sizes.points
  ]


def search(
  make: Callable[[Curve, float, int], runner.Cell],
  curves: list[Curve],
  workdir,
  most_added: int,
) -> int:
  """Trains until every curve has its minimum inside its rates, and all seeds around it.

  What is trained already, here or by an earlier call, is read from the folder.

  Args:
    make: the run of a curve with a rate and a seed, such as `cell` with its first arguments.
    curves: their losses are filled in, and rates added.
    workdir: folder of all runs.
    most_added: how many rates may be added to a curve.

  Returns:
    The exit code.
  """
  make = functools.cache(make)
  while True:
    wanted = [(curve, *run) for curve in curves for run in curve.wanted()]
    made = [make(*run) for run in wanted]
    code = runner.run([cell for cell in made if not _diverged(cell, workdir)], workdir)
    if code == cli.INTERRUPTED:
      return code
    for (curve, rate, seed), cell in zip(wanted, made, strict=True):
      if (found := summary(cell, workdir)) is None:
        return cli.FAILED
      curve.losses[rate, seed] = found['validation']['loss']
    added = [curve for curve in curves if curve.added < most_added and curve.extend()]
    if not added and all(run in c.losses for c in curves for run in c.wanted()):
      return cli.OK


def cells(config, overrides, curves):
  """The cells that were trained."""
  runs = ((curve, run) for curve in curves for run in sorted(curve.losses))
  return [cell(config, overrides, curve, *run) for curve, run in runs]


def cell(config, overrides, curve, rate, seed):
  """One run; `config` and `overrides` as `axes.make_cells` takes them."""
  fields = curve.variant | curve.size | {RATE: f'{rate:g}', SEED: str(seed)}
  axis = Axis(tuple(fields), (tuple(fields.values()),))
  (made,) = axes.make_cells(config, overrides, [axis])
  return made


def summary(cell, workdir) -> dict | None:
  """The summary of a finished cell; of one that diverged, an infinite loss; None of others."""
  if runner.is_done(workdir, cell):
    return report.read_summary(workdir / cell.name)
  return {'validation': {'loss': math.inf}} if _diverged(cell, workdir) else None


def _diverged(cell, workdir):
  """Whether training ended with a loss that is not finite, as the cell's log then says."""
  log = runner.log(workdir, cell.name)
  return log.exists() and _DIVERGED in log.read_text(errors='replace')
