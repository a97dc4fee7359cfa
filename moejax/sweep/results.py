"""The results of a sweep: a table, its best cell and what to try next, a CSV file and a plot."""

import math
from typing import Any, NamedTuple

import numpy as np

from moejax import (
  config as config_lib,
  fields as fields_lib,
  files,
  metrics,
  report,
  runner,
  seeds,
  text,
)

_SEED = 'train.seed'


class Group(NamedTuple):
  """The cells that differ in their seed alone."""

  values: dict[str, Any]  # of all fields but the seed
  losses: list[float]  # of those that are finished; validation, in nats per token
  cells: int

  @property
  def mean(self):
    return seeds.mean(self.losses).value if self.losses else math.inf


def summaries(cells, workdir) -> dict[str, dict]:
  """The summaries of the finished cells, by name."""
  done = [cell.name for cell in cells if runner.is_done(workdir, cell)]
  found = {name: report.read_summary(workdir / name) for name in done}
  return {name: summary for name, summary in found.items() if _has_loss(summary)}


def _has_loss(summary):
  validation = summary.get('validation')
  return isinstance(validation, dict) and metrics.is_number(validation.get('loss'))


def groups(cells, found) -> list[Group]:
  """The cells by the values of their fields without the seed; the first field changes slowest.

  Numbers are in rising order, whenever they were added, other values in that of the cells.
  """
  by_values = {}
  for cell in cells:
    values = {field: value for field, value in cell.values.items() if field != _SEED}
    by_values.setdefault(tuple(values.items()), []).append(cell)
  places = {}  # of the values of every field
  for field in cells[0].values:
    given = list(dict.fromkeys(cell.values[field] for cell in cells))
    order = sorted(given) if all(map(_is_number, given)) else given
    places[field] = {value: i for i, value in enumerate(order)}
  losses = {name: summary['validation']['loss'] for name, summary in found.items()}
  return [
    Group(dict(values), [losses[c.name] for c in members if c.name in losses], len(members))
    for values, members in sorted(
      by_values.items(), key=lambda item: [places[field][value] for field, value in item[0]]
    )
  ]


def noise(all_groups) -> seeds.Noise | None:
  """That of seeds, of all groups together; None without repeated seeds."""
  return seeds.noise(*(group.losses for group in all_groups))


def behind(group, best, all_groups) -> seeds.Estimate:
  """How much higher the mean of a group is than that of the best."""
  known = _noise_of([group, best], all_groups)
  return seeds.difference(group.losses, best.losses, known=known)


def _noise_of(some, all_groups):
  """The noise of all groups, or that of some if it is larger: some learning rates are noisier."""
  known, own = noise(all_groups), noise(some)
  if known and own and own.deviation > known.deviation:
    return known._replace(deviation=own.deviation)
  return known


def is_within_noise(group, best, all_groups) -> bool:
  """Whether the seeds cannot tell the mean of a group from the best."""
  if not group.losses:
    return False
  estimate = behind(group, best, all_groups)
  return estimate.has_interval and not estimate.excludes(0)


def best_value(field, best, all_groups) -> seeds.Estimate | None:
  """The value of a numeric field with the lowest loss, other fields as in the best group.

  By a parabola through the best value and its neighbors, in the value's logarithm if values are
  spread so. Infinity is beyond the values. None if the best is at their end.
  """
  line = _line(field, best, all_groups)
  values = [group.values[field] for group in line]
  if best in (line[0], line[-1]):
    return None
  scale, inverse = (math.log, math.exp) if _is_log(values) else (float, float)
  places = [scale(value) for value in values]
  ends = {places[0]: -math.inf, places[-1]: math.inf}
  place = lambda means: ends.get(x := seeds.lowest(places, means), x)
  known = [_noise_of([group], all_groups) for group in line]
  found = seeds.of_means(place, [group.losses for group in line], known)
  return seeds.Estimate(*(inverse(x) if math.isfinite(x) else x for x in found))


def _line(field, best, all_groups):
  """The finished groups that differ from the best in one field, in the order of its values."""
  others = lambda group: {name: v for name, v in group.values.items() if name != field}
  line = [g for g in all_groups if g.losses and others(g) == others(best)]
  return sorted(line, key=lambda group: group.values[field])


def describe(axes, all_groups) -> str:
  """The table, and below it what follows from it."""
  names = [field for axis in axes for field in axis.fields if field != _SEED]
  best = min(all_groups, key=lambda group: group.mean)
  rows = [[*names, 'validation loss', 'seeds', 'behind the best']]
  for group in all_groups:
    measured = f'{seeds.mean(group.losses):.4f}' if group.losses else '-'
    note = 'best' if group is best else _behind(group, best, all_groups)
    if len(group.losses) < group.cells:
      note += f' ({group.cells - len(group.losses)} of {group.cells} without a result)'
    values = [str(group.values[name]) for name in names]
    rows.append([*values, measured, str(len(group.losses)), note.strip()])
  return '\n'.join([text.table(rows), '', *_conclusions(axes, best, all_groups)])


def _behind(group, best, all_groups):
  if not group.losses:
    return ''
  words = 'within noise, ' if is_within_noise(group, best, all_groups) else ''
  return f'{words}{behind(group, best, all_groups):+.4f}'


def _conclusions(axes, best, all_groups):
  """Lines for the noise, for the best value of every axis, and for those that are at an edge."""
  known, interval = noise(all_groups), f'{seeds.CONFIDENCE:.0%} interval'
  yield f'Losses in nats per token: mean ± {interval} over seeds.'
  if known:
    freedom = f'{known.freedom} degrees of freedom'
    yield f'noise of seeds: {known.deviation:.4f} nats, their standard deviation ({freedom}).'
  if len(all_groups) > 1 and known is None:
    yield f'With one seed, differences may be noise: add --grid {_SEED}=0,1,2.'
  elif len(all_groups) > 1:
    near = any(is_within_noise(g, best, all_groups) for g in all_groups if g is not best)
    yield (
      'within noise: as good as the best, as far as these seeds can tell.'
      if near
      else 'The best is better than all others by more than the noise of seeds.'
    )
  for axis in axes:
    field = _numeric_field(axis, all_groups)
    if field and len(axis.fields) == 1 and (value := best_value(field, best, all_groups)):
      first, *_, last = _line(field, best, all_groups)
      words = _range(value, first.values[field], last.values[field])
      yield f'best {field}: {words}, by a parabola through the best and its neighbors.'
  for axis in axes:
    yield from _edge(axis, best, all_groups)


def _range(value, smallest, largest):
  """A value of a field, and its interval if there is one, as text."""
  if not value.has_interval:
    return f'{value.value:.3g}'
  low = f'{value.low:.3g}' if value.low > smallest else f'{smallest:g} or less'
  high = f'{value.high:.3g}' if value.high < largest else f'{largest:g} or more'
  return f'{value.value:.3g} ({low} to {high})'


def _edge(axis, best, all_groups):
  """What to add to an axis if the best value is its smallest or largest."""
  field = _numeric_field(axis, all_groups)
  if not field or field == 'train.steps':  # longer is better
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
  if len(values) < 3:
    return values[-1] >= 2 * values[0]
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
  columns = ['loss', 'bits_per_byte', 'train_loss', 'clipped', 'steps', 'tokens_seen', 'seconds']
  rows = [['name', *cells[0].values, *columns]]
  for cell in cells:
    summary = found.get(cell.name, {})
    training = summary.get('training', {})
    measured = training | summary | summary.get('validation', {})
    measured['train_loss'] = training.get('loss')  # of the last quarter of the steps
    rows.append([cell.name, *cell.values.values(), *(measured.get(c) for c in columns)])
  files.write_csv(path, rows)


def plot(axes, all_groups, path) -> None:
  """The loss against one axis, a line for every combination of the others.

  The axis is the first with several numbers, else the first, whose values are then evenly spaced.
  Bars are intervals over seeds.
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
    means = [seeds.mean(group.losses) for group in line]
    halves = [mean.high - mean.value if mean.has_interval else 0.0 for mean in means]
    axes_.errorbar(x, [mean.value for mean in means], halves if any(halves) else None, **style)
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
