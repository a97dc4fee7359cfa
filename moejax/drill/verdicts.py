"""Tries faults, and writes the table of what held."""

import shutil
from collections.abc import Sequence
from typing import NamedTuple

from moejax import cli, files, report, text
from moejax.drill.faults import Fault
from moejax.drill.runs import STEPS, DidNotHold, NotTried, Runs

HELD, DID_NOT_HOLD, NOT_TRIED = 'held', 'did not hold', 'not tried'
_COLUMNS = ('fault', 'what was done', 'what must hold', 'verdict')


class Verdict(NamedTuple):
  """What came of a fault."""

  word: str  # HELD, DID_NOT_HOLD or NOT_TRIED
  reason: str = ''  # unless it held

  def __str__(self):
    return f'{self.word}: {self.reason}' if self.reason else self.word


def drill(faults: Sequence[Fault], runs: Runs) -> bool:
  """Tries faults, one after the other; whether all that were tried held, and there is one."""
  verdicts = dict.fromkeys(faults, Verdict(NOT_TRIED, 'the drill was ended before'))
  for fault in faults:
    verdicts[fault] = attempt(fault, runs)
    print(f'{fault.name}: {verdicts[fault]}', flush=True)
    write(verdicts, runs)
  words = {verdict.word for verdict in verdicts.values()}
  if DID_NOT_HOLD not in words:
    shutil.rmtree(runs.undisturbed)
  print(f'\n{describe(verdicts)}')
  print(f'written to {runs.folder}: drill.md, drill.csv, and a log for every fault')
  return HELD in words and DID_NOT_HOLD not in words


def attempt(fault: Fault, runs: Runs) -> Verdict:
  """Tries a fault in a folder of its own, which is kept only if what must hold did not."""
  needed, left = fault.starts * runs.seconds + fault.seconds, runs.left()
  if needed > left:
    about = f'it takes about {text.duration(needed)}'
    return Verdict(NOT_TRIED, f'{about}, and {text.duration(max(left, 0))} were left')
  folder = runs.folder / fault.name.replace(' ', '_')
  verdict = Verdict(HELD)
  try:
    fault.attempt(runs, folder)
  except NotTried as error:
    verdict = Verdict(NOT_TRIED, str(error))
  except (DidNotHold, OSError, ValueError) as error:  # the last two: what should be there is not
    return Verdict(DID_NOT_HOLD, str(error))
  shutil.rmtree(folder, ignore_errors=True)
  return verdict


def rows(verdicts: dict[Fault, Verdict]) -> list[tuple[str, ...]]:
  """The columns of the table, for every fault."""
  return [(f.name, f.done, f.guarantee, str(verdict)) for f, verdict in verdicts.items()]


def describe(verdicts: dict[Fault, Verdict]) -> str:
  """The table in aligned columns, and how many of each verdict there are."""
  words = [verdict.word for verdict in verdicts.values()]
  counts = [f'{words.count(word)} {word}' for word in (HELD, DID_NOT_HOLD, NOT_TRIED)]
  return f'{text.table([_COLUMNS, *rows(verdicts)])}\n\n{", ".join(counts)}'


def write(verdicts: dict[Fault, Verdict], runs: Runs) -> None:
  """Writes drill.md and drill.csv."""
  table = [_COLUMNS, *rows(verdicts)]
  page = [f'`{cli.portable_command()}`', '', _made(runs), '', text.markdown(table), '']
  files.write(runs.folder / 'drill.md', '\n'.join(page))
  files.write_csv(runs.folder / 'drill.csv', table)


def _made(runs):
  """When, and with what, the table was made: what the undisturbed run says of itself."""
  summary = report.read_summary(runs.undisturbed)
  versions = summary['versions']
  devices = f'{versions["device_count"]} x {versions["device_kind"]}'
  made = f'{summary["date"]}, commit {summary["commit"]}, jax {versions["jax"]}, {devices}'
  return f'{made}; {STEPS} steps take {text.duration(runs.seconds)}.'
