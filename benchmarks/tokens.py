"""What it costs to check the tokens of every batch, as a ratio to reading them unchecked.

  python benchmarks/tokens.py --folder=/mnt/disk/here --megabytes=256

Batches of 65,536 tokens are cut from an array in memory, and from token files:
  memory  ids are compared with the vocabulary; unchecked they are not
  again   token files whose blocks were checked before: is the file as it was; ids
  first   token files of which nothing was read before: checksums of the blocks, too
Unchecked, token files are mapped into memory. All are read once per round, in random order and at
the same places, every sequence in another block; a ratio is the median over rounds of the ratios of
CPU time within a round. Files are in the page cache; from a disk, checking reads about what the
disk reads ahead anyway.
"""

import pathlib
import random
import statistics
import tempfile
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from absl import app, flags

from moejax.data import batch as batch_lib, blocks

_BATCHES = 32  # of a round
_TOKENS = 65_536  # of a batch
TOKENIZER: Any = SimpleNamespace(vocab_size=50_260, eos_id=1)


def write(folder, num_tokens):
  """Random token ids; returns them, and a function that opens the file as a run does."""
  ids = np.random.default_rng(0).integers(0, TOKENIZER.vocab_size, num_tokens, np.uint16)
  path = pathlib.Path(folder, 'train.bin')
  with blocks.BlockWriter(path) as writer:
    writer.write(ids.tobytes())
  return ids, lambda: blocks.TokenFile(path, np.dtype('<u2'), num_tokens, writer.crc32)


def measure(tokens, rows, length, is_checked):
  """CPU seconds of a batch; `rows` are the sequences of several."""
  unchecked = mock.patch.object(batch_lib, 'check_ids', lambda *_: None)
  if not is_checked:
    unchecked.start()
  began = time.process_time()
  for places in rows:
    batch_lib.cut(tokens, places, length, TOKENIZER)
  seconds = (time.process_time() - began) / len(rows)
  mock.patch.stopall()
  return seconds


def main(_):
  values = flags.FLAGS
  length, size, results = values.length, _TOKENS // values.length, {}
  with tempfile.TemporaryDirectory(dir=values.folder) as folder:
    ids, open_file = write(folder, values.megabytes * 2**19)
    mapped, again = np.memmap(pathlib.Path(folder, 'train.bin'), '<u2', 'r'), open_file()
    again[:]
    for number in range(values.rounds + 1):  # the first warms up
      places = np.random.default_rng(number).permutation(len(ids) * 2 // blocks.BLOCK)
      rows = (places * (blocks.BLOCK // 2 // length))[: _BATCHES * size].reshape(_BATCHES, size)
      cases = [('memory', ids, False), ('memory', ids, True), ('mapped', mapped, False)]
      cases += [('again', again, True), ('first', open_file(), True)]
      for name, tokens, is_checked in random.sample(cases, len(cases)):
        seconds = measure(tokens, rows, length, is_checked)
        results.setdefault((name, is_checked), []).append(seconds)
  for name, without in (('memory', 'memory'), ('again', 'mapped'), ('first', 'mapped')):
    checked, unchecked = results[name, True][1:], results[without, False][1:]
    ratio = statistics.median(a / b for a, b in zip(checked, unchecked, strict=True))
    milliseconds = [1e3 * statistics.median(times) for times in (checked, unchecked)]
    print(
      '{:8} {:6.2f} ms, {:6.2f} ms unchecked, '.format(name, *milliseconds) + f'ratio {ratio:.2f}'
    )


if __name__ == '__main__':
  flags.DEFINE_string('folder', '.', 'On the disk to measure.')
  flags.DEFINE_integer('megabytes', 256, 'Size of the token file.', lower_bound=128)
  flags.DEFINE_integer('length', 1024, 'Tokens of a sequence.')
  flags.DEFINE_integer('rounds', 15, 'How often each is measured.')
  app.run(main)
