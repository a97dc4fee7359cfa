"""How much one request changes the outputs of others that are served with it.

  python -m moejax.privacy --runs=runs/mot,runs/moe --output=privacy
  python -m moejax.privacy --runs=runs/mot --group_size=4 --group_size=8 --output=by_size

Sequences of the validation split are the requests. Some of every group are exchanged for others,
and the next-token distributions p of those that stay are compared with what they become, q: the
Kullback-Leibler divergence in nats per token, and how often the likeliest token is another one. The
divergence is the evidence that a token sampled from p holds, on average, about who the neighbours
were, for somebody who knows all the rest: one nat in 1 / divergence tokens.

"By block" is the divergence at the output if the exchanged requests are seen by one block alone.
Intervals are over the seeds of a model, or of a single run over its groups. OUTPUT has all numbers
(privacy.csv) and a plot of them against the loss (privacy.png).
"""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags
from matplotlib.ticker import MaxNLocator, NullLocator

from moejax import (
  cli,
  config as config_lib,
  evaluate,
  files,
  model as model_lib,
  report,
  run_folder,
  seeds,
  sharding,
  step as step_lib,
  text,
)
from moejax.compare import runs
from moejax.distributed import is_process_0
from moejax.ops import cross_entropy
from moejax.sharding import rules

DROPLESS = 'dropless'  # as in decoding; training and validation drop tokens where capacity is short
MODES = (*evaluate.MODES, DROPLESS)
ALL = 'all'  # blocks


class Row(NamedTuple):
  """What exchanged requests change for those that stay."""

  model: str
  run: str
  mode: str
  group_size: int  # requests that are mixed or routed together; 1: none is
  temperature: float  # of the mixtures, a mean over layers; nan: there are none
  loss: float  # nats per token, validation
  block: str  # the only one that sees the exchanged requests; or ALL
  exchanged: int  # requests of a group; of a batch where no request sees another
  nats: float  # divergence per token
  low: float  # its interval
  high: float
  largest: float  # divergence of a token
  flipped: float  # share of tokens whose likeliest token is another one

  @property
  def estimate(self) -> seeds.Estimate:
    return seeds.Estimate(self.nats, self.low, self.high)


class Changes(NamedTuple):
  """Of every request of a batch; 0 where it was exchanged itself."""

  nats_B: jax.Array  # summed over tokens
  flipped_B: jax.Array  # number of tokens
  tokens_B: jax.Array
  largest_B: jax.Array  # nats of a token


def measure(folder, modes, group_sizes, num_batches, name='', model=''):
  """Yields the Rows of a run in every mode, or where there are none a text that says why.

  Args:
    folder: of the run.
    modes: of MODES.
    group_sizes: sequences mixed with each other; 0: as in training.
    num_batches: of validation.
    name, model: of the run, and of what it is a seed of; default: that of its folder.

  Raises:
    ValueError: there are fewer than two batches, so that nothing can be exchanged.
  """
  name = name or files.path(folder).name
  source, _, params, mesh = run_folder.load_run(folder)
  config_lib.check_batch(source, mesh)
  of_one_size = 'unmixed', DROPLESS
  ways = [(m, size) for m in modes for size in ([0] if m in of_one_size else group_sizes)]
  for mode, size in ways:
    try:
      run_config, of_evaluate = _served(source, mode)
      with jax.set_mesh(mesh):
        how = params, mesh, [of_evaluate], [size], num_batches
        ((_, done),) = evaluate.evaluations(run_config, *how)
    except ValueError as error:
      yield f'{name}, {mode}{f" in groups of {size}" if size else ""}: {error}'
      continue
    config = evaluate.decoding(run_config.model, of_evaluate, size)
    found = {(ALL, 1): (0.0, 0.0, 0.0, 0.0, 0.0)}  # the others of a group are no requests
    if mode != 'mixed_with_corpus':
      with jax.set_mesh(mesh):
        found = _influence(config, run_config, params, mesh, num_batches)
    temperatures = done.aux.get('mot/temperature', config.mot.temperature)
    temperature = float(np.mean(temperatures)) if 'mot/entropy' in done.aux else math.nan
    group = config.group_multiple
    known = model or name, name, mode, group, temperature, done.result['loss']
    for (block, exchanged), numbers in found.items():
      yield Row(*known, block, exchanged, *numbers)


def _served(run_config, mode):
  """The config of a run for a mode, and what `moejax.evaluate` calls that mode."""
  if mode != DROPLESS:
    return run_config, mode
  if (dropless := run_config.model.dropless()) is None:
    raise ValueError('this model drops no token.')
  return dataclasses.replace(run_config, model=dropless), 'mixed'


def _influence(model_config, run_config, params, mesh, num_batches):
  """The last five fields of a Row by its block and number of exchanged requests."""
  batch_size, accumulation = run_config.data.batch_size, run_config.optimizer.accumulation
  number = step_lib.microbatches(model_config, batch_size, accumulation)
  batches = list(_batches(run_config, mesh, num_batches, number))
  if len(batches) < 2:
    raise ValueError(
      'requests are exchanged for those of another batch, but there is only one: raise --batches, '
      'or lower data.batch_size if the validation split has no other.'
    )
  group = _group(model_config, batch_size // number)
  found, rng = {}, np.random.default_rng(0)
  pairs = zip(batches, [*batches[1:], batches[0]], strict=True)
  hidden = None if is_process_0() else True  # None: unless it is a terminal
  for pair in tqdm.tqdm(pairs, 'exchanging', len(batches), delay=5, leave=False, disable=hidden):
    batch, other = sharding.place_batch(pair, mesh)
    ranks = np.tile(np.arange(group), (batch_size // number // group, 1))
    rank_B = rng.permuted(ranks, axis=1).reshape(-1)
    for key, changes in exchange(model_config, params, batch, other, rank_B, group):
      found.setdefault(key, []).append(np.stack(changes, axis=1).reshape(-1, group, len(changes)))
  return {key: _summary(np.concatenate(parts)) for key, parts in found.items()}


def _batches(run_config, mesh, num_batches, number):
  """The first batches of validation, each as a number of microbatches."""
  for batch in evaluate.host_batches(run_config, mesh, num_batches):
    for i in range(number):
      yield {name: np.split(rows, number)[i] for name, rows in batch.items()}


def _group(model_config, batch_size):
  """How many requests next to each other are served together: a group, or else the batch."""
  group = model_config.group_multiple
  return group if group > 1 else batch_size


def _summary(changes):
  """The last five fields of a Row, of Changes [groups, requests of a group, 4]."""
  largest = float(changes[..., 3].max())
  nats, flipped, tokens = changes[..., :3].sum(axis=1, dtype=np.float64).T
  known = tokens > 0  # the split may end within a batch
  estimate = seeds.mean((nats[known] / tokens[known]).tolist())
  return *estimate, largest, float(flipped.sum() / tokens.sum())


def exchange(model_config, params, batch, other, rank_B, group):
  """What changes for requests if 1, 2, 4 ... and all others of their group are exchanged.

  Args:
    model_config, params: the model.
    batch: as for `LanguageModel.loss`, with 'counted'; global arrays.
    other: a batch, whose requests replace those at the same place.
    rank_B: the rank of every request in its group, from 0; the highest are exchanged first.
    group: the number of requests in a group.

  Yields:
    The block that alone sees the exchanged requests, or ALL, and how many of a group these are; and
    the Changes, as numpy arrays. Single blocks only for one exchanged request, in models with
    groups.
  """
  stream = _stream(model_config, params, batch)
  blocks = len(stream) - 1
  for number in sorted({*itertools.takewhile(lambda n: n < group, _POWERS), group - 1}):
    kept_B = rank_B < group - number
    exchanged = _where(kept_B, batch, other)
    changed = _stream(model_config, params, exchanged)
    ends = {ALL: changed[-1]}
    if number == 1 and model_config.group_multiple > 1:
      for at in range(blocks):
        x_BLD = _where(kept_B, stream[at], changed[at])
        x_BLD = _block(model_config, at, params, x_BLD, exchanged)
        for later in range(at + 1, blocks):
          x_BLD = _block(model_config, later, params, _where(kept_B, x_BLD, stream[later]), batch)
        ends[str(at)] = x_BLD
    for block, end in ends.items():
      found = _changes(model_config, params, stream[-1], end, batch['counted'], kept_B)
      yield (block, number), Changes(*sharding.fetch(found))


_POWERS = [2**i for i in range(31)]


def _stream(config, params, batch):
  """x_BLD before every block, and after the last."""
  stream = [_embed(config, params, batch)]
  for number in range(len(config.sublayers)):
    stream.append(_block(config, number, params, stream[-1], batch))
  return stream


@functools.partial(jax.jit, static_argnums=0)
def _embed(config, params, batch):
  model = model_lib.bind(config, params)
  return model._embed(batch['inputs'], model.tokens_of(batch))


def _block(config, number, params, x_BLD, batch):
  """x_BLD after one block of the model."""
  places = [(i, j) for i, (_, repeats) in enumerate(config.blocks) for j in range(repeats)]
  stack, repeat = places[number]
  return _block_of_stack(config, stack, params, np.int32(repeat), x_BLD, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _block_of_stack(config, stack, params, repeat, x_BLD, batch):
  model = model_lib.bind(config, params)
  block = jax.tree.map(lambda leaf: leaf[repeat], getattr(model, model.stacks[stack]))
  return rules.gather(block, config.dtype)(x_BLD, model.tokens_of(batch))[0]


@jax.jit
def _where(kept_B, batch, other):
  """Of every array the requests of `batch` that are kept, and the others of `other`."""
  choose = lambda a, b: jnp.where(kept_B.reshape(-1, *[1] * (a.ndim - 1)), a, b)
  return jax.tree.map(choose, batch, other)


@functools.partial(jax.jit, static_argnums=0)
def _changes(config, params, x_BLD, y_BLD, counted_BL, kept_B):
  model = model_lib.bind(config, params)
  x_BLD, y_BLD = model._normalize(x_BLD), model._normalize(y_BLD)
  chunk = config.loss_chunk
  nats_BL, flipped_BL = cross_entropy.divergence(x_BLD, y_BLD, model._head(), chunk=chunk)
  weights_BL = (counted_BL & kept_B[:, None]).astype(nats_BL.dtype)
  nats_BL *= weights_BL
  sums = nats_BL.sum(1), (flipped_BL * weights_BL).sum(1), weights_BL.sum(1)
  return Changes(*sums, nats_BL.max(1))


def over_seeds(rows) -> list[Row]:
  """One Row per model and condition, with its interval over seeds where there are several."""
  found = {}
  for row in rows:
    condition = row.model, row.mode, row.group_size, row.block, row.exchanged
    found.setdefault(condition, {})[row.run] = row  # once, if a group size was given twice
  return [_mean(list(same.values())) for same in found.values()]


def _mean(rows):
  """The Row of a model whose seeds have these."""
  if len(rows) == 1:
    return rows[0]
  of = lambda name: [getattr(row, name) for row in rows]
  means = {name: float(np.mean(of(name))) for name in ('temperature', 'loss', 'flipped')}
  nats, low, high = seeds.mean(of('nats'))
  largest = max(of('largest'))
  return rows[0]._replace(run='', nats=nats, low=low, high=high, largest=largest, **means)


def tables(rows) -> str:
  """What requests change by mode, by number of exchanged requests, and by block, as text."""
  rows = over_seeds(rows)
  served = {}
  for row in rows:
    served.setdefault((row.model, row.mode, row.group_size), []).append(row)
  one_and_all = [_HEADING]
  for same in served.values():
    of_all = [row for row in same if row.block == ALL]
    one_and_all.append(_line(of_all[0], of_all[-1]))
  parts = [
    'divergence (nats per token) of what a request gets if others of its group are exchanged',
    '',
    text.table(one_and_all),
  ]
  for title, name, of in (
    ('by number of exchanged requests', 'exchanged', lambda row: row.block == ALL),
    ('by the block that alone sees one exchanged request', 'block', lambda row: row.block != ALL),
  ):
    places = sorted({getattr(row, name) for row in rows if of(row)}, key=int)
    if len(places) > 1:
      lines = [['model', 'mode', 'group', *map(str, places)]]
      for (model, mode, size), same in served.items():
        found = {getattr(row, name): f'{row.nats:.2g}' for row in same if of(row)}
        lines.append([model, mode, str(size), *(found.get(place, '') for place in places)])
      parts += ['', title, '', text.table(lines)]
  return '\n'.join(parts)


_HEADING = ['model', 'mode', 'group', 'temperature', 'loss', 'one exchanged', 'largest']
_HEADING += ['flipped', 'tokens per nat', 'all exchanged', 'flipped']


def _line(one, everybody):
  """Of the first table, from the Rows of one and of all exchanged requests."""
  temperature = '-' if math.isnan(one.temperature) else f'{one.temperature:.3g}'
  return [
    *(one.model, one.mode, str(one.group_size), temperature, f'{one.loss:.4f}'),
    *(f'{one.estimate:.2g}', f'{one.largest:.2g}', f'{one.flipped:.2%}'),
    text.short(1 / one.nats) if one.nats else 'never',
    *(f'{everybody.estimate:.2g}', f'{everybody.flipped:.2%}'),
  ]


def write(rows, output) -> None:
  """Writes privacy.csv, all rows, and privacy.png."""
  files.write_csv(files.path(output) / 'privacy.csv', [Row._fields, *rows])
  report.save_figure(_figure(rows), files.path(output) / 'privacy.png')


def _figure(rows):
  """The divergence against the loss, the number of exchanged requests, and the block.

  Lines connect group sizes in the first part; the others show the first group size of each mode.
  """
  rows = over_seeds(rows)
  drawn, axes = report.new_figures(3, (15, 5))
  lines = {}
  for row in rows:
    lines.setdefault((row.model, row.mode), []).append(row)
  positive = [row.nats for row in rows if row.nats] or [1.0]
  floor = 10.0 ** math.floor(math.log10(min(positive)))
  axes[0].set_yscale('symlog', linthresh=floor, linscale=0.3)
  axes[0].yaxis.set_minor_locator(NullLocator())
  axes[0].set_ylim(-0.3 * floor, 2 * max(positive))
  lowest = min(row.loss for row in rows)
  axes[0].set_xscale('symlog', linthresh=0.1, linscale=1.5)
  axes[0].set(xlabel=f'validation loss over {lowest:.3f} (nats per token)', title='one exchanged')
  axes[0].set_ylabel('divergence (nats per token)')
  axes[1].set_xscale('log', base=2)
  axes[1].set(xlabel='exchanged requests of a group', title='seen by all blocks')
  axes[2].set(xlabel='block that alone sees the exchanged one', title='one exchanged')
  axes[2].xaxis.set_major_locator(MaxNLocator(integer=True))
  for i, ((model, mode), same) in enumerate(lines.items()):
    style = {'color': f'C{i % 10}', 'marker': 'os^Dvp'[i // 10 % 6], 'markersize': 5}
    label = report.plain_label(f'{model}, {mode}')
    points = sorted(row for row in same if row.block == ALL and row.exchanged == 1)
    where = [row.loss - lowest for row in points], [row.nats for row in points]
    axes[0].plot(*where, label=label, linewidth=1, **style)
    for x, row in zip(where[0], points, strict=True):
      axes[0].plot([x] * 2, [max(row.low, 0), row.high], color=style['color'], alpha=0.5)
      axes[0].annotate(f' {row.group_size}', (x, row.nats), fontsize=7)
    first = [row for row in same if row.group_size == same[0].group_size]
    curve = [row for row in first if row.block == ALL]
    axes[1].plot([row.exchanged for row in curve], [row.nats for row in curve], **style)
    blocks = [row for row in first if row.block != ALL]
    axes[2].plot([int(row.block) for row in blocks], [row.nats for row in blocks], **style)
  axes[0].xaxis.set_major_formatter('{x:g}')
  axes[0].set_xticks([0, 0.05, 0.1, 1, 10])
  axes[1].xaxis.set_major_formatter('{x:g}')
  drawn.legend(loc='outside right upper', frameon=False, fontsize='small')
  return drawn


def main():
  args = flags.FLAGS
  cli.join_processes()
  for mode in args.modes or ():
    if mode not in MODES:
      raise ValueError(
        f'--modes: expected some of {", ".join(MODES)}, got {mode!r}'
        f'{text.did_you_mean(mode, MODES)}'
      )
  rows, notes = [], []
  for model in runs.models(runs.read(args.runs)):
    for run in model.runs:
      how = args.modes or MODES, args.group_size, args.batches
      for found in measure(run.folder, *how, run.name, model.name):
        (notes if isinstance(found, str) else rows).append(found)
  if not rows:
    raise ValueError('\n'.join(notes))
  if is_process_0():
    write(rows, args.output)
    asked = args.modes or args.group_size != [0]
    print('\n'.join([tables(rows), *(notes if asked else ())]))
    print(f'written to {args.output}: privacy.csv, privacy.png', flush=True)
  return cli.OK


if __name__ == '__main__':
  cli.define_process_flags()
  cli.define_paths('runs', None, 'Folders of runs, or folders of such runs.', required=True)
  cli.define_path('output', None, 'Folder for the table and the plot.', required=True)
  flags.DEFINE_list(
    'modes',
    None,
    f'How requests are served; default: in all ways that a model has. {evaluate.describe_modes()} '
    f'{DROPLESS}: without capacity, as in decoding.',
  )
  flags.DEFINE_multi_integer(
    'group_size', [0], 'Requests mixed with each other; may be repeated. 0: as in training.'
  )
  flags.DEFINE_integer('batches', 8, 'Batches of validation.', lower_bound=2)
  cli.run(main, needs_config=False)
