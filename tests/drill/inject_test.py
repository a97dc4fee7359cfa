"""What goes wrong, and that it does so at one call of one function."""

import resource
import signal
import sys
import types

import numpy as np
import pytest

from moejax.drill import inject
from moejax.drill.inject import Injection


@pytest.fixture
def place(monkeypatch):
  """A function in a class of a module, which says what it is given."""
  owner = type('Owner', (), {'say': lambda self, what: what.upper()})
  module = types.ModuleType('of_a_test')
  module.Owner = owner
  monkeypatch.setitem(sys.modules, 'of_a_test', module)
  return owner()


@pytest.mark.parametrize('after, seen', [(False, None), (True, 'B')])
def test_only_the_call_is_hit_before_or_after_it(place, after, seen):
  found = []
  injection = Injection('of_a_test:Owner.say', 'kill', 2, after)
  inject.inject(injection, lambda *given: found.append(given))
  assert [place.say(what) for what in 'abc'] == ['A', 'B', 'C']
  assert found == [(injection, seen)]


def test_actions(monkeypatch):
  done = []
  monkeypatch.setattr(inject.os, 'kill', lambda process, number: done.append(number))
  monkeypatch.setattr(inject.resource, 'setrlimit', lambda *given: done.append(given))
  monkeypatch.setattr(inject, '_DELAY', 0)
  for action in ('kill', 'terminate', 'stop', 'fill the disk'):
    inject.ACTIONS[action](Injection('', action, size=7), None)
  full = (resource.RLIMIT_FSIZE, (7, resource.RLIM_INFINITY))
  assert done == [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, full]
  inject.ACTIONS['kill later'](None, None)
  while len(done) < 5:
    pass
  assert done[4] == signal.SIGKILL


def test_batches_without_targets():
  batch = {'inputs': np.ones((2, 3)), 'segments': np.ones((2, 3))}
  run = types.SimpleNamespace(loader=types.SimpleNamespace(batch=lambda step: batch))
  inject.ACTIONS['spoil batches'](None, run)
  sums = [run.loader.batch(step)['segments'].sum() for step in range(8)]
  assert [step for step, total in enumerate(sums) if total == 0] == [*inject.SPOILT]
  assert run.loader.batch(inject.SPOILT[0])['inputs'].all() and batch['segments'].all()
