"""The faults: what is done to a short run, and what must hold then. A new fault is one entry."""

import contextlib
import functools
import pathlib
import random
from collections.abc import Callable
from typing import NamedTuple

from moejax import report
from moejax.cli import INTERRUPTED
from moejax.drill.inject import SPOILT, Injection
from moejax.drill.runs import (
  STEPS,
  DidNotHold,
  NotTried,
  Runs,
  changed,
  fingerprints,
  free_port,
  largest_file,
  step_folder,
)

_STEP = 'moejax.metrics:MetricAverager.add'  # a step was dispatched, and is being computed
_COMMIT = 'moejax.manifest:commit'
_BATCH = 'moejax.evaluate:Evaluation.add'  # of an evaluation
_SILENCE = 45.0  # seconds, about, until a process that is stopped is noticed


class Fault(NamedTuple):
  """One row of the table."""

  name: str
  done: str  # what is done
  guarantee: str  # what must hold
  attempt: Callable[[Runs, pathlib.Path], None]  # in a new folder; raises DidNotHold or NotTried
  starts: int  # of programs, one after the other, for the time that it takes
  seconds: float = 0.0  # beside these


# What is done.


def _again(runs, folder):
  runs.train(folder)
  runs.check_same(folder)


def _kill(injection, runs, folder):
  runs.kill(folder, injection)
  _again(runs, folder)


def _kill_compiling(runs, folder):
  """Without the programs that were compiled before, which is why it must compile."""
  cache = {'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled')}
  runs.kill(folder, Injection('moejax.start:_compile', 'kill later'), **cache)
  runs.train(folder, **cache)
  runs.check_same(folder)


def _terminate(injection, runs, folder):
  runs.train(folder, injection, INTERRUPTED)
  _again(runs, folder)


def _damage(change, runs, folder):
  """Changes the last checkpoint, so that the run must go on from the one before."""
  runs.copy(folder)
  change(step_folder(folder, STEPS))
  output = runs.train(folder)
  if (said := f'skipped damaged checkpoints: {STEPS} (') not in output:
    raise DidNotHold(f'it does not say: {said}...)')
  runs.check_same(folder)


def _flip_bit(checkpoint):
  path, place = largest_file(checkpoint), random.Random(0)
  with path.open('r+b') as file:
    file.seek(place.randrange(path.stat().st_size))
    (byte,) = file.read(1)
    file.seek(-1, 1)
    file.write(bytes([byte ^ 1 << place.randrange(8)]))


def _cut_off(checkpoint):
  path = largest_file(checkpoint)
  with path.open('r+b') as file:
    file.truncate(path.stat().st_size // 2)


def _delete_file(checkpoint):
  largest_file(checkpoint).unlink()


def _delete_manifest(checkpoint):
  (checkpoint / 'manifest.json').unlink()


def _damage_folder(runs, folder):
  runs.copy(folder)
  _delete_manifest(step_folder(folder, STEPS))
  (folder / 'summary.json').write_bytes(b'')
  config, lines = folder / 'config.json', folder / 'metrics.jsonl'
  config.write_bytes(config.read_bytes()[:100])
  first, *others = lines.read_bytes().splitlines(keepends=True)
  lines.write_bytes(b''.join([first, bytes(50), b'\n', *others]))
  _again(runs, folder)


def _fill_disk(runs, folder):
  """All writes fail beyond half the size of the arrays."""
  size = largest_file(step_folder(runs.undisturbed, STEPS)).stat().st_size // 2
  full = Injection('moejax.checkpoint:Checkpoints.save', 'fill the disk', 2, size=size)
  output = runs.train(folder, full, INTERRUPTED)
  if (said := f'cannot write checkpoint {step_folder(folder, 4)}') not in output:
    raise DidNotHold(f'it does not say: {said}')
  _again(runs, folder)


def _spoil(runs, folder):
  runs.train(folder, Injection('moejax.train:prepare', 'spoil batches', after=True))
  found = [incident['step'] for incident in report.read_summary(folder)['incidents']]
  if found != [step + 1 for step in SPOILT]:
    raise DidNotHold(f'summary.json has incidents at steps {found}')
  before, after = (fingerprints(folder, step) for step in (SPOILT[0], SPOILT[-1] + 1))
  if (names := changed(before, after)) != ['step']:
    raise DidNotHold(f'two skipped updates change {", ".join(names)}')


def _stop_neighbour(runs, folder):
  """Two processes, of which one is stopped; they go on as one, which has as many devices."""
  if (platform := report.read_summary(runs.undisturbed)['versions']['platform']) != 'cpu':
    raise NotTried(f'needs another machine where a run takes the whole {platform.upper()}')
  alone, devices = folder / 'alone', 'JAX_NUM_CPU_DEVICES'
  folder.mkdir()
  try:
    runs.train(alone, **{devices: '2'})
  except DidNotHold as error:
    raise NotTried(f'does not train on two devices: {error}') from error
  together, address = folder / 'together', f'--coordinator_address=127.0.0.1:{free_port()}'
  of = [[address, '--num_processes=2', f'--process_id={index}'] for index in range(2)]
  with contextlib.ExitStack() as stack:
    begin = functools.partial(runs.begin, together, **{devices: '1'})
    first, neighbour = begin(more=of[0]), begin(Injection(_STEP, 'stop', 4), of[1])
    stack.callback(neighbour.communicate)
    stack.callback(neighbour.kill)
    output = runs.end(first, together, INTERRUPTED)
  if 'lost process 1 ' not in output.splitlines()[-1]:
    raise DidNotHold(f'the last line is: {output.splitlines()[-1]}')
  runs.train(together, **{devices: '2'})
  runs.check_same(together, alone)


_SAME = 'the next start ends with the same bits'
_BEFORE = 'it is noticed, and the checkpoint before is used: the same bits'
_STOPS = 'exit code 75; the next start ends with the same bits and lines'


def _kills(where, done, *injection):
  attempt = functools.partial(_kill, Injection(*injection))
  return Fault(f'kill {where}', f'SIGKILL {done}', _SAME, attempt, 2)


def _signals(where, done, *injection):
  attempt = functools.partial(_terminate, Injection(*injection))
  return Fault(f'signal {where}', f'SIGTERM {done}', _STOPS, attempt, 2)


def _damages(name, done, change):
  done = f'of the last checkpoint, {done}'
  return Fault(name, done, _BEFORE, functools.partial(_damage, change), 1)


# From what is most likely to what is least, should there not be time for all.
FAULTS = (
  Fault('none', 'it is trained once more', 'the same bits', _again, 1),
  _kills('in a step', 'while step 5 is computed', _STEP, 'kill', 5),
  _kills(
    'in a save', 'while the arrays are written', 'moejax.checkpoint:Checkpoints._finish', 'kill', 2
  ),
  _signals('in a step', 'while step 3 is computed', _STEP, 'terminate', 3),
  Fault('full disk', 'a save fails in the middle of its arrays', _STOPS, _fill_disk, 2),
  _damages('flipped bit', 'one bit of the arrays is flipped', _flip_bit),
  Fault('NaN', 'the loss of two batches is NaN', 'they change nothing but the step', _spoil, 1),
  _kills('before a commit', 'when all but the manifest is written', _COMMIT, 'kill', 2),
  _kills('after a commit', 'when the manifest is written', _COMMIT, 'kill', 2, True),
  _kills('in an evaluation', 'at its second batch', _BATCH, 'kill', 2),
  _signals('in an evaluation', 'at its first batch', _BATCH, 'terminate'),
  _kills('at the start', 'when it has taken its folder', 'moejax.train:resume', 'kill'),
  _kills('in a plot', 'while it is written', 'matplotlib.figure:Figure.savefig', 'kill', 1, True),
  _damages('cut-off file', 'half of the arrays is cut off', _cut_off),
  _damages('vanished file', 'the file of the arrays is deleted', _delete_file),
  _damages('lost manifest', 'the manifest is deleted', _delete_manifest),
  Fault(
    'damaged folder',
    'config.json cut off, summary.json emptied, zeros in metrics.jsonl, no last manifest',
    'they are made again: the same bits and lines',
    _damage_folder,
    1,
  ),
  Fault('kill while compiling', 'SIGKILL in the first compilation', _SAME, _kill_compiling, 2),
  Fault(
    'stopped neighbour',
    'SIGSTOP of one of two processes',
    'the other one ends within a minute and names it; the next start ends with the same bits',
    _stop_neighbour,
    4,
    _SILENCE,
  ),
)
