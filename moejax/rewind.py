"""Going back to a checkpoint before a spike of the loss, past the batches in between."""

import jax

from moejax.start import Run, open_writer, recall, restore

BEFORE = 10  # steps from the checkpoint to the spike, at least: what leads to a spike comes earlier
ATTEMPTS = 3  # from one checkpoint; a spike that comes whatever the batches is not theirs


def rewind(run: Run) -> bool:
  """Goes back from the spike that the watch has seen; False if the run goes on instead.

  The next step then sees the batch after that of the spike. Later checkpoints remember that; a run
  that is killed before there is one sees the same spike again, and goes back again.
  """
  watch, spike = run.watch, run.watch.spike
  watch.spike = None
  step = run.checkpoints.latest_step(at_most=spike['step'] - BEFORE)
  if step is None:
    print(f'going on through the spike: no checkpoint is at least {BEFORE} steps older')
    return False
  if sum(incident.get('back_to') == step for incident in watch.incidents) >= ATTEMPTS:
    print(f'going on through the spike: back at step {step} {ATTEMPTS} times already')
    return False
  run.checkpoints.discard_after(step)  # a later save would leave what exists as it is
  if run.memory:
    run.memory.discard_after(step)
  metadata = run.checkpoints.metadata(step)
  abstract = jax.tree.map(_abstract, run.state)
  run.state = None  # there may be no memory for two
  run.state = restore(run, run.checkpoints, step, abstract)
  recall(run, step, metadata)
  begin, end = step + run.watch.passed, spike['step'] + watch.passed
  for number in range(begin, end):
    run.loader.batch(number)  # some can only be read in order
  run.watch.passed = end - step
  while watch.incidents[-1] is not spike:  # undone, too
    watch.incidents.pop()
  spike['back_to'] = step
  run.watch.incidents, run.watch.good_batch = watch.incidents, watch.good_batch
  run.writer.close()
  run.step, run.is_evaluated = step, True
  open_writer(run)
  run.ledger.lose(metadata.get('goodput', {}))
  print(f'back to the checkpoint of step {step}, past {end - begin} batches of data', flush=True)
  return True


def _abstract(array):
  return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
