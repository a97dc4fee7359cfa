"""Compares moejax with transformers on PyTorch and with MaxText, in training and in decoding.

  python -m benchmarks.peers --output=build/peers
  python -m benchmarks.peers --output=build/peers --only='train,decode moe' --rounds=8

Runs on the CPU. The others get virtual environments of their own, from the package index, in the
user's cache folder; a contender that cannot be had or fails is left out. docs/peers.md says how to
read the table, which is written after every case.
"""

import argparse
import contextlib
import importlib.metadata
import os
import pathlib
import platform
import random
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
  parser.add_argument('--only', default='', help='cases with one of these in their names')
  parser.add_argument('--rounds', type=int, default=4, help='in each, all contenders take a turn')
  parser.add_argument('--seconds', type=float, default=3.5, help='of a turn')
  parser.add_argument('--tiny', action='store_true', help='sizes to try the program out')
  args = parser.parse_args(arguments)
  known = cases.cases(args.tiny)
  is_chosen = lambda name: any(part in name for part in args.only.split(','))
  chosen = {name: case for name, case in known.items() if is_chosen(name)}
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
  pythons = _pythons([product, *chosen.values()], output)
  with contextlib.ExitStack() as until_the_end:
    limits = _start('product', product, pythons, logs, results, until_the_end)
    for name, case in chosen.items():
      with contextlib.ExitStack() as stack:
        contenders = _start(name, case, pythons, logs, results, stack)
        answers = _take_turns(name, contenders | limits, rounds, seconds, results)
      limits = {n: process for n, process in limits.items() if n in answers}
      speeds = table.products(product, [answers[n] for n in limits])
      starts = {n: p.start_seconds for n, p in contenders.items() if n in answers}
      results.add(name, case, starts, answers, speeds)
      results.write(output)
  print(output / 'peers.md')


def _pythons(chosen, output):
  """By environment, the interpreter, or the error with which it could not be made."""
  folder = files.cache_folder('peers') or output / 'environments'
  pythons = {'': sys.executable}
  for name in {c.environment for case in chosen for c in case.contenders} - {''}:
    try:
      pythons[name] = environment.python(name, folder, output / 'logs' / f'environment_{name}.log')
    except RuntimeError as error:
      pythons[name] = error
  return pythons


def _start(name, case, pythons, logs, results, stack):
  """Processes by contender, one started after the other; `stack` closes them."""
  started = {}
  for contender in case.contenders:
    print(f'{name}: starting {contender.name}', flush=True)
    log = logs / f'{name}, {contender.name}.log'.replace(' ', '_').replace(',', '')
    try:
      if isinstance(python := pythons[contender.environment], RuntimeError):
        raise python
      changes = case.task.get('changes', {}) | contender.changes
      process = Process([python, '-m', contender.module], case.task | {'changes': changes}, log)
    except RuntimeError as error:
      results.leave_out(name, contender.name, error)
      continue
    stack.callback(process.close)
    started[contender.name] = process
  return started


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
    f'{text.utc(time.time())}, commit {report.git_commit() or "unknown"}, '
    f'jax {importlib.metadata.version("jax")}, {platform.machine()}, {cores} cores, '
    f'load {load:.1f} before; {rounds} rounds of {seconds:g} s.{idle}'
  )


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
