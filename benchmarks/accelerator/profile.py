"""Where the time of a training step goes: the kernels that take most of it."""

import collections
import functools
import itertools
import pathlib
import tempfile
from typing import NamedTuple

import jax

from benchmarks.accelerator import models, tables

TITLE = 'Kernels of a training step'
ABOUT = (
  'From a profile of two steps, the ten kernels with the most time: per step, their share of the '
  'time of all kernels, and how often they run. The gap is the part of a step in which no kernel '
  'runs: waiting for the host, or between kernels.'
)

_STEPS = 2
_TOP = 10
_SLOWEST = 2.0  # seconds of a step that is profiled: the trace of a slower one may never end


def cases(tiny):
  """By name, functions of a `limits.Limits` that return a row."""
  found = {n: f for n, f in models.families().items() if f.size == '25M'}
  return {name: functools.partial(_case, name, family, tiny) for name, family in found.items()}


def table(rows):
  return '\n\n'.join(map(_of_family, rows))


def _of_family(row):
  lines = [
    [kernel['name'], tables.ms(kernel['seconds']), tables.share(kernel['share']), kernel['count']]
    for kernel in row['kernels']
  ]
  title = (
    f'**{row["case"]}**: {row["count"]} kernels, {tables.ms(row["seconds"])} ms per step, gap '
    f'{tables.share(row["gap"])}'
  )
  return f'{title}\n\n' + tables.markdown(['kernel', 'ms', 'share', 'runs'], lines)


def _case(name, family, tiny, limits):
  measured = limits.row('steps', name)
  if measured and measured['time'][0] > _SLOWEST:
    raise RuntimeError(f'not profiled: a step takes {measured["time"][0]:.1f} s')
  training = models.Training(family.run_config(tiny))
  jax.block_until_ready(training())
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(_STEPS):
        metrics = training()
      jax.block_until_ready(metrics)
    (path,) = pathlib.Path(folder).rglob('*.xplane.pb')
    trace = jax.profiler.ProfileData.from_file(str(path))
    found = list(itertools.chain(*kernels(trace)))
  if not found:
    lines = [f'{plane.name}: {line.name}' for plane in trace.planes for line in plane.lines]
    raise RuntimeError(f'the profile has no kernels, but {lines}')
  return summarize(found)


def kernels(profile):
  """A list of Kernels for every line of a profile that shows what ran on the device.

  Of a CPU, the lines are threads of XLA.
  """
  planes = list(profile.planes)
  lines = [line for plane in planes if plane.name.startswith('/device:') for line in plane.lines]
  # GPUs: streams; further lines repeat them by module and step. TPUs: operations.
  for prefix in ('Stream', 'XLA Ops'):
    if found := [line for line in lines if line.name.startswith(prefix)]:
      return [_alone(line.events) for line in found]
  on_host = [line.events for plane in planes for line in plane.lines]
  return [_alone(e for e in events if any(s == 'hlo_op' for s, _ in e.stats)) for events in on_host]


class Kernel(NamedTuple):
  """One run of a kernel, in nanoseconds; `alone`: without those that it contains, as loops do."""

  name: str
  start: float
  end: float
  alone: float


def _alone(events):
  """The events of a line as Kernels."""
  found, around = [], []  # indices of those that the next one may be in
  for e in sorted(events, key=lambda e: (e.start_ns, -e.end_ns)):
    while around and found[around[-1]].end <= e.start_ns:
      around.pop()
    if around:
      outer = found[around[-1]]
      found[around[-1]] = outer._replace(alone=outer.alone - (e.end_ns - e.start_ns))
    around.append(len(found))
    found.append(Kernel(e.name, e.start_ns, e.end_ns, e.end_ns - e.start_ns))
  return found


def summarize(found):
  """A row: of some Kernels, those with the most time, per step."""
  seconds, count = collections.Counter(), collections.Counter()
  for kernel in found:
    seconds[kernel.name] += kernel.alone / 1e9 / _STEPS
    count[kernel.name] += 1
  total = sum(seconds.values())
  begin, end = min(k.start for k in found), max(k.end for k in found)
  return {
    'seconds': total,
    'count': round(len(found) / _STEPS),
    'gap': 1 - _covered(found) / (end - begin),
    'kernels': [
      {
        'name': name[:100],
        'seconds': spent,
        'share': spent / total,
        'count': round(count[name] / _STEPS),
      }
      for name, spent in seconds.most_common(_TOP)
    ],
  }


def _covered(found):
  """Nanoseconds in which at least one kernel runs."""
  covered, until = 0.0, float('-inf')
  for kernel in sorted(found, key=lambda kernel: kernel.start):
    covered += max(0.0, kernel.end - max(kernel.start, until))
    until = max(until, kernel.end)
  return covered
