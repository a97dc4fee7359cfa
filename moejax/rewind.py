"""Going back to a checkpoint before a spike of the loss, past the batches in between."""

import jax

from moejax import metrics as metrics_lib
from moejax.start import Run, restore

BEFORE = 10  # steps between the checkpoint and the spike, at least: what leads to one comes earlier
ATTEMPTS = 3  # from one checkpoint; a spike that comes whatever the batches is not theirs


def rewind(run: Run) -> bool:
  """Goes back from the spike that the watch has seen; False if the run goes on instead.

  Later checkpoints are deleted. The first step from there sees the batch after that of the spike.
  The next checkpoint remembers this; a run that is killed before it sees the same spike again.
  """
  watch, spike = run.watch, run.watch.spike
  watch.spike = None
  if watch.config.on_spike != 'rewind':
    return False
  run.checkpoints.wait()
  step = run.checkpoints.latest_step(at_most=spike - BEFORE)
  if step is None:
    print(f'step {spike}: no checkpoint is {BEFORE} steps older than the spike; going on')
    return False
  if sum(incident.get('back_to') == step for incident in watch.incidents) >= ATTEMPTS:
    print(f'step {spike}: went back to step {step} {ATTEMPTS} times already; going on')
    return False
  run.checkpoints.discard_after(step)
  watch.incidents[-1]['back_to'] = step
  passed = spike + watch.passed - step
  ...
  return True
