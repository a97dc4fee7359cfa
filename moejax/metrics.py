"""Metrics of a run: averaged over steps, written to metrics.jsonl and passed to trackers.

metrics.jsonl is authoritative: one JSON object per line with its 'step', in order, each metric once
per step. Non-finite numbers are null, because JSON has no NaN.
"""

import json
import math
import sys
import time

import jax
import numpy as np

from moejax import buckets, files, lease
from moejax.exit_codes import FAILS_AGAIN
from moejax.trackers import Trackers

_FILE = 'metrics.jsonl'


class MetricsWriter:
  """Appends to metrics.jsonl in a folder, and passes on to trackers; for process 0 of a run."""

  def __init__(self, workdir, start_step: int, trackers=(), config=None):
    """Opens the file, and drops what an earlier, longer attempt wrote.

    Args:
      workdir: the run's folder; created if it does not exist.
      start_step: the step that the run resumes from. Later lines are dropped; with 0, all.
      trackers: names of trackers.TRACKERS.
      config: of the run, as nested dicts; for the trackers.
    """
    damaged = _read(workdir)[1]
    if damaged:
      print(f'note: {workdir}/{_FILE} is damaged; {damaged} lines that cannot be read are dropped')
    copy(workdir, workdir, start_step)
    self._file = files.append(files.path(workdir) / _FILE)
    self._unwritten, self._has_warned = b'', False
    self._trackers = Trackers(trackers, workdir, config or {}, start_step)

  def write(
    self, step: int, metrics: dict[str, float], prefix: str = '', details: dict | None = None
  ) -> None:
    """Writes one line. With a prefix, 'loss' becomes 'prefix/loss'.

    A line that cannot be written, on a full disk say, is written together with a later one.
    `details` are not passed on to trackers, where every name is a plot.
    """
    before = f'{prefix}/' if prefix else ''
    name_all = lambda of: {f'{before}{name}': float(value) for name, value in of.items()}
    named = name_all(metrics)
    self._unwritten += _line({'step': step, **named, **name_all(details or {})}).encode()
    self._append()
    self._trackers.write(step, named)

  def sync(self) -> None:
    """Waits until the lines are on the disk, before a checkpoint that must not outlive them."""
    self._append(files.sync)
    self._trackers.sync()

  def close(self) -> None:
    """Closes the file and the trackers."""
    if not self._file.closed:
      self.sync()
      self._file.close()
    self._trackers.close()

  def _append(self, finish=lambda file: None):
    """Appends what is not written yet; a failure only prints a warning, once."""
    lease.check()
    try:
      while self._unwritten:
        self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
      finish(self._file)
    except (OSError, buckets.Failed) as error:
      if not self._has_warned:
        why = getattr(error, 'strerror', None) or error
        print(f'warning: {self._file.name}: {why}; lines are kept to be written later')
      self._has_warned = True


class NoWriter:
  """A `MetricsWriter` that writes nothing."""

  def write(
    self, step: int, metrics: dict[str, float], prefix: str = '', details: dict | None = None
  ) -> None:
    pass

  def sync(self) -> None:
    pass

  def close(self) -> None:
    pass


def make_writer(workdir, start_step: int, trackers=(), config=None) -> MetricsWriter | NoWriter:
  """A MetricsWriter in process 0 of a run, a NoWriter in the others."""
  if jax.process_index():
    return NoWriter()
  return MetricsWriter(workdir, start_step, trackers, config)


def read_metrics(workdir) -> list[dict]:
  """All intact lines of metrics.jsonl; [] if there is no file."""
  return _read(workdir)[0]


def _read(workdir):
  """The entries of all intact lines, and the number of damaged ones."""
  path = files.path(workdir) / _FILE
  if not files.exists(path):
    return [], 0
  *lines, last = files.read(path).decode(errors='replace').split('\n')
  entries = [_entry(line) for line in lines]
  intact = [entry for entry in entries if entry]
  return intact, len(entries) - len(intact) + bool(last)  # which is incomplete


def _entry(line):
  """The entry of a line, or None if it is damaged."""
  try:
    entry = json.loads(line)
  except (RecursionError, ValueError):
    return None
  if not isinstance(entry, dict) or type(step := entry.get('step')) is not int:
    return None
  numbers = all(value is None or is_number(value) for value in entry.values())
  return entry if numbers and 0 <= step < 2**31 else None


def is_number(value) -> bool:
  """Whether what JSON holds is a finite number, as large as a float can be."""
  return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def copy(workdir, other, step: int) -> None:
  """Writes the lines of a run until a step to the folder `other`; of step 0, none."""
  first = step + 1 if step else 0
  kept = [entry for entry in read_metrics(workdir) if entry['step'] < first]
  files.write(files.path(other) / _FILE, ''.join(map(_line, kept)))


def loss_curve(workdir, name: str = 'loss') -> list[tuple[int, float]]:
  """(step, value) of one metric, where it was measured and finite."""
  curve = []
  for entry in read_metrics(workdir):
    is_later = not curve or entry['step'] > curve[-1][0]  # else the file is not of a run
    if entry.get(name) is not None and is_later:
      curve.append((entry['step'], entry[name]))
  return curve


def over_steps(curve) -> list[tuple[int, int, float]]:
  """(first step, number of steps, mean) of every log line of a curve of means."""
  starts = [0, *(step for step, _ in curve)]
  return [
    (start + 1, step - start, mean) for start, (step, mean) in zip(starts, curve, strict=False)
  ]


def mean_over_steps(curve, interval: int) -> float | None:
  """The mean over all steps of a curve of means; None if it is empty.

  `interval`: the most steps of a log line. Steps before the first one may be of another run.
  """
  lines = [(min(number, interval), mean) for _, number, mean in over_steps(curve)]
  steps = sum(number for number, _ in lines)
  return sum(number * mean for number, mean in lines) / steps if steps else None


def smoothed_loss(curve, steps: int) -> dict:
  """The mean training loss of the last quarter of `steps` steps.

  Every batch is new text as long as no epoch is over, and then this is a fair estimate of the loss
  on unseen text, at the mean of the last quarter's states.

  Args:
    curve: (step, mean loss since the point before), as `loss_curve` returns it.
    steps: done so far.

  Returns:
    'loss', its 'standard_error' by the noise of batches (None of fewer than three log lines), and
    'first_step' and 'last_step', which it covers: those of all log lines that begin in the last
    quarter, or the last one; {} if there is none. The error is estimated from the differences of
    successive lines, so that the fall of the loss does not count.
  """
  lines = over_steps(curve)
  if not lines:
    return {}
  lines = [line for line in lines if line[0] > 0.75 * steps] or lines[-1:]
  firsts, numbers, means = np.array(lines, float).T
  total, error = numbers.sum(), None
  if len(lines) > 2:
    variances = 1 / numbers[1:] + 1 / numbers[:-1]  # of differences, in those of a step
    error = float(np.sqrt(np.mean(np.diff(means) ** 2 / variances) / total))
  return {
    'loss': float(np.sum(means * numbers) / total),
    'standard_error': error,
    'first_step': int(firsts[0]),
    'last_step': int(firsts[-1] + numbers[-1] - 1),
  }


def flatten_aux(aux: dict) -> dict[str, float]:
  """Metrics of sublayers by name: 'name/00', 'name/01', ... in their order.

  Those with more than one number per sublayer are left out, see `by_expert`.
  """
  arrays = {name: np.asarray(values) for name, values in aux.items()}
  return {
    f'{name}/{i:02d}': float(value)
    for name, values in arrays.items()
    if values.ndim == 1
    for i, value in enumerate(values)
  }


def by_expert(aux: dict) -> dict[str, float]:
  """Metrics that sublayers have of every expert: 'name/00/000', by sublayer and expert."""
  return {
    f'{name}/{i:02d}/{expert:03d}': float(value)
    for name, values in aux.items()
    if np.ndim(values) == 2
    for (i, expert), value in np.ndenumerate(values)
  }


class Diverged(RuntimeError):
  """Updates, or the state of a run and its loss, are not finite."""

  exit_code = FAILS_AGAIN  # steps are exactly repeatable


class MetricAverager:
  """Averages metrics since the last log line, and times steps without evaluation and saving.

  Steps whose update was skipped are timed, but not averaged: their numbers are not finite. A
  resumed run restores the totals of the interrupted one, so that its log lines are the same.
  """

  def __init__(self, sums=None, count=0):
    """Starts the clock; `sums` and `count` are from `totals`."""
    self._sums, self._count, self._timed = dict(sums or {}), count, 0
    self._unread = None
    self._started = time.monotonic()

  def add(self, step, measured, see=lambda step, numbers: None):
    """Adds a dispatched step; reads the previous one while the device computes this one.

    `see(step, numbers)` is called when its numbers are read.
    """
    self.read()
    self._unread = step, measured, see

  def read(self):
    """Waits for the step that was added last."""
    if self._unread:
      (step, measured, see), self._unread = self._unread, None
      measured = jax.device_get(measured)
      flat = {name: float(value) for name, value in measured.items() if name != 'aux'}
      see(step, flat)
      self._timed += 1
      if flat.pop('skipped'):
        return
      flat |= flatten_aux(measured['aux'])
      if not self._count:
        self._sums = dict.fromkeys(flat, 0.0)
      self._sums = {name: total + flat[name] for name, total in self._sums.items()}
      self._count += 1

  def is_computing(self):
    """Whether the step that was added last is still being computed."""
    return bool(self._unread) and not self._unread[1]['loss'].is_ready()

  def skip(self, seconds):
    """Excludes some time from the timing."""
    self._started += seconds

  def restart_clock(self):
    """Waits for the steps so far and excludes them from the timing."""
    self.read()
    self._timed, self._started = 0, time.monotonic()

  def totals(self):
    """The constructor arguments that restore this averager, serialisable as JSON."""
    self.read()
    return {'sums': self._sums, 'count': self._count}

  def means(self):
    """The mean of every metric, and 'seconds_per_step' of the steps that were timed, if any."""
    self.read()
    seconds = time.monotonic() - self._started
    means = {name: total / self._count for name, total in self._sums.items()}
    return means | ({'seconds_per_step': seconds / self._timed} if self._timed else {})


def _line(entry):
  return json.dumps(plain(entry), allow_nan=False) + '\n'


def plain(value):
  """Converts arrays and numpy scalars to lists and numbers, NaN and infinities to None."""
  if isinstance(value, dict):
    return {str(key): plain(v) for key, v in value.items()}
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  if hasattr(value, 'tolist'):
    return plain(value.tolist())
  return None if isinstance(value, float) and not math.isfinite(value) else value
