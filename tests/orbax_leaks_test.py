"""Saves keep no memory."""

import gc
import tracemalloc

import jax.numpy as jnp
import pytest

from moejax.checkpoint import Checkpoints


@pytest.mark.heavy
def test_saves_keep_no_memory(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1)
  state = {f'array_{i}': jnp.ones((2, 2)) for i in range(40)}

  def save(first, last):
    for step in range(first, last):
      checkpoints.save(step, state, None, {})
    checkpoints.wait()
    gc.collect()

  save(0, 10)
  tracemalloc.start()
  try:
    save(10, 20)
    before, _ = tracemalloc.get_traced_memory()
    save(20, 40)
    after, _ = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
    checkpoints.close()
  assert (after - before) / 20 < 8000  # of a save: 300 to 3,000, and 29,000 without `stop`
