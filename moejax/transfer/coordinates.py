"""The coordinate check: does what happens inside a model in a few steps depend on its size?

The method of arXiv:2203.03466 (appendix D.1): if it does not, the best learning rate does not move
with the size.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from moejax import (
  cli,
  config as config_lib,
  data,
  files,
  report,
  seeds as seeds_lib,
  sharding,
  step as step_lib,
  text,
)
from moejax.seeds import Estimate
from moejax.step import fresh_state
from moejax.sweep import axes as axes_lib
from moejax.sweep.axes import Axis
from moejax.transfer import sizes
from moejax.transfer.observe import Product, layers, observe

TOLERANCE = 0.1  # of a slope
_SEQUENCES, _POSITIONS = 8, 32  # of the batch; more sequences where groups are larger
# Sums over the width of parameters that are independent of what they meet: at first they shrink
# like width^-1/2, and what training adds counts.
_SHRINKING = ('scores', 'logits')
_RANGE = 5  # a panel shows at least this much above and below its middle: flat lines look flat


class Measured(NamedTuple):
  """Root mean squares inside models of several sizes, while they take a few steps on one batch."""

  field: str  # what the sizes are of
  sizes: list[float]  # rising
  seeds: list[int]
  places: list[str]  # inside the model, from bottom to top
  values: np.ndarray  # [sizes, seeds, steps + 1, places]: after so many steps
  changes: np.ndarray  # the same of the differences to step 0


class Slope(NamedTuple):
  """How a root mean square inside the model follows the size of the model: the power."""

  place: str
  what: str  # 'size' or 'change'
  slope: Estimate  # mean over seeds
  is_good: bool  # not beyond the tolerance by more than the noise of seeds
  is_within: bool = True  # the tolerance, by its value


def small_steps(config: str, overrides: dict[str, str], steps: int) -> dict[str, str]:
  """Overrides for a few cheap steps at one rate: small batches, no warm-up; `overrides` win."""
  flags = [f'--config.{field}={value}' for field, value in overrides.items()]
  group = config_lib.resolve(cli.config_of([f'--config={config}', *flags])).model.group_multiple
  small = {
    'train.steps': steps,
    'optimizer.warmup_steps': 0,
    'optimizer.final_lr_fraction': 1.0,
    'optimizer.accumulation': 1,
    'data.batch_size': math.ceil(_SEQUENCES / group) * group,
    'data.sequence_length': _POSITIONS,
  }
  return {field: str(value) for field, value in small.items()} | overrides


def measure(config: str, overrides: dict[str, str], axis: Axis, seeds: list[int]) -> Measured:
  """Trains models of all sizes for a few steps on one batch, and looks inside after each.

  Args:
    config, overrides: as `axes.make_cells` takes them; they have `train.steps` steps.
    axis: of the sizes.
    seeds: of initialisation.

  Raises:
    ValueError: a config is invalid.
  """
  cells = axes_lib.make_cells(config, overrides, [axis])
  runs = [config_lib.resolve(cli.config_of(cell.arguments[2:])) for cell in cells]
  runs.sort(key=lambda run: sizes.number(axis, run))
  mesh = sharding.make_mesh(runs[0].mesh, jax.devices()[:1])
  part = sharding.process_part(mesh, runs[0].data.batch_size)
  loader = data.make_loader(runs[0].data, 'train', **part)
  places = _layers if len({run.model.blocks for run in runs}) == 1 else _patterns
  numbers, found = [sizes.number(axis, run) for run in runs], []
  with jax.set_mesh(mesh):
    batch = sharding.place_batch(loader.batch(0), mesh)
    for number, run in zip(numbers, runs, strict=True):
      with cli.waiting_for(f'{axis.fields[0]} = {number:g}: {run.train.steps} steps'):
        steps = _steps(run, mesh, batch, seeds)
        found.append([[places(run.model, step) for step in of_seed] for of_seed in steps])
  names = [*found[0][0][0]]
  table = np.array([[[list(step.values()) for step in steps] for steps in s] for s in found])
  return Measured(axis.fields[0], numbers, seeds, names, table[..., 0], table[..., 1])


def _steps(run, mesh, batch, seeds):
  """For every seed, for every step: the mean squares of all that `observe` sees."""
  abstract = sharding.abstract(fresh_state(run), mesh)
  train_step = step_lib.jit_train_step(run, abstract, mesh)
  for seed in seeds:
    seeded = dataclasses.replace(run, train=dataclasses.replace(run.train, seed=seed))
    now, state = step_lib.make_clock(seeded), step_lib.make_state(fresh_state(seeded), abstract)
    first = observe(run.model, state['params'], batch)
    steps = [_mean_squares(first, first)]
    for step in range(run.train.steps):
      state, _ = train_step(state, batch, now(step))
      steps.append(_mean_squares(observe(run.model, state['params'], batch), first))
    yield jax.device_get(steps)


@jax.jit
def _mean_squares(inside, first):
  """Mean squares [repeats, 2] of what `observe` saw, and of its changes.

  The change of a Product is what the change of its matrix adds. Its initial values are random, and
  add what shrinks with the width; it would hide, in small models, what is learned.
  """
  mean = lambda x: jnp.square(x).mean(range(1, x.ndim))

  def both(now, before):
    if isinstance(now, Product):
      parts = now.value(), now._replace(w=now.w - before.w).value()
    else:
      parts = now, now - before
    return jnp.stack([mean(part) for part in parts], axis=-1)

  return {place: both(now, first[place]) for place, now in inside.items()}


def _layers(model, squares):
  """Root mean squares [2] by place, every layer by itself and numbered: '3 mlp output'."""
  found = {'embedding': squares['embedding'][0]}
  for number, kind, i, part, repeat in layers(model.blocks):
    for what in _inside(squares, f'{i}/{part}/'):
      found[f'{number} {kind} {what}'] = squares[f'{i}/{part}/{what}'][repeat]
  found['logits'] = squares['logits'][0]
  return {place: np.sqrt(square) for place, square in found.items()}


def _patterns(model, squares):
  """The same where models differ in depth: the last repeat of every pattern."""
  found, number = {'embedding': squares['embedding'][0]}, 0
  for i, (pattern, _) in enumerate(model.blocks):
    for j, kind in enumerate(pattern):
      for what in _inside(squares, f'{i}/{j}_{kind}/'):
        found[f'{number} {kind} {what}'] = squares[f'{i}/{j}_{kind}/{what}'][-1]
      number += 1
  found['logits'] = squares['logits'][0]
  return {place: np.sqrt(square) for place, square in found.items()}


def _inside(squares, prefix):
  """What was seen of a sublayer: its scores, if it has any, its output, the stream after it."""
  whats = [name.removeprefix(prefix) for name in squares if name.startswith(prefix)]
  return sorted(whats, key=lambda what: (what == 'stream', what == 'output', what))


def slopes(measured: Measured) -> list[Slope]:
  """The slopes of log root mean square against log size after the last step.

  A change must not follow the size at all, nor must a value, but for those that are near 0 at
  first (scores of routers, logits): these must not grow. A slope fails if it is beyond TOLERANCE by
  more than the noise of seeds. What is 0 in all models is left out.
  """
  found = []
  for what, table in (('size', measured.values), ('change', measured.changes)):
    for place, at_place in zip(measured.places, np.moveaxis(table[:, :, -1], -1, 0), strict=True):
      if not at_place.any():
        continue
      of_seeds = [_slope(measured.sizes, values) for values in at_place.T]
      slope = seeds_lib.mean(of_seeds)
      value, may_shrink = slope.value, what == 'size' and any(n in place for n in _SHRINKING)
      low, high = (slope.low, slope.high) if slope.has_interval else (value, value)
      is_good = _allows(low, high, may_shrink) and bool(np.isfinite(of_seeds).all())
      found.append(Slope(place, what, slope, is_good, _allows(value, value, may_shrink)))
  return found


def _allows(low, high, may_shrink):
  """Whether a slope between these can be within the tolerance."""
  return low <= TOLERANCE and (may_shrink or high >= -TOLERANCE)


def _slope(sizes, values):
  """Of the line of least squares through logs; NaN or infinite if a value is 0 or not finite."""
  with np.errstate(divide='ignore', invalid='ignore'):
    x, y = np.log(sizes) - np.log(sizes).mean(), np.log(values)
    return float((x * y).sum() / (x * x).sum())


def describe(measured: Measured, found: list[Slope]) -> str:
  """A table of all places, and the verdict."""
  first, last = measured.sizes[0], measured.sizes[-1]
  heads = [f'{what} {size:g}' for what in ('size', 'change') for size in (first, last)]
  rows = [['', *heads[:2], 'slope', *heads[2:], 'slope', '']]
  for number, place in enumerate(measured.places):
    row, notes = [place], []
    for what, table in (('size', measured.values), ('change', measured.changes)):
      ends = table[[0, -1], :, -1, number].mean(axis=1)
      slope = next((s for s in found if (s.place, s.what) == (place, what)), None)
      row += [*(f'{value:.3g}' for value in ends), f'{slope.slope:+.2f}' if slope else '-']
      notes += [f'{what} {_word(slope.slope.value)}'] if slope and not slope.is_good else []
    rows.append([*row, ', '.join(notes)])
  return '\n'.join([text.table(rows), '', verdict(measured, found)])


def _word(slope):
  return 'grows' if slope > 0 else 'shrinks' if slope < 0 else 'not finite'


def verdict(measured: Measured, found: list[Slope]) -> str:
  """What follows from the slopes, in words."""
  field, steps = measured.field, measured.values.shape[2] - 1
  span = f'{field} {measured.sizes[0]:g} to {measured.sizes[-1]:g}, after {steps} steps'
  bad = [s for s in found if not s.is_good]
  changes = [s for s in found if s.what == 'change']
  doubtful = [s for s in found if not s.is_within]
  if doubtful and not bad:
    worst = max(doubtful, key=lambda s: abs(s.slope.value))
    return (
      f'flat within noise ({span}): {len(doubtful)} of {len(found)} sizes and changes inside the '
      f'model follow {field} by a power beyond +-{TOLERANCE}, none by more than the noise of these '
      f'seeds; the steepest is the {worst.what} of {worst.place}, {worst.slope:+.2f}. More --seeds '
      'tell more.'
    )
  if not bad:
    worst = max(changes, key=lambda s: abs(s.slope.value))
    return (
      f'flat ({span}): no change inside the model follows {field} by a power beyond '
      f'+-{TOLERANCE}; the steepest is {worst.place}, {worst.slope:+.2f}.'
    )
  worst = max(bad, key=lambda s: abs(s.slope.value) if math.isfinite(s.slope.value) else math.inf)
  return (
    f'not flat ({span}): {len(bad)} of {len(found)} sizes and changes inside the model follow '
    f'{field} by a power beyond +-{TOLERANCE}; the steepest is the {worst.what} of {worst.place}, '
    f'{worst.slope:+.2f}. The best learning rate will depend on {field}.'
  )


def write_csv(measured: Measured, path) -> None:
  """One row per size, seed, step and place."""
  rows = [[measured.field, 'seed', 'step', 'place', 'size', 'change']]
  for index in np.ndindex(measured.values.shape):
    size, seed, step, place = index
    numbers = (f'{table[index]:.6g}' for table in (measured.values, measured.changes))
    where = [f'{measured.sizes[size]:g}', measured.seeds[seed], step, measured.places[place]]
    rows.append([*where, *numbers])
  files.write_csv(path, rows)


def plot(measured: Measured, found: list[Slope], path) -> None:
  """A panel per place: changes (a line per step) and sizes (dashed, first and last) by size."""
  columns = 5
  rows = math.ceil(len(measured.places) / columns)
  figure = Figure(figsize=(2.2 * columns, 1.9 * rows + 0.5), dpi=80, layout='constrained')
  panels: Any = figure.subplots(rows, columns, sharex=True, squeeze=False)
  steps = measured.values.shape[2] - 1
  # Geometric means over seeds.
  with np.errstate(divide='ignore'):
    values, changes = (np.exp(np.log(t).mean(axis=1)) for t in (measured.values, measured.changes))
  for number, (panel, place) in enumerate(zip(panels.flat, measured.places, strict=False)):
    for step, style in ((0, ':'), (steps, '--')):
      label = f'size, step {step}'
      panel.plot(measured.sizes, values[:, step, number], style, color='0.6', label=label)
    for step in range(1, steps + 1):
      style = {'color': colormaps['viridis'](1 - step / steps), 'marker': '.'}
      label = f'change, step {step}'
      panel.plot(measured.sizes, changes[:, step, number], **style, label=label)
    slope = next((s for s in found if (s.place, s.what) == (place, 'change')), None)
    good = all(s.is_good for s in found if s.place == place)
    title = f'{place}\n{slope.slope.value:+.2f}' if slope else place
    panel.set_title(title, fontsize='small', color='black' if good else 'tab:red')
    panel.set(xscale='log', yscale='log')
    panel.set_xticks(measured.sizes, [f'{size:g}' for size in measured.sizes])
    panel.xaxis.minorticks_off()
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.tick_params(labelsize='x-small')
    low, high = panel.get_ylim()
    middle, half = math.sqrt(low * high), max(math.sqrt(high / low), _RANGE)
    panel.set_ylim(middle / half, middle * half)
  for panel in panels.flat[len(measured.places) :]:
    panel.axis('off')
  handles = panels.flat[0].get_legend_handles_labels()
  figure.legend(*handles, loc='outside lower center', ncols=4, frameon=False, fontsize='x-small')
  figure.supylabel(f'root mean square by {measured.field}', fontsize='small')
  report.save_figure(figure, path)
