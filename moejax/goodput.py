"""Where the wall time of a run went, over all processes that trained it.

Phases, in seconds:
  start_up    from the start of the program to the first step, without the next two
  compile     the training and the evaluation step
  restore     reading a checkpoint
  step        training
  input       waiting for a batch while the devices have nothing to do
  evaluation, checkpoint
  lost        steps, and starts, of a process that died, from its last checkpoint on
  other       the results at the end, profiler traces

They add up to the wall time of the run. `goodput.json` in the run's folder keeps them for a process
that resumes; what a dying process did after its last log line is not known.
"""

import json
import math
import time

from moejax import files, metrics, text

PHASES = ('start_up', 'compile', 'restore', 'step', 'input', 'evaluation', 'checkpoint', 'lost')
PHASES += ('other',)
_TRAINING = ('step', 'input', 'evaluation', 'checkpoint', 'other')
_FILE = 'goodput.json'


class Ledger:
  """Counts every second in one phase."""

  def __init__(self, began=None, clock=time.monotonic):
    """`began`: when the run's first phase did, by `clock`; default: now."""
    self._clock = clock
    self._lap = clock() if began is None else began
    self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)

  def lap(self, phase: str) -> None:
    """Counts the time since the last lap as `phase`."""
    now = self._clock()
    self.seconds[phase] += now - self._lap
    self._lap = now

  @property
  def wall(self) -> float:
    """All phases together, until the last lap."""
    return sum(self.seconds.values())

  @property
  def training(self) -> float:
    """`wall` without starting, compiling, restoring, and what was lost."""
    return sum(self.seconds[phase] for phase in _TRAINING)

  def resume(self, workdir, step: int, saved: dict) -> None:
    """Adds the time of earlier processes.

    Args:
      workdir: the run's folder.
      step: the run resumes from; 0: none.
      saved: the seconds by phase that the checkpoint of `step` has.
    """
    newest_step, newest = _read(workdir)
    if newest_step == step:  # also has the time after the checkpoint
      saved = newest
    for phase in PHASES:
      self.seconds[phase] += saved.get(phase, 0.0)
    wall = max([sum(newest.values()), *_walls(workdir)])
    self.seconds['lost'] += max(0.0, wall - sum(saved.values()))

  def lose(self, saved: dict) -> None:
    """Goes back to the seconds by phase that a checkpoint has; all since are lost."""
    lost = self.wall - sum(saved.values())
    self.seconds = dict.fromkeys(PHASES, 0.0) | saved
    self.seconds['lost'] += lost

  def write(self, workdir, step: int) -> None:
    """Writes `goodput.json` of a run at `step`."""
    content = json.dumps({'step': step, 'seconds': self.seconds}, indent=2)
    files.write(files.path(workdir) / _FILE, content + '\n')

  def describe(self) -> str:
    """One line: the fraction of the time spent in training steps, and the other phases."""
    others = [
      f'{phase.replace("_", "-")} {text.short_time(seconds)}'
      for phase, seconds in self.seconds.items()
      if phase != 'step' and seconds >= 0.001 * self.wall
    ]
    share = 100 * self.seconds['step'] / self.wall
    return f'goodput {share:.0f}% of {text.duration(self.wall)}: {", ".join(others)}'


def _read(workdir):
  """(step, seconds by phase) of `goodput.json`; (0, {}) if it is missing or unreadable."""
  try:
    entry = json.loads(files.read(files.path(workdir) / _FILE))
    step, seconds = int(entry['step']), {phase: float(entry['seconds'][phase]) for phase in PHASES}
  except (KeyError, OSError, OverflowError, RecursionError, TypeError, ValueError):
    return 0, {}
  good = all(math.isfinite(value) and value >= 0 for value in seconds.values())
  return (step, seconds) if good else (0, {})


def _walls(workdir):
  """The wall time so far at every line of metrics.jsonl that has it."""
  return [wall for _, wall in metrics.loss_curve(workdir, 'wall_seconds')]
