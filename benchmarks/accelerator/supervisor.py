"""Runs the worker in a process of its own, which a crash or a hang of one case cannot end for all.

A crash inside a compiler or a driver is no exception, and a program that never ends cannot be
interrupted. So the process is watched; a case that took it down, or takes too long, becomes a row,
and another process goes on with the next case.
"""

import json
import multiprocessing
import time

from benchmarks.accelerator import plan as plan_lib
from benchmarks.accelerator.results import Results

_START = 180.0  # seconds until the first case must have begun
_POLL = 0.2


def work(plan):
  """`worker.work`, whose imports take seconds."""
  from benchmarks.accelerator import worker

  worker.work(plan)


def run(plan, work=work):
  """Carries out a plan; returns its Results, or None if no device could be used."""
  plan_lib.environment()  # inherited
  context = multiprocessing.get_context('spawn')
  while True:
    process = context.Process(target=work, args=(plan,), daemon=True)
    process.start()
    reason = _watch(process, plan)
    if process.is_alive():
      process.kill()
    process.join()
    results = _read(plan)
    if results is None or results.content.get('finished'):
      return results
    if 'running' not in results.content:  # nothing to leave out: it would happen again
      reason = reason or f'a process ended with code {process.exitcode} between two cases'
      results.content['stopped'] = reason
      results.write()
      return results
    results.fail(reason or f'the process ended with code {process.exitcode}')
    if time.time() >= plan.end:
      return results


def _watch(process, plan):
  """Waits for the end of a process; why it must be stopped, or '' if it ended by itself."""
  started = time.time()
  while process.is_alive():
    process.join(_POLL)
    if time.time() >= plan.end:
      return 'stopped: the time was up'
    running = _running(plan)
    if running and time.time() - running['since'] > plan.limit(running['part']):
      return f'stopped: took longer than {plan.limit(running["part"]):.0f} s'
    if not plan.files() and time.time() - started > _START:
      return f'stopped: no device answered in {_START:.0f} s'
  return ''


def _running(plan):
  for path in plan.files():
    return json.loads(path.read_text()).get('running')


def _read(plan):
  for path in plan.files():
    return Results.read(path)
