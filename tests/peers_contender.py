"""A contender for tests/peers_test.py, which only waits, or fails where it is told to."""

import time

from benchmarks.peers.contenders import worker


def prepare(task):
  changes = task['changes']
  print('what libraries say is no answer')
  if 'cannot start' in changes:
    raise ValueError('nothing works')
  turns = iter(range(changes.get('steps', 10**9)))

  def step():
    next(turns)
    time.sleep(changes.get('takes', 0))

  return step


if __name__ == '__main__':
  worker.serve(prepare)
