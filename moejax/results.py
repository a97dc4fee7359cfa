"""The results of a run: the summary, the plot of its losses, a sample."""

import math
import time
from collections.abc import Callable

from moejax import cli, flops, metrics as metrics_lib, progress, report, text
from moejax.distributed import is_process_0
from moejax.generate import continuations
from moejax.start import Run


def finish(run: Run, summarize: Callable[[], dict] = dict, interrupt=None) -> bool:
  """Writes the summary and the plot, and prints a sample and where the results are.

  Returns False, having written nothing, if its evaluation was interrupted.
  """
  run.checkpoints.wait()
  run.record('checkpoint')
  batches = run.run_config.train.final_eval_batches or None
  if not progress.evaluate_batches(run, batches, 'final', interrupt):
    return False
  results = summary(run) | summarize()
  if is_process_0():  # before anything else can fail
    report.write_summary(run.workdir, results)
  sample = _sample(run)
  if not is_process_0():
    return True
  if sample:
    print(f'sample: {run.run_config.train.sample_prompt}{sample}')
  plot(run)
  run.writer.close()
  run.record('other')
  report.write_summary(run.workdir, results | run.describe() | {'sample': sample})
  print(report.describe_training(results['training']))
  print(f'final validation {report.describe(run.eval_result)}')
  print(f'averaged over {report.extent(run.eval_result)}')
  print(run.ledger.describe())
  print(f'written to {run.workdir}: summary.json, loss.png, metrics.jsonl, checkpoints/')
  return True


def plot(run: Run):
  """Writes loss.png."""
  if not is_process_0():
    return
  names = {'train': 'loss', 'validation': 'validation/loss'}
  with run.optional('loss.png'):
    curves = {label: metrics_lib.loss_curve(run.workdir, name) for label, name in names.items()}
    report.plot_losses(curves, run.workdir / 'loss.png')


def _sample(run: Run):
  """Text from the model, '' if there is none."""
  model, train, tokenizer = run.run_config.model, run.run_config.train, run.run_config.tokenizer
  room = model.max_length - len(tokenizer.encode(train.sample_prompt))
  length = min(train.sample_length, room)
  if length < 1:
    return ''
  with run.optional('sample'), cli.waiting_for('sampling'):
    return continuations(model, run.state['params'], tokenizer, [train.sample_prompt], length)[0]
  return ''


def _training(run: Run, losses):
  """What the log lines say about the training of a run, see `metrics.smoothed_loss`."""
  sequences = getattr(run.loader, 'num_sequences', None)  # unknown of a stream
  seen = (run.step + run.watch.passed) * run.run_config.data.batch_size
  clipped = metrics_lib.loss_curve(run.workdir, 'clipped')
  return metrics_lib.smoothed_loss(losses, run.step) | {
    'epochs': seen / sequences if sequences else None,
    'clipped': metrics_lib.mean_over_steps(clipped, run.run_config.train.log_interval),
  }


def summary(run: Run):
  """What a run has found so far, for summary.json."""
  losses = metrics_lib.loss_curve(run.workdir)
  return run.describe() | {
    'parameters': flops.param_counts(run.run_config.model),
    'flops_per_token': run.flops_per_token,
    'mesh': dict(run.mesh.shape),
    'finished': True,
    'steps': run.step,
    'tokens_seen': run.step * run.run_config.data.tokens_per_step,
    'resumed_from': run.first_step,
    'train_loss': losses[-1][1] if losses else math.nan,
    'training': _training(run, losses),
    'validation': run.eval_result,
    'sample': '',
    'date': text.utc(time.time()),
    'commit': report.git_commit(),
    'versions': report.versions(),
  }
