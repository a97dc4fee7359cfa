"""Criteria of a claim, and what measured losses say of them.

A criterion holds if the measured number is beyond its threshold, where the noise of seeds is part
of the threshold, else if the number's whole interval over seeds is; it does not hold if the whole
interval is on the other side. Between the two, more seeds are needed.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from moejax import seeds
from moejax.compare import table

HOLDS, FAILS, UNSETTLED = 'holds', 'does not hold', 'not settled by these seeds'
SPREADS = 3
_NOISE = 'standard deviations of seeds'


class Missing(Exception):
  """Runs that a criterion needs are not finished; the message names them."""


class Finding(NamedTuple):
  """What the runs say of a criterion."""

  verdict: str
  measured: str


class Criterion(NamedTuple):
  """A statement, what its paper says of it, and a function of `results.Results` to a Finding."""

  text: str
  paper: str
  check: Callable[[Any], Finding]


def judge(criterion: Criterion, results) -> Finding:
  """The finding; not settled where runs are missing."""
  try:
    return criterion.check(results)
  except Missing as error:
    return Finding(UNSETTLED, str(error))


def verdict(holds, fails) -> str:
  return HOLDS if holds else FAILS if fails else UNSETTLED


def every(findings) -> Finding:
  """All of several findings."""
  findings = list(findings)
  verdicts = {finding.verdict for finding in findings}
  measured = '; '.join(finding.measured for finding in findings)
  return Finding(verdict(verdicts == {HOLDS}, FAILS in verdicts), measured)


def lead(better: dict, worse: dict, spreads: float = SPREADS, word: str = 'needed') -> Finding:
  """Whether losses by seed are lower than others by more than so many spreads of seeds.

  The spread is the standard deviation of seeds within the two models.
  """
  a, b = [*worse.values()], [*better.values()]
  if (known := seeds.noise(a, b)) is None:
    return Finding(UNSETTLED, f'{seeds.difference(a, b):+.4f} with one seed')
  found, least = seeds.difference(a, b, known=known), spreads * known.deviation
  holds = found.value > least and found.low > 0
  text = f'{found:+.4f} ({word}: {least:.4f})'
  return Finding(verdict(holds, found.high < least), text)


def growth(short: tuple[dict, dict], long: tuple[dict, dict]) -> Finding:
  """Whether the lead of (better, worse) losses by seed grows; a seed's runs are pairs."""
  shared = set.intersection(*map(set, (*short, *long)))
  gains = [(long[1][s] - long[0][s]) - (short[1][s] - short[0][s]) for s in sorted(shared)]
  found = seeds.mean(gains) if gains else seeds.Estimate(math.nan)
  if not found.has_interval:
    return Finding(UNSETTLED, f'{found.value:+.4f} without an interval')
  return Finding(verdict(found.low > 0, found.high < 0), f'grows by {found:+.4f}')


def above(found: seeds.Estimate, number: float, text: str) -> Finding:
  """Whether an estimate is above a number."""
  return Finding(verdict(found.low > number, found.high < number), text)


# Criteria over the models of a design, by their names and steps.


def leads(better: str, worse: str, steps, paper: str, spreads: float = SPREADS) -> Criterion:
  """At all of these steps."""
  where = ', '.join(f'{s:,}' for s in steps)
  text = f'{better} is better than {worse} by more than {spreads} {_NOISE} ({where} steps)'
  find = lambda r, s: lead(r.losses(better, s), r.losses(worse, s), spreads)
  return Criterion(text, paper, lambda results: every(find(results, s) for s in steps))


def lead_grows(better: str, worse: str, short: int, long: int, paper: str) -> Criterion:
  text = f'the lead of {better} over {worse} grows from {short:,} to {long:,} steps'
  pair = lambda r, steps: (r.losses(better, steps), r.losses(worse, steps))
  return Criterion(text, paper, lambda results: growth(pair(results, short), pair(results, long)))


def ratio_above(name: str, baseline: str, steps: int, number: float, paper: str) -> Criterion:
  text = f'{baseline} needs more than {number}x the steps to the loss of {name} ({steps:,} steps)'

  def check(results):
    row = results.row(baseline, name, steps)
    return above(row.matched, number, _ratio(row))

  return Criterion(text, paper, check)


def ratio_grows(name: str, baseline: str, short: int, long: int, paper: str) -> Criterion:
  text = f'that ratio grows from {short:,} to {long:,} steps'

  def check(results):
    rows = [results.row(baseline, name, steps) for steps in (short, long)]
    before, after = (row.matched for row in rows)
    least = min(after.low, rows[1].span[1])  # infinity: beyond the longest run of the baseline
    holds, fails = least > before.high, after.high < before.low
    return Finding(verdict(holds, fails), ', then '.join(map(_ratio, rows)))

  return Criterion(text, paper, check)


def recovers(tuned: str, source: str, steps: int, paper: str) -> Criterion:
  """A tuned model is back at the loss of its source."""
  text = f'{tuned} is within {SPREADS} {_NOISE} of the loss of {source} before the switch'

  def check(results):
    losses = results.losses(source, steps), results.losses(tuned, steps)
    finding = lead(*losses, word='allowed')
    opposite = {HOLDS: FAILS, FAILS: HOLDS}
    return finding._replace(verdict=opposite.get(finding.verdict, finding.verdict))

  return Criterion(text, paper, check)


def _ratio(row):
  return next(c.show(row) for c in table.RESULTS if c.heading == 'matched')
