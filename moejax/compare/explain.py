"""What the tables of a comparison mean, in words, and what is missing."""

import itertools
import math
import pathlib
import shlex

import numpy as np

from moejax import buckets, report, seeds
from moejax.compare import runs as runs_lib, speedup
from moejax.compare.runs import SEEDS, Model, Run

LONGER = (1.5, 2, 3)  # lengths of the baseline that matched schedules are measured with


def notes(runs: list[Run]) -> str:
  """The lines below the tables of runs that `read` returned."""
  models = runs_lib.models(runs)
  return '\n'.join([*_explain(models), *_missing(models)])


def explanation(runs: list[Run]) -> str:
  """Those of `notes` that do not say what to train next."""
  return '\n'.join(_explain(runs_lib.models(runs)))


def _explain(models):
  return itertools.chain(_meaning(models), _leverages(models), _warnings(models))


def _meaning(models):
  yield f'Losses in nats per token; ± and (to): the interval of {seeds.CONFIDENCE:.0%} over seeds.'
  if extents := {extent for run in _all(models) if (extent := _extent(run))}:
    yield f'validation: {" or ".join(sorted(extents))}.'
  yield f'training: the mean of the last quarter of the steps{_seen(models)}.'
  if found := seeds.noise(*([*model.losses.values()] for model in models)):
    yield (
      f'noise of seeds: {found.deviation:.4f} nats, their standard deviation within a model '
      f'({found.freedom} degrees of freedom).'
    )
  if len(models) > len(runs_lib.durations(models)):
    yield f'The baseline is {models[0].name}, the model of the first run.'
    yield 'lead: its validation loss after as many tokens minus that of the model.'
    yield (
      'matched: how many times more tokens the baseline needs to the loss of the model, from runs '
      'of several lengths that each decay their learning rate.'
    )
    yield (
      'mid-schedule: the measure of arXiv:2401.04081: where in its run the smoothed training loss '
      "of the model falls to the baseline's last. Nearly blind in short runs, because only the "
      'baseline has had its decay by then.'
    )
    yield 'none: within the noise of seeds.'


def _leverages(models):
  """Efficiency leverage, where final losses of dense models are above and below that of another."""
  finished = [model for model in models if model.is_finished]
  dense = {model.flops: model for model in finished if _kinds(model) == {'attention', 'mlp'}}
  places = sorted(dense)
  samples = [[run.loss for run in dense[flops].runs] for flops in places]
  known = seeds.noise(*samples)
  for model in finished if len(dense) > 1 else ():
    if not _kinds(model) or model in dense.values():
      continue

    def leverage(means, flops=model.flops):
      return speedup.tokens_to_reach(means[0], places, means[1:]) / flops

    losses = [run.loss for run in model.runs]
    found = seeds.of_means(leverage, [losses, *samples], [None, *[known] * len(samples)])
    if 0 < found.value < math.inf:
      yield (
        f'efficiency leverage of {model.name}: {found:.2f}, the FLOPs of dense with its loss over '
        'its own (arXiv:2507.17702), between the compared dense models.'
      )


def _kinds(model):
  """The sublayers of a model; empty if its runs do not say."""
  blocks = model.runs[0].fields.get('model.blocks') or ()
  return {kind for pattern, _ in blocks for names in pattern for kind in names.split('+')}


def _extent(run):
  validation = run.summary.get('validation') or {}
  return report.extent(validation) if 'whole_split' in validation else ''


def _seen(models):
  """Whether training losses are fair: as long as no text was seen twice."""
  epochs = np.max([run.of_training('epochs') for run in _all(models)])
  if np.isnan(epochs):
    return ''
  return ', of text not seen before' if epochs <= 1 else f', of text seen up to {epochs:.2g} times'


def _warnings(models):
  for run in _all(models):
    if not run.is_finished:
      yield (
        f'unfinished: {run.name}, evaluated at step {run.validation[-1][0]} of '
        f'{run.summary["config"]["train"]["steps"]}'
      )
  found = ((run.summary.get('validation') or {}).get('tokens') for run in _all(models))
  sizes = {size for size in found if size}
  if len(sizes) > 1:
    yield (
      f'warning: validation losses are averages over {", ".join(map(str, sorted(sizes)))} tokens; '
      'those over different text are not comparable. moejax.evaluate measures any run again.'
    )
  single = [model.name for model in models if len(model.runs) == 1]
  if single:
    yield (
      f'one seed: {", ".join(single)}. A difference may be noise: train other seeds with '
      '--config.train.seed=1 and so on, and compare all of them.'
    )


def _missing(models):
  """How to measure matched schedules, if the baseline has one length."""
  baseline = models[0]
  lengths = runs_lib.durations(models)
  if len(models) > len(lengths) == 1 and baseline.is_finished and baseline.runs[0].fields:
    yield (
      'matched: not measured. Train the baseline for '
      + ', '.join(f'{times}x' for times in LONGER)
      + ' the steps, and give the folder to --runs as well:'
    )
    yield f'  {_command(baseline)}'


def _command(baseline: Model) -> str:
  """Trains the baseline for longer, with all its seeds."""
  folder = baseline.runs[0].folder
  if not buckets.is_bucket(folder) and folder.is_relative_to(here := pathlib.Path.cwd()):
    folder = folder.relative_to(here)
  steps = baseline.runs[0].fields['train.steps']
  lengths = ','.join(str(round(times * steps)) for times in LONGER)
  seeds_of = {name: [run.seed[i] for run in baseline.runs] for i, name in enumerate(SEEDS)}
  varied = {name: given for name, given in seeds_of.items() if len({*given}) > 1}
  words = ['python', '-m', 'moejax.sweep', f'--config=configs/run.py:{folder}']
  workdir = folder.with_name(f'{baseline.name.replace("/", "-")}-longer')
  words += [f'--workdir={workdir}', '--grid', f'train.steps={lengths}']
  for name, given in varied.items():
    words += ['--zip' if len(varied) > 1 else '--grid', f'{name}={",".join(map(str, given))}']
  return shlex.join(words)


def _all(models):
  return [run for model in models for run in model.runs]
