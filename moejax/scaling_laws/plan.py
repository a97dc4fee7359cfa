"""Training plan for a budget: the optimum of a law, rounded to a model, and a machine for it."""

import dataclasses
import math

from moejax import cli, hardware, variants
from moejax.scaling_laws import grid, laws, machine, optimal, report, runtime
from moejax.text import short, size

_HEAD_WIDTH = 64
_RULE = 'arXiv:2502.05172'
_COLUMNS = 100
_BYTES = 256  # the vocabulary of the laptop's recipe


def make(
  coefficients,
  expansion_rate,
  target,
  recipe,
  fitted=(),
  chip=None,
  memory=None,
  clock=None,
  **machine_options,
):
  """The plan as a dict of plain values, in the units of laws.py.

  Args:
    coefficients: dict of expansion rate to `laws.Coefficients`.
    expansion_rate: of the model to train, a key of `coefficients`; 1: dense.
    target: one quantity of `optimal.solve`, and its value.
    recipe: a `grid.Recipe` to train the model with.
    fitted: (N, D, G) of the runs that the law was fitted to, to warn of extrapolation.
    chip: such as 'v5e' or 'H100', to choose a machine and estimate hours, or None.
    memory: the bytes that serving the model may take, as laws.serving_bytes counts, or None. Its
      target is FLOPs.
    clock: a `runtime.Clock`, to compare models by time, or None.
    **machine_options: `mfu`, to estimate hours from the chip's peak instead, or as `machine.find`.

  Raises:
    ValueError: the chip is unknown, or no budget reaches the target.
  """
  law = coefficients[expansion_rate]
  choices = in_memory(coefficients, target, memory, recipe) if memory else {}
  best = choices[expansion_rate] if memory else optimal.solve(law, expansion_rate, **target)
  cell = _cell(coefficients, best, expansion_rate, recipe, memory or math.inf)
  rate = peak_lr(recipe, cell)
  if rate < recipe.peak_lr:
    cell = _with_fields(cell, {'optimizer.peak_lr': f'{rate:.2g}'})
  counted = laws.counted_params(law, cell.d_model, cell.blocks, expansion_rate)
  result = {
    'flops': best.flops,
    'expansion_rate': expansion_rate,
    'params': best.params,
    'active_params': best.active_params,
    'tokens': best.tokens,
    'granularity': best.granularity,
    'loss': best.loss,
    'tokens_per_param': best.tokens / best.params,
    'tokens_per_active_param': best.tokens / best.active_params,
    'peak_lr': rate,
    'peak_lr_rule': _RULE if rate < recipe.peak_lr else '',
    'extrapolation': report.beyond(counted, cell.tokens, cell.granularity, fitted),
  }
  if expansion_rate != 1 and 1 in coefficients:
    result['dense'] = _dense(coefficients[1], best)
  if memory:
    bytes_ = laws.serving_bytes(cell.d_model, cell.blocks, expansion_rate, _vocabulary(recipe))
    result['memory'] = {'limit': memory, 'bytes': bytes_, 'experts': _compared(choices)}
  if clock:
    shape = cell.d_model, cell.blocks, cell.heads
    estimates = runtime.estimated(clock, shape, recipe, best.granularity) if clock.machines else ()
    result['runtime'] = runtime.compare(clock.coefficients, best, [*clock.speeds, *estimates])
  if chip:
    result['chip'], mesh = _chip(chip, cell, best.flops, **machine_options)
    cell = _with_fields(cell, mesh)
  return result | {'model': _model(cell)}


def in_memory(coefficients, target, memory, recipe):
  """The optima that fit into memory, by expansion rate.

  Raises:
    ValueError: the target is not FLOPs, or none fits.
  """
  if set(target) != {'flops'}:
    raise ValueError('--memory finds the best model of a budget: give it as --flops.')
  found = optimal.in_memory(coefficients, target['flops'], memory, _vocabulary(recipe))
  if not found:
    raise ValueError(
      f'--memory: no model fits into {size(memory)} with a cache of {laws.CACHE_TOKENS} tokens.'
    )
  return found


def _compared(choices):
  """What the optima of different expansion rates are, as plain values."""
  names = ('granularity', 'loss', 'active_params', 'params', 'tokens')
  return {rate: {name: getattr(best, name) for name in names} for rate, best in choices.items()}


def _vocabulary(recipe):
  return laws.OfActiveAndEmbeddings.vocabulary if recipe is grid.PAPER else _BYTES


def _cell(coefficients, best, expansion_rate, recipe, memory):
  """The nearest model that machines like, trained with the same FLOPs, as a `grid.Cell`."""
  d_model = round_width(best.d_model)
  blocks = max(1, round(best.params / laws.total_params(d_model, 1, expansion_rate)))
  while laws.serving_bytes(d_model, blocks, expansion_rate, _vocabulary(recipe)) > memory:
    d_model, blocks = (d_model, blocks - 1) if blocks > 1 else (round_width(d_model / 2), 1)
  per_token = optimal.flops_per_token(
    coefficients[expansion_rate], d_model, blocks, expansion_rate, best.granularity
  )
  steps = max(1, round(best.flops / per_token / recipe.tokens_per_step))
  if recipe is grid.PAPER:
    recipe = dataclasses.replace(recipe, base=_nearest_size(laws.active_params(d_model, blocks)))
  shape = d_model, blocks, max(2, d_model // _HEAD_WIDTH)
  return grid.make_cell(recipe, shape, expansion_rate, best.granularity, steps, coefficients)


def round_width(d_model):
  """The nearest width of the form 4, 5, 6, 7 times a power of two, in multiples of 128 if larger.

  Mesh axes divide it, and so do 16 experts in place of one from 512 on; heads are even.
  """
  smallest = 128 if d_model >= 128 else 32
  step = max(smallest, 2 ** (math.floor(math.log2(d_model)) - 2))
  return max(smallest, step * round(d_model / step))


def _nearest_size(active_params):
  """The variant with the closest number of active parameters, for its name and recipe."""

  def distance(name):
    d_model, blocks, *_ = variants.SCALING_SIZES[name]
    return abs(math.log(laws.active_params(d_model, blocks) / active_params))

  return min(variants.SCALING_SIZES, key=distance)


def _with_fields(cell, fields):
  return dataclasses.replace(cell, fields=cell.fields | fields)


def peak_lr(recipe, cell):
  """The recipe's peak rate, or a lower one by the rule of arXiv:2502.05172.

  The rule, of the authors of the laws, is for E experts of which a token activates one, and at most
  2.7B active parameters: exp(8.39 - 0.81 ln N_active - 0.25 ln E). A recipe with a parameterization
  needs no rule.
  """
  if 'model.parameterization' in recipe.fields:
    return recipe.peak_lr
  rule = math.exp(8.39 - 0.81 * math.log(cell.active_params) - 0.25 * math.log(cell.expansion_rate))
  return min(recipe.peak_lr, rule)


def _model(cell):
  sparse = cell.granularity != laws.DENSE
  return {
    'd_model': cell.d_model,
    'blocks': cell.blocks,
    'heads': cell.heads,
    'experts': round(cell.expansion_rate * cell.granularity) if sparse else 0,
    'expert_width': 4 * cell.d_model // cell.granularity if sparse else 0,
    'params': cell.params,
    'active_params': cell.active_params,
    'tokens': cell.tokens,
    'steps': cell.steps,
    'flops': cell.flops,
    'loss': cell.predicted_loss,
    'workdir': f'runs/{cell.name}',
    'command': f'{cell.command} --workdir=runs/{cell.name}',
  }


def _dense(law, best):
  """The compute-optimal dense model with the same loss.

  The ratio of FLOPs is the efficiency leverage of arXiv:2507.17702, Definition 3.1.
  """
  try:
    same = optimal.solve(law, 1, loss=best.loss)
  except ValueError:  # below the least loss of the dense law
    return None
  return {
    'flops': same.flops,
    'params': same.params,
    'tokens': same.tokens,
    'flops_ratio': same.flops / best.flops,
  }


def _chip(name, cell, training_flops, mfu=None, **options):
  """A machine of a chip, or hours at `mfu`; and the fields of the mesh there."""
  chip = hardware.find(name)
  if mfu is None or chip is None:
    kind = machine.kind_of(name)
    found = machine.find(cli.config_of(cell.arguments[2:]), kind, **options)
    mesh = (found or {}).get('mesh', '').split()
    fields = dict(flag.removeprefix('--config.').split('=') for flag in mesh)
    return {'name': name, 'kind': kind, 'machine': found}, fields
  if not 0 < mfu <= 1:
    raise ValueError(f'--mfu={mfu}: expected a fraction of the peak, such as 0.4.')
  return {'name': name, 'mfu': mfu, 'hours': training_flops / (chip.flops * mfu) / 3600}, {}


def _chip_rows(chip):
  if 'mfu' in chip:
    text = f'{chip["hours"]:.4g} if {100 * chip["mfu"]:.0f}% MFU is reached, which is a guess'
    return [(f'{chip["name"]} hours', text)]
  return machine.describe(chip['machine'], chip['kind'])


def describe(plan):
  """The plan as text."""
  model, dense, chip = plan['model'], plan.get('dense'), plan.get('chip')
  kind = f'expansion rate {plan["expansion_rate"]:g}' if model['experts'] else 'dense'
  rows = [
    ('training FLOPs', f'{plan["flops"]:.3g}'),
    ('model', kind),
    ('parameters N', f'{short(plan["params"])}, {short(plan["active_params"])} active'),
    (
      'tokens D',
      f'{short(plan["tokens"])}: {plan["tokens_per_param"]:.3g} per parameter, '
      f'{plan["tokens_per_active_param"]:.3g} per active one',
    ),
    ('granularity G', str(plan['granularity'])) if model['experts'] else None,
    ('loss', f'{plan["loss"]:.4f} nats per token'),
    (
      'dense, same loss',
      f'{dense["flops"]:.3g} FLOPs, {short(dense["params"])} parameters, '
      f'{short(dense["tokens"])} tokens: efficiency leverage {dense["flops_ratio"]:.1f}',
    )
    if dense
    else None,
    *_memory_rows(plan),
    *runtime.describe(plan.get('runtime', ())),
    (
      'nearest shape',
      f'd_model {model["d_model"]}, {model["blocks"]} blocks'
      + (
        f', {model["experts"]} experts of width {model["expert_width"]}' if kind != 'dense' else ''
      ),
    ),
    (
      '',
      f'{short(model["params"])} parameters, {short(model["tokens"])} tokens, '
      f'loss {model["loss"]:.4f}',
    ),
    _rate_row(plan),
    *(_chip_rows(chip) if chip else ()),
    *(('warning', f'extrapolates: {text}') for text in plan['extrapolation']),
  ]
  lines = [f'{name:17} {text}' for name, text in filter(None, rows)]
  return '\n'.join([*lines, '', _wrapped(model['command']), *_launch(model, chip)])


def _memory_rows(plan):
  memory = plan.get('memory')
  if not memory:
    return
  yield (
    'memory',
    f'{size(memory["bytes"])} of {size(memory["limit"])}: weights with embeddings, and a cache of '
    f'{laws.CACHE_TOKENS} tokens, in bfloat16',
  )
  for rate, one in sorted(memory['experts'].items()):
    granularity = f' G {one["granularity"]},' if one['granularity'] > 1 else ''
    yield (
      f'  E {rate:g}',
      f'loss {one["loss"]:.4f},{granularity} {short(one["params"])} parameters, '
      f'{short(one["active_params"])} active, {short(one["tokens"])} tokens'
      + (' <- best' if rate == plan['expansion_rate'] else ''),
    )


def _rate_row(plan):
  source = f'by the rule of {_RULE}' if plan['peak_lr_rule'] else "the recipe's"
  return 'peak rate', f'{plan["peak_lr"]:.2g}, {source}, not by this law: try half and twice of it'


def _launch(model, chip):
  """Text: how to launch it on a slice."""
  found = (chip or {}).get('machine')
  if not found or not found['type'].startswith('v'):
    return
  name = model['workdir'].removeprefix('runs/')
  flags = model['command'].removeprefix('python -m moejax.main ').partition(' --workdir=')[0]
  yield '\non a slice, with C4 and a tokenizer in a bucket (docs/data.md, docs/launch.md):'
  yield _wrapped(
    f'launch/tpu_run.sh --name={name} --zone=ZONE --type={found["type"]} {flags} '
    f'--workdir=gs://BUCKET/{name} --config.data.tokenizer=gpt2:gs://BUCKET/gpt2 '
    '--config.data.tfds_data_dir=gs://BUCKET/tfds'
  )


def _wrapped(command):
  """A command on lines that a shell joins again."""
  lines = ['']
  for word in command.replace(' --', '\n--').split('\n'):
    if len(lines[-1]) + len(word) > _COLUMNS:
      lines.append(' ')
    lines[-1] += f' {word}'
  return ' \\\n'.join(lines).strip()
