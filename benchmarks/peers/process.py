"""A contender as a process of its own, which is asked for steps."""

import contextlib
import json
import os
import pathlib
import select
import subprocess
import time

_ROOT = pathlib.Path(__file__).parents[2]
_LIMIT = 600  # seconds for an answer


class Process:
  """Starts a command with a task, and waits for its first step.

  `start_seconds`: until its first step was done.

  Raises:
    RuntimeError: it does not answer; `log`, a path, has what it printed. Also from `measure`.
  """

  def __init__(self, command, task, log):
    self._log, started = log, time.perf_counter()
    with log.open('w') as output:
      self._process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=output,
        text=True,
        cwd=_ROOT,
        env=os.environ | {'PYTHONPATH': str(_ROOT), 'JAX_PLATFORMS': 'cpu'},
      )
    self._ask(task)
    self.start_seconds = time.perf_counter() - started

  def measure(self, seconds):
    """Steps for about so long: a dict of 'steps', 'seconds', 'memory' (bytes, the most so far)."""
    return self._ask(seconds)

  def _ask(self, question):
    with contextlib.suppress(OSError):  # it has ended
      print(json.dumps(question), file=self._process.stdin, flush=True)
    answered, _, _ = select.select([self._process.stdout], [], [], _LIMIT)
    line = self._process.stdout.readline() if answered else ''
    if line:
      return json.loads(line)
    self.close()
    reason = 'it ended' if answered else f'no answer in {_LIMIT} s'
    raise RuntimeError(f'{reason}, see {self._log}')

  def close(self):
    """Ends the process."""
    self._process.kill()
    self._process.wait()
    with contextlib.suppress(OSError):
      self._process.stdin.close()
    self._process.stdout.close()
