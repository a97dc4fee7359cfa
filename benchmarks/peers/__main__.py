"""Compares moejax with transformers on PyTorch and with MaxText, in training and in decoding.

  python -m benchmarks.peers --output=build/peers
  python -m benchmarks.peers --output=build/peers --only='dense|train moe' --rounds=8

Runs on the CPU. The others get virtual environments of their own, from the package index, in the
user's cache folder; a contender that cannot be had or fails is left out. docs/peers.md says how to
read the table, which is written after every case.
"""

import argparse
import contextlib
import functools
import os
import pathlib
import platform
import random
import re
import sys
import time

from benchmarks.peers import cases, environment, table
from benchmarks.peers.process import Process
from moejax import files, report, text

_PAUSE = 0.3  # seconds in which the threads of the one before fall asleep


def main(arguments):
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.peers',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--output', type=pathlib.Path, required=True, help='folder of the results')
  parser.add_argument('--only', default='', help='cases that match this expression')
  parser.add_argument('--rounds', type=int, default=4, help='in each, all contenders take a turn')
  parser.add_argument('--seconds', type=float, default=3.5, help='of a turn')
  parser.add_argument('--tiny', action='store_true', help='sizes to try the program out')
  args = parser.parse_args(arguments)
  known = cases.cases(args.tiny)
  chosen = {name: case for name, case in known.items() if re.search(args.only, name)}
  if not chosen or args.rounds < 1:
    parser.error(f'expected --rounds of at least 1, --only of {", ".join(known)}')
  compare(chosen, cases.product(args.tiny), args.output, args.rounds, args.seconds)
  return 0


def compare(chosen, product, output, rounds, seconds):
  """Measures cases one after the other, with the matrix product in every round.

  Writes peers.md and peers.csv after each, and what contenders print to logs/.
  """
  logs = output / 'logs'
  logs.mkdir(parents=True, exist_ok=True)
  results = table.Results(_about(rounds, seconds))
  with contextlib.ExitStack() as until_the_end:
    limits = _start('product', product, logs, results, until_the_end)
    for name, case in chosen.items():
      with contextlib.ExitStack() as stack:
        contenders = _start(name, case, logs, results, stack)
        answers = _take_turns(name, contenders | limits, rounds, seconds, results)
      speeds = table.products(product, [answers[n] for n in limits if n in answers])
      starts = {n: p.start_seconds for n, p in contenders.items() if n in answers}
      results.add(name, case, starts, answers, speeds)
      results.write(output)
  print(output / 'peers.md')


def _start(name, case, logs, results, stack):
  """Processes by contender, one started after the other; `stack` closes them."""
  started = {}
  for contender in case.contenders:
    print(f'{name}: starting {contender.name}', flush=True)
    log = logs / f'{name}, {contender.name}.log'.replace(' ', '_').replace(',', '')
    try:
      python = _python(contender.environment, logs)
      command = python, '-m', contender.module
      process = Process(command, case.task | {'changes': contender.changes}, log)
    except RuntimeError as error:
      results.leave_out(name, contender.name, error)
      continue
    stack.callback(process.close)
    started[contender.name] = process
  return started


@functools.cache
def _python(name, logs):
  if not name:
    return sys.executable
  folder = files.cache_folder('peers') or logs.parent / 'environments'
  return environment.python(name, folder, logs / f'environment_{name}.log')


def _take_turns(name, processes, rounds, seconds, results):
  """The answers of every process, by round; those that end are left out."""
  answers = {contender: [] for contender in processes}
  for number in range(rounds):
    print(f'{name}: round {number + 1} of {rounds}', flush=True)
    for contender in random.sample(list(answers), len(answers)):
      time.sleep(_PAUSE)
      try:
        answers[contender].append(processes[contender].measure(seconds))
      except RuntimeError as error:
        results.leave_out(name, contender, error)
        del answers[contender]
  return answers


def _about(rounds, seconds):
  """What the page says first."""
  load, cores = os.getloadavg()[0], os.cpu_count() or 1
  idle = '' if load < 0.5 else ' **Others computed beside it: not to be trusted.**'
  return (
    f'{text.utc(time.time())}, commit {report.git_commit() or "unknown"}, {platform.machine()}, '
    f'{cores} cores, load {load:.1f} before; {rounds} rounds of {seconds:g} s.{idle}'
  )


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
