"""The law of fine-grained experts: fitted to the models of a design, and tested on larger ones."""

import dataclasses
import json
import pathlib

import numpy as np

from moejax import cli, config as config_lib, files, runner, seeds
from moejax.reproduce import design as design_lib
from moejax.reproduce.criteria import Criterion, Finding, Missing, every, verdict
from moejax.scaling_laws import collect, fit, grid, laws, predictions, report as law_report

_FIT, _PREDICTIONS = 'fit.json', 'predictions.json'
_TIMES = 2  # the most that the error of a prediction may be of the error of the fit


def predict(design: design_lib.Design, rates: dict[str, float], workdir: pathlib.Path) -> None:
  """Fits the law to the finished runs, and writes down what it predicts; does so once."""
  if files.exists(workdir / _PREDICTIONS):
    return
  cells = {
    is_predicted: [
      cell
      for model in design.models
      if model.is_predicted == is_predicted
      for of_seeds in design_lib.runs(design, rates, model).values()
      for cell in (of_seeds[:1] if is_predicted else of_seeds)
    ]
    for is_predicted in (False, True)
  }
  with cli.waiting_for('fitting the law'):
    runs, _ = collect.collect([workdir / cell.name for cell in cells[False]])
    fits = fit.fit_moe_and_dense(*collect.by_kind(runs), held_out=0.0)
  law_report.save(fits, workdir / _FIT)
  collect.write_table(runs, workdir / 'runs.csv')
  law = law_report.load(workdir / _FIT)
  entries = [_law_cell(cell, law) for cell in cells[True]]
  found = predictions.write(entries, workdir / _FIT, workdir / _PREDICTIONS, cli.portable_command())
  print('\n'.join(predictions.describe(found)), flush=True)


def _law_cell(cell, law) -> grid.Cell:
  """A run in the quantities of laws.py, with its predicted loss."""
  config = config_lib.resolve(cli.config_of(cell.arguments[2:]))
  model = config.model
  is_dense = 'moe' not in model.kinds
  d_model, blocks = model.d_model, sum(repeats for _, repeats in model.blocks)
  granularity = laws.DENSE if is_dense else model.moe.granularity
  rate = 1 if is_dense else model.moe.expansion_rate
  tokens = cell.steps * config.data.tokens_per_step
  params = laws.counted_params(law[rate], d_model, blocks, rate)
  own = {f.name: getattr(cell, f.name) for f in dataclasses.fields(runner.Cell)}
  return grid.Cell(
    **own,
    d_model=d_model,
    blocks=blocks,
    heads=model.num_heads,
    expansion_rate=rate,
    granularity=granularity,
    tokens=tokens,
    active_params=laws.active_params(d_model, blocks),
    predicted_loss=float(laws.loss(law[rate], params, tokens, granularity)),
  )


def describe(workdir: pathlib.Path) -> list[str]:
  """Lines of the report: the fit, and the predictions beside what was measured."""
  if not files.exists(workdir / _PREDICTIONS):
    return []
  rows, _, missing = predictions.judge(
    workdir / _PREDICTIONS, [workdir], workdir / 'predictions.md'
  )
  columns = [name.split(' (')[0] for name in predictions.COLUMNS]
  return [
    f'| {" | ".join(columns)} |',
    f'|{"---|" * len(columns)}',
    *rows,
    *(f'\n{name}: no finished run yet' for name in missing),
  ]


def extrapolates(models: tuple[design_lib.Model, ...], paper: str) -> Criterion:
  """Whether predictions of these models were as good as promised, for dense and sparse alike."""
  text = f'the error of predictions of larger models is below {_TIMES}x that of the fit'
  keys = [(m.name, steps) for m in models if m.is_predicted for steps in m.steps]

  def check(results):
    if not files.exists(results.workdir / _PREDICTIONS):
      raise Missing('no predictions yet')
    fits = json.loads(files.read(results.workdir / _FIT))
    record = json.loads(files.read(results.workdir / _PREDICTIONS))['predictions']
    missed = {}
    for (name, steps), entry in zip(keys, record, strict=True):
      losses = results.losses(name, steps).values()
      rate = f'{entry["cell"]["expansion_rate"]:g}'
      missed.setdefault(rate, []).append([loss - entry['loss'] for loss in losses])
    return every(_error(rate, fits[rate]['rmse'], found) for rate, found in missed.items())

  return Criterion(text, paper, check)


def _error(rate, rmse, missed):
  """The root mean square of misses, lists by seed, against the error of a fit."""
  rms = lambda means: float(np.sqrt(np.mean(np.square(means))))
  known = [seeds.noise(*missed)] * len(missed)
  error, most = seeds.of_means(rms, missed, known), _TIMES * rmse
  text = f'{"dense" if rate == "1" else "sparse"}: {error:.4f}, of the fit {rmse:.4f}'
  return Finding(verdict(error.value < most, error.low > most), text)
