"""Which tokens find no slot, what that costs, and which capacity factor a run needs.

  python -m moejax.drops --workdir=runs/moe --output=drops

Validation text is evaluated at several capacity factors, without limit, and with experts chosen at
random. Prints, and writes to OUTPUT,

  capacity.csv, capacity.png   loss and dropped choices by capacity factor
  tokens.csv, tokens.png       of every kind of token: dropped choices, and the loss of predicting
                               the next token with and without drops

Errors (±) are standard errors over sequences, of differences on the same text.
"""

import contextlib
import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from moejax import (
  cli,
  config as config_lib,
  files,
  model as model_lib,
  report,
  run_folder,
  sharding,
  step as step_lib,
  text,
)
from moejax.distributed import is_process_0
from moejax.evaluate import standard_error, validation_batches
from moejax.layers import moe

FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
_RANDOM = 'random_choice'
_LEAST = 1e-4  # nats of drops that are shown
_RANKS = (3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000)  # last ones of classes of frequency


class Point(NamedTuple):
  """A capacity factor."""

  factor: float
  dropped: float  # fraction of all choices of experts
  loss: float  # nats per token
  cost: float  # what drops add to the loss, nats per token
  cost_error: float  # its standard error


class Row(NamedTuple):
  """A class of tokens."""

  by: str
  tokens: str
  share: float  # of all tokens
  dropped: float  # fraction of their choices of experts
  loss: float  # of predicting the token after them, nats
  loss_without: float  # the same without drops
  cost: float
  cost_error: float


class Ledger(NamedTuple):
  """What `measure` finds."""

  factor: float  # the capacity factor of the run, of which `rows` are
  points: list[Point]
  rows: list[Row]
  dropless: float  # loss without drops
  random: float  # the same where experts are chosen at random


class _Tokens(NamedTuple):
  """All tokens of a pass, in numpy; what they are followed by is predicted."""

  id_N: np.ndarray
  position_N: np.ndarray
  sequence_N: np.ndarray
  missed_KN: np.ndarray  # fraction of its experts that a token did not get, by layer
  with_N: np.ndarray  # nats of the prediction
  without_N: np.ndarray  # the same without drops


def _choice_at_random(logits_GTE, *, config, **options):
  """Every token gets the experts and weights of another token of its group."""
  order_T = jax.random.permutation(jax.random.key(0), logits_GTE.shape[1])
  return moe.token_choice(logits_GTE[:, order_T], config=config, **options)


@contextlib.contextmanager
def _random_router():
  """Adds it to the routers of configs, for a while: it is no choice for users."""
  moe.ROUTERS[_RANDOM] = moe.Router(_choice_at_random)
  try:
    yield
  finally:
    del moe.ROUTERS[_RANDOM]


def measure(run_config, params, mesh, num_batches=None) -> Ledger:
  """The Ledger of a run.

  Args:
    run_config, params, mesh: of `run_folder.load_run`.
    num_batches: of validation; None: all.

  Raises:
    ValueError: the model has no layer that drops tokens.
  """
  own = run_config.model.moe.capacity_factor or 1.0
  limited = _with(run_config.model, capacity_factor=own)
  free = limited.dropless()
  if free is None or not free.moe.rule.chooses_best:
    raise ValueError(
      '--workdir: expected a run with layers that can drop tokens (moe, and model.moe.router = '
      'token_choice); this one has none.'
    )
  group = free.moe.group_tokens(run_config.data.sequence_length)
  load = free.moe.top_k * group / free.moe.num_experts
  factors = [f for f in sorted({own, *FACTORS}) if f * load >= 1]
  models = {0.0: free, **{f: _with(free, capacity_factor=f) for f in factors}}
  nats, dropped, targets, tokens = {}, {}, [], []
  with jax.set_mesh(mesh), _random_router():
    models[_RANDOM] = _with(free, router=_RANDOM)
    for batch in validation_batches(run_config, mesh, num_batches):
      number = step_lib.microbatches(free, len(batch['inputs']), run_config.optimizer.accumulation)
      for name, model in models.items():
        *_, aux, sums = step_lib.eval_step(model, number, params, batch)
        nats.setdefault(name, []).append(sharding.fetch(sums.nats_B))
        dropped.setdefault(name, []).append(sharding.fetch(aux['moe/dropped']).mean())
      targets.append(sharding.fetch(sums.targets_B))
      tokens.append(_tokens(limited, free, params, batch, len(tokens)))
  targets_B = np.concatenate(targets)
  nats = {name: np.concatenate(parts).astype(np.float64) for name, parts in nats.items()}
  loss = {name: nats_B.sum() / targets_B.sum() for name, nats_B in nats.items()}
  points = [
    Point(f, float(np.mean(dropped[f])), loss[f], *_ratio(nats[f] - nats[0.0], targets_B))
    for f in factors
  ]
  joined = _Tokens(*(np.concatenate(parts, axis=-1) for parts in zip(*tokens, strict=True)))
  rows = list(_rows(joined, run_config.tokenizer))
  return Ledger(own, points, rows, loss[0.0], loss[_RANDOM])


def _with(model, **changes):
  return dataclasses.replace(model, moe=dataclasses.replace(model.moe, **changes))


@functools.partial(jax.jit, static_argnums=0)
def _nats(model, params, batch):
  return -model_lib.bind(model, params).target_scores(batch)[0]


@functools.partial(jax.jit, static_argnums=0)
def _missed(model, params, batch):
  """For every layer and token, the fraction of its experts that it did not get: BLK."""
  weights_KBLE = model_lib.bind(model, params).observe(batch)['moe']['weights']
  return jnp.moveaxis(1 - (weights_KBLE > 0).sum(-1) / model.moe.top_k, 0, -1)


def _tokens(limited, free, params, batch, number):
  """The _Tokens of a batch, the `number`-th."""
  found = {
    'id': batch['inputs'],
    'position': batch['positions'],
    'missed': _missed(limited, params, batch),
    'with': _nats(limited, params, batch),
    'without': _nats(free, params, batch),
    'counted': batch['counted'],
  }
  found = sharding.fetch(found)
  counted_BL = found.pop('counted')
  sequence_N = number * len(counted_BL) + np.nonzero(counted_BL)[0]
  found = {name: values[counted_BL] for name, values in found.items()}
  columns = found['with'].astype(np.float64), found['without'].astype(np.float64)
  return _Tokens(found['id'], found['position'], sequence_N, found['missed'].T, *columns)


def _ratio(numbers_B, weights_B):
  """A ratio of sums over sequences, and its standard error."""
  ratio = numbers_B.sum() / weights_B.sum()
  return ratio, standard_error(numbers_B, weights_B, ratio)


def _rows(tokens, tokenizer):
  """Yields the Row of every class of tokens, and of every layer."""
  everything_N = np.ones(len(tokens.id_N), bool)
  for layer, missed_N in enumerate(tokens.missed_KN):
    yield _row('layer', str(layer), tokens, missed_N, everything_N)
  for by, (class_N, names) in _classes(tokens, tokenizer).items():
    for i, name in enumerate(names):
      if (of_class_N := class_N == i).any():
        yield _row(by, name, tokens, tokens.missed_KN.mean(0), of_class_N)


def _row(by, name, tokens, missed_N, of_class_N):
  with_N, without_N = tokens.with_N[of_class_N], tokens.without_N[of_class_N]
  sequence_N = tokens.sequence_N[of_class_N]
  sums = np.bincount(sequence_N, with_N - without_N), np.bincount(sequence_N)
  dropped = float(missed_N[of_class_N].mean())
  means = with_N.mean(), without_N.mean()
  return Row(by, name, float(of_class_N.mean()), dropped, *means, *_ratio(*sums))


def _classes(tokens, tokenizer):
  """By what tokens are classified: the class of every token, and the names of classes."""
  layers_N = (tokens.missed_KN > 0).sum(0)
  number_V = np.bincount(tokens.id_N)
  rank_V = np.empty(len(number_V), np.int64)
  rank_V[np.argsort(-number_V, kind='stable')] = np.arange(1, len(number_V) + 1)
  ranks = [f'{a + 1} to {b}' for a, b in itertools.pairwise((0, *_RANKS))]
  positions = int(tokens.position_N.max()).bit_length()
  halves = ['0', '1', *(f'{2**i} to {2 ** (i + 1) - 1}' for i in range(1, positions))]
  kind_V = np.array([_KINDS.index(_kind(tokenizer.decode([i]))) for i in range(len(number_V))])
  return {
    'layers that dropped it': (layers_N, [str(i) for i in range(len(tokens.missed_KN) + 1)]),
    'rank by frequency': (
      np.searchsorted(_RANKS, rank_V[tokens.id_N]),
      [*ranks, f'{_RANKS[-1] + 1} and more'],
    ),
    'position': (np.ceil(np.log2(tokens.position_N + 1)).astype(int), halves),
    'kind of text': (kind_V[tokens.id_N], _KINDS),
  }


_KINDS = ('letters', 'digits', 'punctuation', 'space', 'end of line', 'other')


def _kind(piece):
  """What the text of a token is."""
  if not (bare := piece.strip()):
    return 'end of line' if '\n' in piece else 'space' if piece else 'other'
  kinds = {'letters': str.isalpha, 'digits': str.isdigit, 'other': lambda c: not c.isprintable()}
  first = bare[0]
  if first == '\ufffd':
    return 'other'
  return next((kind for kind, holds in kinds.items() if holds(first)), 'punctuation')


def enough(ledger, cost) -> float | None:
  """The smallest capacity factor at which drops cost at most `cost` nats per token, if any does."""
  return next((p.factor for p in ledger.points if p.cost <= cost), None)


def tables(ledger, cost) -> str:
  """All of a Ledger as text."""
  own = next(p for p in ledger.points if p.factor == ledger.factor)
  points = [['capacity factor', 'dropped', 'loss', 'cost of drops']]
  points += [
    [f'{p.factor:g}', f'{p.dropped:.2%}', f'{p.loss:.4f}', _cost(p)] for p in ledger.points
  ]
  rows = [['by', 'tokens', 'share', 'dropped', 'loss', 'without drops', 'cost of drops']]
  for r in ledger.rows:
    losses = f'{r.loss:.4f}', f'{r.loss_without:.4f}', _cost(r)
    losses = ('', '', '') if r.by == 'layer' else losses  # those of all tokens
    rows.append([r.by, r.tokens, f'{r.share:.1%}', f'{r.dropped:.2%}', *losses])
  factor = enough(ledger, cost)
  answer = 'No capacity factor here is' if factor is None else f'Capacity factor {factor:g} is'
  return (
    f'{text.table(points)}\n\n{answer} the smallest one at which drops cost at most {cost:g} nats '
    f'per token.\n\nloss {own.loss:.4f} = {ledger.random:.4f} with experts chosen at random '
    f'- {ledger.random - ledger.dropless:.4f} by the router + {own.cost:.4f} by drops '
    f'(capacity factor {ledger.factor:g})\n\n{text.table(rows)}'
  )


def _cost(row):
  return f'{row.cost:+.4f} ± {row.cost_error:.4f}'


def write(ledger, output) -> None:
  """Writes the files of the module's docstring."""
  output = files.path(output)
  files.write_csv(output / 'capacity.csv', [Point._fields, *ledger.points])
  files.write_csv(output / 'tokens.csv', [Row._fields, *ledger.rows])
  report.save_figure(_capacity_figure(ledger), output / 'capacity.png')
  report.save_figure(_tokens_figure(ledger), output / 'tokens.png')


def _capacity_figure(ledger):
  figure, axes = report.new_figure(
    xlabel='capacity factor (percentages: dropped choices)',
    ylabel='cost of drops (nats per token)',
    yscale='log',
  )
  shown = [p for p in ledger.points if p.cost > _LEAST]
  factors, costs = [p.factor for p in shown], [p.cost for p in shown]
  axes.errorbar(factors, costs, [p.cost_error for p in shown], marker='o', capsize=3)
  for p in shown:
    axes.annotate(f'{p.dropped:.1%}', (p.factor, p.cost), (8, 4), textcoords='offset points')
  axes.margins(x=0.12)
  axes.axvline(ledger.factor, color='0.6', linestyle='--', label='of the run')
  axes.legend(frameon=False)
  return figure


def _tokens_figure(ledger):
  """Bars: what is dropped of every class of tokens."""
  rows = [row for row in ledger.rows if row.by != 'layers that dropped it']
  kinds = list(dict.fromkeys(row.by for row in rows))
  figure, panels = report.new_figures(len(kinds), (3.2 * len(kinds), 4.5))
  for axes, by in zip(panels, kinds, strict=True):
    of_kind = [row for row in rows if row.by == by]
    axes.bar([row.tokens for row in of_kind], [100 * row.dropped for row in of_kind])
    axes.tick_params('x', rotation=60)
    axes.set_title(by)
  panels[0].set_ylabel('dropped choices (%)')
  return figure


def main(overrides):
  args = flags.FLAGS
  cli.join_processes()
  run_config, step, params, mesh = run_folder.load_run(args.workdir, overrides)
  config_lib.check_batch(run_config, mesh)
  ledger = measure(run_config, params, mesh, args.batches or None)
  if is_process_0():
    write(ledger, args.output)
    print(f'{args.workdir}, step {step}\n{tables(ledger, args.cost)}\nwritten to {args.output}')
  return cli.OK


if __name__ == '__main__':
  cli.define_process_flags()
  cli.define_path('workdir', None, 'Folder of the run.', required=True, bucket=True)
  cli.define_path('output', None, 'Folder for tables and plots.', required=True)
  flags.DEFINE_integer('batches', 0, 'Batches of validation; 0: all.', lower_bound=0)
  flags.DEFINE_float('cost', 0.005, 'What drops may cost, in nats per token.', lower_bound=0.0)
  cli.run(main, needs_config=False, takes_overrides=True)
