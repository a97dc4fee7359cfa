"""Compares runs: one plot of their losses, and one table of their results.

python -m moejax.compare --runs=runs/dense,runs/mot --output=compare.png
"""

import json
import pathlib
from typing import NamedTuple

from absl import flags

from moejax import cli, metrics, report

FORMATS = ('.png', '.pdf', '.svg')
_COLUMNS = '{:{width}} {:>10} {:>10} {:>12} {:>11} {:>11} {:>9} {:>9}'


def compare(runs, output):
  """Plots the losses of runs and returns the table of their results.

  Its column `speed-up` is the steps of the first run over the steps that a run takes to reach the
  first run's last validation loss. Runs may be unfinished, interrupted or still training: the table
  shows their newest checkpoint and evaluation.

  Args:
    runs: their folders. A run's name is the shortest end of its path that is unique; a run that is
      given twice counts once.
    output: the file to write; its name ends in one of FORMATS.

  Raises:
    ValueError: a folder holds no run with a checkpoint and an evaluation, the runs are on different
      data, or `output` names no file of this kind.
  """
  return tabulate(read(runs), output)


def tabulate(runs, output):
  """`compare` for runs that `read` returned."""
  if pathlib.Path(output).suffix not in FORMATS:
    raise ValueError(f'--output={output}: expected a name that ends in {", ".join(FORMATS)}.')
  curves = {}
  for run in runs:
    curves[f'{run.name} train'] = metrics.loss_curve(run.folder)
    curves[f'{run.name} validation'] = run.validation
  report.plot_losses(curves, output)
  header = 'run parameters active FLOPs/token tokens validation speed-up seconds'
  width = max(24, *(len(run.name) for run in runs))
  lines = [_COLUMNS.format(*header.split(), width=width)]
  steps, loss = runs[0].validation[-1]
  for run in runs:
    needed = steps_to_reach(loss, run.validation)
    cells = _cells(run.summary, run.validation[-1][1], steps / needed if needed else None)
    lines.append(_COLUMNS.format(run.name, *cells, width=width))
  return '\n'.join(lines)


def notes(runs):
  """What their table means, and which runs are unfinished, for runs that `read` returned."""
  loss = runs[0].validation[-1][1]
  lines = [
    'validation: nats per token; speed-up: how many times fewer steps than '
    f'{runs[0].name} to its last loss, {loss:.4f}'
  ]
  for run in runs:
    if not report.is_finished(run.summary):
      step = run.validation[-1][0]
      lines.append(f'unfinished: {run.name}, evaluated at step {step} of {_steps(run.summary)}')
  return '\n'.join(lines)


class Run(NamedTuple):
  """What is compared of a run."""

  folder: pathlib.Path
  name: str
  summary: dict
  validation: list[tuple[int, float]]  # (step, loss)


def read(folders):
  """The `Run`s in folders, each once; raises ValueError as `compare` does."""
  folders = [pathlib.Path(folder).absolute() for folder in folders]
  folders = list({f.resolve(): f for f in reversed(folders)}.values())[::-1]
  names = {folder: _name(folder, folders) for folder in folders}
  summaries = {folder: _summary(folder) for folder in folders}
  corpora = {folder: (s['corpus'], s['tokenizer']) for folder, s in summaries.items()}
  if len({*corpora.values()}) > 1:
    raise ValueError(
      'the runs were trained on different corpora or tokenizers; their losses are not comparable: '
      + ', '.join(f'{names[folder]} on {"/".join(map(str, c))}' for folder, c in corpora.items())
    )
  runs = []
  for folder in folders:
    validation = metrics.loss_curve(folder, 'validation/loss')
    if not validation:
      raise ValueError(
        f'--runs: {folder} has no validation loss in its metrics.jsonl; evaluations are every '
        'train.eval_interval steps.'
      )
    runs.append(Run(folder, names[folder], summaries[folder], validation))
  return runs


def _name(run, runs):
  """The shortest end of a run's path that no other run's path ends in."""
  for number in range(1, len(run.parts) + 1):
    end = run.parts[-number:]
    if sum(other.parts[-number:] == end for other in runs) == 1:
      return str(pathlib.Path(*end))
  raise AssertionError(f'{run} is given twice')


def steps_to_reach(loss, curve):
  """Steps until a curve of (step, loss) first reaches `loss`, or None if it never does.

  Interpolates linearly between measurements.
  """
  for i, (step, reached) in enumerate(curve):
    if reached <= loss:
      before, higher = curve[i - 1] if i else (step, reached + 1)
      return before + (step - before) * (higher - loss) / (higher - reached)
  return None


def _summary(run):
  path = pathlib.Path(run) / 'summary.json'
  if not path.exists():
    raise ValueError(f'--runs: {run} holds no run with a checkpoint: {path} does not exist.')
  try:
    summary = json.loads(path.read_text())
    _cells(summary, 0.0, None)
    hash((summary['corpus'], summary['tokenizer']))  # what `compare` does with them
    if not report.is_finished(summary):
      _steps(summary)
  except (KeyError, OSError, RecursionError, TypeError, ValueError) as error:
    raise ValueError(
      f'--runs: {path} is incomplete or from another version ({error!r}).'
    ) from error
  return summary


def _steps(summary):
  return summary['config']['train']['steps']


def _cells(summary, loss, speed_up):
  return (
    f'{summary["parameters"]["total"] / 1e6:.2f}M',
    f'{summary["parameters"]["active"] / 1e6:.2f}M',
    f'{summary["flops_per_token"]["model"] / 1e6:.2f}M',
    f'{summary["tokens_seen"] / 1e6:.2f}M',
    f'{loss:.4f}',
    f'{speed_up:.2f}x' if speed_up else 'never',
    f'{summary["seconds"]:.0f}',
  )


def main():
  runs = read(flags.FLAGS.runs)  # once: one of them may be training
  table = tabulate(runs, flags.FLAGS.output)
  print(notes(runs), table, sep='\n\n')
  return cli.OK


if __name__ == '__main__':
  cli.define_paths('runs', None, 'Folders of runs, separated by commas.', required=True)
  cli.define_path('output', 'compare.png', 'The plot to write.')
  cli.run(main, needs_config=False)
