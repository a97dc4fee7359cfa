"""Training plan for a budget: the optimum of a law, rounded to a real model."""

from moejax import hardware
from moejax.scaling_laws import grid, laws, optimal
from moejax.text import short


def make(coefficients, expansion_rate, target, recipe, chip=None, mfu=0.4):
  """The plan as a dict of plain values, in the units of laws.py.

  Args:
    coefficients: dict of expansion rate to `laws.Coefficients`.
    expansion_rate: of the model to train, a key of `coefficients`; 1: dense.
    target: one quantity of `optimal.solve`, and its value.
    recipe: a `grid.Recipe` to train the model with.
    chip: such as 'v5e' or 'H100', to estimate hours on it, or None.
    mfu: the fraction of the chip's peak that the model's FLOPs reach.

  Raises:
    ValueError: the chip is unknown, or no budget reaches the target.
  """
  best = optimal.solve(coefficients[expansion_rate], expansion_rate, **target)
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
    'model': _model(coefficients, best, expansion_rate, recipe),
  }
  if expansion_rate != 1 and 1 in coefficients:
    result['dense'] = _dense(coefficients[1], best)
  if chip:
    result['chip'] = _chip(chip, mfu, best.flops)
  return result


def _model(coefficients, best, expansion_rate, recipe):
  """The nearest model with an integer number of blocks, trained with the same FLOPs."""
  blocks = max(1, round(best.blocks))
  d_model = laws.WIDTH_PER_BLOCK * blocks
  per_token = laws.flops_per_token(d_model, blocks, expansion_rate, best.granularity)
  steps = max(1, round(best.flops / per_token / recipe.tokens_per_step))
  cell = grid.make_cell(
    recipe, (d_model, blocks, blocks), expansion_rate, best.granularity, steps, coefficients
  )
  sparse = best.granularity != laws.DENSE
  return {
    'd_model': d_model,
    'blocks': blocks,
    'heads': blocks,
    'experts': round(expansion_rate * best.granularity) if sparse else 0,
    'expert_width': 4 * d_model // best.granularity if sparse else 0,
    'params': cell.params,
    'active_params': cell.active_params,
    'tokens': cell.tokens,
    'steps': steps,
    'flops': cell.flops,
    'loss': cell.predicted_loss,
    'command': cell.command,
  }


def _dense(law, best):
  """The dense model with the same loss."""
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


def _chip(name, mfu, training_flops):
  chip = hardware.find(name)
  if chip is None:
    raise ValueError(f'--chip={name}: unknown chip; known ones are {", ".join(hardware.CHIPS)}.')
  if not 0 < mfu <= 1:
    raise ValueError(f'--mfu={mfu}: expected a fraction of the peak, such as 0.4.')
  return {'name': name, 'mfu': mfu, 'hours': training_flops / (chip.flops * mfu) / 3600}


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
      f'{dense["flops"]:.3g} FLOPs ({dense["flops_ratio"]:.1f}x), {short(dense["params"])} '
      f'parameters, {short(dense["tokens"])} tokens',
    )
    if dense
    else None,
    (f'{chip["name"]} hours', f'{chip["hours"]:.4g} at {100 * chip["mfu"]:.0f}% MFU')
    if chip
    else None,
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
  ]
  lines = [f'{name:17} {text}' for name, text in filter(None, rows)]
  return '\n'.join([*lines, '', model['command']])
