"""Training steps of every family, beside the dense model of the same active FLOPs."""

import functools

import jax

from benchmarks.accelerator import models, tables, timing
from moejax import flops
from moejax.text import short

TITLE = 'Training steps'
ABOUT = (
  'One microbatch of the papers per step, with the optimizer: 65k tokens at 25M, 65k (context 256) '
  'or 262k (context 1024) at 100M; bf16, `model.remat` and the rest as in configs/, random tokens '
  'in packed documents. MFU: model FLOPs of active parameters (docs/concepts, moejax/flops.py: '
  'attention counted in full, recomputation not at all) over the specified peak; beside it, over '
  'the measured matrix products. Time and FLOPs: per token, over the dense model of the same '
  'context; a sparse model at 1.15 and 1.00 takes 15% longer for the same FLOPs.'
)


def cases(tiny):
  """By name, functions of a `limits.Limits` that return a row."""
  return {name: functools.partial(_case, f, tiny) for name, f in models.families().items()}


def table(rows):
  lines = [
    [
      row['case'],
      short(row['tokens_per_second']),
      tables.ms(row['time'][0]),
      tables.spread(row['time']),
      tables.share(row['mfu']),
      tables.share(row['of_matmul']),
      tables.ratio(row['time_ratio']),
      tables.ratio(row['flops_ratio']),
      tables.size(row['peak_bytes']),
      tables.compiled(row),
      f'{short(row["params"])} / {short(row["active_params"])}',
    ]
    for row in rows
  ]
  header = ['model', 'tokens/s', 'ms', 'spread', 'MFU', 'of matmul', 'time', 'FLOPs', 'memory']
  return tables.markdown([*header, 'compile s', 'parameters / active'], lines)


def _case(family, tiny, limits):
  training = models.Training(family.run_config(tiny))
  metrics = []

  def step():
    metrics[:] = [training()]
    return metrics[0]

  time = timing.measure(step, jax.block_until_ready, tables.seconds(tiny, 2.0))
  rate = training.tokens / time.median
  matmul = limits.rates.get('bfloat16')
  counts = flops.param_counts(training.run_config.model)
  baseline = limits.row('steps', family.baseline)
  per_token = training.flops_per_token
  return {
    'tokens': training.tokens,
    'time': time,
    'tokens_per_second': rate,
    'flops_per_token': per_token,
    'mfu': limits.peak and per_token * rate / limits.peak,
    'of_matmul': matmul and per_token * rate / matmul,
    'baseline': family.baseline,
    'time_ratio': baseline and baseline['tokens_per_second'] / rate or None,
    'flops_ratio': baseline and per_token / baseline['flops_per_token'] or None,
    'params': counts['total'],
    'active_params': counts['active'],
    'loss': float(metrics[0]['loss']),
    'skipped': float(metrics[0]['skipped']),
    **training.program.costs(),
  }
