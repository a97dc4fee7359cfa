"""Watches the steps of a run: updates that were skipped, and spikes of the loss.

An update whose loss or gradient is not finite is skipped (`step.train_step`): the state stays as it
was. A loss far above those before it is a spike; by choice the run goes back to a checkpoint before
it, and passes over the batches in between (`moejax.rewind`).

What a watch has seen is saved in every checkpoint. Which batch a step sees is a function of the
config and of that alone, so a run that was killed sees the same spikes and does the same again.
"""

import dataclasses
import hashlib
import math
import statistics
from typing import Any

from moejax import metrics, sharding

WINDOW = 100  # losses that a spike is measured against


@dataclasses.dataclass
class Watch:
  """What a run has seen so far."""

  config: Any  # the TrainConfig
  losses: list[float] = dataclasses.field(default_factory=list)  # the last WINDOW that are finite
  in_row: int = 0  # updates that were skipped since the last good one
  passed: int = 0  # batches passed over: step `s` sees batch `s + passed` of the data
  incidents: list[dict] = dataclasses.field(default_factory=list)  # skipped updates and spikes
  spike: dict | None = None  # the first incident from which to go back
  good_batch: Any = None  # the last whose update was not skipped, in this process

  def saved(self) -> dict:
    """What the next process needs, beside the incidents; serialisable as JSON."""
    return {'losses': self.losses, 'in_row': self.in_row, 'passed': self.passed}

  @property
  def skipped(self) -> int:
    """The number of updates that were skipped."""
    return sum(incident['what'] == 'skipped' for incident in self.incidents)

  def see(self, batch, step: int, numbers: dict[str, float]) -> None:
    """Takes note of a step, in the order of steps. All processes must call it.

    Args:
      batch: of the step; its global arrays.
      step: its number, from 1.
      numbers: 'loss', 'grad_norm', 'update_norm', and 'skipped', 1 or 0.

    Raises:
      Diverged: the update is not finite, and was not skipped, for its gradient is.
    """
    loss = numbers['loss']
    if numbers['skipped']:
      self.in_row += 1
      found = {name: numbers[name] for name in ('loss', 'grad_norm', 'update_norm')}
      what = ', '.join(f'{name} {value:.4g}' for name, value in found.items())
      self._note(step, 'skipped', batch, found, f'update skipped ({what})')
      return
    if not math.isfinite(numbers['update_norm']):
      raise metrics.Diverged(
        f'training diverged at step {step}: the update is not finite, though the gradient is '
        f'(loss {loss:.4g}, grad_norm {numbers["grad_norm"]:.4g})'
      )
    self.in_row, self.good_batch = 0, batch
    height = zscore(loss, self.losses)
    if height > self.config.spike_zscore:
      what = f'{height:.1f} standard deviations above the mean of the last {WINDOW}'
      found = {'loss': loss, 'zscore': height}
      self._note(step, 'spike', batch, found, f'the loss spikes to {loss:.4g}, {what}')
      if self.config.on_spike == 'rewind':
        self.spike = self.spike or self.incidents[-1]
    self.losses = [*self.losses, loss][-WINDOW:]

  def _note(self, step, what, batch, numbers, message):
    of_batch = fingerprint(batch)
    incident: Any = metrics.plain({'step': step, 'what': what, 'batch': of_batch, **numbers})
    self.incidents.append(incident)
    print(f'step {step}: {message}; batch {of_batch}', flush=True)


def zscore(loss: float, before: list[float]) -> float:
  """How many standard deviations a loss is above those before it; 0 until these are WINDOW."""
  deviation = statistics.stdev(before) if len(before) >= WINDOW else 0.0
  return (loss - statistics.fmean(before)) / deviation if deviation else 0.0


def fingerprint(batch) -> str:
  """16 hex digits that identify the sequences of a global batch, on any mesh.

  All processes must call it.
  """
  digest = hashlib.sha256()
  for name, array in sorted(sharding.fetch(batch).items()):
    digest.update(name.encode() + array.tobytes())
  return digest.hexdigest()[:16]
