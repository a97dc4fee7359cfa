"""The figures of a law: what it says, beside the runs it was fitted to; and the numbers behind."""

import csv
import math
import pathlib

import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.figure import Figure

from moejax.scaling_laws import laws, optimal

_SPARSE_COLOURS = 'viridis'
_DENSE_COLOUR = '#d1495b'
_DPI = 130


def plot(coefficients, expansion_rate, runs, folder):
  """Draws every figure that the laws at hand allow, as NAME.png with NAME.csv.

  Args:
    coefficients: dict of expansion rate to `laws.Coefficients`; 1 is the dense law.
    expansion_rate: the sparse law to draw.
    runs: `collect.Run`s it was fitted to, or none: the curves alone.
    folder: where to write; created if it does not exist.

  Returns:
    The paths of the figures.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  sparse, dense = coefficients.get(expansion_rate), coefficients.get(1)
  budgets = _budgets(runs)
  figures = {}
  if sparse:
    figures['loss_by_granularity'] = _loss_by_granularity(sparse, expansion_rate, runs)
    figures['optimal_granularity'] = _optimal_granularity(sparse, expansion_rate, budgets)
  figures['loss_by_flops'] = _loss_by_flops(coefficients, expansion_rate, runs, budgets)
  if runs:
    figures['residuals'] = _residuals(sparse, dense, runs)
  for name, (figure, header, rows) in figures.items():
    figure.savefig(folder / f'{name}.png', dpi=_DPI)
    with (folder / f'{name}.csv').open('w', newline='') as file:
      csv.writer(file).writerows([header, *rows])
  return [folder / f'{name}.png' for name in figures]


def _figure(xlabel, ylabel, **size):
  figure = Figure(figsize=(7.5, 5), layout='constrained')
  axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel, axisbelow=True, **size)
  axes.grid(color='0.92')
  axes.spines[['top', 'right']].set_visible(False)
  return figure, axes


def _colours(values):
  """A colour for each of the values, light for the largest."""
  ordered = sorted(set(values))
  shades = np.linspace(0, 0.9, max(len(ordered), 2))
  return {v: colormaps[_SPARSE_COLOURS](s) for v, s in zip(ordered, shades, strict=False)}


def _loss_by_granularity(law, expansion_rate, runs):
  """Fixed N and D: how much finer experts help."""
  figure, axes = _figure('granularity G', 'loss (nats per token)', xscale='log')
  measured = {}
  for run in runs:
    if run.granularity != laws.DENSE:
      points = measured.setdefault((run.params, run.tokens), {})
      points[run.granularity] = run.loss
  groups = measured or {size: {} for size in _example_sizes(expansion_rate)}
  last = max([16, *(g for points in groups.values() for g in points)])
  fine = np.geomspace(1, last, 60)
  colours = _colours(params for params, _ in groups)
  durations = sorted({tokens for _, tokens in groups})
  styles = dict(zip(durations, ['-', '--', ':', '-.'] * len(durations), strict=False))
  rows = []
  for (params, tokens), points in sorted(groups.items()):
    style = {'color': colours[params], 'linestyle': styles[tokens]}
    axes.plot(fine, laws.loss(law, params, tokens, fine), linewidth=1.4, **style)
    if points:
      axes.plot(*zip(*sorted(points.items()), strict=True), 'o', color=colours[params], ms=4.5)
    for granularity in sorted(points) or _powers_of_two(last):
      predicted = float(laws.loss(law, params, tokens, granularity))
      rows.append((params, tokens, granularity, points.get(granularity, ''), predicted))
  handles = [axes.plot([], color=c, label=f'N = {short(n)}')[0] for n, c in colours.items()]
  handles += [
    axes.plot([], color='0.4', linestyle=styles[d], label=f'D = {short(d)}')[0] for d in durations
  ]
  axes.legend(handles=handles, frameon=False, ncols=2, fontsize='small', loc='upper right')
  axes.set_title(f'Loss by granularity, E = {expansion_rate:g}', fontsize='medium')
  axes.margins(y=0.12)
  _granularity_ticks(axes.xaxis, last)
  return figure, ('params', 'tokens', 'granularity', 'loss', 'predicted'), rows


def _example_sizes(expansion_rate):
  """Sizes of the paper's runs, for a law that comes without runs."""
  for d_model, blocks in ((256, 4), (512, 8), (768, 12)):
    for tokens in (16e9, 66e9):
      yield laws.total_params(d_model, blocks, expansion_rate), tokens


def _loss_by_flops(coefficients, expansion_rate, runs, budgets):
  """The best loss of each granularity and of dense models at every budget, and their envelope."""
  figure, axes = _figure(
    'training FLOPs', 'loss (nats per token)', xscale='log', yscale='log', xlim=budgets[[0, -1]]
  )
  curves = {}
  if sparse := coefficients.get(expansion_rate):
    for g in _powers_of_two(_last_granularity(sparse, expansion_rate, runs, budgets[-1])):
      curves[g] = _best_losses(sparse, expansion_rate, g, budgets)
  colours = _colours(curves) | {laws.DENSE: _DENSE_COLOUR}
  if dense := coefficients.get(1):
    curves[laws.DENSE] = _best_losses(dense, 1, laws.DENSE, budgets)
  for g, losses in curves.items():
    axes.plot(budgets, losses, color=colours[g], linewidth=1.4, label=_kind(g))
  axes.plot(
    budgets, np.min(list(curves.values()), axis=0), color='black', linewidth=5, alpha=0.15, zorder=0
  )
  axes.plot([], color='black', linewidth=5, alpha=0.15, label='envelope')
  for run in runs:
    if run.granularity in curves:
      axes.plot(run.flops, run.loss, 'o', color=colours[run.granularity], ms=4, alpha=0.8)
  axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
  axes.yaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
  axes.yaxis.set_minor_locator(ticker.NullLocator())
  axes.legend(frameon=False, fontsize='small')
  axes.set_title('Compute-optimal loss' + (', and the runs' if runs else ''), fontsize='medium')
  rows = [
    (float(flops), _kind(g), float(loss))
    for g, losses in curves.items()
    for flops, loss in zip(budgets, losses, strict=True)
  ]
  return figure, ('flops', 'model', 'loss'), rows


def _best_losses(law, expansion_rate, granularity, budgets):
  best = [optimal.best_width(law, expansion_rate, granularity, flops) for flops in budgets]
  return np.array([optimum.loss for optimum in best])


def _optimal_granularity(law, expansion_rate, budgets):
  """The best granularity at every budget, and what coarse experts cost there."""
  best = [optimal.best(law, expansion_rate, flops) for flops in budgets]
  figure, axes = _figure(
    'training FLOPs', 'best granularity G', xscale='log', yscale='log', xlim=budgets[[0, -1]]
  )
  granularities = [optimum.granularity for optimum in best]
  axes.step(budgets, granularities, where='mid', color='C0', linewidth=2)
  _granularity_ticks(axes.yaxis, max(granularities))
  axes.set_ylim(0.8, 1.3 * max(granularities))
  axes.set_title(f'Compute-optimal granularity, E = {expansion_rate:g}', fontsize='medium')
  rows = [(o.flops, o.granularity, o.params, o.tokens, o.loss) for o in best]
  return figure, ('flops', 'granularity', 'params', 'tokens', 'loss'), rows


def _residuals(sparse, dense, runs):
  """Measured less predicted, over the prediction."""
  figure, axes = _figure('predicted loss (nats per token)', 'measured - predicted')
  colours = _colours(r.granularity for r in runs if r.granularity != laws.DENSE)
  colours |= {laws.DENSE: _DENSE_COLOUR}
  rows = []
  for run in sorted(runs, key=lambda run: run.granularity):
    law = dense if run.granularity == laws.DENSE else sparse
    if law:
      predicted = float(laws.loss(law, run.params, run.tokens, run.granularity))
      rows.append((run.name, run.granularity, predicted, run.loss, run.loss - predicted))
  for granularity in dict.fromkeys(row[1] for row in rows):
    points = [(row[2], row[4]) for row in rows if row[1] == granularity]
    label = _kind(granularity)
    axes.plot(
      *zip(*points, strict=True), 'o', color=colours[granularity], ms=5, alpha=0.8, label=label
    )
  rmse = math.sqrt(sum(row[4] ** 2 for row in rows) / len(rows))
  axes.axhline(0, color='0.3', linewidth=1)
  axes.axhspan(-rmse, rmse, color='0.5', alpha=0.12, linewidth=0, label=f'RMSE {rmse:.4f}')
  axes.legend(frameon=False, fontsize='small', ncols=2)
  axes.set_title('Residuals', fontsize='medium')
  axes.margins(y=0.15)
  return figure, ('name', 'granularity', 'predicted', 'loss', 'residual'), rows


def _budgets(runs):
  """FLOPs to draw curves over: the runs' and two decades more; without runs those of the paper."""
  flops = [run.flops for run in runs] or [1e18, 1e24]
  return np.geomspace(min(flops) / 3, max(flops) * 100, 81)


def _last_granularity(law, expansion_rate, runs, flops):
  """The largest one worth a curve: the best at the largest budget, or the largest of the runs."""
  best = optimal.best(law, expansion_rate, flops).granularity
  return max([best, *(run.granularity for run in runs)])


def _powers_of_two(last):
  return [g for g in optimal.GRANULARITIES if g <= last]


def _kind(granularity):
  return 'dense' if granularity == laws.DENSE else f'G = {granularity}'


def _granularity_ticks(axis, last):
  axis.set_major_locator(ticker.FixedLocator(_powers_of_two(last)))
  axis.set_major_formatter(ticker.FormatStrFormatter('%g'))
  axis.set_minor_locator(ticker.NullLocator())


def short(number):
  """'4.37B': three digits and a unit."""
  for unit in ('', 'k', 'M', 'B'):
    if number < 999.5:
      return f'{number:.3g}{unit}'
    number /= 1000
  return f'{number:.3g}T'
