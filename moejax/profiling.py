"""Profiler traces of chosen steps, for Perfetto and XProf."""

import contextlib
import re

import jax

from moejax import files


def parse(text: str) -> range:
  """The steps that '10:13' means, as Python counts: 10, 11 and 12; '' means none.

  Raises:
    ValueError: with a message for the user.
  """
  if not text:
    return range(0)
  match = re.fullmatch(r'(\d+):(\d+)', text)
  if not match or not 1 <= int(match[1]) < int(match[2]):
    raise ValueError("must be 'FIRST:END' with 1 <= FIRST < END; '10:13' is steps 10, 11 and 12")
  return range(int(match[1]), int(match[2]))


class Profiler:
  """Traces those of the steps that this process trains into a folder; to be closed."""

  def __init__(self, steps: range, folder):
    self._steps, self._folder, self._writing = steps, folder, contextlib.ExitStack()
    self._first = self._last = None  # steps that are in the trace; None: no trace is being taken

  def step(self, number: int):
    """A context in which step `number` is dispatched; it has this number in the trace."""
    if number in self._steps:
      if self._first is None:
        jax.profiler.start_trace(str(self._writing.enter_context(files.to_fill(self._folder))))
        self._first = number
      self._last = number
    return jax.profiler.StepTraceAnnotation('train', step_num=number)

  def is_complete(self) -> bool:
    """Whether the last of the steps was dispatched, and `close` is due."""
    return self._last is not None and self._last + 1 not in self._steps

  def close(self) -> None:
    """Writes the trace, if one is being taken; the devices must have finished its steps."""
    if self._first is None:
      return
    jax.profiler.stop_trace()
    self._writing.close()
    print(
      f'profile of steps {self._first} to {self._last}: open {self._folder}/plugins/profile/*/'
      '*.trace.json.gz in https://ui.perfetto.dev, or run pip install tensorboard xprof and '
      f'tensorboard --logdir={self._folder}'
    )
    self._first = self._last = None
