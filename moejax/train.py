"""Training: a run from its start to its end, and the loop that measures, evaluates and saves.

A run is a function of its config: the data and the noise of a step follow from the seeds and the
step. Only states that are finite and have a finite loss are saved.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable

import jax

from moejax import (
  cli,
  files,
  goodput,
  metrics as metrics_lib,
  profiling,
  progress,
  report,
  run_folder,
  sharding,
)
from moejax.distributed import Interrupt, is_process_0
from moejax.metrics import Diverged
from moejax.optimizer import shared_steps
from moejax.results import finish, plot, summary
from moejax.rewind import rewind
from moejax.start import Run, in_memory, is_finished, prepare, resume, set_up
from moejax.step import eval_step, is_finite

_STEPS_TO_ESTIMATE = 5  # after which the time of a run is known


def train(
  config, workdir, start=None, summarize: Callable[[], dict] = dict, origin=None, began=None
):
  """Trains a config in a folder, resuming from its last checkpoint if there is one.

  Args:
    config: a ConfigDict.
    workdir: the folder.
    start: makes the first state instead of `init_state`: `start(run, abstract_state)` returns one
      with the shardings of `abstract_state`, at any step; it is evaluated and saved before the
      first step.
    summarize: called at the end; returns further entries of the summary.
    origin: choices of `start`, as JSON has them; a run resumes only with the same.
    began: when the program did, by time.monotonic, for the time it took to start; default: now.

  Returns:
    The exit code: done, or interrupted with everything saved.

  Raises:
    ValueError: the config, the data or the folder cannot be used; nothing was written.
    Diverged: something is not finite; the last good checkpoint is kept.
    RuntimeError: there is no room for checkpoints, or one cannot be saved.
  """
  ledger = goodput.Ledger(began)
  run = prepare(config, files.path(workdir))
  run.ledger, run.origin = ledger, origin
  with (
    jax.set_mesh(run.mesh),
    run_folder.lock(run.workdir),
    contextlib.closing(run_folder.checkpoints(run.workdir, run.run_config)) as run.checkpoints,
  ):
    run.memory = in_memory(run)
    step = resume(run)
    if is_finished(run):
      if not files.exists(run.workdir / 'loss.png'):  # it was killed before it wrote that
        plot(run)
      if run.memory:
        run.memory.clear()
      print(f'{workdir} is already finished, at step {step}; nothing is changed')
      return cli.OK
    try:
      set_up(run, step, start)
      with contextlib.ExitStack() as stack, Interrupt() as interrupt:
        stack.callback(lambda: run.writer.close())  # the one it has then
        if start and step is None:
          run.is_evaluated = progress.evaluate(run, interrupt)
          _save(run)
        is_done = loop(run, interrupt) and finish(run, summarize, interrupt)
        if not is_done:
          run.checkpoints.wait()
          run.ledger.lap('checkpoint')
          plot(run)
          run.writer.close()
          run.record('other')
          print(f'interrupted at step {run.step} of {run.run_config.train.steps}; saved')
        if run.memory:
          run.memory.clear()
        return cli.OK if is_done else cli.INTERRUPTED
    except Diverged as diverged:
      raise Diverged(_advice(diverged, run)) from diverged


def loop(run: Run, interrupt):
  """Trains to the last step, or saves and returns False if interrupted.

  Raises:
    Diverged: the state or its loss is not finite, and was not saved; or too many updates in a row
      were not, and the state before them was.
  """
  train, shared = run.run_config.train, shared_steps(run.run_config)
  last = lambda: run.step == train.steps
  profile = profiling.parse(train.profile_steps) if is_process_0() else range(0)
  with contextlib.closing(profiling.Profiler(profile, run.workdir / 'profile')) as profiler:
    if not run.is_evaluated:
      run.is_evaluated = progress.evaluate(run, interrupt)
    while run.step < train.steps and not interrupt.reached(run.step):
      with profiler.step(run.step + 1):
        local = run.loader.batch(run.step + run.watch.passed)
        batch = sharding.place_batch(local, run.mesh)
        run.ledger.lap('step' if run.averager.is_computing() else 'input')
        run.state, measured = run.train_step(run.state, batch, run.now(run.step))
        run.step += 1
        run.averager.add(run.step, measured, functools.partial(run.watch.see, batch))
      if run.step == run.first_step + 1:
        run.averager.restart_clock()  # the first step also allocates, loads and tunes programs
      if run.step == run.first_step + _STEPS_TO_ESTIMATE:
        progress.estimate(run)
      if run.step % train.log_interval == 0 or last():
        progress.log(run, run.averager.means())
        run.averager = metrics_lib.MetricAverager()
      run.ledger.lap('step')
      pause = time.monotonic()
      if profiler.is_complete():
        run.averager.read()
        profiler.close()
        run.ledger.lap('other')
      if run.step % train.eval_interval == 0 or last():
        run.is_evaluated = progress.evaluate(run, interrupt)
      is_due = run.step % train.checkpoint_interval == 0 or run.step == shared or last()
      stores = [run.checkpoints] * is_due
      if run.memory and run.step % train.memory_checkpoint == 0 and not last():
        stores.append(run.memory)
      if stores:
        run.averager.read()
      if run.watch.spike and rewind(run):
        continue
      if run.watch.in_row >= train.max_skipped and not last():
        _give_up(run)
      if stores:
        _save(run, *stores)
      run.averager.skip(time.monotonic() - pause)
    if not last():
      run.averager.read()
      if not (run.watch.spike and rewind(run)):
        _save(run)
  return last() and run.is_evaluated


def _give_up(run: Run):
  """Saves the state, which is that after the last good update, and raises Diverged."""
  skipped = run.watch.in_row
  run.averager.read()  # the step that was dispatched meanwhile
  if run.watch.good_batch is not None:  # else there is nothing new
    with contextlib.suppress(Diverged):  # its loss is not finite
      _save(run)
  raise Diverged(
    f'training diverged at step {run.step}: {skipped} updates in a row were not finite, and were '
    f'skipped (python -m moejax.replay --step={run.watch.incidents[-1]["step"]} shows where)'
  )


def check_health(run: Run):
  """Raises Diverged unless the state and its loss on the last good batch are finite.

  Without a good batch in this process, the state is still that which it began with.
  """
  run.averager.read()
  batch, good = run.watch.good_batch, bool(is_finite(run.state))
  if batch is None:
    good = good and (run.step == 0 or run.first_step > 0)
  elif good:
    accumulation = run.run_config.optimizer.accumulation
    batch = batch | {'counted': batch['segments'] > 0}  # as evaluations have it
    nats, *_ = eval_step(run.run_config.model, accumulation, run.state['params'], batch)
    good = math.isfinite(nats)
  if not good:
    raise Diverged(f'training diverged: after step {run.step} the state or its loss is not finite')


def _save(run: Run, *stores):
  """Saves the state, by default in the folder of the run."""
  check_health(run)
  run.ledger.lap('checkpoint')
  run.writer.sync()
  metadata = run.describe() | {
    'window': run.averager.totals(),
    'watch': run.watch.saved(),
    'is_evaluated': run.is_evaluated,
  }
  for store in stores or [run.checkpoints]:
    store.save(run.step, run.state, run.loader, metadata)
  if is_process_0() and stores != (run.memory,):
    with run.optional('summary.json'):
      report.write_summary(run.workdir, summary(run) | {'finished': False})
  run.record('checkpoint')


def _advice(diverged, run: Run):
  """One sentence: what happened, what was kept, what to do."""
  step = run.checkpoints.latest_step()
  kept = 'no checkpoint was saved' if step is None else f'the checkpoint of step {step} is good'
  first = ' or model.init_scale' if run.step == 1 else ''
  return f'{diverged}; {kept}: lower optimizer.peak_lr{first}, or lengthen optimizer.warmup_steps.'
