"""What losses at several learning rates say: the best rate at every size, and what transfer costs.

The best rate is the minimum of a parabola in log rate, through the best of the rates and its
neighbors; intervals follow from the noise of seeds.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from moejax import report, seeds, text
from moejax.seeds import Estimate
from moejax.transfer.search import RATE, Curve

FACTOR = 1.4  # by which best rates may differ and count as the same
_SHOWN = 0.5  # nats above the best loss of the worst curve that a plot shows


class Losses(NamedTuple):
  """The finite part of a curve."""

  places: list[float]  # logs of rates, rising
  samples: list[list[float]]  # losses there, a number per seed
  noise: seeds.Noise | None  # of all samples together

  @classmethod
  def of(cls, curve: Curve) -> 'Losses':
    found = {math.log(rate): curve.at(rate) for rate in curve.rates}
    found = {place: sample for place, sample in found.items() if np.isfinite(sample).all()}
    return cls([*found], [*found.values()], seeds.noise(*found.values()))

  def lowest(self, means: Sequence[float]) -> float:
    return seeds.lowest(self.places, means)

  def at(self, means: Sequence[float], place: float) -> float:
    """The loss at a log rate: of the parabola through the three points nearest to it."""
    if len(self.places) < 3:
      return float(np.interp(place, self.places, means))
    i = int(np.argmin(np.abs(np.subtract(self.places, place))))
    first = min(max(i - 1, 0), len(self.places) - 3)
    near = slice(first, first + 3)
    place = min(max(place, self.places[0]), self.places[-1])
    return float(np.polyval(np.polyfit(self.places[near], means[near], 2), place))


def _estimate(function, *curves: Losses) -> Estimate:
  """A function of the mean losses of curves, an array each, with its interval."""
  ends = np.cumsum([len(curve.places) for curve in curves])[:-1]
  samples = [sample for curve in curves for sample in curve.samples]
  known = [curve.noise for curve in curves for _ in curve.samples]
  return seeds.of_means(lambda means: function(*np.split(means, ends)), samples, known)


def best_rate(curve: Losses) -> Estimate:
  return Estimate(*map(math.exp, _estimate(curve.lowest, curve)))


def best_loss(curve: Losses) -> Estimate:
  return _estimate(lambda means: curve.at(means, curve.lowest(means)), curve)


def ratio(small: Losses, large: Losses) -> Estimate:
  """The best rate of the larger model over that of the smaller one."""
  difference = lambda a, b: large.lowest(b) - small.lowest(a)
  return Estimate(*map(math.exp, _estimate(difference, small, large)))


def cost(small: Losses, large: Losses) -> Estimate:
  """Nats that the larger model loses at the best rate of the smaller one."""

  def more(a, b):
    return large.at(b, small.lowest(a)) - large.at(b, large.lowest(b))

  return _estimate(more, small, large)


def is_inside(curve: Losses) -> bool:
  """Whether the best of the rates has a neighbor on both sides that did not diverge."""
  means = [np.mean(sample) for sample in curve.samples]
  return 0 < int(np.argmin(means)) < len(means) - 1


def detectable(curve: Losses) -> float:
  """The difference of two losses that the noise of a curve's seeds can make; NaN if unknown."""
  sample = max(curve.samples, key=len)
  return seeds.difference(sample, sample, known=curve.noise).high


def describe(curves: list[Curve]) -> str:
  """A table of the best rates, and for every variant what follows, in words."""
  rows = [['', 'best rate', 'over the first', 'loss there', "cost of the first's rate", 'note']]
  verdicts = []
  for variant, members in by_variant(curves).items():
    first, *larger = found = [Losses.of(curve) for curve in members]
    for curve, losses in zip(members, found, strict=True):
      name = ', '.join(filter(None, (variant, curve.label)))
      if not losses.places:
        rows.append([name, '-', '-', '-', '-', 'all rates diverged'])
        continue
      compared = ['', ''] if losses is first else ['-', '-']
      if losses is not first and first.places:
        compared = [f'{ratio(first, losses):.2f}', _cost(first, losses)]
      measured = [f'{best_rate(losses):.2g}', compared[0], f'{best_loss(losses):.4f}', compared[1]]
      rows.append([name, *measured, _note(curve)])
    if all(losses.places for losses in found):
      verdicts.append(_verdict(variant, members, found))
  return '\n'.join(
    [
      text.table(rows),
      '',
      'Losses in nats per token; intervals of 95 % from the noise of seeds.',
      *verdicts,
    ]
  )


def by_variant(curves):
  """Curves by the text of their variant, in order."""
  found = {}
  for curve in curves:
    found.setdefault(', '.join(f'{k}={v}' for k, v in curve.variant.items()), []).append(curve)
  return found


def _cost(first, losses):
  lost, least = cost(first, losses), detectable(losses)
  return f'{lost:.4f}' + (f', within noise ({least:.4f})' if lost.value <= least else '')


def _note(curve):
  i, rates = curve.lowest(), curve.rates
  if 0 < i < len(rates) - 1:
    beyond = f'{rates[i + 1]:g} diverges' if math.inf in curve.at(rates[i + 1]) else ''
    return ', '.join(filter(None, (f'of {len(rates)} rates', beyond)))
  which = 'smallest' if i == 0 else 'largest'
  return f'the {which} of {len(rates)} rates: the minimum may be beyond'


def _verdict(variant, members, found):
  """One line: do the best rates agree, and what does the first one cost the last model?"""
  first, *larger = found
  ratios = [ratio(first, losses) for losses in larger]
  worst = max(ratios, key=lambda r: abs(math.log(r.value)))
  inside = 1 / FACTOR <= worst.value <= FACTOR
  certain = worst.has_interval and (
    1 / FACTOR <= worst.low and worst.high <= FACTOR
    if inside
    else worst.low > FACTOR or worst.high < 1 / FACTOR
  )
  what = f'best rates differ by a factor of {worst:.2f}, ' + (
    f'within {FACTOR}' if inside else f'beyond {FACTOR}'
  )
  doubt = '' if certain else ', which these seeds do not settle'
  if not all(map(is_inside, found)):  # the interval does not know it
    doubt = ', as far as these rates tell: a best one has no neighbor on one side'
  lost, least = cost(first, found[-1]), detectable(found[-1])
  price = f'{lost:.4f} nats' if lost.value > least else f'none beyond noise ({lost:.4f} nats)'
  if math.isnan(least):
    price = f'{lost:.4f} nats, with one seed of unknown noise'
  name = f'{variant}: ' if variant else ''
  return (
    f'{name}{what}{doubt}; what the best rate of {members[0].label} costs {members[-1].label}: '
    f'{price}.'
  )


def plot(curves: list[Curve], path) -> None:
  """Loss against rate, a panel per variant, a line per size, a mark at every best rate."""
  variants = by_variant(curves)
  figure = Figure(figsize=(4.5 * len(variants), 4), dpi=100, layout='constrained')
  panels: Any = figure.subplots(1, len(variants), sharex=True, sharey=True, squeeze=False)
  best = []
  for panel, (variant, members) in zip(panels.flat, variants.items(), strict=True):
    for number, curve in enumerate(members):
      losses, style = Losses.of(curve), {'color': f'C{number}'}
      if not losses.places:
        continue
      rates, means = np.exp(losses.places), [np.mean(sample) for sample in losses.samples]
      spread = [np.std(sample, ddof=1) if len(sample) > 1 else 0 for sample in losses.samples]
      panel.errorbar(rates, means, spread, marker='o', capsize=3, label=curve.label, **style)
      at = best_rate(losses)
      panel.plot(at.value, best_loss(losses).value, '*', markersize=12, zorder=3, **style)
      panel.axvspan(at.low, at.high, alpha=0.15, linewidth=0, **style) if at.has_interval else None
      best.append(min(means))
    panel.set(xscale='log', xlabel=RATE, title=variant)
    rates = sorted({rate for curve in curves for rate in curve.rates})
    panel.set_xticks(rates, [f'{rate:g}' for rate in rates], fontsize='small')
    panel.minorticks_off()
    panel.grid(color='0.9')
    panel.spines[['top', 'right']].set_visible(False)
    panel.legend(frameon=False)
  panels.flat[0].set_ylabel('validation loss (nats per token)')
  if best:
    panels.flat[0].set_ylim(min(best) - 0.05, max(best) + _SHOWN)
  report.save_figure(figure, path)
