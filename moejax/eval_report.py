"""What moejax.evaluate shows: a table, and the loss by position as table, CSV file and plot."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moejax import files, report, text


def table(rows: list[dict]) -> str:
  """The results of `evaluate.compare_modes` in columns."""
  columns = {
    'mode': lambda row: row['mode'],
    'group': lambda row: str(row['group_size']),
    'leaks': lambda row: 'yes' if row['leaks'] else 'no',
    'nats/token': report.loss_of,
    'perplexity': lambda row: f'{row["perplexity"]:.4g}',
  }
  if any('bits_per_byte' in row for row in rows):
    columns['bits/byte'] = lambda row: f'{row.get("bits_per_byte", math.nan):.4f}'
  if any('loss_dropless' in row for row in rows):
    columns['without drops'] = lambda row: f'{row.get("loss_dropless", math.nan):.4f}'
  columns['tokens'] = lambda row: text.short(row['tokens'])
  columns['batches'] = lambda row: str(row['batches'])
  return text.table([list(columns), *([cell(row) for cell in columns.values()] for row in rows)])


def buckets(nats_L, tokens_L) -> list[dict]:
  """The loss in nats per token at positions 0, 1, 2 to 3, 4 to 7, ..., each with its tokens."""
  found, first = [], 0
  while first < len(nats_L):
    end = min(max(1, 2 * first), len(nats_L))
    tokens = float(tokens_L[first:end].sum())
    loss = float(nats_L[first:end].sum()) / tokens if tokens else math.nan
    found.append({'first': first, 'last': end - 1, 'loss': loss, 'tokens': int(tokens)})
    first = end
  return found


def position_table(curves: dict) -> str:
  """The buckets of several results, by label: (nats_L, tokens_L)."""
  columns = [buckets(*curve) for curve in curves.values()]
  lines = [['position', *curves]]
  for parts in zip(*columns, strict=True):
    first, last = parts[0]['first'], parts[0]['last']
    where = str(first) if first == last else f'{first} to {last}'
    lines.append([where, *(f'{part["loss"]:.4f}' for part in parts)])
  return text.table(lines)


def write_positions(curves: dict, path) -> None:
  """Writes the loss at every position to a CSV file, and a plot of it beside the file (.png)."""
  rows: list[list[Any]] = [['label', 'position', 'loss', 'tokens']]
  for label, (nats_L, tokens_L) in curves.items():
    for position in np.flatnonzero(tokens_L):
      loss = nats_L[position] / tokens_L[position]
      rows.append([label, position, f'{loss:.6f}', int(tokens_L[position])])
  files.write_csv(path, rows)
  report.save_figure(position_figure(curves), path.with_suffix('.png'))


def position_figure(curves: dict) -> Figure:
  """The loss by position, thin at every position and thick in the buckets of `buckets`."""
  figure, axes = report.new_figure(
    xlabel='position in the sequence, from 1', ylabel='loss (nats per token)', xscale='log'
  )
  for i, (label, (nats_L, tokens_L)) in enumerate(curves.items()):
    seen = np.flatnonzero(tokens_L)
    axes.plot(seen + 1, nats_L[seen] / tokens_L[seen], color=f'C{i}', linewidth=0.7, alpha=0.35)
    parts = [part for part in buckets(nats_L, tokens_L) if part['tokens']]
    centres = [math.sqrt((part['first'] + 1) * (part['last'] + 1)) for part in parts]
    losses = [part['loss'] for part in parts]
    axes.plot(centres, losses, color=f'C{i}', linewidth=2, marker='o', markersize=4, label=label)
  axes.set_xticks([2**i for i in range(len(next(iter(curves.values()))[0]).bit_length())])
  axes.xaxis.set_major_formatter('{x:.0f}')
  axes.minorticks_off()
  axes.legend(frameon=False)
  return figure
