"""What the chip is able to do, as measured in part `chip`, and floors of time that follow."""

import functools
from typing import NamedTuple

from moejax import hardware


class Work(NamedTuple):
  """What a computation cannot do without."""

  flops: float = 0.0  # of matrix products, at the rate of bfloat16
  bytes: float = 0.0  # read and written
  exps: float = 0.0


class Limits:
  """Rates of the chip, and the rows so far."""

  def __init__(self, results):
    self.rows = results.rows
    self.tiny = results.content['tiny']
    self.chip = hardware.find(results.content['chip'])

  def row(self, part, case):
    """The row of a case, {} if it has none or failed."""
    found = [row for row in self.rows if (row['part'], row['case']) == (part, case)]
    return found[0] if found and 'error' not in found[0] else {}

  @functools.cached_property
  def rates(self):
    """Per second, measured: 'bfloat16' and 'float32' (FLOPs of products), 'bytes', 'exps'.

    Of what was not measured, the specification if it is known.
    """
    chip = self.chip or hardware.Chip(0)
    specified = {'bfloat16': chip.flops, 'bytes': chip.memory_bandwidth}
    measured = {row['limit']: row['rate'] for row in self.rows if 'limit' in row}
    return {k: v for k, v in specified.items() if v} | measured

  def floor(self, work):
    """The least seconds that a Work takes here, and what bounds it; (None, '') if not known."""
    rates = self.rates | {'flops': self.rates.get('bfloat16')}
    needed = {kind: getattr(work, kind) for kind in ('flops', 'bytes', 'exps')}
    seconds = {k: n / rates[k] for k, n in needed.items() if n and rates.get(k)}
    bound = max(seconds, key=seconds.__getitem__, default='')
    return seconds.get(bound), bound

  @property
  def peak(self):
    """Specified FLOP/s of 16-bit matrix products, or None."""
    return self.chip.flops if self.chip else None
