"""Several runs side by side: one plot of their losses, and one table of what they reached.

python -m moejax.compare --runs=runs/dense,runs/mot --output=compare.png
"""

import json
import pathlib

from absl import flags

from moejax import cli, metrics, report

_COLUMNS = '{:24} {:>10} {:>10} {:>12} {:>11} {:>11} {:>9} {:>9}'


def compare(runs, output):
  """Plots the losses of finished runs and returns the table.

  Its column `speed-up` says how many times fewer steps a run takes to the final validation loss of
  the first run than that did.

  Args:
    runs: their folders.
    output: the PNG file to write.

  Raises:
    ValueError: a folder holds no finished run, or the runs are on different data.
  """
  summaries = {pathlib.Path(run): _summary(run) for run in runs}
  corpora = {(s['corpus'], s['tokenizer']) for s in summaries.values()}
  if len(corpora) > 1:
    raise ValueError(
      'the runs were trained on different corpora or tokenizers, so their losses do not compare: '
      + ', '.join(f'{run} on {s["corpus"]}/{s["tokenizer"]}' for run, s in summaries.items())
    )
  curves = {}
  for run in summaries:
    curves[f'{run.name} train'] = metrics.loss_curve(run)
    curves[f'{run.name} validation'] = metrics.loss_curve(run, 'validation/loss')
  report.plot_losses(curves, output)
  header = 'run parameters active FLOPs/token tokens validation speed-up seconds'
  lines = [_COLUMNS.format(*header.split())]
  steps, loss = curves[f'{next(iter(summaries)).name} validation'][-1]
  for run, summary in summaries.items():
    needed = steps_to_reach(loss, curves[f'{run.name} validation'])
    lines.append(_row(run.name, summary, steps / needed if needed else None))
  return '\n'.join(lines)


def steps_to_reach(loss, curve):
  """Steps after which a curve of (step, loss) first is at `loss` or below, or None if it never is.

  Between two measurements the loss is taken to fall evenly.
  """
  for i, (step, reached) in enumerate(curve):
    if reached <= loss:
      before, higher = curve[i - 1] if i else (step, reached + 1)
      return before + (step - before) * (higher - loss) / (higher - reached)
  return None


def _summary(run):
  path = pathlib.Path(run) / 'summary.json'
  if not path.exists():
    raise ValueError(f'--runs: {run} holds no finished run: {path} does not exist.')
  return json.loads(path.read_text())


def _row(name, summary, speed_up):
  return _COLUMNS.format(
    name,
    f'{summary["parameters"]["total"] / 1e6:.2f}M',
    f'{summary["parameters"]["active"] / 1e6:.2f}M',
    f'{summary["flops_per_token"]["model"] / 1e6:.2f}M',
    f'{summary["tokens_seen"] / 1e6:.2f}M',
    f'{summary["validation"]["loss"]:.4f}',
    f'{speed_up:.2f}x' if speed_up else 'never',
    f'{summary["seconds"]:.0f}',
  )


def main():
  print(compare(flags.FLAGS.runs, flags.FLAGS.output))
  return cli.OK


if __name__ == '__main__':
  cli.define_paths('runs', None, 'Folders of finished runs, with commas between.', required=True)
  cli.define_path('output', 'compare.png', 'The plot to write.')
  cli.run(main, needs_config=False)
