"""Training: set-up, the loop that measures, evaluates and saves, and the results at the end.

A run is a function of its config: the data and the noise of a step follow from the seeds and the
step. Only states that are finite and have a finite loss are saved.
"""

import contextlib
import dataclasses
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from moejax import (
  cli,
  config as config_lib,
  data,
  estimate,
  flops,
  goodput,
  imports,
  metrics as metrics_lib,
  profiling,
  report,
  run_folder,
  sharding,
  start_page,
  trackers,
)
from moejax.checkpoint import changed_fields, one_line_errors
from moejax.distributed import Interrupt, is_process_0
from moejax.evaluate import evaluation
from moejax.generate import continuations
from moejax.metrics import Diverged
from moejax.optimizer import shared_steps
from moejax.step import (
  eval_step,
  fresh_state,
  is_finite,
  jit_train_step,
  lower_eval_step,
  lower_train_step,
  make_clock,
  make_state,
)

_STEPS_TO_ESTIMATE = 5  # after which the time of a run is known


@dataclasses.dataclass
class Run:
  """A run in progress."""

  config: Any  # the ConfigDict
  run_config: Any  # what it resolves to
  mesh: Any
  workdir: pathlib.Path
  loader: Any
  eval_loader: Any
  checkpoints: Any = None
  origin: dict | None = None  # choices that made its first state and are not in the config
  history: list = dataclasses.field(default_factory=list)  # changed fields, and from which step
  step: int = 0  # optimizer steps done
  first_step: int = 0  # where this process began
  ledger: goodput.Ledger = dataclasses.field(default_factory=goodput.Ledger)
  train_step: Any = None
  now: Any = None  # of `step.make_clock`
  state: Any = None
  batch: Any = None  # of the last step
  averager: Any = dataclasses.field(default_factory=metrics_lib.MetricAverager)
  writer: Any = None
  eval_result: dict = dataclasses.field(default_factory=dict)
  flops_per_token: dict = dataclasses.field(default_factory=dict)
  peak_flops: float | None = None  # of all devices together, if it is known

  def describe(self):
    """The metadata of a checkpoint, also part of the summary."""
    return {
      'config': self.config.to_dict(),
      'corpus': self.loader.fingerprint,
      'tokenizer': self.run_config.tokenizer.fingerprint,
      'history': self.history,
      'origin': self.origin,
      'seconds': self.ledger.training,
      'goodput': dict(self.ledger.seconds),
    }


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
    RuntimeError: training diverged; the last good checkpoint is kept.
  """
  ledger = goodput.Ledger(began)
  run = prepare(config, pathlib.Path(workdir))
  run.ledger, run.origin = ledger, origin
  with (
    Interrupt() as interrupt,
    jax.set_mesh(run.mesh),
    run_folder.lock(run.workdir),
    contextlib.closing(run_folder.checkpoints(run.workdir, run.run_config)) as run.checkpoints,
  ):
    step = resume(run)
    if is_finished(run):
      print(f'{workdir} is already finished, at step {step}; nothing is changed')
      return cli.OK
    try:
      set_up(run, step, start)
      with contextlib.closing(run.writer):
        if not loop(run, interrupt):
          run.checkpoints.wait()
          run.ledger.lap('checkpoint')
          _plot(run)
          run.writer.close()
          _record(run, 'other')
          print(f'interrupted at step {run.step} of {run.run_config.train.steps}; saved')
          return cli.INTERRUPTED
        finish(run, summarize)
    except Diverged as diverged:
      raise RuntimeError(_advice(diverged, run)) from diverged
  return cli.OK


def prepare(config, workdir):
  """A Run whose config, mesh and data are checked; nothing is written."""
  run_config = config_lib.resolve(config)
  imports.name_task(run_config.data.task)
  with cli.waiting_for('initialising the devices'):
    run_config = estimate.placed(run_config, jax.devices())
    mesh = sharding.make_mesh(run_config.mesh)
  config_lib.check_mesh(run_config, mesh)
  _check_prompt(run_config)
  trackers.check_installed(run_config.train.trackers)
  run_folder.check_same_run(config, workdir)
  part = sharding.process_part(mesh, run_config.data.batch_size)
  with cli.waiting_for('reading the corpus'):
    loader = data.make_loader(run_config.data, 'train', **part)
    eval_loader = data.make_loader(run_config.data, 'validation', **part)
  with tempfile.TemporaryDirectory() as folder:
    loader.batch(0)
    loader.save(pathlib.Path(folder))  # fails now rather than at the first checkpoint
  if run_config.model.leaks():
    print(f'warning: {run_config.model.leaks()}')
  return Run(config, run_config, mesh, workdir, loader, eval_loader)


def _check_prompt(run_config):
  """Raises ValueError unless the prompt of the final sample fits into the context."""
  train, context = run_config.train, run_config.model.max_length
  length = len(run_config.tokenizer.encode(train.sample_prompt))
  if train.sample_length and not 0 < length < context:
    raise ValueError(
      f'train.sample_prompt = {train.sample_prompt!r} has {length} tokens of data.tokenizer = '
      f'{run_config.data.tokenizer!r}; expected 1 to {context - 1} (data.sequence_length). Change '
      'it, or set train.sample_length = 0.'
    )


def resume(run):
  """Restores the history of a run from its newest checkpoint; returns its step, None without one.

  Raises:
    ValueError: the run cannot resume with this config, tokenizer or corpus.
  """
  run_folder.check_same_run(run.config, run.workdir)  # again, now that the folder is locked
  step = run.checkpoints.latest_step()
  if step is None:
    run.ledger.resume(run.workdir, 0, {})
    return None
  metadata = run.checkpoints.metadata(step)
  run_folder.check_tokenizer(metadata, run.run_config.tokenizer)
  imported = metadata['corpus'] is None  # by moejax.convert, which reads no text
  if not imported and metadata['corpus'] != run.loader.fingerprint:
    raise ValueError(
      f'--workdir={run.workdir}: its run was trained on corpus {metadata["corpus"]}, but '
      f'data.source = {run.run_config.data.source!r} now gives {run.loader.fingerprint} (another '
      'Python version, or changed files). Restore the corpus, or choose another folder.'
    )
  saved = run_folder.from_saved(metadata['config'], f'checkpoint {step}')
  run_folder.check_resume(saved, run.config, step, run.workdir, imported)
  origin = metadata.get('origin', run.origin)
  if run.origin and origin != run.origin:
    raise ValueError(
      f'--workdir={run.workdir} holds a run that began with {origin}, not {run.origin}; choose '
      'another folder.'
    )
  run.origin = origin
  run.history = metadata.get('history', [])
  if step == run.run_config.train.steps:
    run.config, run.run_config = (
      saved,
      dataclasses.replace(run.run_config, train=config_lib.TrainConfig(**saved.train)),
    )
  elif changes := changed_fields(saved.to_dict(), run.config.to_dict()):
    run.history = [*run.history, {'from_step': step, 'changes': changes}]
  run.step = run.first_step = step
  seconds = metadata.get('goodput') or {'other': metadata.get('seconds', 0.0)}  # of older versions
  run.ledger.resume(run.workdir, step, seconds)
  with one_line_errors(f'--workdir={run.workdir}: cannot read the log window of checkpoint {step}'):
    run.averager = metrics_lib.MetricAverager(**metadata.get('window', {}))
  return step


def is_finished(run):
  """Whether an earlier process trained all steps and wrote the summary."""
  steps = run.run_config.train.steps
  summary = report.read_summary(run.workdir)
  return run.step == steps == summary.get('steps') and report.is_finished(summary)


def set_up(run, step, start=None):
  """Compiles the steps, initialises or restores the state at `step`, and opens the metrics files.

  Raises:
    ValueError: the state is not finite, or there is no space for a checkpoint.
    Diverged: the loss of the state that `start` made is not finite.
  """
  init = fresh_state(run.run_config)
  abstract = sharding.abstract(init, run.mesh)
  num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
  run.checkpoints.check_writable(num_bytes)
  run.ledger.lap('start_up')
  page = start_page.page(run.run_config, run.mesh, abstract, run.loader, run.workdir)
  print(page, flush=True)
  run.train_step, run.now = _compile(run, abstract), make_clock(run.run_config)
  run.ledger.lap('compile')
  if step is not None:
    print(f'resuming from step {step}')
    loader = run.loader if run.checkpoints.metadata(step)['corpus'] else None  # None: imported
    with cli.waiting_for('restoring the state'):
      run.state = run.checkpoints.restore(step, abstract, loader, run.config.to_dict())
    run.ledger.lap('restore')
  else:
    with cli.waiting_for('initialising the state'):
      run.state = start(run, abstract) if start else make_state(init, abstract)
    run.step = run.first_step = int(run.state['step'])
  if not is_finite(run.state):
    if step is None:
      raise ValueError('the parameters of the first step are not finite; lower model.init_scale.')
    raise ValueError(
      f'workdir: checkpoint {run_folder.checkpoint_dir(run.workdir)}/{step} holds numbers that are '
      'not finite. Delete it to resume from the previous one.'
    )
  if is_process_0() and run.step < run.run_config.train.steps:
    run_folder.write(run.config, run.workdir, run.loader.fingerprint)
  run.writer = metrics_lib.make_writer(
    run.workdir, run.step, run.run_config.train.trackers, run.config.to_dict()
  )
  run.flops_per_token = flops.training_flops_per_token(
    run.run_config.model, run.run_config.data.sequence_length
  )
  peak = flops.peak_flops(jax.devices()[0], run.run_config.model.dtype)
  run.peak_flops = peak and peak * jax.device_count()
  _record(run, 'start_up')
  if start and step is None:
    _evaluate(run)
    _save(run)


def _compile(run, abstract_state):
  """Compiles the training step, and the evaluation step too: an interrupt leaves no time for it."""
  args = run.run_config, abstract_state, run.mesh
  jax_config: Any = jax.config
  if jax_config.jax_disable_jit:  # for debugging
    return jit_train_step(*args)
  with cli.waiting_for('compiling the training and the evaluation step'):
    compiled = lower_train_step(*args).compile()
    lower_eval_step(run.run_config, abstract_state['params'], run.mesh).compile()
  return compiled


def _record(run, phase):
  """Counts the time since the last lap as `phase`, and keeps the ledger for a resuming process."""
  run.ledger.lap(phase)
  if is_process_0():
    run.ledger.write(run.workdir, run.step)


def loop(run, interrupt):
  """Trains to the last step, or saves and returns False if interrupted.

  Raises:
    Diverged: something is not finite; it was not saved.
  """
  train, shared = run.run_config.train, shared_steps(run.run_config)
  last = lambda: run.step == train.steps
  profile = profiling.parse(train.profile_steps) if is_process_0() else range(0)
  with contextlib.closing(profiling.Profiler(profile, run.workdir / 'profile')) as profiler:
    while run.step < train.steps and not interrupt.reached(run.step):
      with profiler.step(run.step + 1):
        run.batch = sharding.place_batch(run.loader.batch(run.step), run.mesh)
        run.ledger.lap('step' if run.averager.is_computing() else 'input')
        run.state, measured = run.train_step(run.state, run.batch, run.now(run.step))
        run.step += 1
        run.averager.add(run.step, measured)
      if run.step == run.first_step + 1:
        run.averager.restart_clock()  # the first step also allocates, loads and tunes programs
      if run.step == run.first_step + _STEPS_TO_ESTIMATE:
        _estimate(run)
      if run.step % train.log_interval == 0 or last():
        _log(run, run.averager.means())
        run.averager = metrics_lib.MetricAverager()
      run.ledger.lap('step')
      pause = time.monotonic()
      if profiler.is_complete():
        run.averager.read()
        profiler.close()
        run.ledger.lap('other')
      if run.step % train.eval_interval == 0 or last():
        _evaluate(run)
      if run.step % train.checkpoint_interval == 0 or run.step == shared or last():
        _save(run)
      run.averager.skip(time.monotonic() - pause)
    if not last():
      _save(run)
  return last()


def check_health(run):
  """Raises Diverged unless the state and its loss on the last batch are finite."""
  run.averager.read()
  good = bool(is_finite(run.state))
  if good and run.batch is not None:
    accumulation = run.run_config.optimizer.accumulation
    batch = run.batch | {'counted': run.batch['segments'] > 0}  # as evaluations have it
    nats, *_ = eval_step(run.run_config.model, accumulation, run.state['params'], batch)
    good = math.isfinite(nats)
  if not good:
    raise Diverged(f'training diverged: after step {run.step} the state or its loss is not finite')


def _save(run):
  check_health(run)
  run.ledger.lap('checkpoint')
  metadata = run.describe() | {'window': run.averager.totals()}
  run.checkpoints.save(run.step, run.state, run.loader, metadata)
  if is_process_0():
    report.write_summary(run.workdir, _summary(run) | {'finished': False})
  _record(run, 'checkpoint')


def _advice(diverged, run):
  """One sentence: what happened, what was kept, what to do."""
  step = run.checkpoints.latest_step()
  kept = 'no checkpoint was saved' if step is None else f'the checkpoint of step {step} is good'
  first = ' or model.init_scale' if run.step == 1 else ''
  return f'{diverged}; {kept}: lower optimizer.peak_lr{first}, or lengthen optimizer.warmup_steps.'


def _estimate(run):
  """Prints how long the rest of the run will take, if that is worth knowing."""
  train, seconds = run.run_config.train, run.averager.means().get('seconds_per_step', 0)
  evaluations = math.ceil(train.steps / train.eval_interval) - run.step // train.eval_interval
  batches = evaluations * train.eval_batches
  batches += train.final_eval_batches or getattr(run.eval_loader, 'num_batches', 0)
  forward = batches / 3  # of a step each
  if (left := seconds * (train.steps - run.step + forward)) > 10:
    print(start_page.time_left(left), flush=True)


def _log(run, means):
  train, speeds = run.run_config.train, {}
  seconds = means.get('seconds_per_step')  # of no step yet, if the first one is logged
  if seconds:
    speeds['tokens_per_second'] = run.run_config.data.tokens_per_step / seconds
  if seconds and run.peak_flops:
    flops_per_second = speeds['tokens_per_second'] * run.flops_per_token['model']
    speeds['mfu'] = flops_per_second / run.peak_flops
  dropped = [value for name, value in means.items() if name.startswith('moe/dropped/')]
  run.ledger.lap('step')
  run.writer.write(run.step, means | speeds | {'wall_seconds': run.ledger.wall})
  print(
    report.progress_line(
      step=run.step,
      steps=train.steps,
      loss=means['loss'],
      grad_norm=means['grad_norm'],
      dropped=statistics.fmean(dropped) if run.run_config.model.dropless() else None,
      seconds_left=(train.steps - run.step) * seconds if seconds else None,
      **speeds,
    ),
    flush=True,
  )


def _evaluate(run):
  """A point of the validation curve."""
  _evaluate_batches(run, run.run_config.train.eval_batches, 'validation')
  result, part = report.describe(run.eval_result), report.part(run.eval_result)
  print(f'step {run.step}: validation {result}, {part}', flush=True)


def _evaluate_batches(run, num_batches, prefix):
  """Evaluates the first batches of validation, None: all, and logs the results."""
  with cli.waiting_for('evaluating'):
    done = evaluation(
      run.run_config.model,
      run.state['params'],
      run.eval_loader,
      num_batches,
      run.mesh,
      run.run_config.optimizer.accumulation,
    )
  # The previous process may have written it at the step it stopped at.
  if not run.step == run.first_step in dict(metrics_lib.loss_curve(run.workdir, f'{prefix}/loss')):
    run.writer.write(run.step, done.result | metrics_lib.flatten_aux(done.aux), prefix=prefix)
  run.eval_result = done.result | done.extent
  if is_process_0() and 'moe/load' in done.aux:
    report.plot_router(done.aux['moe/load'], run.workdir / 'router.png')
  run.ledger.lap('evaluation')
  if not math.isfinite(run.eval_result['loss']):
    raise Diverged(f'training diverged: after step {run.step} the validation loss is not finite')


def finish(run, summarize: Callable[[], dict] = dict):
  """Writes the summary and the plot, and prints a sample and where the results are."""
  run.checkpoints.wait()
  _record(run, 'checkpoint')
  _evaluate_batches(run, run.run_config.train.final_eval_batches or None, 'final')
  summary = _summary(run) | summarize()
  if is_process_0():  # before anything else can fail
    report.write_summary(run.workdir, summary)
  sample = _sample(run)
  if not is_process_0():
    return
  if sample:
    print(f'sample: {run.run_config.train.sample_prompt}{sample}')
  _plot(run)
  run.writer.close()
  _record(run, 'other')
  report.write_summary(run.workdir, summary | run.describe() | {'sample': sample})
  print(report.describe_training(summary['training']))
  print(f'final validation {report.describe(run.eval_result)}')
  print(f'averaged over {report.extent(run.eval_result)}')
  print(run.ledger.describe())
  print(f'written to {run.workdir}: summary.json, loss.png, metrics.jsonl, checkpoints/')


def _plot(run):
  """Writes loss.png; a failure only prints a warning, for the checkpoint is what counts."""
  if not is_process_0():
    return
  names = {'train': 'loss', 'validation': 'validation/loss'}
  curves = {label: metrics_lib.loss_curve(run.workdir, name) for label, name in names.items()}
  try:
    report.plot_losses(curves, run.workdir / 'loss.png')
  except Exception as error:
    print(f'warning: no loss.png: {type(error).__name__}: {error}')


def _sample(run):
  """Text from the model, '' if there is none; a failure only prints a warning."""
  model, train, tokenizer = run.run_config.model, run.run_config.train, run.run_config.tokenizer
  room = model.max_length - len(tokenizer.encode(train.sample_prompt))
  length = min(train.sample_length, room)
  if length < 1:
    return ''
  try:
    with cli.waiting_for('sampling'):
      return continuations(model, run.state['params'], tokenizer, [train.sample_prompt], length)[0]
  except Exception as error:
    print(f'warning: no sample: {type(error).__name__}: {error}')
    return ''


def _training(run, losses):
  """What the log lines say about the training of a run, see `metrics.smoothed_loss`."""
  sequences = getattr(run.loader, 'num_sequences', None)  # unknown of a stream
  seen = run.step * run.run_config.data.batch_size
  clipped = metrics_lib.loss_curve(run.workdir, 'clipped')
  return metrics_lib.smoothed_loss(losses, run.step) | {
    'epochs': seen / sequences if sequences else None,
    'clipped': metrics_lib.mean_over_steps(clipped, run.run_config.train.log_interval),
  }


def _summary(run):
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
    'commit': report.git_commit(),
    'versions': report.versions(),
  }
