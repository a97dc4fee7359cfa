"""Watches the steps of a run: updates that were skipped, and spikes of the loss.

An update that is not finite is skipped (`step.train_step`): the state stays as it was. A loss far
above those before it is a spike; by choice the run goes back to a checkpoint before it, and passes
over the batches in between (`moejax.rewind`).

What a watch has seen is saved in every checkpoint. Which batch a step sees is a function of the
config and of that alone, so a run that was killed sees the same spikes and does the same again.
"""

import dataclasses
import hashlib
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
  spike: int | None = None  # the step of one that has not been dealt with
  good_batch: Any = None  # the last whose update was not skipped, in this process

  def saved(self) -> dict:
    """What the next process needs, beside the incidents; serialisable as JSON."""
    return {'losses': self.losses, 'in_row': self.in_row, 'passed': self.passed}

  @property
  def skipped(self) -> int:
    """The number of updates that were skipped."""
    return sum(incident['what'] == 'skipped' for incident in self.incidents)

  def see(self, batch, step: int, numbers: dict[str, float]) -> None:
    """Takes note of a step, in the order of steps.

    Args:
      batch: of the step; its global arrays.
      step: its number, from 1.
      numbers: 'loss', 'grad_norm', 'update_norm', and 'skipped', 1 or 0.
    """
    if numbers['skipped']:
      self.in_row += 1
      names = {'loss': 'loss', 'gradient norm': 'grad_norm', 'update norm': 'update_norm'}
      what = ', '.join(f'{name} {numbers[key]:.4g}' for name, key in names.items())
      self._note(step, 'skipped', batch, {key: numbers[key] for key in names.values()})
      print(f'step {step}: update skipped ({what}); batch {self.incidents[-1]["batch"]}', flush=True)
      return
    self.in_row, self.good_batch = 0, batch
    height = zscore(numbers['loss'], self.losses)
    if height > self.config.spike_zscore:
      self.spike = step
      self._note(step, 'spike', batch, {'loss': numbers['loss'], 'zscore': height})
      print(
        f'step {step}: the loss spikes to {numbers["loss"]:.4g}, {height:.1f} standard deviations '
        f'above the last {WINDOW} steps; batch {self.incidents[-1]["batch"]}',
        flush=True,
      )
    self.losses = [*self.losses, numbers['loss']][-WINDOW:]

  def _note(self, step, what, batch, numbers):
    of_batch = fingerprint(batch)
    self.incidents.append({'step': step, 'what': what, 'batch': of_batch, **metrics.plain(numbers)})


def zscore(loss: float, before: list[float]) -> float:
  """How many standard deviations a loss is above those before it; 0 until these are WINDOW."""
  if len(before) < WINDOW:
    return 0.0
  deviation = statistics.stdev(before)
  excess = loss - statistics.fmean(before)
  return excess / deviation if deviation else 0.0


def fingerprint(batch) -> str:
  """16 hex digits that identify the sequences of a global batch, on any mesh.

  All processes must call it.
  """
  digest = hashlib.sha256()
  for name, array in sorted(sharding.fetch(batch).items()):
    digest.update(name.encode() + array.tobytes())
  return digest.hexdigest()[:16]
