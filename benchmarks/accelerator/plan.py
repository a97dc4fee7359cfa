"""What one call of the program measures, and for how long."""

import dataclasses
import itertools
import os
import pathlib
import time

# Parts in the order of their worth, and their shares of the time. What one does not use, the next
# ones have.
SHARES = {'chip': 1, 'values': 4, 'steps': 9, 'ops': 4, 'profile': 2, 'decoding': 2}
_LEAST_LIMIT = 60.0  # seconds that a case may take in any part: most of it compiles


@dataclasses.dataclass(frozen=True)
class Plan:
  """One call; the processes that carry it out share it."""

  output: pathlib.Path
  seconds: float
  parts: tuple[str, ...] = tuple(SHARES)
  only: str = ''  # a regular expression that the names of cases must contain
  tiny: bool = False  # sizes for a CPU
  command: str = ''
  start: float = dataclasses.field(default_factory=time.time)

  @property
  def end(self):
    return self.start + self.seconds

  def deadline(self, part):
    """When the last case of a part may begin."""
    until = itertools.accumulate(SHARES[name] for name in self.parts)
    shares = dict(zip(self.parts, until, strict=True))
    return self.start + self.seconds * shares[part] / sum(SHARES[name] for name in self.parts)

  def limit(self, part):
    """Seconds after which a case of a part is stopped: half of its time."""
    share = SHARES[part] / sum(SHARES[name] for name in self.parts)
    return max(_LEAST_LIMIT, self.seconds * share / 2)

  @property
  def name(self):
    """Of the results, before the name of the chip: date and time, UTC."""
    return time.strftime('%Y-%m-%d-%H%M%S', time.gmtime(self.start))

  def files(self):
    """The files of results, as far as they exist: at most one."""
    return sorted(self.output.glob(f'{self.name}-*.json'))

  def path(self, chip):
    """The file of results on a chip."""
    return self.output / f'{self.name}-{"-".join(_words(chip))}.json'


def _words(text):
  return ''.join(c if c.isalnum() else ' ' for c in text.lower()).split()


def environment():
  """What must be set before a process uses JAX."""
  platforms = os.environ.get('JAX_PLATFORMS', '')
  if platforms and 'cpu' not in platforms.split(','):
    os.environ['JAX_PLATFORMS'] = f'{platforms},cpu'  # where the references run
  # The states of the largest models take 50 GB; the rest is for other programs' kernels.
  os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.88')
