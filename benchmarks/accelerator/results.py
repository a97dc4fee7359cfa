"""The results so far, as JSON and as a page, written after every case."""

import json
import pathlib
import subprocess
import time

from moejax import files


class Results:
  """A dict, and the file it is written to, with a page beside it.

  `rows`: of what was measured: 'part', 'case', 'took' (seconds), and numbers, or 'error'.
  `cases`: by part, the names of all that were to be measured. `running`: the case in progress.
  """

  def __init__(self, path, content):
    self.path, self.content = pathlib.Path(path), content

  @classmethod
  def read(cls, path):
    return cls(path, json.loads(pathlib.Path(path).read_text()))

  @property
  def rows(self):
    return self.content['rows']

  def has(self, part, case):
    return any((row['part'], row['case']) == (part, case) for row in self.rows)

  def begin(self, part, case):
    self.content['running'] = {'part': part, 'case': case, 'since': time.time()}
    self._write_numbers()

  def end(self, measured):
    """Adds the row of the case in progress."""
    running = self.content.pop('running')
    took = time.time() - running.pop('since')
    self.rows.append(running | {'took': took} | measured)
    self.write()

  def fail(self, error):
    """Adds a row without numbers for the case in progress, if there is one."""
    if 'running' in self.content:
      self.end({'error': error})

  def write(self):
    from benchmarks.accelerator import page  # imports all parts

    self._write_numbers()
    files.write(self.path.with_suffix('.md'), page.render(self.content))

  def _write_numbers(self):
    files.write(self.path, json.dumps(self.content, indent=1, default=float))


def versions():
  """Versions of what is measured."""
  import flax
  import jax
  import jaxlib

  import moejax

  found = {'moejax': moejax.__version__}
  git = ['git', '-C', str(pathlib.Path(__file__).parent), 'describe', '--always', '--dirty']
  try:
    commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
  except (OSError, subprocess.TimeoutExpired):
    commit = ''
  found |= {'commit': commit} if commit else {}
  return found | {module.__name__: module.__version__ for module in (jax, jaxlib, flax)}
