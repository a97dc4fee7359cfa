"""Workers for tests/accelerator_test.py; they run in processes of their own, and import little."""

import os
import time

from benchmarks.accelerator import results as results_lib

CASES = ['crashes', 'hangs', 'is cut', 'late']


def misbehave(plan):
  """The first case ends the process, the others take forever."""
  path = plan.path('a chip')
  if path.exists():
    results = results_lib.Results.read(path)
  else:
    content = {'date': plan.name, 'chip': 'a chip', 'memory': 0, 'versions': {}, 'command': ''}
    content |= {'tiny': True, 'rows': [], 'cases': {'steps': CASES}}
    results = results_lib.Results(path, content)
  for case in CASES:
    if not results.has('steps', case):
      results.begin('steps', case)
      if case == 'crashes':
        os.abort()
      time.sleep(600)


def die(plan):
  """What a process does that finds no device."""
  os._exit(3)
