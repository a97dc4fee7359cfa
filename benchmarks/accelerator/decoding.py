"""Decoding with a cache: tokens per second as `moejax.generate` reaches them."""

import functools
import itertools
import statistics
import time

import jax
import numpy as np

from benchmarks.accelerator import models, tables
from moejax import decode, flops, model as model_lib
from moejax.text import short

TITLE = 'Decoding'
ABOUT = (
  'New tokens per second of all sequences together, sampled at temperature 1 after a prompt of 128 '
  'tokens, one position after the other with the host between them, as a user streams them; the '
  'time of a position, and of the first one, which reads the prompts. Parameters are float32 in '
  'memory. The floor is one read of all parameters that a position needs; MoT fills groups of 32.'
)

_BATCHES = 1, 32, 256
_FAMILIES = 'dense 1024', 'Switch 32E', 'Mamba', 'MoE-Mamba', 'MoT 32E/1'
_SETTINGS = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, 'repetition_penalty': 1.0}


def cases(tiny):
  """By name, functions of a `limits.Limits` that return a row."""
  found = models.families()
  return {
    f'{name} 25M, batch {batch}': functools.partial(_case, found[f'{name} 25M'], batch, tiny)
    for batch in _BATCHES
    for name in _FAMILIES
  }


def table(rows):
  lines = [
    [
      row['case'],
      short(row['tokens_per_second']),
      tables.ms(row['time'][0]),
      tables.spread(row['time']),
      tables.ms(row['first_seconds']),
      tables.ms(row['floor_seconds']),
      f'{row["start_seconds"]:.1f}',
    ]
    for row in rows
  ]
  header = ['model', 'tokens/s', 'ms', 'spread', 'first ms', 'floor ms', 'compile s']
  return tables.markdown(header, lines)


def _case(family, batch, tiny, limits):
  config = family.run_config(tiny).model
  prompt, length = (8, 6) if tiny else (128, 64)
  params = jax.jit(functools.partial(model_lib.init_params, config))(jax.random.key(0))
  prompts = np.random.default_rng(0).integers(1, config.vocab_size, (batch, prompt)).tolist()
  stream = functools.partial(
    decode.stream, config, params, prompts, length, list(range(batch)), _SETTINGS
  )
  start = time.perf_counter()
  for _ in itertools.islice(stream(), 2):  # compiles: the prompts, then one position
    pass
  compiled = time.perf_counter()
  stamps = [compiled]
  for _ in stream():
    stamps.append(time.perf_counter())
  seconds = np.diff(stamps)
  low, median, high = statistics.quantiles(seconds[1:], n=4, method='inclusive')
  active = _read(config, batch)
  return {
    'tokens_per_second': batch / median,
    'time': (median, low, high),
    'first_seconds': seconds[0],
    'floor_seconds': limits.rates.get('bytes') and 4 * active / limits.rates['bytes'],
    'start_seconds': compiled - start,
  }


def _read(config, batch):
  """Parameters that a position reads: without the embedding, and the experts that are chosen."""
  counts = flops.param_counts(config)
  experts = counts['by_kind'].get('experts', 0)
  chosen = 1.0
  if config.uses('moe'):
    moe = config.moe
    chosen = 1 - (1 - moe.top_k / moe.num_experts) ** batch  # some tokens choose the same
  rest = counts['non_embedding'] - experts + counts['by_kind']['head']
  return rest + chosen * experts
