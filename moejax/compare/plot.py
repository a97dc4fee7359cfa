"""Loss curves of models against steps, FLOPs and seconds, with the range of their seeds."""

import numpy as np
from matplotlib.figure import Figure

from moejax import report
from moejax.compare.runs import Model


def draw(models: list[Model]) -> Figure:
  """Training loss as lines, their running mean; validation loss as points; ranges over seeds."""
  figure, all_axes = report.new_figures(3, (15, 5))
  curves = []
  for axes, (label, scale) in zip(all_axes, _SCALES.items(), strict=True):
    axes.set_xlabel(label)
    for number, model in enumerate(models):
      factor, style = scale(model) / _steps(model), {'color': f'C{number % 10}'}
      training = [(s, report.running_mean(losses)) for s, losses in _columns(model, 'training')]
      if training:
        steps, mean, low, high = _over_seeds(training)
        axes.plot(steps * factor, mean, linewidth=1.5, **style)
        axes.fill_between(steps * factor, low, high, alpha=0.2, linewidth=0, **style)
        curves += [np.stack([steps, line], axis=1) for line in (low, high)]
      steps, mean, low, high = _over_seeds(_columns(model, 'validation'))
      axes.errorbar(
        steps * factor,
        mean,
        [mean - low, high - mean],
        fmt='o',
        markersize=5,
        markeredgecolor='white',
        linewidth=1,
        label=report.plain_label(f'{model.name}, {_seeds(model)}'),
        **style,
      )
      curves.append(np.stack([steps, mean], axis=1))
  all_axes[0].set_ylabel('loss (nats per token)')
  all_axes[0].set_ylim(*report.loss_limits(curves))
  note = 'lines: training; points: validation; bands and bars: from the lowest to the highest seed'
  legend = {'loc': 'outside lower center', 'ncols': 4, 'frameon': False, 'title': note}
  figure.legend(*all_axes[0].get_legend_handles_labels(), **legend)
  return figure


# By label: how much of it a run of the model takes.
_SCALES = {
  'step': lambda model: _steps(model),
  'training FLOPs, routing included': lambda model: model.flops,
  'seconds': lambda model: model.seconds,
}


def _steps(model):
  run = model.runs[0]
  return run.summary.get('steps') or run.validation[-1][0]


def _seeds(model):
  number = len(model.runs)
  return '1 seed' if number == 1 else f'{number} seeds'


def _columns(model, curve):
  """Steps and losses of every run that has some."""
  found = (getattr(run, curve) for run in model.runs)
  return [np.array(points, float).T for points in found if points]


def _over_seeds(curves):
  """Steps, and the mean, lowest and highest loss of curves, at the steps that all reached."""
  last = min(steps[-1] for steps, _ in curves)
  steps = curves[0][0][curves[0][0] <= last]
  losses = np.stack([np.interp(steps, *curve) for curve in curves])
  return steps, losses.mean(axis=0), losses.min(axis=0), losses.max(axis=0)
