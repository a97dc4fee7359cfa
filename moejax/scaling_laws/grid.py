"""Grids of runs: models, training durations, costs and commands."""

import dataclasses
import json
import math
import pathlib

from moejax import files, runner
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
# granularities have the rate of the base shape, by docs/transfer.md. Durations share their steps
# before the decay.
LAPTOP = Recipe(
  sizes={},
  base='laptop',
  tokens_per_step=16 * 64,
  peak_lr=1.3e-2,
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
_LAPTOP_SHAPES = ((32, 2, 2), (64, 2, 2), (96, 2, 3))
# From one to the next, the stable phase goes on: all cost as much as 1425 steps.
_LAPTOP_STEPS = (75, 150, 300, 600, 1200)
# Ordered so that the first part has every size and duration, and both kinds.
_LAPTOP_GRIDS = tuple(
  dict.fromkeys(_LAPTOP_SHAPES, dict.fromkeys(_LAPTOP_STEPS, granularities))
  for granularities in ((*_DENSE, 1, 4), (2, 8))
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
    cells = [_cell(entry) for entry in json.loads(pathlib.Path(path).read_text('utf-8'))]
  except FileNotFoundError as error:
    raise ValueError(f'--grid={path}: file not found; `grid` writes it.') from error
  except (TypeError, ValueError) as error:
    raise ValueError(f'--grid={path} is not a valid grid file: {error}.') from error
  for cell in cells:
    name = cell.name
    if not isinstance(name, str) or not name or name.startswith('.') or '/' in name:
      raise ValueError(f'--grid={path}: name = {name!r}: expected a folder name.')
    if not isinstance(cell.config, str):
      raise ValueError(f'--grid={path}, {name}: config = {cell.config!r}: expected a string.')
    if not isinstance(cell.fields, dict) or not all(
      isinstance(text, str) for text in cell.fields.values()
    ):
      raise ValueError(f'--grid={path}, {name}: fields = {cell.fields!r}: expected texts by field.')
    for field in ('steps', 'params', 'flops'):
      if not isinstance(value := getattr(cell, field), int | float) or not 0 < value < math.inf:
        raise ValueError(f'--grid={path}, {name}: {field} = {value!r}: expected a number above 0.')
  return cells


def _cell(entry):
  """The Cell of an entry of a grid file; older versions wrote a command."""
  entry = dict(entry)
  if 'command' in entry:
    command = entry.pop('command')
    entry['config'], entry['fields'] = runner.arguments_of(str(command))
  return Cell(**entry)
