"""How long a program takes to compile and to run.

Devices work asynchronously, so a clock is read only once they have finished. The first call, which
loads kernels, does not count. Short programs are called many times between two readings. No program
is measured as shorter than the host takes for a call (part `chip`, case `call`).
"""

import statistics
import time
from typing import NamedTuple

import jax

from moejax.aot.step import peak_bytes

_BATCH = 0.02  # seconds between two readings of the clock, at least
_REPEATS = 3, 25
_HITS = []  # an entry for every program that was found in the compilation cache


def _on_event(event, **_):
  if event == '/jax/compilation_cache/cache_hits':
    _HITS.append(event)


jax.monitoring.register_event_listener(_on_event)


class Time(NamedTuple):
  """Seconds of one call: the median of repeats, and their quartiles."""

  median: float
  low: float
  high: float


def measure(call, wait, seconds):
  """The Time of `call()`, whose result `wait` waits for; takes about `seconds`."""
  wait(call())
  once = _timed(call, wait, 1)
  if once > seconds:
    return Time(once, once, once)
  calls = max(1, min(1000, round(_BATCH / once)))
  least, most = _REPEATS
  repeats = max(least, min(most, round(seconds / calls / once)))
  times = [_timed(call, wait, calls) for _ in range(repeats)]
  low, median, high = statistics.quantiles(times, n=4, method='inclusive')
  return Time(median, low, high)


def _timed(call, wait, calls):
  start = time.perf_counter()
  for _ in range(calls):
    result = call()
  wait(result)
  return (time.perf_counter() - start) / calls


class Program:
  """What `lower()` returns, compiled, and the arguments it is called with.

  `compile_seconds`: from tracing to a program. `cached`: whether the compiler was spared.
  `peak_bytes`: of memory, arguments and results included, as the compiler says.
  """

  def __init__(self, lower, args=()):
    hits, start = len(_HITS), time.perf_counter()
    self.compiled = lower().compile()
    self.compile_seconds = time.perf_counter() - start
    self.cached = len(_HITS) > hits
    self.peak_bytes = peak_bytes(self.compiled)
    self.args = args

  def __call__(self):
    return self.compiled(*self.args)

  def time(self, seconds):
    return measure(self, jax.block_until_ready, seconds)

  def costs(self):
    """What a row says of compiling."""
    names = ('compile_seconds', 'cached', 'peak_bytes')
    return {name: getattr(self, name) for name in names}


def program(function, *args):
  """The Program of a function of these arguments."""
  return Program(lambda: jax.jit(function).lower(*args), args)


def with_gradients(function, num_args):
  """`function`, and its gradients by the first `num_args` arguments for a gradient of ones."""

  def both(*args):
    first, rest = args[:num_args], args[num_args:]
    y, backward = jax.vjp(lambda *first: function(*first, *rest), *first)
    return y, backward(jax.tree.map(lambda a: jax.numpy.ones(a.shape, a.dtype), y))

  return both
