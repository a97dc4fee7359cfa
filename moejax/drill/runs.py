"""Short runs of the user's config, as programs of their own, and whether two are the same."""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np

from moejax import cli, imports, manifest, metrics, report, run_folder, text
from moejax.checkpoint import Checkpoints
from moejax.drill.inject import Injection

STEPS = 8
# Checkpoints at steps 2, 4, 6 and 8, evaluations at 4 and 8; what is not of a run's numbers is off.
SHORT = {
  'train.steps': STEPS,
  'train.log_interval': 1,
  'train.eval_interval': 4,
  'train.eval_batches': 2,
  'train.final_eval_batches': 2,
  'train.checkpoint_interval': 2,
  'train.keep_checkpoints': 4,
  'train.max_skipped': 10,
  'train.sample_length': 0,
  'train.profile_steps': '',
  'train.trackers': (),
  'train.deterministic': True,
}
_TIMES = {'seconds_per_step', 'tokens_per_second', 'mfu', 'wall_seconds'}
_PROGRAM = (sys.executable, '-m')


class DidNotHold(Exception):
  """A guarantee did not hold; the message says what was found."""


class NotTried(Exception):
  """A fault cannot be tried here; the message says why."""


class Runs:
  """The short runs of one config, in a folder of their own, until a time.

  Attributes:
    folder: that folder.
    undisturbed: the folder of the run in which nothing goes wrong.
    seconds: that it took.
  """

  def __init__(self, folder: pathlib.Path, arguments: list[str], minutes: float, program=_PROGRAM):
    """Trains nothing.

    Args:
      folder: an empty one.
      arguments: of moejax.main, which name the config.
      minutes: from now on, for all runs.
      program: what is put before the name of a module.
    """
    self.folder, self.undisturbed, self.seconds = folder, folder / 'undisturbed', 0.0
    short = [f'--config.{name}={value}' for name, value in SHORT.items()]
    self._arguments, self._program = [*arguments, *short, *imports.flags()], program
    self._end = time.monotonic() + 60 * minutes
    self._patience = 60 * minutes / 4  # seconds of one program, at least

  def train_undisturbed(self) -> None:
    """Trains the run that others are compared with.

    Raises:
      RuntimeError: it fails, or there is no time for it.
    """
    began = time.monotonic()
    try:
      self.train(self.undisturbed)
    except (DidNotHold, NotTried) as error:
      log = self.undisturbed.with_suffix('.log')
      raise RuntimeError(f'without any fault, {STEPS} steps fail: {error} (see {log}).') from error
    self.seconds = time.monotonic() - began

  def left(self) -> float:
    """The seconds until the end."""
    return self._end - time.monotonic()

  def begin(
    self, folder: pathlib.Path, injection: Injection | None = None, more=(), **environment: str
  ) -> subprocess.Popen:
    """Starts to train in a folder, which may hold a run; `more`: arguments."""
    module = ['moejax.drill.inject', json.dumps(injection)] if injection else ['moejax.main']
    command = [*self._program, *module, *self._arguments, f'--workdir={folder}', *more]
    return subprocess.Popen(
      command,
      env=os.environ | environment,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,  # not a file: how large these may become is a fault
      stderr=subprocess.STDOUT,
      text=True,
      errors='replace',
    )

  def end(self, process: subprocess.Popen, folder: pathlib.Path, code: int = cli.OK) -> str:
    """Waits for a program; returns what it printed, which is also appended to FOLDER.log.

    Raises:
      DidNotHold: it ends with another code, or not at all.
      NotTried: there is no time left.
    """
    most, left, is_late = max(60 + 3 * self.seconds, self._patience), self.left(), False
    try:
      output, _ = process.communicate(timeout=max(0, min(most, left)))
    except subprocess.TimeoutExpired:
      is_late = True
    finally:
      process.kill()
    if is_late:
      output, _ = process.communicate()
    with folder.with_suffix('.log').open('a') as log:
      log.write(f'{output}-- exit code {process.returncode}\n')
    if is_late and most > left:
      raise NotTried('no time was left')
    if is_late:
      raise DidNotHold(f'a program did not end within {text.duration(most)}')
    if process.returncode != code:
      last = (output.splitlines() or ['no output'])[-1]
      raise DidNotHold(f'exit code {process.returncode} instead of {code}: {last}')
    return output

  def train(self, folder: pathlib.Path, injection=None, code=cli.OK, **environment: str) -> str:
    """Trains in a folder until the program ends; see `begin` and `end`."""
    return self.end(self.begin(folder, injection, **environment), folder, code)

  def kill(self, folder: pathlib.Path, injection: Injection, **environment: str) -> None:
    """Trains in a folder until the program kills itself."""
    self.train(folder, injection, -signal.SIGKILL, **environment)

  def copy(self, folder: pathlib.Path) -> None:
    """Copies the undisturbed run, with the last two checkpoints."""
    older = shutil.ignore_patterns(*map(str, range(1, STEPS - 2)))
    shutil.copytree(self.undisturbed, folder, ignore=older)

  def check_same(self, folder: pathlib.Path, other: pathlib.Path | None = None) -> None:
    """Raises DidNotHold unless a run ended like another one, bit for bit; default: undisturbed."""
    other = other or self.undisturbed
    if not report.has_finished(folder):
      raise DidNotHold('summary.json is not that of a finished run')
    if not (folder / 'loss.png').exists():
      raise DidNotHold('there is no loss.png')
    if names := changed(fingerprints(other, STEPS), fingerprints(folder, STEPS)):
      raise DidNotHold(f'{len(names)} arrays have other bits, such as {names[0]}')
    pairs = itertools.zip_longest(_lines(folder), _lines(other))
    for number, (line, its_line) in enumerate(pairs, 1):
      if line != its_line:
        raise DidNotHold(f'line {number} of metrics.jsonl is not the same')


def largest_file(folder: pathlib.Path) -> pathlib.Path:
  """That of a checkpoint, which holds arrays."""
  return max((folder / 'state').rglob('*'), key=lambda path: path.stat().st_size * path.is_file())


def step_folder(folder: pathlib.Path, step: int) -> pathlib.Path:
  return run_folder.checkpoint_dir(folder) / str(step)


def fingerprints(folder: pathlib.Path, step: int) -> dict[str, tuple]:
  """The dtype, the shape and a hash of the bits of all arrays of a checkpoint, by name.

  Raises:
    DidNotHold: the checkpoint is damaged or missing.
  """
  if problem := manifest.problem(step_folder(folder, step)):
    raise DidNotHold(f'checkpoint {step} is damaged: {problem}')
  with contextlib.closing(Checkpoints(run_folder.checkpoint_dir(folder))) as checkpoints:
    return {
      name: (str(array.dtype), array.shape, _hash(array))
      for name, array in checkpoints.arrays(step)
    }


def _hash(array):
  return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()


def changed(before: dict, after: dict) -> list[str]:
  """The names of `fingerprints` that are not the same."""
  names = sorted(before.keys() | after.keys())
  return [name for name in names if before.get(name) != after.get(name)]


def _lines(folder):
  """The lines of metrics.jsonl, without what depends on the time."""
  lines = metrics.read_metrics(folder)
  return [{name: line[name] for name in line.keys() - _TIMES} for line in lines]


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]
