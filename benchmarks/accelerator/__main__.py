"""Measures one accelerator: what it is able to do, and what moejax does with it.

  python -m benchmarks.accelerator --minutes=8 --output=DIR
  python -m benchmarks.accelerator --minutes=4 --output=DIR --parts=chip,steps --only=Switch
  python -m benchmarks.accelerator --minutes=2 --output=DIR --tiny    on a CPU, to try it out

Needs one GPU or TPU, no network and no data. DIR gets one JSON file and one page, named by date and
chip, which are written after every case. docs/accelerator.md says how to read them.
"""

import argparse
import pathlib
import re
import shlex
import sys

from benchmarks.accelerator import plan as plan_lib, supervisor


def main(arguments):
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.accelerator',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--output', type=pathlib.Path, required=True, help='folder of the results')
  parser.add_argument('--minutes', type=_positive, default=8.0, help='time for everything')
  parser.add_argument(
    '--parts', type=_parts, default=tuple(plan_lib.SHARES), help=f'of {",".join(plan_lib.SHARES)}'
  )
  parser.add_argument('--only', type=_expression, default='', help='cases that match this')
  parser.add_argument('--tiny', action='store_true', help='sizes for a CPU')
  args = parser.parse_args(arguments)
  plan = plan_lib.Plan(
    args.output,
    60 * args.minutes,
    args.parts,
    args.only,
    args.tiny,
    command=shlex.join(['python', '-m', 'benchmarks.accelerator', *arguments]),
  )
  results = supervisor.run(plan)
  if results is None:
    print('error: no results: the process that uses the device ended at once', file=sys.stderr)
    return 1
  page = results.path.with_suffix('.md')
  print(page.read_text(), page, sep='\n')
  return 0


def _parts(text):
  chosen = text.split(',')
  if unknown := [part for part in chosen if part not in plan_lib.SHARES]:
    known = ', '.join(plan_lib.SHARES)
    raise argparse.ArgumentTypeError(f'no part {unknown[0]!r}; there are {known}')
  return tuple(part for part in plan_lib.SHARES if part in chosen)  # each once, in their order


def _positive(text):
  if not 0 < float(text) < 24 * 60:
    raise argparse.ArgumentTypeError(f'expected minutes between 0 and a day, got {text}')
  return float(text)


def _expression(text):
  try:
    re.compile(text)
  except re.error as error:
    raise argparse.ArgumentTypeError(f'no regular expression: {error}') from None
  return text


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
