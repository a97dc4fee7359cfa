"""A training program in which something goes wrong at one call of one function.

python -m moejax.drill.inject '["moejax.manifest:commit", "kill", 2]' ARGUMENTS OF MOEJAX.MAIN

So training itself needs no place where faults are put in: functions are replaced from outside.
"""

import functools
import importlib
import itertools
import json
import os
import resource
import runpy
import signal
import sys
import threading
from typing import NamedTuple

import numpy as np

_DELAY = 1.0  # seconds
SPOILT = (4, 5)  # steps done before the batches of NaN


class Injection(NamedTuple):
  """What goes wrong, and where."""

  place: str  # 'module:function' or 'module:class.method', as the program looks it up
  action: str  # of ACTIONS
  call: int = 1  # at which call, from 1
  after: bool = False  # when that has returned, instead of before
  size: int = 0  # for the action


def _signal(number):
  return lambda injection, result: os.kill(os.getpid(), number)


def _kill_later(injection, result):
  threading.Timer(_DELAY, os.kill, (os.getpid(), signal.SIGKILL)).start()


def _fill_disk(injection, result):
  """From now on, no file can be written beyond a size; Python ignores the signal for that."""
  resource.setrlimit(resource.RLIMIT_FSIZE, (injection.size, resource.RLIM_INFINITY))


def _spoil(injection, run):
  """Some batches of a `start.Run` have no targets, and the mean of their losses is 0 / 0."""
  batch = run.loader.batch

  def spoilt(step):
    found = batch(step)
    if step in SPOILT:
      found = found | {'segments': np.zeros_like(found['segments'])}
    return found

  run.loader.batch = spoilt


# Functions of the Injection and of what the call has returned.
ACTIONS = {
  'kill': _signal(signal.SIGKILL),
  'terminate': _signal(signal.SIGTERM),
  'stop': _signal(signal.SIGSTOP),
  'kill later': _kill_later,
  'fill the disk': _fill_disk,
  'spoil batches': _spoil,
}


def inject(injection: Injection, act=None) -> None:
  """Replaces the function of a place; `act` instead of the action."""
  module, _, path = injection.place.partition(':')
  *parents, name = path.split('.')
  owner = functools.reduce(getattr, parents, importlib.import_module(module))
  function, calls = getattr(owner, name), itertools.count(1)
  act = act or ACTIONS[injection.action]

  def replaced(*args, **options):
    is_now = next(calls) == injection.call
    if is_now and not injection.after:
      act(injection, None)
    result = function(*args, **options)
    if is_now and injection.after:
      act(injection, result)
    return result

  setattr(owner, name, replaced)


def run():
  inject(Injection(*json.loads(sys.argv.pop(1))))
  runpy.run_module('moejax.main', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  run()
