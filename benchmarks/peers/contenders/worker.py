"""How a contender answers: one line of JSON for each that it is asked, over standard input.

The first is a task (`cases.Case.task`), answered after its first step. The others are numbers of
seconds: it takes steps for so long, at least one, and answers how many these were, their seconds,
and the most memory that it has held. Imports the standard library alone.
"""

import json
import os
import random
import resource
import sys
import time


def _most_memory():
  """In bytes. Linux counts what the parent held when it forked into `ru_maxrss`, not here."""
  if sys.platform == 'darwin':
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with open('/proc/self/status') as lines:
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith('VmHWM'))


def serve(prepare):
  """Answers until the end of standard input. What libraries print goes to standard error."""
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)

  def answer(**values):
    print(json.dumps(values), file=answers, flush=True)

  step = prepare(json.loads(sys.stdin.readline()))
  step()  # compiles
  answer()
  for line in sys.stdin:
    seconds, steps, start = float(line), 0, time.perf_counter()
    while not steps or time.perf_counter() - start < seconds:
      step()
      steps += 1
    took = time.perf_counter() - start
    answer(steps=steps, seconds=took, memory=_most_memory())


def tokens(task, length):
  """Random ids, as lists of one length."""
  rng, vocabulary = random.Random(0), task['model']['vocab_size']
  return [[rng.randrange(1, vocabulary) for _ in range(length)] for _ in range(task['batch'])]
