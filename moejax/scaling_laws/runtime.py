"""The optimum by time: the best granularity where seconds, not FLOPs, are the budget.

Finer experts cost time that FLOPs do not show: moving tokens, small matmuls. A `Speed` says how
many FLOPs of the laws a machine does per second at a granularity. It is measured by runs, or from
moejax.aot, whose steps are lower bounds.
"""

import math
import pathlib
import shlex
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from moejax import cli, fields, files, metrics, run_folder
from moejax.model_config import ModelConfig
from moejax.scaling_laws import laws, optimal


class Speed(NamedTuple):
  """Of training steps of one model on one machine."""

  machine: str
  d_model: int
  blocks: int
  expansion_rate: float
  granularity: int
  flops_per_second: float  # as laws.flops_per_token counts them, of the whole machine


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
      yield from _speed('the runs', run_folder.read(folder), tokens_per_second)


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
    yield from _speed(machine, cli.config_of(arguments), tokens_per_second)


def _speed(machine, config, tokens_per_second):
  """Yields the speed, if the laws are of such a model."""
  model = fields.make(ModelConfig, {**config.model, 'max_length': config.data.sequence_length})
  sublayers = {sublayer for pattern, _ in model.blocks for sublayer in pattern}
  granularity, rate = model.moe.granularity, model.moe.expansion_rate
  if sublayers == {'attention', 'mlp'}:
    granularity, rate = laws.DENSE, 1
  elif sublayers != {'attention', 'moe'}:
    return
  blocks = sum(repeats for _, repeats in model.blocks)
  per_token = laws.flops_per_token(model.d_model, blocks, rate, granularity)
  yield Speed(
    machine, model.d_model, blocks, rate, granularity, float(per_token * tokens_per_second)
  )


def compare(law, best, expansion_rate, speeds):
  """The best granularity by FLOPs and by the clock, on every machine with enough speeds.

  Both have the time that the one by FLOPs takes for its budget, and the widths best for them.

  Args:
    law: `laws.Coefficients`.
    best: the `optimal.Optimum` of the plan; its FLOPs are the budget.
    expansion_rate: of the model.
    speeds: `Speed`s; those of the size nearest to `best` count.

  Returns:
    A list of dicts, one per machine: shape (d_model, blocks), speeds and losses by granularity,
    by_flops and by_clock, excess_loss (of the one by FLOPs in equal time), and more_time (that it
    takes for the loss that the other reaches, as a factor).

  Raises:
    ValueError: the law has no granularity, or no machine speeds of two granularities.
  """
  if law.g is None:
    raise ValueError('--runtime compares granularities, which this law does not have.')
  machines = sorted({speed.machine for speed in speeds})
  found = [_on_machine(law, best, expansion_rate, machine, speeds) for machine in machines]
  if not any(found):
    known = sorted({(speed.expansion_rate, speed.granularity) for speed in speeds})
    raise ValueError(
      f'--runtime: expected speeds of at least two granularities of expansion rate '
      f'{expansion_rate:g}, on one machine and of one size; found '
      + ', '.join(f'E {rate:g} G {granularity}' for rate, granularity in known)
      + '.'
    )
  return [one for one in found if one]


def _on_machine(law, best, expansion_rate, machine, speeds):
  shapes = {}  # shape -> granularity -> speed
  for speed in speeds:
    if (speed.machine, speed.expansion_rate) == (machine, expansion_rate):
      by_granularity = shapes.setdefault((speed.d_model, speed.blocks), {})
      by_granularity[speed.granularity] = speed.flops_per_second
  shapes = {shape: found for shape, found in shapes.items() if len(found) > 1}
  if not shapes:
    return None
  size = math.log(best.active_params)
  shape = min(shapes, key=lambda shape: abs(math.log(laws.active_params(*shape)) - size))
  speed = dict(sorted(shapes[shape].items()))

  def loss(granularity, flops):
    return optimal.best_width(law, expansion_rate, granularity, flops).loss

  by_flops = min(speed, key=lambda granularity: loss(granularity, best.flops))
  seconds = best.flops / speed[by_flops]
  losses = {granularity: loss(granularity, seconds * speed[granularity]) for granularity in speed}
  by_clock = min(losses, key=lambda granularity: losses[granularity])
  return {
    'machine': machine,
    'shape': shape,
    'flops_per_second': speed,
    'losses': losses,
    'by_flops': by_flops,
    'by_clock': by_clock,
    'seconds': seconds,
    'excess_loss': losses[by_flops] - losses[by_clock],
    'more_time': _more_time(lambda flops: loss(by_flops, flops), best.flops, losses[by_clock]),
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


def describe(found):
  """Rows of text: (name, text)."""
  for one in found:
    d_model, blocks = one['shape']
    fastest = max(one['flops_per_second'].values())
    yield (
      'by FLOPs, clock',
      f'G {one["by_flops"]} and G {one["by_clock"]} on {one["machine"]}, by steps of d_model '
      f'{d_model}, {blocks} blocks'
      + (
        f': G {one["by_flops"]} loses {one["excess_loss"]:.4f} nats in equal time, or takes '
        f'{one["more_time"]:.2f} times as long'
        if one['by_flops'] != one['by_clock']
        else ''
      ),
    )
    for granularity, loss in one['losses'].items():
      share = one['flops_per_second'][granularity] / fastest
      yield f'  G {granularity}', f'{100 * share:.0f} % of the speed, loss {loss:.4f}'
