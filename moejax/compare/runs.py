"""The runs that are compared, and the models that they are runs of: one per seed."""

import itertools
import json
import math
import os
import pathlib
import re
import statistics
from typing import NamedTuple

from flax.traverse_util import flatten_dict

from moejax import config as config_lib, files, metrics, report, run_folder

SEEDS = ('train.seed', 'data.seed')
_STEPS = 'train.steps'


class Run(NamedTuple):
  """What is compared of a run."""

  folder: pathlib.Path
  name: str
  summary: dict
  validation: list[tuple[int, float]]  # (step, loss)
  training: list[tuple[int, float]]
  fields: dict  # of its config, flat; {} if the summary has none

  @property
  def loss(self) -> float:
    """Of the evaluation at the end, else the last one."""
    final = (self.summary.get('validation') or {}).get('loss')
    return final if self.is_finished and final is not None else self.validation[-1][1]

  @property
  def seed(self) -> tuple:
    return tuple(self.fields.get(name) for name in SEEDS)

  @property
  def is_finished(self) -> bool:
    return report.is_finished(self.summary)

  def of_training(self, name: str) -> float:
    """What its summary says of training; NaN if it does not."""
    value = (self.summary.get('training') or {}).get(name)
    return math.nan if value is None else value


class Model(NamedTuple):
  """Runs that are the same but for their seeds."""

  name: str
  runs: list[Run]

  @property
  def losses(self) -> dict[tuple, float]:
    """The last validation losses by seed."""
    return {run.seed: run.loss for run in self.runs}

  @property
  def tokens(self) -> float:
    return self.runs[0].summary['tokens_seen']

  @property
  def train_losses(self) -> list[float]:
    """Of the last quarter of the steps."""
    curves = [run.training for run in self.runs if run.training]
    return [metrics.smoothed_loss(curve, curve[-1][0])['loss'] for curve in curves]

  @property
  def summary(self) -> dict:
    """Of its first run, for what is the same in all."""
    return self.runs[0].summary

  @property
  def is_finished(self) -> bool:
    return self.runs[0].is_finished

  @property
  def flops(self) -> float:
    """Of training, routing included."""
    per_token = self.summary['flops_per_token']
    return self.tokens * per_token.get('total', per_token['model'])

  @property
  def clipped(self) -> float:
    """In which part of the steps the gradient was clipped; NaN if that is unknown."""
    return statistics.fmean(run.of_training('clipped') for run in self.runs)

  @property
  def seconds(self) -> float:
    return statistics.fmean(run.summary['seconds'] for run in self.runs)


def read(folders) -> list[Run]:
  """The runs in folders, and in the subfolders of folders without a run; each once.

  Raises:
    ValueError: a folder holds no run with a checkpoint and an evaluation, or the runs are on
      different data.
  """
  folders = [run for folder in folders for run in _runs_in(files.absolute(folder))]
  folders = list({files.real(f): f for f in reversed(folders)}.values())[::-1]
  names = {folder: _name(folder, folders) for folder in folders}
  summaries = {folder: _summary(folder) for folder in folders}
  corpora = {folder: (s['corpus'], s['tokenizer']) for folder, s in summaries.items()}
  if len({*corpora.values()}) > 1:
    raise ValueError(
      'the runs were trained on different corpora or tokenizers; their losses are not comparable: '
      + ', '.join(f'{names[folder]} on {"/".join(map(str, c))}' for folder, c in corpora.items())
    )
  return [_run(folder, names[folder], summaries[folder]) for folder in folders]


def _runs_in(folder):
  """The folder, or its subfolders with a run if it has none itself."""
  if files.exists(folder / 'summary.json'):
    return [folder]
  inside = [folder / name for name in sorted(files.children(folder))]
  inside = [run for run in inside if files.exists(run / 'summary.json')]
  return inside or [folder]  # `_summary` says what is missing


def _name(run, runs):
  """The shortest end of a run's path that no other run's path ends in."""
  for number in range(1, len(run.parts) + 1):
    end = run.parts[-number:]
    if sum(other.parts[-number:] == end for other in runs) == 1:
      return str(pathlib.Path(*end))
  raise AssertionError(f'{run} is given twice')


def _summary(run):
  path = run / 'summary.json'
  if not files.exists(path):
    raise ValueError(f'--runs: {run} holds no run with a checkpoint: {path} does not exist.')
  try:
    summary = files.parse_json(files.read(path))
    per_token = summary['flops_per_token']
    for number in (
      summary['parameters']['total'],
      summary['parameters']['active'],
      per_token['model'],
      per_token.get('total', 1),
      summary['tokens_seen'],
      summary['seconds'],
    ):
      _check(number, metrics.is_number(number) and number >= 0)
    _check(summary['tokens_seen'], summary['tokens_seen'] > 0)
    for part, names in (('validation', ('loss',)), ('training', ('clipped', 'loss'))):
      numbers = dict(summary.get(part) or {})
      for number in map(numbers.get, names):
        _check(number, number is None or metrics.is_number(number))
    dict(summary.get('origin') or {})
    known = config_lib.flat_fields()
    for name, value in flatten_dict(dict(summary.get('config') or {}), sep='.').items():
      _check(value, name not in known or known[name].type is not int or type(value) is int)
    for entry in summary.get('history') or ():
      _ = json.dumps(entry['from_step']), dict(entry['changes'])
    hash((summary['corpus'], summary['tokenizer']))  # what `read` does with them
    if not report.is_finished(summary):
      _ = summary['config']['train']['steps']
  except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
    raise ValueError(
      f'--runs: {path} is incomplete or from another version ({error!r}).'
    ) from error
  return summary


def _check(number, is_right):
  if not is_right:
    raise ValueError(f'{number!r} is not the number that is expected there')


def _run(folder, name, summary):
  validation = metrics.loss_curve(folder, 'validation/loss')
  if not validation:
    raise ValueError(
      f'--runs: {folder} has no validation loss in its metrics.jsonl; evaluations are every '
      'train.eval_interval steps.'
    )
  fields = flatten_dict(summary.get('config') or {}, sep='.')
  return Run(folder, name, summary, validation, metrics.loss_curve(folder), fields)


def models(runs) -> list[Model]:
  """The models of runs: the baseline, which is that of the first run, its other lengths, others.

  A model is what a run learned from and how: not where it computed and what it logged. A seed that
  is there again begins another.
  """
  found, given = {}, set()
  for run in runs:
    key, number = _key(run), 0
    while (key, number, run.seed) in given:
      number += 1
    given.add((key, number, run.seed))
    found.setdefault((key, number), []).append(run)
  groups = [sorted(group, key=lambda run: run.seed) for group in found.values()]
  names = [_common_name([run.name for run in group]) for group in groups]
  named = [
    Model(name if names.count(name) == 1 else group[0].name, group)
    for name, group in zip(names, groups, strict=True)
  ]
  lengths = [model for model in durations(named).values() if model is not named[0]]
  others = [model for model in named[1:] if model not in lengths]
  return [named[0], *(_as_duration(model, named[0]) for model in lengths), *others]


def _as_duration(model, baseline):
  """A baseline of another length, under the baseline's name."""
  return model._replace(name=f'{baseline.name}-{model.tokens / baseline.tokens:.3g}x')


def durations(models: list[Model]) -> dict[float, Model]:
  """The baseline, which is the first model, at every length that it was trained for: by its tokens.

  A warm-up and other numbers of steps may be the same or as much longer. A run that was resumed to
  more steps does not count: its learning rate had decayed in between.
  """
  baseline, *others = models
  found = {baseline.tokens: baseline}
  for model in others:
    if _differ_in_length(baseline.runs[0], model.runs[0]):
      found.setdefault(model.tokens, model)
  return dict(sorted(found.items()))


def have_pairs(a: Model, b: Model) -> bool:
  """Whether runs of the same seed are to be compared: both began alike and saw the same batches.

  Not with fewer than three seeds, whose differences are too few to know their spread.
  """
  same = a.losses.keys() == b.losses.keys() and _data(a.runs[0]) == _data(b.runs[0])
  return same and len(a.runs) > 2


def _key(run):
  """What runs of one model have in common, as text."""
  if not run.fields:
    return str(run.folder)
  parts = _learned(run), run.fields.get(_STEPS), _past(run), run.summary['tokens_seen']
  return json.dumps(parts, sort_keys=True)


def _learned(run):
  """The fields of a run that change what it learns, without its seeds and train.steps."""
  defaults = {name: metrics.plain(f.default) for name, f in config_lib.flat_fields().items()}
  return {name: value for name, value in (defaults | run.fields).items() if _matters(name)}


def _matters(name):
  free = run_folder.RESUMABLE_FIELDS | {*SEEDS}
  return name.startswith(('model.', 'data.', 'optimizer.')) and name not in free


def _past(run):
  """How a run began, and what was changed on resuming it; a fork equals a run trained whole."""
  changes = [
    (entry['from_step'], changed)
    for entry in run.summary.get('history') or ()
    if (changed := {n: v for n, v in entry['changes'].items() if n == _STEPS or _matters(n)})
  ]
  origin = run.summary.get('origin') or {}
  return {} if 'forked_from' in origin else origin, changes


def _data(run):
  return {name: value for name, value in _learned(run).items() if name.startswith('data.')}


def _differ_in_length(a, b):
  """Whether two finished runs learned the same, one for longer."""
  if not (a.fields and b.fields and a.is_finished and b.is_finished and _past(a) == _past(b)):
    return False
  lengths = a.summary['tokens_seen'], b.summary['tokens_seen']
  ours, theirs = _learned(a), _learned(b)
  return ours.keys() == theirs.keys() and all(
    ours[name] == theirs[name]
    or name.endswith('_steps')
    and _in_proportion((ours[name], theirs[name]), lengths)
    for name in ours
  )


def _in_proportion(numbers, lengths):
  """Whether b is as much of its length as a is of its own, but for rounding."""
  (a, b), (of_a, of_b) = numbers, lengths
  return abs(a * of_b / of_a - b) <= 1


def _common_name(names):
  """What names have in common, part by part: 'dense' of 'dense-s0' and 'dense-s1'."""
  split = [re.findall(r'[-_/]*[^-_/]+', name) for name in names]
  shared = [parts[0] for parts in itertools.zip_longest(*split) if len({*parts}) == 1]
  return ''.join(shared).lstrip('-_/') or os.path.commonprefix(names).rstrip('-_/') or names[0]
