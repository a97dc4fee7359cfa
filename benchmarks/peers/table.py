"""What was measured, as a page and as CSV."""

import dataclasses
import math
from typing import NamedTuple

from benchmarks.peers import cases
from moejax import files, seeds, text


class Row(NamedTuple):
  """One contender in one case."""

  case: str
  contender: str
  tokens_per_second: float  # geometric mean over rounds
  ratio: seeds.Estimate  # of that to moejax's, within rounds
  share: seeds.Estimate  # of the FLOPs that the machine's matrix product does
  memory: float  # bytes, the most that the process has held
  start_seconds: float  # until its first step was done


@dataclasses.dataclass
class Results:
  """`about`: what the page says first."""

  about: str
  rows: list = dataclasses.field(default_factory=list)
  left_out: list = dataclasses.field(default_factory=list)  # case, contender, reason

  def leave_out(self, case, contender, error):
    print(f'{case}: {contender} is left out: {error}', flush=True)
    self.left_out.append([case, contender, str(error)])

  def add(self, name, case, starts, answers, products):
    """Adds the rows of a case.

    Args:
      name, case: of `cases.cases`.
      starts: seconds, by contender.
      answers: of `Process.measure`, by contender and round.
      products: see the function.
    """
    speeds = {contender: _speeds(answers[contender], case.work) for contender in starts}
    for contender, speed in speeds.items():
      self.rows.append(
        Row(
          name,
          contender,
          math.exp(seeds.mean([*map(math.log, speed)]).value),
          _ratio(speed, speeds.get(cases.BASE)),
          _ratio([case.flops * s for s in speed], products),
          answers[contender][-1]['memory'],
          starts[contender],
        )
      )

  def write(self, folder):
    """Writes peers.md and peers.csv."""
    files.write(folder / 'peers.md', self.page())
    heading = 'case', 'contender', 'tokens_per_second', 'ratio', 'ratio_low', 'ratio_high'
    heading += 'share', 'share_low', 'share_high', 'memory_bytes', 'start_seconds'
    lines = [(*row[:3], *row.ratio, *row.share, *row[5:]) for row in self.rows]
    files.write_csv(folder / 'peers.csv', [heading, *lines])

  def page(self):
    heading = ['case', 'contender', 'tokens/s', 'of moejax', 'of the product', 'memory', 'start']
    parts = ['# moejax and its peers', self.about]
    parts += [text.markdown([heading, *map(_cells, self.rows)])]
    if self.left_out:
      parts.append(text.markdown([['left out', 'contender', 'because'], *self.left_out]))
    return '\n\n'.join(parts) + '\n'


def products(case, answers):
  """FLOPs per second of the faster product of every round; empty if there was none.

  `answers`: by product, by round.
  """
  speeds = [_speeds(of_one, case.flops) for of_one in answers]
  return [max(of_round) for of_round in zip(*speeds, strict=True)]


def _speeds(answers, work):
  return [answer['steps'] * work / answer['seconds'] for answer in answers]


def _ratio(numerators, denominators):
  """The geometric mean of ratios within rounds, with its interval over rounds."""
  if not denominators:
    return seeds.Estimate(math.nan)
  logs = [math.log(a / b) for a, b in zip(numerators, denominators, strict=True)]
  return seeds.Estimate(*map(math.exp, seeds.mean(logs)))


def _cells(row):
  ratio = '' if math.isnan(row.ratio.value) or row.contender == cases.BASE else f'{row.ratio:.3g}'
  share = '' if math.isnan(row.share.value) else f'{100 * row.share.value:.0f}%'
  speed, memory = text.short(row.tokens_per_second), text.size(row.memory)
  return [row.case, row.contender, speed, ratio, share, memory, f'{row.start_seconds:.0f} s']
