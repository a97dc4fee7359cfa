"""The start of a run: everything before its first step is checked, restored or compiled."""

import contextlib
import dataclasses
import math
import pathlib
import tempfile
from typing import Any

import jax

from moejax import (
  cli,
  config as config_lib,
  data,
  determinism,
  estimate,
  files,
  flops,
  goodput,
  imports,
  metrics as metrics_lib,
  report,
  run_folder,
  sharding,
  start_page,
  trackers,
)
from moejax.checkpoint import one_line_errors
from moejax.differences import changed_fields
from moejax.distributed import is_process_0
from moejax.memory_checkpoint import MemoryCheckpoints
from moejax.step import (
  fresh_state,
  is_finite,
  jit_train_step,
  lower_eval_step,
  lower_train_step,
  make_clock,
  make_state,
)
from moejax.watch import Watch

# Of the metadata of a checkpoint: types by field. `recall` sees to the others.
_METADATA: dict[str, Any] = {
  'config': dict,
  'corpus': str | None,
  'tokenizer': str,
  'history': list,
  'origin': dict | None,
  'seconds': float | int,
  'goodput': dict,
  'is_evaluated': bool,
}
_LATER = _METADATA.keys() - {'config', 'corpus', 'tokenizer'}  # which older versions lack


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
  memory: Any = None  # a `memory_checkpoint.MemoryCheckpoints`
  store: Any = None  # that of the two in which it found its newest checkpoint
  origin: dict | None = None  # choices that made its first state and are not in the config
  history: list = dataclasses.field(default_factory=list)  # changed fields, and from which step
  step: int = 0  # optimizer steps done
  is_evaluated: bool = True  # as far as the curve has points at this step
  first_step: int = 0  # where this process began
  ledger: goodput.Ledger = dataclasses.field(default_factory=goodput.Ledger)
  train_step: Any = None
  now: Any = None  # of `step.make_clock`
  state: Any = None
  watch: Any = None  # a `watch.Watch`
  averager: Any = dataclasses.field(default_factory=metrics_lib.MetricAverager)
  writer: Any = None
  eval_result: dict = dataclasses.field(default_factory=dict)
  flops_per_token: dict = dataclasses.field(default_factory=dict)
  peak_flops: float | None = None  # of all devices together, if it is known
  missing: set = dataclasses.field(default_factory=set)  # files that could not be written

  def describe(self):
    """The metadata of a checkpoint, also part of the summary."""
    return {
      'config': self.config.to_dict(),
      'corpus': self.loader.fingerprint,
      'tokenizer': self.run_config.tokenizer.fingerprint,
      'history': self.history,
      'incidents': self.watch.incidents,
      'origin': self.origin,
      'seconds': self.ledger.training,
      'goodput': dict(self.ledger.seconds),
    }

  def record(self, phase):
    """Counts the time since the last lap as `phase`; a resuming process reads the ledger."""
    self.ledger.lap(phase)
    if is_process_0():
      with self.optional('goodput.json'):
        self.ledger.write(self.workdir, self.step)

  @contextlib.contextmanager
  def optional(self, what):
    """A context whose failure only prints a warning, once: no run ends for a picture or a log."""
    try:
      yield
    except Exception as error:
      if what not in self.missing:
        print(f'warning: no {what}: {type(error).__name__}: {error}', flush=True)
      self.missing.add(what)


def prepare(config, workdir):
  """A Run whose config, mesh and data are checked; nothing is written."""
  run_config = config_lib.resolve(config)
  imports.name_task(run_config.data.task)
  if run_config.train.deterministic:
    determinism.require()
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
  watch = Watch(run_config.train)
  return Run(config, run_config, mesh, workdir, loader, eval_loader, watch=watch)


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


def checked(metadata, where):
  """The metadata of a checkpoint, if they are as `Run.describe` and `train` make them.

  Raises:
    ValueError: a field is missing that every version has written, or has another type.
  """
  for name, kind in _METADATA.items():
    is_good = isinstance(metadata.get(name), kind) or name in _LATER.difference(metadata)
    if name == 'goodput' and is_good:
      is_good = all(map(metrics_lib.is_number, metadata.get(name, {}).values()))
    if not is_good:
      raise ValueError(
        f'{where}: {name} in its metadata.json is {str(metadata.get(name))[:40]!r}, which no '
        'version of moejax writes. Delete the checkpoint to resume from the one before.'
      )
  return metadata


def resume(run):
  """Restores the history of a run from its newest checkpoint; returns its step, None without one.

  Raises:
    ValueError: the run cannot resume with this config, tokenizer or corpus.
  """
  run_folder.check_same_run(run.config, run.workdir)  # again, now that the folder is locked
  run.store, step = newest(run)
  if step is None:
    run.ledger.resume(run.workdir, 0, {})
    return None
  metadata = checked(run.store.metadata(step), f'checkpoint {step}')
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
  run.is_evaluated = metadata.get('is_evaluated', True)
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
  recall(run, step, metadata)
  return step


def in_memory(run):
  """The checkpoints in memory of a run; None if it has none."""
  train = run.run_config.train
  if not train.memory_checkpoint:
    return None
  folder = run_folder.checkpoint_dir(run.workdir)
  return MemoryCheckpoints(train.memory_folder, folder, run.config.to_dict(), run.mesh)


def newest(run):
  """Where the newest checkpoint is, and its step, None if there is none.

  One in memory is taken without a look at the files of older ones.
  """
  held = run.memory.newest() if run.memory else None
  if held is not None and held >= run.checkpoints.last():
    return run.memory, held
  step = run.checkpoints.latest_step()
  return (run.memory, held) if held is not None and held > (step or 0) else (run.checkpoints, step)


def recall(run, step, metadata):
  """Takes the log window and the watch from the metadata of a checkpoint."""
  with one_line_errors(f'--workdir={run.workdir}: cannot read the log window of checkpoint {step}'):
    run.averager = metrics_lib.MetricAverager(**metadata.get('window', {}))
    of_run = metadata.get('watch', {}) | {'incidents': metadata.get('incidents', [])}
    run.watch = Watch(run.run_config.train, **of_run)


def is_finished(run):
  """Whether an earlier process trained all steps and wrote the summary."""
  steps = run.run_config.train.steps
  summary = report.read_summary(run.workdir)
  if run.step == steps and not summary and files.exists(run.workdir / 'summary.json'):
    print('note: summary.json is damaged, and is written again')
  return run.step == steps == summary.get('steps') and report.is_finished(summary)


def set_up(run, step, start=None):
  """Compiles the steps, initialises or restores the state at `step`, and opens the metrics files.

  Raises:
    ValueError: the state is not finite, or no checkpoint can be written.
    RuntimeError: there is no space for checkpoints.
  """
  init = fresh_state(run.run_config)
  abstract = sharding.abstract(init, run.mesh)
  num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
  train = run.run_config.train
  saves = math.ceil(train.steps / train.checkpoint_interval) - run.step // train.checkpoint_interval
  run.checkpoints.check_writable(num_bytes, saves)
  if run.memory:
    run.memory.begin(abstract)
  run.ledger.lap('start_up')
  page = start_page.page(run.run_config, run.mesh, abstract, run.loader, run.workdir)
  print(page, flush=True)
  run.train_step, run.now = _compile(run, abstract), make_clock(run.run_config)
  run.ledger.lap('compile')
  if step is not None:
    print(f'resuming from step {step}{" in memory" * (run.store is run.memory)}')
    run.state = restore(run, run.store, step, abstract)
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
  if step is not None and int(run.state['step']) != step:
    raise ValueError(
      f'workdir: checkpoint {run_folder.checkpoint_dir(run.workdir)}/{step} holds step '
      f'{run.state["step"]}. Give the folder that name again, or move it away.'
    )
  if is_process_0():
    run_folder.write(run.config, run.workdir, run.loader.fingerprint)
  open_writer(run)
  run.flops_per_token = flops.training_flops_per_token(
    run.run_config.model, run.run_config.data.sequence_length
  )
  peak = flops.peak_flops(jax.devices()[0], run.run_config.model.dtype)
  run.peak_flops = peak and peak * jax.device_count()
  run.record('start_up')


def restore(run, store, step, abstract_state):
  """The state of a checkpoint; the loader goes to its position."""
  loader = run.loader if store.metadata(step)['corpus'] else None  # None: imported
  with cli.waiting_for('restoring the state'):
    state = store.restore(step, abstract_state, loader, run.config.to_dict())
  run.ledger.lap('restore')
  return state


def open_writer(run):
  """Opens the metrics files, and drops what they have after the step of the run."""
  run.writer = metrics_lib.make_writer(
    run.workdir, run.step, run.run_config.train.trackers, run.config.to_dict()
  )


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
