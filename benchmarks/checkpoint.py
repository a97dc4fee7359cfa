"""Saves that are flushed to the disk, compared with saves that are not.

  python benchmarks/checkpoint.py --folder=/mnt/disk/here --megabytes=1,100

Both are made once per round, in random order; a ratio is the median over rounds of the ratios
within a round. Training waits for the first part of a save; the rest is done in the background.
TensorStore flushes the files of arrays in both cases.
"""

import contextlib
import pathlib
import random
import statistics
import tempfile
import time
from unittest import mock

import numpy as np
from absl import app, flags

from moejax import files
from moejax.checkpoint import Checkpoints

_FOLDER = flags.DEFINE_string('folder', '.', 'On the disk to measure.')
_MEGABYTES = flags.DEFINE_list('megabytes', '1,100', 'Sizes of states.')
_SAVES = flags.DEFINE_integer('saves', 9, 'Of each kind.')


def measure(directory, step, state, flushed):
  """Seconds until `save` returns, and until the step is complete."""
  unflushed = mock.patch.multiple(files, flush=mock.DEFAULT, _flush_one=mock.DEFAULT)
  with contextlib.nullcontext() if flushed else unflushed:
    checkpoints = Checkpoints(directory, keep=1)
    checkpoints._has_saved = True  # the first save is read back
    began = time.perf_counter()
    checkpoints.save(step, state, None, {'config': {}})
    returned = time.perf_counter()
    checkpoints.close()
    return returned - began, time.perf_counter() - began


def main(_):
  for megabytes in map(float, _MEGABYTES.value):
    rows = max(1, int(megabytes * 1e6 / 4 / 8 / 1000))
    state = {f'w{i}': np.random.default_rng(i).random((rows, 1000), np.float32) for i in range(8)}
    results = {True: [], False: []}
    with tempfile.TemporaryDirectory(dir=_FOLDER.value) as folder:
      for number in range(1, _SAVES.value + 1):
        for flushed in random.sample([True, False], 2):
          directory = pathlib.Path(folder, str(flushed))
          results[flushed].append(measure(directory, number, state, flushed))
    for part, name in enumerate(('until training goes on', 'until the step is complete')):
      ratio = statistics.median(
        a[part] / b[part] for a, b in zip(results[True], results[False], strict=True)
      )
      with_, without = (statistics.median(r[part] for r in results[f]) for f in (True, False))
      print(
        f'{megabytes:g} MB, {name}: {with_:.3f} s, {without:.3f} s unflushed, ratio {ratio:.2f}'
      )


if __name__ == '__main__':
  app.run(main)
