"""Trains a design in stages: rates, models, predicted models, transition tuning. All resume."""

import json
import pathlib
import subprocess
import sys

from moejax import cli, files, metrics, report, run_folder, runner
from moejax.reproduce import design as design_lib, law
from moejax.reproduce.design import Design
from moejax.transfer import search

_MOST_ADDED = 3  # rates beyond those of a design, where the best is at their end


def train(design: Design, workdir: pathlib.Path) -> int:
  """Trains what is missing; returns an exit code. A stage begins when the one before is whole."""
  for stage in (_find_rates, _train_models, _train_predicted, _tune):
    code = stage(design, workdir)
    if code != cli.OK:
      return code
  return cli.OK


def read_rates(design: Design, workdir: pathlib.Path) -> dict[str, dict]:
  """By model, as far as it is known: its best `rate`, and the loss of every rate `tried`.

  Raises:
    ValueError: rates.json is damaged.
  """
  path = workdir / 'rates.json'
  found = run_folder.read_json(path) if files.exists(path) else {}
  for name, entry in found.items():
    known = isinstance(entry, dict) and isinstance(entry.get('tried'), dict)
    if not known or not metrics.is_number(entry.get('rate')):
      raise ValueError(f'{path}: {name}: expected its rate and those that were tried, got {entry}.')
  single = {m.name: {'rate': m.rates[0], 'tried': {}} for m in design.models if len(m.rates) == 1}
  return found | single


def best_rates(design: Design, workdir: pathlib.Path) -> dict[str, float]:
  return {name: entry['rate'] for name, entry in read_rates(design, workdir).items()}


def _find_rates(design, workdir):
  """Every model's best rate, by short runs of the first seed."""
  known = read_rates(design, workdir)
  models = {model.name: model for model in design.models if model.name not in known}
  size = {'train.steps': str(design.rate_steps)}
  curves = [
    search.Curve({'model': name}, size, sorted(model.rates), [design.seeds[0]])
    for name, model in models.items()
  ]
  if not curves:
    return cli.OK

  def make(curve, rate, seed):
    model = models[curve.variant['model']]
    return design_lib.cell(design, model, rate, seed, design.rate_steps)

  code = search.search(make, curves, workdir, _MOST_ADDED)
  if code == cli.OK:
    for curve in curves:
      tried = {f'{rate:g}': curve.at(rate)[0] for rate in curve.rates}
      known[curve.variant['model']] = {'rate': curve.rates[curve.lowest()], 'tried': tried}
    files.write(workdir / 'rates.json', json.dumps(known, indent=1) + '\n')
  return code


def _train_models(design, workdir, are_predicted=False):
  rates = best_rates(design, workdir)
  models = [model for model in design.models if model.is_predicted == are_predicted]
  runs = (design_lib.runs(design, rates, model) for model in models)
  return runner.run([cell for by in runs for cells in by.values() for cell in cells], workdir)


def _train_predicted(design, workdir):
  if not any(model.is_predicted for model in design.models):
    return cli.OK
  law.predict(design, best_rates(design, workdir), workdir)
  return _train_models(design, workdir, are_predicted=True)


def tuned_runs(design: Design, rates: dict[str, float], tuned: design_lib.Tuned):
  """(name of the run, name of the run that it starts from), for every seed."""
  source = design.source_of(tuned)
  for seed in design.seeds_of(source):
    cell = design_lib.cell(design, source, rates[source.name], seed, tuned.steps)
    yield cell.name.replace(source.name, tuned.name, 1), cell.name


def _tune(design, workdir):
  rates = best_rates(design, workdir)
  for tuned in design.tuned:
    for name, source in tuned_runs(design, rates, tuned):
      if report.has_finished(workdir / name):
        continue
      print(f'transition tuning of {source}', flush=True)
      flags = [f'--from={workdir / source}', f'--workdir={workdir / name}', '--router=token_choice']
      command = [sys.executable, '-m', 'moejax.transition_tuning', *flags]
      code = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
      if code == cli.INTERRUPTED:
        cli.say_how_to_resume()
      if code != cli.OK:
        return code
  return cli.OK
