"""What a comparison says: a row for every model, as tables for people and as CSV for programs."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

from moejax import files, seeds, text
from moejax.compare import speedup
from moejax.compare.runs import Model, durations, have_pairs

NOTHING = seeds.Estimate(math.nan)  # does not apply, or was not measured


class Row(NamedTuple):
  """A model beside the baseline."""

  model: Model
  validation: seeds.Estimate
  training: seeds.Estimate = NOTHING
  lead: seeds.Estimate = NOTHING  # nats, over the baseline of as many tokens
  matched: seeds.Estimate = NOTHING  # of speedup.matched_schedule
  mid_schedule: seeds.Estimate = NOTHING  # of speedup.mid_schedule
  span: tuple[float, float] = (1.0, 1.0)  # shortest and longest baseline over the model's tokens
  is_baseline: bool = False  # of any length


def make_rows(models: list[Model]) -> list[Row]:
  """A Row for each model; the first is the baseline."""
  lengths = durations(models)
  return [_row(model, lengths) for model in models]


def _row(model, lengths):
  """The row of a model; `lengths`: the baseline by its tokens."""
  row = Row(model, seeds.mean([*model.losses.values()]))
  if model.train_losses:
    row = row._replace(training=seeds.mean(model.train_losses))
  if model in lengths.values():
    return row._replace(is_baseline=True)
  if not model.is_finished:
    return row
  if (same := lengths.get(model.tokens)) and same.is_finished:
    paired = have_pairs(same, model)
    losses = ([*m.losses.values()] for m in (same, model))  # in the order of seeds
    row = row._replace(lead=seeds.difference(*losses, paired=paired))
    if all(run.training for run in same.runs + model.runs):
      curves = ({run.seed: run.training for run in m.runs} for m in (same, model))
      row = row._replace(mid_schedule=speedup.mid_schedule(*curves, paired=paired))
  if len(lengths) > 1:
    losses = {tokens: other.losses for tokens, other in lengths.items()}
    paired = all(have_pairs(other, model) for other in lengths.values())
    row = row._replace(
      matched=speedup.matched_schedule(model.losses, model.tokens, losses, paired),
      span=(min(lengths) / model.tokens, max(lengths) / model.tokens),
    )
  return row


class Column(NamedTuple):
  """A heading, the value of a row, and how the table shows it."""

  heading: str
  value: Callable[[Row], float | seeds.Estimate]
  show: Callable[[Row], str]


def _loss(estimate):
  return '-' if math.isnan(estimate.value) else f'{estimate:.4f}'


def _lead(row):
  lead = row.lead
  if math.isnan(lead.value):
    return '-'
  if not lead.has_interval:
    return f'{lead:+.4f} (one seed)'
  return f'{lead:+.4f}' if lead.excludes(0) else f'none ({lead:+.4f})'


def _matched(row):
  measurable = row.model.is_finished and not row.is_baseline
  return (
    'not measured'
    if measurable and math.isnan(row.matched.value)
    else _ratio(row.matched, row.span)
  )


def _ratio(estimate, span):
  """A ratio as text; 0 and infinity are below and above what was measured."""
  if math.isnan(estimate.value):
    return '-'
  beyond = {0.0: f'<{span[0]:.3g}x', math.inf: f'>{span[1]:.3g}x'}
  value, low, high = (beyond.get(number, f'{number:.2f}x') for number in estimate)
  if not estimate.has_interval:
    return f'{value} (one seed)'
  if estimate.low == estimate.high:
    return value
  return f'{value} ({low} to {high})' if estimate.excludes(1) else f'none ({low} to {high})'


def _clipped(row):
  return '-' if math.isnan(row.model.clipped) else f'{row.model.clipped:.0%}'


def _tokens_per_active(row):
  return row.model.tokens / row.model.summary['parameters']['active']


def _number(heading, value):
  return Column(heading, value, lambda row: text.short(value(row)))


# Two tables, one below the other. A new column is an entry here.
RESULTS = (
  Column('seeds', lambda row: len(row.model.runs), lambda row: str(len(row.model.runs))),
  _number('tokens', lambda row: row.model.tokens),
  Column('validation', lambda row: row.validation, lambda row: _loss(row.validation)),
  Column('training', lambda row: row.training, lambda row: _loss(row.training)),
  Column('lead', lambda row: row.lead, _lead),
  Column('matched', lambda row: row.matched, _matched),
  Column(
    'mid-schedule', lambda row: row.mid_schedule, lambda row: _ratio(row.mid_schedule, (1, 1))
  ),
)
COSTS = (
  _number('parameters', lambda row: row.model.summary['parameters']['total']),
  _number('active', lambda row: row.model.summary['parameters']['active']),
  _number('tokens/active', _tokens_per_active),
  _number('FLOPs/token', lambda row: row.model.summary['flops_per_token']['model']),
  Column('FLOPs', lambda row: row.model.flops, lambda row: f'{row.model.flops:.2e}'),
  Column('clipped', lambda row: row.model.clipped, _clipped),
  Column('seconds', lambda row: row.model.seconds, lambda row: f'{row.model.seconds:.0f}'),
)


def describe(rows: list[Row]) -> str:
  """The tables: what was reached, and at what cost."""
  return '\n\n'.join(_table(rows, columns) for columns in (RESULTS, COSTS))


def _table(rows, columns):
  heading = ['model', *(column.heading for column in columns)]
  cells = [[row.model.name, *(column.show(row) for column in columns)] for row in rows]
  return text.table([heading, *cells])


def write_csv(rows: list[Row], path) -> None:
  """One line per model; an estimate has three columns: NAME, NAME_low and NAME_high.

  Folders of runs are relative to that of the table if they are in it, so that both can be moved.
  """
  lines = [_values(row, files.absolute(path).parent) for row in rows]
  files.write_csv(path, [lines[0], *(line.values() for line in lines)])


def _values(row, parent):
  folders = (run.folder for run in row.model.runs)
  shown = [f.relative_to(parent) if f.is_relative_to(parent) else f for f in folders]
  values = {'model': row.model.name, 'folders': ' '.join(map(str, shown))}
  for column in RESULTS + COSTS:
    name, value = re.sub(r'\W', '_', column.heading.lower()), column.value(row)
    parts = value._asdict() if isinstance(value, seeds.Estimate) else {'value': value}
    values |= {
      name if part == 'value' else f'{name}_{part}': '' if math.isnan(number) else number
      for part, number in parts.items()
    }
  return values
