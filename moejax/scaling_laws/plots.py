"""Plots of a law and the runs it was fitted to, and their data as CSV."""

import math
import pathlib

import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moejax import files
from moejax.scaling_laws import laws, optimal
from moejax.text import short

_SPARSE_COLOURS = 'viridis'
_DENSE_COLOUR = '#d1495b'
_DPI = 130


def plot(coefficients, expansion_rate, runs, folder):
  """Draws every figure that the coefficients allow, as NAME.png with NAME.csv.

  Args:
    coefficients: dict of expansion rate to `laws.Coefficients`; 1 is the dense law.
    expansion_rate: of the sparse law to plot.
    runs: `collect.Run`s to plot; if empty, only the curves.
    folder: output folder; created if missing.

  Returns:
    The paths of the figures.
  """
  folder = pathlib.Path(folder)
  sparse, dense = coefficients.get(expansion_rate), coefficients.get(1)
  runs = [run for run in runs if run.expansion_rate in {1, expansion_rate} & coefficients.keys()]
  budgets = _budgets(runs)
  figures = {}
  if sparse and sparse.g is not None:
    figures['loss_by_granularity'] = _loss_by_granularity(sparse, expansion_rate, runs)
    more = np.geomspace(budgets[0] / 10, budgets[-1] * 1000, len(budgets))
    figures['optimal_granularity'] = _optimal_granularity(sparse, expansion_rate, runs, more)
  figures['loss_by_flops'] = _loss_by_flops(coefficients, expansion_rate, runs, budgets)
  if runs:
    figures['residuals'] = _residuals(sparse, dense, runs)
  for name, (figure, header, rows) in figures.items():
    _save(folder / f'{name}.png', figure, header, rows)
  return [folder / f'{name}.png' for name in figures]


def by_the_clock(found, path):
  """Losses for equal FLOPs and in equal time, by granularity and expansion rate: PNG and CSV.

  Args:
    found: what `runtime.compare` returns.
    path: of the PNG file; the CSV file has the same name.
  """
  figure, first, rows = _figure(1.6 + 3.4 * len(found), 4), None, []
  names = ('machine', 'basis', 'd_model', 'blocks', 'seconds')
  everything = [model for one in found for model in one['models']]
  finest = max(model['granularity'] for model in everything)
  x = 'granularity' if finest > 1 else 'expansion_rate'
  rates = sorted({model['expansion_rate'] for model in everything})
  colours = _colours(rates) | {1: _DENSE_COLOUR}
  for column, one in enumerate(found, start=1):
    axes = _axes(figure, 1, len(found), column, xscale='log', sharey=first)
    first = first or axes
    for models, colour, marker in _lines(one['models'], x, colours):
      for loss, style in (('loss_for_flops', '--'), ('loss_in_time', f'{marker}-')):
        axes.plot(
          *zip(*((m[x], m[loss]) for m in models), strict=True), style, color=colour, ms=4.5
        )
    for best, loss, marker in (
      ('by_flops', 'loss_for_flops', 's'),
      ('by_clock', 'loss_in_time', 'o'),
    ):
      at = max(1, one[best][x]), one[best][loss]
      axes.plot(*at, marker, color='black', ms=10, fillstyle='none', zorder=3)
    axes.set_title(f'{one["machine"]}, {one["flops"]:.3g} FLOPs', fontsize='medium')
    axes.tick_params(labelleft=axes is first)
    _granularity_ticks(axes.xaxis, max(finest, *rates) if x == 'expansion_rate' else finest)
    rows += [(*(one[name] for name in names), *model.values()) for model in one['models']]
  assert first
  first.set_ylabel('loss (nats per token)')
  figure.supxlabel('granularity G' if x == 'granularity' else 'expansion rate E', fontsize='medium')
  handles = [
    *(
      Line2D([], [], color=colours[rate], label=_rate(rate))
      for rate in (rates if x == 'granularity' else ())
    ),
    Line2D([], [], color='0.3', linestyle='--', label='equal FLOPs'),
    Line2D([], [], color='0.3', marker='o', ms=4.5, label='equal time'),
    Line2D([], [], color='black', marker='s', ms=9, fillstyle='none', ls='', label='best by FLOPs'),
    Line2D([], [], color='black', marker='o', ms=9, fillstyle='none', ls='', label='best by time'),
  ]
  figure.legend(handles=handles, frameon=False, fontsize='small', loc='outside right upper')
  header = (*names, *found[0]['models'][0])
  _save(pathlib.Path(path), figure, header, rows)


def _lines(models, x, colours):
  """Models, colour and marker of every line; a dense model, of no granularity, is a level."""
  if x == 'expansion_rate':
    return [(sorted(models, key=lambda model: model[x]), '0.3', 'o')]
  finest = max(model[x] for model in models)
  lines = {}
  for model in models:
    ends = (1, finest) if model[x] == laws.DENSE else (model[x],)
    lines.setdefault(model['expansion_rate'], []).extend(model | {x: end} for end in ends)
  return [(line, colours[rate], '' if rate == 1 else 'o') for rate, line in lines.items()]


def _rate(expansion_rate):
  return 'dense' if expansion_rate == 1 else f'E = {expansion_rate:g}'


def _save(path, figure, header, rows):
  """Writes a figure, and beside it its data."""
  with files.atomic_output(path) as temporary:
    figure.savefig(temporary, dpi=_DPI, format='png')
  files.write_csv(path.with_suffix('.csv'), [header, *rows])


def _figure(width=7.5, height=5):
  return Figure(figsize=(width, height), layout='constrained')


def _axes(figure, *position, xlabel='', ylabel='', **properties):
  axes = figure.add_subplot(*position, xlabel=xlabel, ylabel=ylabel, axisbelow=True, **properties)
  axes.grid(color='0.92')
  axes.spines[['top', 'right']].set_visible(False)
  return axes


def _colours(values):
  """A colour for each of the values, light for the largest."""
  ordered = sorted(set(values))
  shades = np.linspace(0, 0.9, max(len(ordered), 2))
  return {v: colormaps[_SPARSE_COLOURS](s) for v, s in zip(ordered, shades, strict=False)}


def _loss_by_granularity(law, expansion_rate, runs):
  """Loss by granularity: a panel per D, a line per N."""
  measured = {}  # tokens -> params -> granularity -> loss
  for run in runs:
    if run.granularity != laws.DENSE:
      sizes = measured.setdefault(run.tokens, {})
      sizes.setdefault(run.params, {})[run.granularity] = run.loss
  panels = measured or _example_sizes(expansion_rate)
  colours = _colours(params for sizes in panels.values() for params in sizes)
  last = max([16, *(run.granularity for run in runs)])
  fine = np.geomspace(1, last, 60)
  figure, first, rows = _figure(2 + 2.4 * len(panels)), None, []
  for column, tokens in enumerate(sorted(panels), start=1):
    axes = _axes(figure, 1, len(panels), column, xscale='log', sharey=first)
    first = first or axes
    for params, points in sorted(panels[tokens].items()):
      axes.plot(fine, laws.loss(law, params, tokens, fine), color=colours[params], linewidth=1.4)
      if points:
        axes.plot(list(points), list(points.values()), 'o', color=colours[params], ms=4.5)
      for granularity in sorted(points) or _powers_of_two(last):
        predicted = float(laws.loss(law, params, tokens, granularity))
        rows.append((params, tokens, granularity, points.get(granularity, ''), predicted))
    axes.set_title(f'D = {short(tokens)}', fontsize='medium')
    axes.tick_params(labelleft=axes is first)
    _granularity_ticks(axes.xaxis, last)
  assert first
  first.set_ylabel('loss (nats per token)')
  figure.supxlabel(f'granularity G, at expansion rate {expansion_rate:g}', fontsize='medium')
  handles = [
    first.plot([], [], color=colour, label=f'N = {short(params)}')[0]
    for params, colour in colours.items()
  ]
  figure.legend(handles=handles, frameon=False, fontsize='small', loc='outside right upper')
  return figure, ('params', 'tokens', 'granularity', 'loss', 'predicted'), rows


def _example_sizes(expansion_rate):
  """Sizes of the paper's runs, to plot a law without runs."""
  shapes = ((256, 4), (512, 8), (768, 12))
  sizes = {laws.total_params(*shape, expansion_rate): {} for shape in shapes}
  return {16.4e9: sizes, 65.5e9: sizes}


def _loss_by_flops(coefficients, expansion_rate, runs, budgets):
  """Best loss by budget, of each granularity and of dense models, and their envelope."""
  figure = _figure()
  axes = _axes(
    figure,
    xlabel='training FLOPs',
    ylabel='loss (nats per token)',
    xscale='log',
    yscale='log',
    xlim=budgets[[0, -1]],
  )
  curves = {}
  if expansion_rate != 1 and (sparse := coefficients.get(expansion_rate)):
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
  axes.plot([], [], color='black', linewidth=5, alpha=0.15, label='envelope')
  for run in runs:
    if run.granularity in curves:
      axes.plot(run.flops, run.loss, 'o', color=colours[run.granularity], ms=4, alpha=0.8)
  axes.yaxis.set_major_locator(
    ticker.LogLocator(subs=(1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8))
  )
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


def _optimal_granularity(law, expansion_rate, runs, budgets):
  """Best granularity by budget, the excess loss of the others, and the budgets of runs."""
  best = [optimal.best(law, expansion_rate, flops) for flops in budgets]
  chosen = [optimum.granularity for optimum in best]
  lowest = np.array([optimum.loss for optimum in best])
  figure = _figure(height=6)
  top = _axes(figure, 2, 1, 1, ylabel='best granularity G', xscale='log', yscale='log')
  top.step(budgets, chosen, where='mid', color='0.2', linewidth=2)
  top.set_ylim(0.8, 1.3 * max(chosen))
  top.set_title(f'Compute-optimal granularity at expansion rate {expansion_rate:g}', size='medium')
  _granularity_ticks(top.yaxis, max(chosen))
  bottom = _axes(
    figure, 2, 1, 2, xlabel='training FLOPs', ylabel='loss above the best (nats)', sharex=top
  )
  granularities = _powers_of_two(max(8, *chosen))
  colours = _colours(granularities)
  excess = {}
  for g in granularities:
    excess[g] = _best_losses(law, expansion_rate, g, budgets) - lowest
    bottom.plot(budgets, excess[g], color=colours[g], linewidth=1.4, label=_kind(g))
  if runs:
    span = min(run.flops for run in runs), max(run.flops for run in runs)
    for axes in (top, bottom):
      axes.axvspan(*span, color='0.5', alpha=0.12, linewidth=0, label='budgets of runs')
  bottom.set_xlim(*budgets[[0, -1]])
  bottom.set_ylim(0, 1.1 * max(0.02, *excess[1]))
  figure.legend(*bottom.get_legend_handles_labels(), frameon=False, loc='outside right lower')
  rows = [
    (o.flops, o.granularity, o.params, o.tokens, o.loss, *(float(excess[g][i]) for g in excess))
    for i, o in enumerate(best)
  ]
  names = (f'excess_g{g}' for g in granularities)
  return figure, ('flops', 'granularity', 'params', 'tokens', 'loss', *names), rows


def _residuals(sparse, dense, runs):
  """Measured minus predicted loss, by predicted loss."""
  figure = _figure()
  axes = _axes(
    figure, xlabel='predicted loss (nats per token)', ylabel='measured - predicted (nats)'
  )
  colours = _colours(r.granularity for r in runs if r.granularity != laws.DENSE)
  colours |= {laws.DENSE: _DENSE_COLOUR}
  rows = []
  for run in sorted(runs, key=lambda run: run.granularity):
    law = dense if run.granularity == laws.DENSE else sparse
    if law:
      predicted = float(laws.loss_of(law, run))
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
  """FLOPs of the curves: those of the runs and a decade more; without runs the paper's."""
  flops = [run.flops for run in runs] or [1e18, 1e25]
  return np.geomspace(min(flops) / 3, max(flops) * 10, 81)


def _last_granularity(law, expansion_rate, runs, flops):
  """The largest granularity to plot: the best at the largest budget, or the runs' largest."""
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
