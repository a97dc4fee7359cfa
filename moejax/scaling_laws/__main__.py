"""Scaling laws: training plans, grids of runs, fits and plots.

python -m moejax.scaling_laws plan --flops=1e21
python -m moejax.scaling_laws grid --preset=laptop --output=grid.json
python -m moejax.scaling_laws run --grid=grid.json --workdir=runs/grid
python -m moejax.scaling_laws fit runs/grid --output=law
python -m moejax.scaling_laws judge runs/larger --predictions=larger.predictions.json
python -m moejax.scaling_laws plot --coefficients=law/fit.json --runs=law/runs.csv --output=law
"""

import json
import math
import pathlib
from typing import Any

from absl import flags

from moejax import cli, text

_FLAGS = flags.FLAGS


def _define_coefficients(default: str | None = 'printed'):
  cli.define_path(
    'coefficients',
    default,
    'printed, four_digits or joint (published laws), or a fit.json; default of plan: printed, and '
    'joint with --memory.',
  )


class _FiniteParser(flags.FloatParser):
  def convert(self, argument):
    if not math.isfinite(value := super().convert(argument)):
      raise ValueError('expected a finite number')
    return value


class _SizeParser(flags.ArgumentParser):
  syntactic_help = 'a size'

  def parse(self, argument):
    return text.num_bytes(argument)


def _define_number(name, default, meaning, lower_bound=None, upper_bound=None):
  parser = _FiniteParser(lower_bound, upper_bound)
  flags.DEFINE(parser, name, default, meaning, serializer=flags.ArgumentSerializer())


def _define_expansion_rate(what):
  _define_number('expansion_rate', None, f'Expansion rate {what}; 1 is dense.', lower_bound=1)


def _define_plan():
  _define_coefficients(default=None)
  _define_expansion_rate('of the model to train; default: the largest with coefficients')
  _define_number('flops', None, 'Training FLOPs.')
  _define_number('target_loss', None, 'Target loss in nats per token.')
  _define_number('params', None, 'Active parameters: 7e9 is the "64x7B" of the paper.')
  _define_number('tokens', None, 'Training tokens.')
  meaning = 'Of serving the model, such as 16GiB: also finds the best expansion rate.'
  flags.DEFINE(_SizeParser(), 'memory', None, meaning, serializer=flags.ArgumentSerializer())
  meaning = (
    'Compare models by time: folders of runs, files of moejax.aot --json, v5e:16x16, h100x64.'
  )
  cli.define_paths('runtime', [], meaning)
  cli.define_path('chart', None, 'Of --runtime: a PNG file; beside it, all numbers as CSV.')
  flags.DEFINE_string('chip', None, 'Choose a machine with this chip: v5e, v5p, A100, H100, ...')
  _define_number('days', None, 'The machine must end in so many days, not only be large enough.', 0)
  flags.DEFINE_bool('estimate', False, 'Do not compile for it, even if libtpu is installed.')
  _define_number('mfu', None, 'Instead: hours on one chip at this model FLOPs utilization.')
  flags.DEFINE_enum('recipe', 'paper', ['paper', 'laptop'], 'Training recipe of the model.')
  flags.DEFINE_bool('json', False, 'Print JSON.')


def plan():
  """Finds the best model and training duration for a budget."""
  from moejax.scaling_laws import grid, plan as plan_lib, plots, report, runtime

  targets = {
    'flops': _FLAGS.flops,
    'loss': _FLAGS.target_loss,
    'active_params': _FLAGS.params,
    'tokens': _FLAGS.tokens,
  }
  target = {name: value for name, value in targets.items() if value is not None}
  if len(target) != 1 or min(target.values()) <= 0:
    raise ValueError('give one of --flops, --target_loss, --params and --tokens, above zero.')
  of_chip = {'--mfu': _FLAGS.mfu, '--days': _FLAGS.days}
  if given := [name for name, value in of_chip.items() if value is not None and not _FLAGS.chip]:
    raise ValueError(f'{given[0]} is of a chip: give --chip too, such as --chip=v5e.')
  if _FLAGS.chart and not _FLAGS.runtime:
    raise ValueError('--chart is of --runtime: give that too, such as --runtime=v5e:16x16.')
  name = _FLAGS.coefficients or ('joint' if _FLAGS.memory else 'printed')
  coefficients = report.load(name)
  recipe = {'paper': grid.PAPER, 'laptop': grid.LAPTOP}[_FLAGS.recipe]
  memory = _FLAGS.memory
  if memory and _FLAGS.expansion_rate is None:
    if len(coefficients) == 1:
      raise ValueError(
        f'--memory compares numbers of experts, and --coefficients={name} has one only: give '
        '--expansion_rate, or the joint law (--coefficients=joint; from runs: fit --law=joint).'
      )
    choices = plan_lib.in_memory(coefficients, target, memory, recipe)
    rate = min(choices, key=lambda rate: choices[rate].loss)
  else:
    rate = report.choose_rate(coefficients, _FLAGS.expansion_rate)
  compared = coefficients if _FLAGS.expansion_rate is None else {rate: coefficients[rate]}
  result = plan_lib.make(
    coefficients,
    rate,
    target,
    recipe,
    report.fitted_runs(name, rate),
    _FLAGS.chip,
    memory,
    runtime.clock(_FLAGS.runtime, compared) if _FLAGS.runtime else None,
    mfu=_FLAGS.mfu,
    days=_FLAGS.days,
    compiles=not _FLAGS.estimate,
  )
  print(json.dumps(result, indent=2) if _FLAGS.json else plan_lib.describe(result))
  if _FLAGS.chart:
    plots.by_the_clock(result['runtime'], _FLAGS.chart)
  return cli.OK


def _define_grid():
  _define_coefficients(default=None)
  flags.DEFINE_string('preset', 'laptop', 'Grid: paper, laptop or laptop_larger.')
  cli.define_path('output', 'grid.json', 'Output file.')


def grid():
  """Writes a grid of runs; with --coefficients=fit.json, also a file of predictions."""
  from moejax.scaling_laws import grid as grid_lib, laws, predictions, report

  coefficients = report.load(_FLAGS.coefficients) if _FLAGS.coefficients else None
  cells = grid_lib.make(_FLAGS.preset, coefficients)
  output = pathlib.Path(_FLAGS.output)
  predicted = []
  if coefficients and _FLAGS.coefficients not in laws.PUBLISHED:
    path = output.with_suffix('.predictions.json')
    command = cli.portable_command()
    predicted = predictions.write(cells, _FLAGS.coefficients, path, command)
  grid_lib.write(cells, output)
  total = sum(cell.flops for cell in cells)
  tokens = sum(cell.tokens for cell in cells)
  print(f'{len(cells)} cells, {total:.3g} FLOPs, {text.short(tokens)} tokens, in {_FLAGS.output}')
  if predicted:
    print('\n'.join(predictions.describe(predicted)))
  else:
    for cell in cells:
      if cell.predicted_loss:
        print(f'{cell.name:24} predicted loss {cell.predicted_loss:.4f}')
  return cli.OK


def _define_judge():
  cli.define_path('predictions', 'grid.predictions.json', 'File of predictions, from `grid`.')
  cli.define_path('page', 'predictions.md', 'Page of hits and misses to append to.')


def judge(paths):
  """Compares predictions with the runs that have arrived, and appends to a page."""
  from moejax.scaling_laws import predictions

  if not paths:
    raise ValueError('judge needs folders of runs: judge runs/larger --predictions=FILE.')
  folders = [cli.path(path, bucket=True) for path in paths]
  rows, new, missing = predictions.judge(_FLAGS.predictions, folders, _FLAGS.page)
  print('\n'.join(rows))
  for name in missing:
    print(f'{name}: no finished run yet')
  print(f'{len(new)} new rows in {_FLAGS.page}')
  return cli.OK


def _define_run():
  cli.define_path('grid', 'grid.json', 'Grid file written by `grid`.')
  flags.DEFINE_string('workdir', None, 'Folder for all runs.', required=True)
  flags.DEFINE_list('seeds', ['0'], 'Seeds of initialisation; every cell is trained with each.')
  flags.DEFINE_string(
    'launch',
    None,
    'Train nothing; print this template for each cell, with its {name} and quoted {command}.',
  )


def run():
  """Trains a grid, or prints commands to train it on other machines."""
  from moejax import files, runner
  from moejax.scaling_laws import grid as grid_lib

  seeds = cli.integers('seeds', _FLAGS.seeds)
  cells = grid_lib.with_seeds(grid_lib.read(_FLAGS.grid), seeds)
  if _FLAGS.launch is None:
    return runner.run(cells, files.absolute(cli.path(_FLAGS.workdir, bucket=True)))
  print('\n'.join(runner.launch_commands(cells, _FLAGS.workdir, _FLAGS.launch)))
  return cli.OK


def _define_fit():
  _define_expansion_rate('of sparse runs in CSV files without this column')
  flags.DEFINE_enum(
    'law',
    'moe',
    ['moe', 'dense', 'chinchilla', 'joint'],
    'moe: fit the sparse runs, then the dense runs with its c. joint: fit dense runs and those of '
    'any number of experts, of G = 1, together. Others: fit the dense runs.',
  )
  _define_number('c', None, 'Fixed value of c; default: fit c.', lower_bound=0)
  flags.DEFINE_integer('starts', 8, 'Starting points per optimization.', lower_bound=1)
  flags.DEFINE_integer('repeats', 100, 'Bootstrap samples.', lower_bound=0)
  _define_number('held_out', 0.2, 'Fraction of the runs held out for validation.', 0, 0.9)
  _define_number('penalty', 0.0, 'Weight of squared coefficients; 0: none.', lower_bound=0)
  cli.define_path('output', 'law', 'Output folder for fit.json and runs.csv.')


def fit(paths):
  """Fits a law to runs."""
  from moejax.scaling_laws import collect, fit as fit_lib, report

  if not paths:
    raise ValueError('fit needs folders of runs or CSV files: fit runs/grid --output=law.')
  folders = [cli.path(path, bucket=True) for path in paths]
  runs, excluded = collect.collect(folders, _FLAGS.expansion_rate or 0)
  names = ('c', 'starts', 'repeats', 'held_out', 'penalty')
  options: Any = {name: _FLAGS[name].value for name in names}
  fits = {}
  with cli.waiting_for('fitting'):
    if _FLAGS.law == 'joint':
      runs, others = collect.unsplit(runs)
      excluded |= others
      fits[0] = fit_lib.fit(runs, 'joint', **options)
    elif _FLAGS.law == 'moe':
      fits = fit_lib.fit_moe_and_dense(*collect.by_kind(runs), **options)
    else:
      fits[1] = fit_lib.fit(collect.by_kind(runs)[1], _FLAGS.law, **options)
  folder = pathlib.Path(_FLAGS.output)
  report.save(fits, folder / 'fit.json')
  used = {name for one in fits.values() for name in one.used}
  collect.write_table([run for run in runs if run.name in used], folder / 'runs.csv')
  print(report.describe(fits, excluded))
  print(f'written to {folder}: fit.json, runs.csv')
  return cli.OK


def _define_plot():
  _define_coefficients()
  _define_expansion_rate('of the sparse law to plot; default: the largest with coefficients')
  cli.define_paths('runs', [], 'Runs to plot too: folders or CSV files.', bucket=True)
  cli.define_path('output', 'law', 'Output folder.')


def plot():
  """Plots a law and the runs it was fitted to."""
  from moejax.scaling_laws import collect, plots, report

  coefficients = report.load(_FLAGS.coefficients)
  rate = report.choose_rate(coefficients, _FLAGS.expansion_rate)
  runs, _ = collect.collect(_FLAGS.runs, rate)
  for path in plots.plot(coefficients, rate, runs, _FLAGS.output):
    print(path)
  return cli.OK


# Commands import what they need, so --help is fast.
COMMANDS = {
  'plan': cli.Command(_define_plan, plan),
  'grid': cli.Command(_define_grid, grid),
  'run': cli.Command(_define_run, run),
  'judge': cli.Command(_define_judge, judge, takes_arguments=True),
  'fit': cli.Command(_define_fit, fit, takes_arguments=True),
  'plot': cli.Command(_define_plot, plot),
}

if __name__ == '__main__':
  cli.run_command(COMMANDS)
