"""Training: the loop that measures, saves and resumes.

A run is a function of its config: data by step from its seed, noise by step from the same.
"""

import contextlib
import math
import pathlib
import time

import jax

from moejax import (
  cli,
  config as config_lib,
  data,
  flops,
  metrics as metrics_lib,
  report,
  run_folder,
  sharding,
  step as step_lib,
)
from moejax.checkpoint import Checkpoints
from moejax.distributed import Interrupt, leads
from moejax.evaluate import evaluate
from moejax.generate import continuations


def train(config, workdir, start=None):
  """Runs a config in a folder, from its last checkpoint if there is one.

  Args:
    config: a ConfigDict.
    workdir: the folder.
    start: what a run without a checkpoint begins with: `start(run, abstract_state)` returns a state
      with the shardings of `abstract_state`, at any step; it is evaluated and saved before the
      first step. None: `init_state`.

  Returns:
    The exit code: done, or interrupted with everything saved.

  Raises:
    ValueError: the config, the data or the folder cannot be used; nothing was written.
  """
  workdir = pathlib.Path(workdir)
  stages = config_lib.resolve(config)
  mesh = sharding.make_mesh(stages.mesh)
  config_lib.check_mesh(stages, mesh)
  run_folder.check_same_run(config, workdir)
  part = sharding.process_part(mesh, stages.data.batch_size)
  loader = data.make_loader(stages.data, 'train', **part)
  eval_loader = data.make_loader(stages.data, 'validation', **part)
  checkpoints = Checkpoints(run_folder.checkpoint_dir(workdir), stages.train.keep_checkpoints)
  if stages.model.leaks():
    print(
      'warning: model.moe.group_by = sequence with expert_choice lets tokens see the future: the '
      'loss is too good, and generation does not reach it. model.moe.group_by = position is causal.'
    )
  with Interrupt() as interrupt, jax.set_mesh(mesh), contextlib.closing(checkpoints):
    run = Run(config, stages, mesh, workdir, loader, eval_loader, checkpoints, start)
    with contextlib.closing(run.writer):
      finished = run.loop(interrupt)
    if finished:
      run.finish()
      return cli.OK
  print(f'interrupted at step {run.step}; the same command goes on from there')
  return cli.INTERRUPTED


class Run:
  """A run in progress: its compiled step, its state, and where its numbers go."""

  def __init__(self, config, stages, mesh, workdir, loader, eval_loader, checkpoints, start):
    self.stages, self.mesh, self.workdir = stages, mesh, workdir
    self.loader, self.eval_loader, self.checkpoints = loader, eval_loader, checkpoints
    self.metadata = {
      'config': config.to_dict(),
      'corpus': loader.fingerprint,
      'tokenizer': stages.tokenizer.fingerprint,
    }
    self.window = metrics_lib.MetricAverager()
    latest = checkpoints.latest_step()
    self.state = self._restore_or_init(latest, start)
    self.step = int(self.state['step'])
    if leads():
      run_folder.write(config, workdir, loader.fingerprint)
    self.writer = metrics_lib.make_writer(workdir, self.step)
    self.eval_result = {}
    if start and latest is None:
      self._evaluate()
      self._save()
    logged = metrics_lib.loss_curve(workdir)  # of a run that is finished, nothing more will be
    self.train_loss = logged[-1][1] if logged else math.nan
    self.started, self.first_step = time.monotonic(), self.step
    self.tokens_per_step = stages.data.batch_size * stages.data.sequence_length
    self.flops_per_token = flops.training_flops_per_token(stages.model, stages.data.sequence_length)
    peak = flops.peak_flops(jax.devices()[0], stages.model.dtype)
    self.peak_flops = (peak or flops.measured_peak_flops(stages.model.dtype)) * (
      1 if jax.default_backend() == 'cpu' else jax.device_count()
    )

  def _restore_or_init(self, step, start):
    init = step_lib.fresh_state(self.stages)
    abstract = sharding.abstract(init, self.mesh)
    self.checkpoints.make_writable(
      sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    )
    metadata = {}
    if step is not None:
      metadata = self.checkpoints.metadata(step)
      self._check_same_text(metadata)
    started = time.monotonic()
    self.train_step = step_lib.lower_train_step(self.stages, abstract, self.mesh).compile()
    print(f'compiled the training step in {time.monotonic() - started:.1f} s', flush=True)
    if step is None and start:
      return start(self, abstract)
    if step is None:
      return jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()
    print(f'resuming from step {step}')
    self.window = metrics_lib.MetricAverager(**metadata.get('window', {}))
    loader = self.loader if metadata['corpus'] else None  # None: moejax.convert has read no text
    return self.checkpoints.restore(step, abstract, loader, self.metadata['config'])

  def _check_same_text(self, metadata):
    run_folder.check_tokenizer(metadata, self.stages.tokenizer)
    if metadata['corpus'] not in (None, self.loader.fingerprint):
      raise ValueError(
        f'--workdir={self.workdir}: its run was trained on corpus {metadata["corpus"]}, but '
        f'data.source = {self.stages.data.source!r} now gives {self.loader.fingerprint} (another '
        'Python version, or changed files). Restore the corpus, or choose another folder.'
      )

  def loop(self, interrupt):
    """Trains to the last step, or saves and returns False if interrupted."""
    train = self.stages.train
    while self.step < train.steps and not interrupt.reached(self.step):
      batch = sharding.place_batch(self.loader.batch(self.step), self.mesh)
      self.state, measured = self.train_step(self.state, batch)
      self.step += 1
      self.window.add(measured)
      if self.step % train.log_interval == 0 or self.step == train.steps:
        self._log(self.window.means())
        self.window = metrics_lib.MetricAverager()
      pause = time.monotonic()
      if self.step % train.eval_interval == 0 or self.step == train.steps:
        self._evaluate()
      if self.step % train.checkpoint_interval == 0 or self.step == train.steps:
        self._save()
      self.window.skip(time.monotonic() - pause)
    finished = self.step >= train.steps
    if not finished:
      self._save()
    elif not self.eval_result:  # resumed after the last step
      self._evaluate()
    return finished

  def _save(self):
    metadata = self.metadata | {'window': self.window.totals()}
    self.checkpoints.save(self.step, self.state, self.loader, metadata)

  def _log(self, means):
    self.train_loss = means['loss']
    if not math.isfinite(self.train_loss):
      raise RuntimeError(
        f'The loss became {self.train_loss} before step {self.step}. The last checkpoint is good; '
        'lower optimizer.peak_lr, or lengthen optimizer.warmup_steps.'
      )
    seconds = means['seconds_per_step']
    speed = self.tokens_per_step / seconds
    means |= {
      'tokens_per_second': speed,
      'mfu': speed * self.flops_per_token['model'] / self.peak_flops,
    }
    self.writer.write(self.step, means)
    print(
      report.progress_line(
        step=self.step,
        steps=self.stages.train.steps,
        loss=means['loss'],
        grad_norm=means['grad_norm'],
        tokens_per_second=speed,
        mfu=means['mfu'],
        dropped=_mean_of(means, 'moe/dropped/') if self.stages.model.dropless() else None,
        seconds_left=(self.stages.train.steps - self.step) * seconds,
      ),
      flush=True,
    )

  def _evaluate(self):
    self.eval_result, aux = evaluate(
      self.stages.model,
      self.state['params'],
      self.eval_loader,
      self.stages.train.eval_batches,
      self.mesh,
    )
    measured = self.eval_result | metrics_lib.flatten_aux(aux)
    self.writer.write(self.step, measured, prefix='validation')
    if leads() and 'moe/load' in aux:
      report.plot_router(aux['moe/load'], self.workdir / 'router.png')
    print(f'step {self.step}: validation {report.describe(self.eval_result)}', flush=True)

  def finish(self):
    """Writes the summary and the plot, and prints a sample and where everything is."""
    sample = self._sample()
    if not leads():
      return
    curves = {
      'train': metrics_lib.loss_curve(self.workdir),
      'validation': metrics_lib.loss_curve(self.workdir, 'validation/loss'),
    }
    report.plot_losses(curves, self.workdir / 'loss.png')
    report.write_summary(self.workdir, self._summary(sample))
    if sample:
      print(f'sample: {self.stages.train.sample_prompt}{sample}')
    print(f'final validation {report.describe(self.eval_result)}')
    print(f'written to {self.workdir}: summary.json, loss.png, metrics.jsonl, checkpoints/')

  def _sample(self):
    train = self.stages.train
    room = self.stages.model.max_length - len(self.stages.tokenizer.encode(train.sample_prompt))
    length = min(train.sample_length, room)
    if length < 1:
      return ''
    args = (self.stages.model, self.state['params'], self.stages.tokenizer)
    return continuations(*args, [train.sample_prompt], length)[0]

  def _summary(self, sample):
    return {
      'config': self.metadata['config'],
      'corpus': self.metadata['corpus'],
      'tokenizer': self.metadata['tokenizer'],
      'parameters': flops.param_counts(self.stages.model),
      'flops_per_token': self.flops_per_token,
      'steps': self.step,
      'tokens_seen': self.step * self.tokens_per_step,
      'seconds': time.monotonic() - self.started,
      'resumed_from': self.first_step,
      'train_loss': self.train_loss,
      'validation': self.eval_result,
      'sample': sample,
      'commit': report.git_commit(),
      'versions': report.versions(),
    }


def _mean_of(means, prefix):
  values = [value for name, value in means.items() if name.startswith(prefix)]
  return sum(values) / len(values)
