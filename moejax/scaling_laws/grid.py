"""Grids of runs: which models to train for how long, what that costs, and the commands."""

import dataclasses
import json
import math
import pathlib

from moejax import files
from moejax.scaling_laws import laws


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of a grid; parameters and FLOPs are the laws'."""

  name: str
  d_model: int
  blocks: int
  heads: int
  expansion_rate: float
  granularity: int
  steps: int
  tokens: int
  params: int
  active_params: int
  flops: float
  command: str  # without --workdir
  predicted_loss: float | None = None  # before it was trained


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What all runs of a grid share."""

  sizes: dict[tuple[int, int], str]  # (d_model, blocks): the configs' word for the size
  word: str  # for other sizes: of the one whose fields are changed
  tokens_per_step: int
  warmup: float  # fraction of the steps
  flags: tuple[str, ...]


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
  word='3M',
  tokens_per_step=2048 * 256,
  warmup=0.01,
  flags=(),
)
# A grid for the CPU of a laptop, on the embedded corpus; only the last validation counts.
LAPTOP = Recipe(
  sizes={},
  word='laptop',
  tokens_per_step=16 * 64,
  warmup=0.05,
  flags=(
    '--config.data.batch_size=16',
    '--config.data.sequence_length=64',
    '--config.train.log_interval=50',
    '--config.train.eval_interval=1000000',
    '--config.train.eval_batches=64',
    '--config.train.sample_length=0',
  ),
)

_TO_4, _TO_8, _TO_16 = (1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8, 16)
_D16, _D24, _D33, _D66, _D131 = 31_250, 46_875, 62_500, 125_000, 250_000  # steps for so many G
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
_SHORT, _MIDDLE, _LONG = 200, 400, 800
# All cells, in an order that has every size, duration and kind in the first half.
_LAPTOP_GRIDS = (
  dict.fromkeys(_LAPTOP_SHAPES, {_SHORT: (*_DENSE, 1, 4), _MIDDLE: (2, 8), _LONG: (*_DENSE, 1, 4)}),
  dict.fromkeys(_LAPTOP_SHAPES, {_SHORT: (2, 8), _MIDDLE: (*_DENSE, 1, 4), _LONG: (2, 8)}),
)

# Name -> recipe, expansion rate, grids.
PRESETS = {
  'paper': (PAPER, 64, (_PAPER_SPARSE, _PAPER_DENSE)),
  'laptop': (LAPTOP, 8, _LAPTOP_GRIDS),
  # Larger than every run of `laptop`: does the law that they give extrapolate?
  'laptop_larger': (LAPTOP, 8, ({(128, 2, 4): {1000: (*_DENSE, 1, 4)}},)),
}


def make(preset, coefficients=None):
  """The cells of a preset; with coefficients by expansion rate, also the losses they predict.

  Raises:
    ValueError: there is no such preset.
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
    granularity: laws.DENSE for a dense one.
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
    command=' '.join(_command(recipe, shape, rate, granularity, steps)),
    predicted_loss=law and float(laws.loss(law, params, tokens, granularity)),
  )


def _command(recipe, shape, expansion_rate, granularity, steps):
  d_model, blocks, heads = shape
  words = recipe.sizes.get((d_model, blocks), recipe.word)
  feed_forward, config = 'mlp', f'configs/dense.py:{words}'
  if granularity != laws.DENSE:
    feed_forward = 'moe'
    config = f'configs/fine_grained.py:{words},granularity={granularity}'
    config += f',expansion_rate={expansion_rate:g}'
  yield f'python -m moejax.main --config={config}'
  if (d_model, blocks) not in recipe.sizes:
    yield f'--config.model.d_model={d_model}'
    yield f'--config.model.d_ff={4 * d_model}'
    yield f'--config.model.num_heads={heads}'
    pattern = f"'attention','{feed_forward}'"
    yield f'--config.model.blocks="((({pattern}),{blocks}),)"'
  yield from recipe.flags
  yield f'--config.optimizer.warmup_steps={int(recipe.warmup * steps)}'
  yield f'--config.train.steps={steps}'


def write(cells, path):
  """Writes cells as JSON."""
  text = json.dumps([dataclasses.asdict(cell) for cell in cells], indent=1)
  files.write(path, text + '\n')


def read(path):
  """The cells of a file.

  Raises:
    ValueError: there is no such file, or it holds something else.
  """
  try:
    cells = [Cell(**fields) for fields in json.loads(pathlib.Path(path).read_text('utf-8'))]
  except FileNotFoundError as error:
    raise ValueError(f'--grid={path}: there is no such file; `grid` writes one.') from error
  except (TypeError, ValueError) as error:
    raise ValueError(f'--grid={path} is not a file that `grid` wrote: {error}.') from error
  for cell in cells:
    name = cell.name
    if not isinstance(name, str) or not name or name.startswith('.') or '/' in name:
      raise ValueError(f'--grid={path}: name = {name!r}: expected the name of a folder.')
    if not isinstance(cell.command, str):
      raise ValueError(f'--grid={path}, {name}: command = {cell.command!r}: expected text.')
    for field in ('steps', 'params', 'flops'):
      if not isinstance(value := getattr(cell, field), int | float) or not 0 < value < math.inf:
        raise ValueError(f'--grid={path}, {name}: {field} = {value!r}: expected a number above 0.')
  return cells
