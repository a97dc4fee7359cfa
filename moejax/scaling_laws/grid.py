"""Grids of runs: models, training durations, costs and commands."""

import dataclasses
import json
import pathlib
import re
from typing import Any

from moejax import cli, config as config_lib, files, imports, runner
from moejax.scaling_laws import laws


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(runner.Cell):
  """One run of a grid; parameters and FLOPs as in laws.py."""

  d_model: int
  blocks: int
  heads: int
  expansion_rate: float
  granularity: int
  tokens: int
  active_params: int
  predicted_loss: float | None = None  # before training


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Settings shared by all runs of a grid."""

  sizes: dict[tuple[int, int], str]  # (d_model, blocks) -> variant of the config
  base: str  # variant whose fields are overridden for other sizes
  tokens_per_step: int
  peak_lr: float
  fields: dict[str, str]  # as in a Cell
  warmup: float | None = None  # fraction of the steps; None: the number in `fields`


# arXiv:2402.07871, Appendix A: 2048 sequences of 256 tokens of C4, one learning rate for all sizes.
PAPER = Recipe(
  sizes={
    (256, 4): '3M',
    (256, 8): '6M',
    (384, 4): '7M',
    (512, 4): '13M',
    (512, 8): '25M',
    (640, 10): '49M',
    (768, 12): '85M',
  },
  base='3M',
  tokens_per_step=2048 * 256,
  warmup=0.01,
  peak_lr=2e-4,
  fields={},
)
# A grid for a laptop CPU, on the embedded corpus; validation runs only at the end. All sizes and
# granularities have one rate, which is that of the base shape for the longer durations: half of
# what is best for 200 steps (docs/transfer.md). Durations share their steps before the decay.
LAPTOP = Recipe(
  sizes={},
  base='laptop',
  tokens_per_step=16 * 64,
  peak_lr=6.5e-3,
  fields={
    'model.parameterization': 'mup',
    'model.base': 'd_model=64,d_ff=256,num_heads=2,moe.granularity=1',
    'optimizer.schedule': 'wsd',
    'optimizer.warmup_steps': '20',
    'optimizer.final_lr_fraction': '0',
    'data.batch_size': '16',
    'data.sequence_length': '64',
    'train.log_interval': '50',
    'train.eval_interval': '1000000',
    'train.eval_batches': '64',
    'train.sample_length': '0',
    'train.trackers': '()',
  },
)

_TO_4, _TO_8, _TO_16 = (1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8, 16)
# Steps for 16B, 24B, ... tokens.
_D16, _D24, _D33, _D66, _D131 = 31_250, 46_875, 62_500, 125_000, 250_000
_DENSE = (laws.DENSE,)

# (d_model, blocks, heads) -> steps -> granularities.
_PAPER_SPARSE = {
  (256, 4, 4): {_D16: _TO_16, _D33: _TO_16, _D66: _TO_16},
  (384, 4, 6): {_D16: _TO_16, _D33: _TO_16, _D66: _TO_16},
  (512, 4, 8): {_D16: _TO_16, _D33: _TO_16, _D66: _TO_16, _D131: _TO_4},
  (512, 8, 8): {_D16: _TO_16, _D33: _TO_16, _D66: _TO_8},
  (640, 10, 10): {_D16: _TO_16, _D33: _TO_16, _D66: _TO_4},
  (768, 12, 12): {_D33: _TO_4},
}
_PAPER_DENSE = {
  **{
    shape: dict.fromkeys((_D16, _D24, _D33, _D66), _DENSE)
    for shape in ((256, 4, 4), (256, 8, 4), (512, 4, 8), (512, 8, 8), (640, 10, 10))
  },
  (768, 12, 12): dict.fromkeys((_D16, _D33), _DENSE),
}
_LAPTOP_SHAPES = ((48, 2, 2), (64, 2, 2), (96, 2, 3))
# From one to the next, the stable phase goes on: all cost as much as 1425 steps.
_LAPTOP_STEPS = (75, 150, 300, 600, 1200)
# Ordered so that the first part has every size and duration, and both kinds.
_LAPTOP_GRIDS = tuple(
  dict.fromkeys(_LAPTOP_SHAPES, dict.fromkeys(_LAPTOP_STEPS, granularities))
  for granularities in ((*_DENSE, 1, 4), (8,))
)

# Name -> recipe, expansion rate, grids.
PRESETS = {
  'paper': (PAPER, 64, (_PAPER_SPARSE, _PAPER_DENSE)),
  'laptop': (LAPTOP, 8, _LAPTOP_GRIDS),
  # Larger than every run of `laptop`, to test extrapolation of their law.
  'laptop_larger': (LAPTOP, 8, ({(128, 2, 4): {1500: (*_DENSE, 1, 4)}},)),
}


def make(preset, coefficients=None):
  """The cells of a preset; with coefficients by expansion rate, also their predicted losses.

  Raises:
    ValueError: the preset is unknown.
  """
  if preset not in PRESETS:
    raise ValueError(f'--preset={preset}: expected one of {", ".join(PRESETS)}.')
  recipe, expansion_rate, grids = PRESETS[preset]
  return [
    make_cell(recipe, shape, expansion_rate, granularity, steps, coefficients)
    for grid in grids
    for shape, durations in grid.items()
    for steps, granularities in durations.items()
    for granularity in granularities
  ]


def make_cell(recipe, shape, expansion_rate, granularity, steps, coefficients=None):
  """One cell.

  Args:
    recipe: a `Recipe`.
    shape: d_model, blocks, heads.
    expansion_rate: of sparse models; dense ones have 1.
    granularity: laws.DENSE for a dense model.
    steps: of training.
    coefficients: by expansion rate, or None.
  """
  d_model, blocks, heads = shape
  rate = 1 if granularity == laws.DENSE else expansion_rate
  params = laws.total_params(d_model, blocks, rate)
  tokens = steps * recipe.tokens_per_step
  law = (coefficients or {}).get(rate)
  kind = 'dense' if granularity == laws.DENSE else f'g{granularity}'
  return Cell(
    name=f'd{d_model}x{blocks}-{kind}-{steps}',
    d_model=d_model,
    blocks=blocks,
    heads=heads,
    expansion_rate=rate,
    granularity=granularity,
    steps=steps,
    tokens=tokens,
    params=params,
    active_params=laws.active_params(d_model, blocks),
    flops=float(laws.flops_per_token(d_model, blocks, rate, granularity) * tokens),
    config=_config(recipe, shape, rate, granularity),
    fields=_fields(recipe, shape, granularity, steps),
    predicted_loss=law and _predicted(law, shape, rate, granularity, tokens),
  )


def with_seeds(cells, seeds):
  """Cells for every seed of initialisation; seed 0, that of the configs, keeps their names."""
  named = lambda cell, seed: f'{cell.name}-s{seed}' if seed else cell.name
  fields = lambda cell, seed: cell.fields | ({'train.seed': str(seed)} if seed else {})
  return [
    dataclasses.replace(cell, name=named(cell, seed), fields=fields(cell, seed))
    for seed in seeds
    for cell in cells
  ]


def _predicted(law, shape, expansion_rate, granularity, tokens):
  d_model, blocks, _ = shape
  params = laws.counted_params(law, d_model, blocks, expansion_rate)
  return float(laws.loss(law, params, tokens, granularity))


def _config(recipe, shape, expansion_rate, granularity):
  d_model, blocks, _ = shape
  variant = recipe.sizes.get((d_model, blocks), recipe.base)
  if granularity == laws.DENSE:
    return f'configs/dense.py:{variant}'
  rate = f'expansion_rate={expansion_rate:g}'
  return f'configs/fine_grained.py:{variant},granularity={granularity},{rate}'


def _fields(recipe, shape, granularity, steps):
  d_model, blocks, heads = shape
  fields = {}
  if (d_model, blocks) not in recipe.sizes:
    feed_forward = 'mlp' if granularity == laws.DENSE else 'moe'
    fields = {
      'model.d_model': d_model,
      'model.d_ff': 4 * d_model,
      'model.num_heads': heads,
      'model.blocks': f"((('attention','{feed_forward}'),{blocks}),)",
    }
  fields |= {'optimizer.peak_lr': recipe.peak_lr, **recipe.fields}
  if recipe.warmup is not None:
    fields['optimizer.warmup_steps'] = int(recipe.warmup * steps)
  fields['train.steps'] = steps
  return {name: str(value) for name, value in fields.items()}


def write(cells, path):
  """Writes cells as JSON."""
  text = json.dumps([dataclasses.asdict(cell) for cell in cells], indent=1)
  files.write(path, text + '\n')


def read(path):
  """The cells of a file.

  Raises:
    ValueError: the file does not exist or is not a grid.
  """
  try:
    entries = files.parse_json(pathlib.Path(path).read_bytes())
  except FileNotFoundError as error:
    raise ValueError(f'--grid={path}: file not found; `grid` writes it.') from error
  except ValueError as error:
    raise ValueError(f'--grid={path} is not valid: {error}.') from error
  if not isinstance(entries, list):
    raise ValueError(f'--grid={path} is not valid: expected a list, [...].')
  return [cell_of(entry, f'--grid={path}') for entry in entries]


_NUMBERS = [f.name for f in dataclasses.fields(Cell) if f.type in (int, float)]
_MOST = 1e40  # more is a mistake, and too much for a float


def cell_of(entry: Any, source: str) -> Cell:
  """The Cell that a file holds as JSON; older versions wrote a command in place of fields.

  Args:
    entry: what the file holds.
    source: the file, for errors.

  Raises:
    ValueError: it is no cell, or would run code that the user has not run before nor allows.
  """
  try:
    entry = dict(entry)
    if 'command' in entry:
      entry['config'], entry['fields'] = runner.arguments_of(str(entry.pop('command')))
    cell = Cell(**entry)
  except (TypeError, ValueError) as error:
    raise ValueError(f'{source} is not valid: {error}.') from error
  if problem := _problem(cell):
    raise ValueError(f'{source}, {cell.name}: {problem}.')
  cli.check_config(f'--config={cell.config}', source)
  imports.check_task(cell.fields.get('data.task', ''), source)
  return cell


def _problem(cell):
  """What is wrong with the values of a cell, or ''. They become words of a command."""
  if not isinstance(cell.name, str) or not re.fullmatch(r'\w[\w.+=,-]*', cell.name):
    return f'name = {cell.name!r}: expected a folder name of letters, digits and _ . + = , -'
  if not isinstance(cell.config, str):
    return f'config = {cell.config!r}: expected a string'
  if not isinstance(cell.fields, dict):
    return f'fields = {cell.fields!r}: expected texts by field'
  known = config_lib.flat_fields()
  for field, value in cell.fields.items():
    if field not in known or not isinstance(value, str):
      return f'fields: {field} = {value!r}: expected a field of the config and its text'
  for name in _NUMBERS:
    value = getattr(cell, name)
    least = 0 if name == 'granularity' else 1  # 0: dense
    if type(value) not in (int, float) or not least <= value < _MOST:
      return f'{name} = {value!r}: expected a number from {least}'
  if type(cell.predicted_loss) not in (int, float, type(None)):
    return f'predicted_loss = {cell.predicted_loss!r}: expected a number or null'
  return ''
