"""The optimum by time: the best model where seconds, not FLOPs, are the budget.

More experts, and finer ones, cost time that FLOPs do not show: moving tokens, small matmuls. A
`Speed` says how many tokens a machine trains a model on per second. It is measured by runs, or a
bound that moejax.aot compiled, or an estimate of moejax.estimate.
"""

import math
import pathlib
import shlex
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from moejax import cli, fields, files, metrics, run_folder
from moejax.aot import topologies
from moejax.model_config import ModelConfig
from moejax.scaling_laws import grid, laws, machine as machine_lib, optimal

# What a speed rests on, and what it leaves out, beside LEFT_OUT.
MEASURED, COMPILED, ESTIMATED = 'measured', 'compiled', 'estimated'
_LEFT_OUT = {
  MEASURED: 'other work of that machine may have slowed some of these runs',
  COMPILED: "the compiler's bounds: without norms, softmax, sorting, latencies, and as if all "
  'overlapped (docs/pods.md)',
  ESTIMATED: 'estimates are without all that bounds leave out, and without the memory traffic of '
  'experts: within 12 % of the bounds for 1B active parameters and more on 64 chips and more, 1.5 '
  'to 3 times too fast for small models on few chips',
}
LEFT_OUT = (
  'FLOPs per second are those of this width at all widths, with one batch and mesh; no input, '
  'evaluation, checkpoints, failures; losses are those of the law, in any memory'
)
_ROWS = 6  # of the best models, in text


class Speed(NamedTuple):
  """Of training steps of one model on one machine."""

  machine: str
  basis: str  # MEASURED, COMPILED or ESTIMATED
  d_model: int
  blocks: int
  expansion_rate: float
  granularity: int
  tokens_per_second: float  # of the whole machine


class Clock(NamedTuple):
  """What is compared by time."""

  speeds: list[Speed]
  machines: list[topologies.Topology]  # whose speeds are estimated
  coefficients: dict[float, laws.Coefficients]  # to compare, by expansion rate


def clock(sources, coefficients):
  """The Clock of the values of --runtime.

  Args:
    sources: folders of runs, JSON files of `moejax.aot --json` or benchmarks/pods.py, and names of
      machines as moejax.aot knows them.
    coefficients: the laws to compare, by expansion rate.

  Raises:
    ValueError: a source is none of these, or holds no speed.
  """
  found = Clock([], [], coefficients)
  for source in sources:
    if pathlib.Path(source).exists():
      found.speeds.extend(read([source]))
      continue
    try:
      found.machines.append(topologies.parse(source))
    except ValueError as error:
      known = str(error).partition(': ')[2]
      raise ValueError(
        f'--runtime={source}: no such file or folder; as a machine {known}'
      ) from error
  return found


def read(paths):
  """The speeds of folders of runs, and of JSON files of `moejax.aot --json` or benchmarks/pods.py.

  Raises:
    ValueError: a path is neither, or holds none.
  """
  speeds = []
  for path in map(pathlib.Path, paths):
    found = [*(_of_runs(path) if path.is_dir() else _of_reports(path))]
    if not found:
      raise ValueError(
        f'--runtime={path}: no speed of a model of attention with experts or mlp in it.'
      )
    speeds += found
  return speeds


def _of_runs(path):
  """Medians over the log lines of every run; the first line after a start includes compiling."""
  for folder in [path, *sorted(path.glob('*'))]:
    if not ((folder / 'config.json').exists() and (folder / 'metrics.jsonl').exists()):
      continue
    rates = [line.get('tokens_per_second') for line in metrics.read_metrics(folder)]
    if rates := [rate for rate in rates if rate]:
      tokens_per_second = float(np.median(rates[1:] or rates))
      yield from _speed('the runs', MEASURED, run_folder.read(folder), tokens_per_second)


def _of_reports(path):
  found = []  # machine, arguments, tokens per second
  try:
    content = files.parse_json(path.read_bytes())
    for report in [content] if 'step_seconds' in content else content.values():
      if report['fits']:
        words = shlex.split(report['command'])
        tokens_per_second = report['tokens'] / report['step_seconds']
        if not 0 < tokens_per_second < math.inf:
          raise ValueError(f'{tokens_per_second} tokens per second')
        arguments = [word for word in words if word.startswith('--config')]
        found.append((str(report['topology']), arguments, tokens_per_second))
  except FileNotFoundError as error:
    raise ValueError(f'--runtime={path}: file not found; expected runs or reports.') from error
  except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f'--runtime={path} is neither a folder of runs nor reports of moejax.aot --json: {error!r}.'
    ) from error
  for machine, arguments, tokens_per_second in found:
    for argument in arguments:
      if argument.startswith('--config='):
        cli.check_config(argument, f'--runtime={path}')
    yield from _speed(machine, COMPILED, cli.config_of(arguments), tokens_per_second)


def _speed(machine, basis, config, tokens_per_second):
  """Yields the speed, if the laws are of such a model."""
  model = fields.make(ModelConfig, {**config.model, 'max_length': config.data.sequence_length})
  sublayers = {sublayer for pattern, _ in model.blocks for sublayer in pattern}
  granularity, rate = model.moe.granularity, model.moe.expansion_rate
  if sublayers == {'attention', 'mlp'}:
    granularity, rate = laws.DENSE, 1
  elif sublayers != {'attention', 'moe'}:
    return
  blocks = sum(repeats for _, repeats in model.blocks)
  yield Speed(machine, basis, model.d_model, blocks, rate, granularity, tokens_per_second)


def estimated(clock, shape, recipe, granularity):
  """Yields the estimated Speeds of all models of a shape that the laws of a Clock compare.

  Args:
    clock: a `Clock`, of which the machines count.
    shape: d_model, blocks, heads.
    recipe: a `grid.Recipe`, for batch and sequences.
    granularity: the best by FLOPs; the finest here is twice as fine, and at least 8.
  """
  d_model, blocks, _ = shape
  for rate, law in clock.coefficients.items():
    for finer in optimal.granularities(law, rate):
      if finer > max(8, 2 * granularity) or 4 * d_model % max(finer, 1):
        continue
      cell = grid.make_cell(recipe, shape, rate, finer, steps=1000)
      config = cli.config_of(cell.arguments[2:])
      for topology, seconds in machine_lib.step_seconds(config, clock.machines).items():
        name = f'{topology}, estimated'
        speed = recipe.tokens_per_step / seconds
        yield Speed(name, ESTIMATED, d_model, blocks, cell.expansion_rate, finer, speed)


def compare(coefficients, best, speeds):
  """The best model by FLOPs and by the clock, on every machine with enough speeds.

  Both have the time that the one by FLOPs takes for its budget, and the widths best for them.

  Args:
    coefficients: the laws to compare, by expansion rate.
    best: the `optimal.Optimum` of the plan; its FLOPs are the budget.
    speeds: `Speed`s; those of the size nearest to `best` count.

  Returns:
    A list of dicts of plain values, one per machine: machine, basis, d_model, blocks, seconds (of
    the budget), models (dicts: expansion_rate, granularity, flops_per_second as the law counts
    them, and loss for the FLOPs and in the time of the best by FLOPs), by_flops and by_clock (two
    of them), excess_loss (of the one by FLOPs in equal time), and more_time (that it takes for the
    loss that the other reaches, as a factor).

  Raises:
    ValueError: no machine has speeds of two models that the laws compare.
  """
  compared = [
    speed
    for speed in speeds
    if (law := coefficients.get(speed.expansion_rate))
    and (speed.granularity != laws.DENSE if law.g else speed.granularity in _only(law, speed))
  ]
  machines = dict.fromkeys(speed.machine for speed in compared)
  found = [
    _on_machine(coefficients, best, [speed for speed in compared if speed.machine == machine])
    for machine in machines
  ]
  if not any(found):
    rates = ', '.join(f'{rate:g}' for rate in coefficients)
    known = sorted({_model(speed.expansion_rate, speed.granularity) for speed in speeds})
    raise ValueError(
      '--runtime: expected speeds of at least two models that the law compares (expansion rate '
      f'{rates}), on one machine and of one size; found {", ".join(known) or "none that fits"}.'
    )
  return [one for one in found if one]


def _only(law, speed):
  return optimal.granularities(law, speed.expansion_rate)


def _on_machine(coefficients, best, speeds):
  shapes = {}  # shape -> expansion rate, granularity -> speeds
  for speed in speeds:
    models = shapes.setdefault((speed.d_model, speed.blocks), {})
    model = speed.expansion_rate, speed.granularity
    models.setdefault(model, []).append(speed.tokens_per_second)
  shapes = {shape: models for shape, models in shapes.items() if len(models) > 1}
  if not shapes:
    return None
  size = math.log(best.active_params)
  shape = min(shapes, key=lambda shape: abs(math.log(laws.active_params(*shape)) - size))
  d_model, blocks = shape
  flops_per_second = {
    (rate, granularity): float(np.median(tokens_per_second))
    * optimal.flops_per_token(coefficients[rate], d_model, blocks, rate, granularity)
    for (rate, granularity), tokens_per_second in sorted(shapes[shape].items())
  }

  def loss(model, flops):
    rate, granularity = model
    return optimal.best_width(coefficients[rate], rate, granularity, flops).loss

  of_flops = {model: loss(model, best.flops) for model in flops_per_second}
  by_flops = min(of_flops, key=lambda model: of_flops[model])
  seconds = best.flops / flops_per_second[by_flops]
  of_time = {model: loss(model, seconds * speed) for model, speed in flops_per_second.items()}
  by_clock = min(of_time, key=lambda model: of_time[model])
  models = {
    model: {
      'expansion_rate': model[0],
      'granularity': model[1],
      'flops_per_second': flops_per_second[model],
      'loss_for_flops': of_flops[model],
      'loss_in_time': of_time[model],
    }
    for model in flops_per_second
  }
  return {
    'machine': speeds[0].machine,
    'basis': speeds[0].basis,
    'd_model': d_model,
    'blocks': blocks,
    'flops': best.flops,
    'seconds': seconds,
    'models': [*models.values()],
    'by_flops': models[by_flops],
    'by_clock': models[by_clock],
    'excess_loss': of_time[by_flops] - of_time[by_clock],
    'more_time': _more_time(lambda flops: loss(by_flops, flops), best.flops, of_time[by_clock]),
  }


def _more_time(loss, flops, target):
  """The factor on FLOPs, so on time, that reaches a lower loss; infinite if none does."""

  def excess(log_factor):
    return loss(flops * math.exp(log_factor)) - target

  if excess(0) <= 0:
    return 1.0
  most = math.log(1e6)
  log_factor: Any = optimize.brentq(excess, 0, most) if excess(most) < 0 else math.inf
  return math.exp(log_factor)


def _model(expansion_rate, granularity):
  return 'dense' if granularity == laws.DENSE else f'E {expansion_rate:g} G {granularity}'


def name(model):
  """What text and chart call one of the models of `compare`."""
  return _model(model['expansion_rate'], model['granularity'])


def describe(found):
  """Rows of text: (name, text)."""
  for one in found:
    by_flops, by_clock = name(one['by_flops']), name(one['by_clock'])
    yield (
      'by FLOPs, clock',
      f'{by_flops} and {by_clock} on {one["machine"]}, by steps of d_model {one["d_model"]}, '
      f'{one["blocks"]} blocks'
      + (
        f': {by_flops} loses {one["excess_loss"]:.4f} nats in equal time, or takes '
        f'{one["more_time"]:.2f} times as long'
        if by_flops != by_clock
        else ''
      ),
    )
    fastest = max(model['flops_per_second'] for model in one['models'])
    models = sorted(one['models'], key=lambda model: model['loss_in_time'])
    for model in models:
      if model in models[:_ROWS] or model is one['by_flops']:
        yield (
          f'  {name(model)}',
          f'{100 * model["flops_per_second"] / fastest:.0f} % of the speed, loss '
          f'{model["loss_for_flops"]:.4f} by FLOPs, {model["loss_in_time"]:.4f} in equal time',
        )
  if found:
    yield 'left out', LEFT_OUT
    for basis in dict.fromkeys(one['basis'] for one in found):
      yield '', _LEFT_OUT[basis]
