"""The results of a sweep: a table, its best cell and what to try next, a CSV file and a plot."""

import csv
import io
import math
import pathlib
import statistics
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from moejax import config as config_lib, fields as fields_lib, files, report, runner, text

_SEED = 'train.seed'
_CONFIDENCE = 0.95


class Group(NamedTuple):
  """The cells that differ in their seed alone."""

  values: dict[str, Any]  # of all fields but the seed
  losses: list[float]  # of those that are finished; validation, in nats per token
  cells: int

  @property
  def mean(self):
    return statistics.fmean(self.losses) if self.losses else math.inf

  @property
  def deviation(self):
    """The standard deviation over seeds; 0 with a single one."""
    return statistics.stdev(self.losses) if len(self.losses) > 1 else 0.0


def summaries(cells, workdir) -> dict[str, dict]:
  """The summaries of the finished cells, by name."""
  done = [cell.name for cell in cells if runner.is_done(workdir, cell)]
  found = {name: report.read_summary(pathlib.Path(workdir) / name) for name in done}
  return {name: summary for name, summary in found.items() if _loss(summary) is not None}


def _loss(summary):
  return summary.get('validation', {}).get('loss')


def groups(cells, found) -> list[Group]:
  """The cells by the values of their fields without the seed, in order."""
  by_values = {}
  for cell in cells:
    values = {field: value for field, value in cell.values.items() if field != _SEED}
    by_values.setdefault(tuple(values.items()), []).append(cell)
  return [
    Group(dict(values), [_loss(found[c.name]) for c in members if c.name in found], len(members))
    for values, members in by_values.items()
  ]


def noise(all_groups) -> float | None:
  """The standard deviation over seeds, of all groups together; None without repeated seeds."""
  repeated = [group for group in all_groups if len(group.losses) > 1]
  if not repeated:
    return None
  freedom = sum(len(group.losses) - 1 for group in repeated)
  squares = sum((len(group.losses) - 1) * group.deviation**2 for group in repeated)
  return math.sqrt(squares / freedom)


def is_within_noise(group, best, all_groups) -> bool:
  """Whether a t-test cannot tell the mean of a group from the best.

  The deviation is that of all groups, or that of these two if it is larger: some learning rates are
  noisier than others.
  """
  deviation = noise(all_groups)
  if deviation is None or not group.losses:
    return False
  deviation = max(deviation, noise([group, best]) or 0.0)
  freedom = sum(max(0, len(g.losses) - 1) for g in all_groups)
  error = deviation * math.sqrt(1 / len(group.losses) + 1 / len(best.losses))
  return bool(group.mean - best.mean <= stats.t.ppf((1 + _CONFIDENCE) / 2, freedom) * error)


def describe(axes, all_groups) -> str:
  """The table, and below it what follows from it."""
  names = [field for axis in axes for field in axis.fields if field != _SEED]
  best = min(all_groups, key=lambda group: group.mean)
  rows = [[*names, 'validation loss', 'seeds', '']]
  for group in all_groups:
    many = len(group.losses) > 1
    measured = f'{group.mean:.4f}' + (f' ± {group.deviation:.4f}' if many else '')
    note = 'best' if group is best else ''
    if group is not best and is_within_noise(group, best, all_groups):
      note = 'within noise'
    if len(group.losses) < group.cells:
      note += f' ({group.cells - len(group.losses)} of {group.cells} without a result)'
    values = [str(group.values[name]) for name in names]
    rows.append([*values, measured if group.losses else '-', str(len(group.losses)), note.strip()])
  return '\n'.join([text.table(rows), '', *_conclusions(axes, best, all_groups)])


def _conclusions(axes, best, all_groups):
  """One line for the noise, and one for every axis on whose edge the best group is."""
  yield 'Losses in nats per token, mean ± standard deviation over seeds.'
  if len(all_groups) > 1 and noise(all_groups) is None:
    yield f'With one seed, differences may be noise: add --grid {_SEED}=0,1,2.'
  elif len(all_groups) > 1:
    test = f't-test at {_CONFIDENCE:.0%}'
    near = any(is_within_noise(g, best, all_groups) for g in all_groups if g is not best)
    yield (
      f'within noise: as good as the best, as far as these seeds can tell ({test}).'
      if near
      else f'The best is better than all others by more than the noise of seeds ({test}).'
    )
  for axis in axes:
    yield from _edge(axis, best, all_groups)


def _edge(axis, best, all_groups):
  """What to add to an axis if the best value is its smallest or largest."""
  field = _numeric_field(axis, all_groups)
  if not field:
    return
  points = {g.values[field]: g.values for g in all_groups}
  ordered = [points[value] for value in sorted(points)]
  for end, neighbor, which in (
    (ordered[0], ordered[1], 'smallest'),
    (ordered[-1], ordered[-2], 'largest'),
  ):
    if best.values[field] != end[field]:
      continue
    added = {
      name: _next(end[name], neighbor[name], [p[name] for p in ordered])
      for name in axis.fields
      if _is_number(end[name])
    }
    if all(_is_valid(name, value) for name, value in added.items()):
      wanted = ', '.join(f'{name}={value:g}' for name, value in added.items())
      yield (
        f'The best {field}, {end[field]:g}, is the {which} of the sweep: add {wanted} to the '
        'command. What is trained is kept.'
      )


def _is_number(value):
  return type(value) in (int, float)


def _numeric_field(axis, all_groups):
  """The first field of an axis that has several numbers; None without one."""
  for field in axis.fields:
    values = {group.values.get(field) for group in all_groups}
    if field != _SEED and len(values) > 1 and all(map(_is_number, values)):
      return field
  return None


def _is_log(values):
  """Whether numbers are spread like 1, 2, 4 rather than like 1, 2, 3."""
  values = sorted({*values})
  if values[0] <= 0:
    return False
  if len(values) == 2:
    return values[1] >= 2 * values[0]
  steps = np.diff(values), np.diff(np.log(values))
  linear, logarithmic = (np.std(step) / np.mean(step) for step in steps)
  return bool(logarithmic <= linear)


def _next(end, neighbor, values):
  """The number that continues a list of numbers beyond its end, rounded."""
  value = end * end / neighbor if _is_log(values) else 2 * end - neighbor
  return round(value) if type(end) is int else float(f'{value:.2g}')


def _is_valid(name, value):
  try:
    fields_lib.checked(name, config_lib.flat_fields()[name], value)
  except ValueError:
    return False
  return True


def write_csv(cells, found, path) -> None:
  """One row per cell; cells without a result have empty columns."""
  columns = ['loss', 'bits_per_byte', 'train_loss', 'steps', 'tokens_seen', 'seconds']
  output = io.StringIO()
  table = csv.writer(output, lineterminator='\n')
  table.writerow(['name', *cells[0].values, *columns])
  for cell in cells:
    summary = found.get(cell.name, {})
    measured = summary | summary.get('validation', {})
    table.writerow([cell.name, *cell.values.values(), *(measured.get(c) for c in columns)])
  files.write(path, output.getvalue())


def plot(axes, all_groups, path) -> None:
  """The loss against one axis, a line for every combination of the others, bars over seeds.

  The axis is the first with several numbers, else the first, whose values are then evenly spaced.
  """
  numeric = {axis: field for axis in axes if (field := _numeric_field(axis, all_groups))}
  axis = next(iter(numeric), axes[0])
  field = numeric.get(axis, axis.fields[0])
  figure, axes_ = report.new_figure(xlabel=field, ylabel='validation loss (nats per token)')
  finished = [group for group in all_groups if group.losses]
  ticks = list(dict.fromkeys(str(group.values.get(field, 'all')) for group in all_groups))
  others = lambda group: {k: v for k, v in group.values.items() if k not in axis.fields}
  for number, (label, line) in enumerate(_lines(finished, others)):
    place = lambda g: (
      g.values[field] if axis in numeric else ticks.index(str(g.values.get(field, 'all')))
    )
    line = sorted(line, key=place)
    x = [place(group) for group in line]
    style = {'marker': 'o', 'capsize': 3, 'color': f'C{number % 10}', 'label': label or None}
    deviations = [group.deviation for group in line]
    axes_.errorbar(x, [g.mean for g in line], deviations if any(deviations) else None, **style)
  if axis in numeric:
    values = [group.values[field] for group in all_groups]
    axes_.set_xscale('log' if _is_log(values) else 'linear')
    axes_.set_xticks(sorted({*values}), [f'{value:g}' for value in sorted({*values})], minor=False)
    axes_.minorticks_off()
  else:
    axes_.set_xticks(range(len(ticks)), ticks)
  if axes_.get_legend_handles_labels()[1]:
    axes_.legend(frameon=False)
  report.save_figure(figure, path)


def _lines(finished, others):
  """(label, groups) for every combination of the fields that `others` gives."""
  key = lambda group: ', '.join(f'{name}={value}' for name, value in others(group).items())
  lines = {}
  for group in finished:
    lines.setdefault(key(group), []).append(group)
  return lines.items()
