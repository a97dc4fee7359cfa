"""The chip's own limits, which all other parts are compared with."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.accelerator import tables, timing

TITLE = 'Limits of the chip'
ABOUT = (
  'Measured: large matrix products, a copy larger than any cache (bytes read and written), '
  'exponentials in registers, one turn of a loop whose end the device computes, one call of an '
  'empty program. Floors below are in terms of the first three kinds.'
)

_CHAIN = 64  # exponentials of a number, one after the other
_TURNS = 1000


def cases(tiny):
  """By name, functions of a `limits.Limits` that return a row."""
  size, numbers = (256, 2**20) if tiny else (8192, 2**28)
  return {
    'matmul bfloat16': functools.partial(_matmul, size, 'bfloat16', None),
    'copy': functools.partial(_copy, numbers),
    'exponentials': functools.partial(_exponentials, numbers // 16),
    'matmul float32, full precision': functools.partial(_matmul, size // 2, 'float32', 'highest'),
    'matmul float32, as by default': functools.partial(_matmul, size // 2, 'float32', None),
    'turn of a loop': _turn,
    'call': _call,
  }


def table(rows):
  """Rates and seconds."""
  lines = [
    [
      row['case'],
      _rate(row),
      tables.share(row.get('of_specification')),
      tables.ms(row['seconds']),
      tables.spread(row['time']),
    ]
    for row in rows
  ]
  return tables.markdown(['limit', 'rate', 'of specification', 'ms', 'spread'], lines)


def _rate(row):
  if 'rate' not in row:
    return ''
  unit = {'bytes': 'TB/s', 'exps': 'T exp/s'}.get(row['limit'], 'TFLOP/s')
  return f'{row["rate"] / 1e12:.3g} {unit}'


def _matmul(size, dtype, precision, limits):
  x, y = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in (0, 1))
  product = functools.partial(jnp.matmul, precision=precision)
  limit = dtype if (dtype, precision) != ('float32', None) else 'float32 by default'
  specified = limits.peak if dtype == 'bfloat16' else None
  return _row(limits, timing.program(product, x, y), limit, 2 * size**3, specified)


def _copy(numbers, limits):
  x = jax.random.normal(jax.random.key(0), (numbers,))
  specified = limits.chip.memory_bandwidth if limits.chip else None
  return _row(limits, timing.program(jnp.negative, x), 'bytes', 2 * x.nbytes, specified)


def _exponentials(numbers, limits):
  def chain(x):
    for _ in range(_CHAIN):
      x = jnp.exp(-x)
    return x

  x = jax.random.uniform(jax.random.key(0), (numbers,))
  return _row(limits, timing.program(chain, x), 'exps', _CHAIN * numbers, None)


def _row(limits, program, limit, number, specified):
  time = program.time(tables.seconds(limits.tiny, 0.5))
  row = {'limit': limit, 'rate': number / time.low, 'seconds': time.low, 'time': time}
  if specified:
    row['of_specification'] = row['rate'] / specified
  return row | program.costs()


def _turn(limits):
  """A loop like that of dropless experts: its number of turns is on the device."""

  def loop(turns, x):
    return jax.lax.fori_loop(0, turns, lambda i, x: x.at[i % 8].add(x[(i + 1) % 8]), x)

  program = timing.program(loop, jnp.int32(_TURNS), jnp.zeros((8, 1024)))
  time = timing.Time(*(t / _TURNS for t in program.time(tables.seconds(limits.tiny, 0.5))))
  return {'seconds': time.median, 'time': time} | program.costs()


def _call(limits):
  program = timing.program(lambda x: x + 1, jnp.float32(0))
  time = program.time(tables.seconds(limits.tiny, 0.5))
  return {'seconds': time.median, 'time': time} | program.costs()
