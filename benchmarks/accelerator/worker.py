"""Goes through parts and cases within their times; what fails becomes a row."""

import functools
import gc
import multiprocessing
import re
import textwrap
import time
import traceback

import jax

from benchmarks.accelerator import limits, parts
from benchmarks.accelerator.results import Results, versions
from moejax import compilation_cache


def work(plan):
  """Measures what the results of a plan do not have yet; returns them."""
  compilation_cache.enable()
  device = jax.devices()[0]
  path = plan.path(device.device_kind)
  if path.exists():
    results = Results.read(path)
  else:
    content = {'command': plan.command, 'minutes': plan.seconds / 60, 'date': plan.name}
    content |= {'chip': device.device_kind, 'platform': device.platform}
    content |= {'memory': (device.memory_stats() or {}).get('bytes_limit', 0)}
    content |= {'versions': versions(), 'tiny': plan.tiny, 'rows': [], 'cases': {}}
    results = Results(path, content)
  for part in plan.parts:
    cases = _cases(part, plan)
    results.content['cases'][part] = list(cases)
    for name, case in cases.items():
      if results.has(part, name):
        continue
      if time.time() > plan.deadline(part) or _is_orphan():
        break
      results.begin(part, name)
      print(f'{time.time() - plan.start:6.1f} s  {part}: {name}', flush=True)
      results.end(attempt(case, limits.Limits(results)))
  results.content['finished'] = True
  results.write()
  return results


def _cases(part, plan):
  """Those to be measured; if they cannot be made, one that says why."""
  try:
    found = parts.PARTS[part].cases(plan.tiny)
  except Exception as error:
    return {'cases': functools.partial(_raise, error)}
  return {name: case for name, case in found.items() if re.search(plan.only, name)}


def _raise(error, limits):
  raise error


def attempt(case, limits):
  """What `case(limits)` measures, or its error."""
  try:
    return case(limits)
  except Exception as error:
    traceback.print_exc()
    return {'error': describe(error)}
  finally:
    gc.collect()  # its arrays, before the next case needs the memory


def describe(error):
  """An exception in one line."""
  text = ' '.join(f'{type(error).__name__}: {error}'.split())
  return textwrap.shorten(text, 400)


def _is_orphan():
  """Whether the process that started this one, and stops it in time, has ended."""
  parent = multiprocessing.parent_process()
  return parent is not None and not parent.is_alive()
