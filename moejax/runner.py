"""Trains the cells of a grid: locally, several at a time, or by commands for other machines.

Cells that differ in train.steps alone may share their first steps, bit for bit (`shared_steps` of
moejax.optimizer). Then the next longer one is forked off the checkpoint that the shorter one saves
there, and these steps are trained once.
"""

import collections
import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shlex
import subprocess
import sys
import threading
import urllib.parse
from typing import NamedTuple

import tqdm
from flax.traverse_util import flatten_dict

from moejax import (
  buckets,
  checkpoint,
  cli,
  config as config_lib,
  exit_codes,
  files,
  imports,
  lease,
  metrics,
  optimizer,
  report,
  run_folder,
  signals,
)

_POLL_SECONDS = 0.5
_BUCKET_SECONDS = 10  # between two looks at runs in a bucket
_MOST_STARTS = 3  # of a cell that fails, by one call of `run`
_FAILS_AGAIN = (cli.USAGE, exit_codes.FAILS_AGAIN)
_PROCESS_BYTES = 1 << 30  # of a training process, without its model
_BYTES_PER_PARAM = 40  # float32 parameters, gradients and moments, plus activations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """One run of a grid."""

  name: str  # of its folder
  config: str  # a config file and its variants, as --config takes them
  fields: dict[str, str]  # what differs: 'section.field' -> the text of its flag
  steps: int
  params: int  # for the memory that it takes
  flops: float  # of training, for the progress of the grid

  @property
  def arguments(self):
    """Of python, without --workdir."""
    fields = [f'--config.{name}={text}' for name, text in self.fields.items()]
    return ['-m', 'moejax.main', f'--config={self.config}', *fields, *imports.flags()]

  @property
  def command(self):
    """Trains the cell, without --workdir; quoted for a shell."""
    return ' '.join(['python', *map(_quote, self.arguments)])


def _quote(argument):
  """Like shlex.quote, but a value with single quotes stays readable."""
  flag, _, value = argument.partition('=')
  if "'" in value and not set('"$`\\!') & set(argument):
    return f'{flag}="{value}"'
  return shlex.quote(argument)


def arguments_of(command):
  """The `config` and the `fields` of a Cell with this command.

  Raises:
    ValueError: it is not of the form python -m moejax.main --config=FILE --config.FIELD=VALUE.
  """
  fields = {}
  words = shlex.split(command)
  config, *overrides = words[3:] or ['']
  for word in overrides:
    name, equals, fields[name.removeprefix('--config.')] = word.partition('=')
    if not name.startswith('--config.') or not equals:
      words = []
  if words[1:3] != ['-m', 'moejax.main'] or not config.startswith('--config='):
    raise ValueError(
      'expected a command python -m moejax.main --config=FILE --config.FIELD=VALUE ..., got '
      f'{command}.'
    )
  return config.removeprefix('--config='), fields


def run(cells, workdir):
  """Trains the unfinished cells, each in a process with the workdir `workdir`/NAME.

  `workdir` is a folder, or in a bucket; `log` says where the logs are.

  On CPUs, cores and half of the memory limit how many cells run at a time; on accelerators it is
  one, because a process takes the whole accelerator. Interrupted cells resume from their
  checkpoints. A cell that fails does not stop the others, and is started again unless its exit
  code says that this does not help. A folder belongs to a cell if its run has the cell's config,
  not by its name alone.

  Returns:
    The exit code.

  Raises:
    ValueError: another program is training in `workdir`, a run there has a cell's name but another
      config, or two cells have the same name or config.
  """
  workdir = files.path(workdir)
  settings = {cell.name: settings_of(cell) for cell in cells}
  _check_distinct(cells, settings)
  _check_same_runs(settings, workdir)
  files.make_folder(workdir)
  sources = _sources(cells, settings)
  if any(sources.values()):
    print(_describe_sources(cells, sources), flush=True)
  with _lock(workdir) as lock:
    scheduler = _Scheduler(cells, workdir, lock, settings, sources)
    with _stop_on_signals() as stop:
      failed = scheduler.work(stop)
  if stop.is_set():
    cli.say_how_to_resume()
    return cli.INTERRUPTED
  for name in failed:
    print(f'{name} failed: see the end of {log(workdir, name)}', file=sys.stderr)
  done = sum(is_done(workdir, cell) for cell in cells)
  print(f'{done} of {len(cells)} cells are done, in {workdir}')
  if failed and set(failed.values()) <= set(_FAILS_AGAIN):
    return exit_codes.FAILS_AGAIN
  return cli.FAILED if failed else cli.OK


def log(workdir, name) -> pathlib.Path:
  """Where the cell of this name writes its log: a bucket's are in the user's cache folder.

  Raises:
    ValueError: there is no cache folder.
  """
  return _local(workdir) / f'{name}.log'


def _local(workdir):
  """The folder of the disk for what is not written to a bucket: logs, and the lock."""
  if not buckets.is_bucket(workdir):
    return workdir
  folder = files.cache_folder('grids/' + urllib.parse.quote(str(workdir), safe=''))
  if folder is None:
    raise ValueError(
      f'--workdir={workdir}: there is no folder for the logs of a grid in a bucket; set '
      'XDG_CACHE_HOME to one that can be written.'
    )
  return folder


class _Source(NamedTuple):
  """A cell that trains the first steps of another one, and how many."""

  cell: Cell
  step: int


def _sources(cells, settings):
  """The `_Source`s of every cell by its name, the most steps first."""
  groups = collections.defaultdict(list)
  for cell in cells:
    others = settings[cell.name] | {'train.steps': None}
    groups[json.dumps(others, sort_keys=True)].append(cell)
  sources = {cell.name: [] for cell in cells}
  for group in groups.values():
    shorter = []
    group.sort(key=lambda cell: settings[cell.name]['train.steps'])
    for cell in group if len(group) > 1 else ():
      sources[cell.name] = shorter[::-1]
      if step := _shared_steps(cell):
        shorter.append(_Source(cell, step))
  return sources


def _shared_steps(cell):
  """`optimizer.shared_steps` of a cell; 0 if its config is invalid, which its run will say."""
  try:
    return optimizer.shared_steps(config_lib.resolve(cli.config_of(cell.arguments[2:])))
  except ValueError:
    return 0


def _taken(cell, sources):
  """The number of steps that another cell trains for this one."""
  return sources[cell.name][0].step if sources[cell.name] else 0


def _describe_sources(cells, sources):
  total, taken = sum(cell.steps for cell in cells), sum(_taken(cell, sources) for cell in cells)
  return (
    f'{total - taken} steps to train instead of {total}: {taken}, before learning rates decay, are '
    'shared by runs that differ in train.steps alone'
  )


def settings_of(cell):
  """The config of a cell as a flat dict."""
  try:
    return flat(cli.config_of(cell.arguments[2:]))
  except ValueError as error:
    raise ValueError(f'{cell.name}: {error}') from error


def flat(config):
  """A ConfigDict as a flat dict of plain values: 'section.field' -> value."""
  return flatten_dict(json.loads(config.to_json()), sep='.')


def _check_distinct(cells, settings):
  names = [cell.name for cell in cells]
  for number, name in enumerate(names):
    if name in names[:number]:
      raise ValueError(f'two cells are named {name}, so they would share a folder.')
    for other in names[:number]:
      if settings[other] == settings[name]:
        raise ValueError(f'{other} and {name} have the same configuration.')


def _check_same_runs(settings, workdir):
  problems = []
  for name, wanted in settings.items():
    has = {file: files.exists(workdir / name / file) for file in ('config.json', 'summary.json')}
    if has['summary.json'] and not has['config.json']:
      problems.append(f'{name}: it has a summary.json but no config.json')
    elif has['config.json']:
      found = flat(run_folder.read(workdir / name))
      problems += [
        f'{name}: {field} = {found.get(field)!r} in the folder, {wanted.get(field)!r} in the grid'
        for field in differences(found, wanted)
      ]
  if problems:
    raise ValueError(
      f'--workdir={workdir} holds runs of another grid; choose another folder or delete them.\n'
      + '\n'.join(problems)
    )


def differences(found, wanted):
  """The fields that make one flat config another run than the other, in order."""
  return [
    field
    for field in sorted(found.keys() | wanted.keys())
    if found.get(field) != wanted.get(field) and not _is_free(field)
  ]


def _is_free(field):
  """Whether a run learns the same with any value of a field, so that it may change on resuming."""
  how = run_folder.RESUMABLE_FIELDS | {'train.trackers', 'train.profile_steps'}
  return field.startswith('mesh.') or (field in how and not field.startswith('data.'))


def is_done(workdir, cell) -> bool:
  """Whether the run of a cell is finished."""
  return report.has_finished(workdir / cell.name)


@contextlib.contextmanager
def _lock(workdir):
  """Held by this program and its training processes, so that orphans of a killed one count.

  A bucket has a lease too, for programs on other machines.
  """
  with contextlib.ExitStack() as stack:
    file = stack.enter_context((_local(workdir) / 'lock').open('w'))
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(
        f'--workdir={workdir}: another program is training cells there, or the training processes '
        'of a killed one are still running. Wait for them or stop them.'
      ) from error
    if buckets.is_bucket(workdir):
      try:
        stack.enter_context(lease.held(workdir))
      except lease.Held as held:
        raise ValueError(
          f'--workdir={workdir}: {held} is training cells there. Wait for it or stop it.'
        ) from held
    yield file


@contextlib.contextmanager
def _stop_on_signals():
  stop = threading.Event()
  with signals.handled_by(lambda *_: stop.set()):
    yield stop


class _Scheduler:
  """Waiting and running cells, and the progress of all."""

  def __init__(self, cells, workdir, lock, settings, sources):
    self.cells, self.workdir, self.lock = cells, workdir, lock
    self.settings, self.sources = settings, sources
    self.waiting = [cell for cell in cells if not is_done(workdir, cell)]
    self.running = {}  # process -> cell
    self.failed = {}  # name -> exit code
    self.starts = collections.Counter()
    self.progress = {cell.name: self._progress(cell) for cell in cells}
    self.seconds = _BUCKET_SECONDS if buckets.is_bucket(workdir) else _POLL_SECONDS
    self.cores = os.cpu_count() or 1
    on_cpu = bool(self.waiting) and _backend() == 'cpu'
    self.most = min(self.cores, len(self.waiting)) if on_cpu else 1
    self.memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2

  def work(self, stop):
    """Returns the exit codes of the cells that failed, by name."""
    total = sum(map(self._own_flops, self.cells))
    seconds = 0.1 if sys.stderr.isatty() else 60  # in a file, every line stays
    options = {'unit': 'FLOP', 'unit_scale': True, 'mininterval': seconds}
    with tqdm.tqdm(total=total, initial=self._flops(), **options) as bar:
      while (self.waiting or self.running) and not stop.is_set():
        while (cell := next(filter(self._is_ready, self.waiting), None)) and self._fits(cell):
          self.waiting.remove(cell)
          self._start(cell)
        stop.wait(self.seconds)
        self._reap()
        bar.set_postfix_str(self._describe(), refresh=False)
        bar.update(self._flops() - bar.n)
      for process in self.running:
        process.terminate()  # the cell saves a checkpoint
      for process in self.running:
        process.wait()
    return self.failed

  def _is_ready(self, cell):
    """Whether a cell can resume or be forked, or has nothing to wait for."""
    if not self.sources[cell.name] or checkpoint.exists(self._checkpoints(cell)):
      return True
    other, step = self.sources[cell.name][0]
    pending = other in self.waiting or other in self.running.values()
    return not pending or checkpoint.exists(self._checkpoints(other), step)

  def _checkpoints(self, cell):
    return run_folder.checkpoint_dir(self.workdir / cell.name)

  def _fork(self, cell):
    """Begins the run of a cell at the last step that another one has trained for it, if any."""
    for other, step in self.sources[cell.name]:
      source = self._checkpoints(other)
      if checkpoint.exists(source, step) and self._is_of(other, source, step):
        config = cli.config_of(cell.arguments[2:])
        return run_folder.fork(self.workdir / other.name, step, config, self.workdir / cell.name)

  def _is_of(self, cell, checkpoints, step):
    """Whether a checkpoint was trained with the settings of a cell from its first step on."""
    metadata = checkpoint.read_metadata(checkpoints, step)
    found = flat(run_folder.from_saved(metadata['config'], checkpoints))
    changed = {field for entry in metadata.get('history', []) for field in entry['changes']}
    return not differences(found, self.settings[cell.name]) and all(map(_is_free, changed))

  def _fits(self, cell):
    need = sum(_PROCESS_BYTES + _BYTES_PER_PARAM * c.params for c in (cell, *self.running.values()))
    return not self.running or len(self.running) < self.most and need <= self.memory

  def _start(self, cell):
    if not checkpoint.exists(self._checkpoints(cell)):
      try:
        self._fork(cell)
      except (OSError, ValueError) as error:
        print(f'note: {cell.name} is trained from its first step: {error}', file=sys.stderr)
    # JAX reads NPROC as the number of cores: concurrent cells are faster on separate cores.
    environment = os.environ | {'NPROC': str(self.cores // max(self.most, 1))}
    with log(self.workdir, cell.name).open('a') as output:
      process = subprocess.Popen(
        [sys.executable, *cell.arguments, f'--workdir={self.workdir / cell.name}'],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        pass_fds=[self.lock.fileno()],
        start_new_session=True,  # Ctrl-C reaches it through `work`
      )
    self.running[process] = cell
    self.starts[cell.name] += 1

  def _reap(self):
    for process in [p for p in self.running if p.poll() is not None]:
      cell = self.running.pop(process)
      self.progress[cell.name] = self._progress(cell)
      code, starts = process.returncode, self.starts[cell.name]
      if code and code not in _FAILS_AGAIN and starts < _MOST_STARTS:
        print(f'note: {cell.name} ended with code {code} and is started again', file=sys.stderr)
        self.waiting.append(cell)
      elif code:
        self.failed[cell.name] = code

  def _flops(self):
    self.progress |= {cell.name: self._progress(cell) for cell in self.running.values()}
    return sum(self._own_flops(cell) * self.progress[cell.name] for cell in self.cells)

  def _own_flops(self, cell):
    """Of the steps that no other cell trains for it."""
    return cell.flops * (1 - _taken(cell, self.sources) / cell.steps)

  def _progress(self, cell):
    """The fraction of these steps that are done."""
    if is_done(self.workdir, cell):
      return 1.0
    lines, shared = metrics.read_metrics(self.workdir / cell.name), _taken(cell, self.sources)
    return max(0, lines[-1]['step'] - shared) / (cell.steps - shared) if lines else 0.0

  def _describe(self):
    ended = len(self.cells) - len(self.waiting) - len(self.running)
    names = ', '.join(cell.name for cell in self.running.values())
    return f'{ended} of {len(self.cells)} cells; {names}'


def _backend():
  """Read in another process, because initialising JAX takes the accelerator."""
  program = 'import jax; print(jax.default_backend())'
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f'JAX failed to start:\n{done.stderr}')
  return done.stdout.strip()


def launch_commands(cells, workdir, template):
  """Yields a command per cell that trains it on another machine.

  Args:
    cells: of a grid.
    workdir: the grid's folder on that machine, such as gs://bucket/grid.
    template: with {name}, the cell's name, and {command}, its command quoted for a shell.

  Raises:
    ValueError: the template has other braces, or no {command}.
  """
  for cell in cells:
    folder = shlex.quote(f'--workdir={workdir.rstrip("/")}/{cell.name}')
    command = shlex.quote(f'{cell.command} {folder}')
    try:
      launch = template.format(name=cell.name, command=command)
    except (KeyError, IndexError, ValueError) as error:
      raise ValueError(f'--launch={template!r} may only use {{name}} and {{command}}.') from error
    if command not in launch:
      raise ValueError(f'--launch={template!r} has no {{command}}, the command to run.')
    yield launch
