"""What a run logs and prints on its way: progress lines, the validation curve, the time left."""

import math
import statistics

from moejax import cli, metrics as metrics_lib, report, start_page
from moejax.distributed import is_process_0
from moejax.evaluate import evaluation
from moejax.metrics import Diverged
from moejax.start import Run


def estimate(run: Run):
  """Prints how long the rest of the run will take, if that is worth knowing."""
  train, seconds = run.run_config.train, run.averager.means().get('seconds_per_step', 0)
  evaluations = math.ceil(train.steps / train.eval_interval) - run.step // train.eval_interval
  batches = evaluations * train.eval_batches
  batches += train.final_eval_batches or getattr(run.eval_loader, 'num_batches', 0)
  forward = batches / 3  # of a step each
  if (left := seconds * (train.steps - run.step + forward)) > 10:
    print(start_page.time_left(left), flush=True)


def log(run: Run, means):
  """Logs the means of the metrics since the last log line, and prints the progress line."""
  train, speeds = run.run_config.train, {}
  seconds = means.get('seconds_per_step')  # of no step yet, if the first one is logged
  if seconds:
    speeds['tokens_per_second'] = run.run_config.data.tokens_per_step / seconds
  if seconds and run.peak_flops:
    flops_per_second = speeds['tokens_per_second'] * run.flops_per_token['model']
    speeds['mfu'] = flops_per_second / run.peak_flops
  dropped = [value for name, value in means.items() if name.startswith('moe/dropped/')]
  run.ledger.lap('step')
  seen = {'skipped': run.watch.skipped, 'wall_seconds': run.ledger.wall}
  run.writer.write(run.step, means | speeds | seen)
  print(
    report.progress_line(
      step=run.step,
      steps=train.steps,
      loss=means.get('loss', math.nan),  # if every update was skipped
      grad_norm=means.get('grad_norm'),
      dropped=statistics.fmean(dropped) if dropped and run.run_config.model.dropless() else None,
      seconds_left=(train.steps - run.step) * seconds if seconds else None,
      **speeds,
    ),
    flush=True,
  )


class _Stopped(Exception):
  """An evaluation was interrupted."""


def evaluate(run: Run, interrupt=None) -> bool:
  """A point of the validation curve; False if it was interrupted."""
  if not evaluate_batches(run, run.run_config.train.eval_batches, 'validation', interrupt):
    return False
  result, part = report.describe(run.eval_result), report.part(run.eval_result)
  print(f'step {run.step}: validation {result}, {part}', flush=True)
  return True


def evaluate_batches(run: Run, num_batches, prefix, interrupt=None) -> bool:
  """Evaluates the first batches of validation, None: all, and logs the results.

  Returns False, and logs nothing, if `interrupt`, a distributed.Interrupt, comes meanwhile.
  """

  def stop():
    if interrupt and interrupt.has_come():
      raise _Stopped

  try:
    with cli.waiting_for('evaluating'):
      done = evaluation(
        run.run_config.model,
        run.state['params'],
        run.eval_loader,
        num_batches,
        run.mesh,
        run.run_config.optimizer.accumulation,
        before_batch=stop,
      )
  except _Stopped:
    run.ledger.lap('evaluation')
    return False
  # The previous process may have written it at the step it stopped at.
  if not run.step == run.first_step in dict(metrics_lib.loss_curve(run.workdir, f'{prefix}/loss')):
    measured, details = metrics_lib.flatten_aux(done.aux), metrics_lib.by_expert(done.aux)
    run.writer.write(run.step, done.result | measured, prefix=prefix, details=details)
  run.eval_result = done.result | done.extent
  if is_process_0() and 'moe/load' in done.aux:
    with run.optional('router.png'):
      report.plot_router(done.aux['moe/load'], run.workdir / 'router.png')
  run.ledger.lap('evaluation')
  if not math.isfinite(run.eval_result['loss']):
    raise Diverged(f'training diverged: after step {run.step} the validation loss is not finite')
  return True
