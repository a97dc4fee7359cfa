"""Predictions as files: the losses that a fit predicts for a grid, and a page of hits and misses.

`write` records predictions before the runs are trained, with what it takes to make them again;
`judge` compares them with the runs as they arrive. The page is only ever appended to.
"""

import dataclasses
import hashlib
import json
import math
import time
from typing import Any

import numpy as np
from scipy import stats

from moejax import files, metrics, report as run_report, run_folder, runner, seeds
from moejax.scaling_laws import fit as fit_lib, grid, laws, report
from moejax.text import short, utc

_COVERED = (fit_lib.INTERVAL[1] - fit_lib.INTERVAL[0]) / 100
COLUMNS = (
  'predicted on', 'commit', 'fit', 'cell', 'N', 'D', 'G', 'E',
  f'predicted ({100 * _COVERED:.0f} %)', 'measured', 'seeds', 'measured - predicted', 'verdict',
)  # fmt: skip
_PAGE = f"""# Predictions, hits and misses

What `python -m moejax.scaling_laws judge` found when runs arrived whose losses a fit had predicted
before they were trained. Losses are of validation, in nats per token, means over seeds; a hit is a
mean inside of the predicted interval. The program appends rows and never changes them; commit and
fit (the start of its SHA-256) say how to make a prediction again.

| {' | '.join(COLUMNS)} |
| {' | '.join(['---'] * len(COLUMNS))} |
"""


def write(cells, coefficients, path, command):
  """Writes the predicted losses of cells, and returns the entries of the file.

  Args:
    cells: `grid.Cell`s with predicted losses.
    coefficients: the path of the fit.json that they are from.
    path: of the file, next to that of the grid.
    command: that makes the file.

  Raises:
    ValueError: the file exists. A prediction is made once.
  """
  path, content = files.path(path), files.read(files.path(coefficients))
  if files.exists(path):
    raise ValueError(
      f'{path} exists, and predictions are written once: choose another --output for new ones.'
    )
  with report.reading(coefficients):
    fits = files.parse_json(content)
    entries = [_predict(cell, fits, coefficients) for cell in cells if cell.predicted_loss]
  record = {
    'fit': str(coefficients),
    'fit_sha256': hashlib.sha256(content).hexdigest(),
    'command': command,
    'commit': run_report.git_commit(),
    'date': utc(time.time()),
    'predictions': entries,
  }
  files.write(path, json.dumps(record, indent=1) + '\n')
  return entries


def _predict(cell, fits, coefficients):
  rate = cell.expansion_rate
  one = fits.get(f'{rate:g}') or fits['0']
  low, high = _interval(cell, one)
  law = report.load(coefficients)[rate]
  params = laws.counted_params(law, cell.d_model, cell.blocks, rate)
  fitted = report.fitted_runs(coefficients, rate)
  return {
    'cell': dataclasses.asdict(cell),
    'loss': cell.predicted_loss,
    'low': low,
    'high': high,
    'beyond': report.beyond(params, cell.tokens, cell.granularity, fitted),
    'fitted': cell.name in one['used'],
  }


def _interval(cell, one):
  """The ends of the interval of the loss of a run.

  It covers the spread of the bootstrap samples and, in quadrature, the error of the fit.
  """
  kind = laws.Joint if 'delta' in one['coefficients'] else laws.Coefficients
  losses = []
  for sample in one.get('samples', ()):
    law = kind(*sample)
    law = law.at(cell.expansion_rate) if isinstance(law, laws.Joint) else law
    losses.append(laws.loss_of(law, cell))
  below, above = np.percentile(losses, fit_lib.INTERVAL) if losses else [cell.predicted_loss] * 2
  error = max(one['rmse'], one['held_out_rmse'] or 0) * stats.norm.ppf((1 + _COVERED) / 2)
  return (
    cell.predicted_loss - math.hypot(max(0, cell.predicted_loss - below), error),
    cell.predicted_loss + math.hypot(max(0, above - cell.predicted_loss), error),
  )


def describe(entries):
  """The predictions as text."""
  for one in entries:
    warning = '; extrapolates: ' + ', '.join(one['beyond']) if one['beyond'] else ''
    known = '; the fit was made with this run' if one['fitted'] else ''
    interval = f'{one["low"]:.4f} to {one["high"]:.4f}'
    yield f'{one["cell"]["name"]:24} predicted loss {one["loss"]:.4f}, {interval}{known}{warning}'


def judge(path, paths, page):
  """Compares predictions with the runs that have arrived, and appends to the page.

  Args:
    path: a file of `write`.
    paths: folders of runs, or of such folders.
    page: a Markdown file, made if missing.

  Returns:
    The rows of all cells with runs, of them those that are new on the page, and the names of the
    cells without a finished run.

  Raises:
    ValueError: a path is missing, or not what it should be.
  """
  record, page = _read(path), files.path(page)
  runs = _runs(paths)
  rows, missing = [], []
  for entry in record['predictions']:
    cell = entry['cell']
    wanted = runner.settings_of(cell)
    same = [run for run in runs if set(runner.differences(run.config, wanted)) <= {'train.seed'}]
    if same:
      rows.append(_row(record, entry, cell, same))
    else:
      missing.append(cell.name)
  text = files.read(page).decode() if files.exists(page) else _PAGE
  known = set(text.splitlines())
  new = [row for row in rows if row not in known]
  if new:
    files.write(page, text.rstrip('\n') + ''.join(f'\n{row}' for row in new) + '\n')
  return rows, new, missing


def _read(path):
  try:
    record = files.parse_json(files.read(files.path(path)))
    record |= {name: str(record[name] or 'unknown') for name in ('fit_sha256', 'commit', 'date')}
    entries = [dict(entry) for entry in record['predictions']]
    for entry in entries:
      _ = entry['cell'], entry['fitted']
      if not -math.inf < entry['low'] <= entry['loss'] <= entry['high'] < math.inf:
        raise ValueError(f'{entry["low"]} to {entry["high"]} does not cover {entry["loss"]}')
  except FileNotFoundError as error:
    raise ValueError(
      f'--predictions={path}: file not found; `grid --coefficients=FIT.json` writes it.'
    ) from error
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f'--predictions={path} is not a file of predictions: {error!r}.') from error
  cells = [grid.cell_of(entry['cell'], f'--predictions={path}') for entry in entries]
  named = [entry | {'cell': cell} for entry, cell in zip(entries, cells, strict=True)]
  return record | {'predictions': named}


@dataclasses.dataclass(frozen=True)
class _Finished:
  config: dict[str, Any]  # flat
  loss: float  # NaN if it diverged
  date: str

  @property
  def seed(self):
    return self.config['train.seed']


def _runs(paths):
  found = []
  for path in map(files.path, paths):
    if not files.exists(path) or files.is_file(path):
      raise ValueError(f'{path} is not a folder of runs.')
    inside = [path / name for name in sorted(files.children(path))]
    for folder in [path] if files.exists(path / 'config.json') else inside:
      summary = folder / 'summary.json'
      if not (files.exists(summary) and files.exists(folder / 'config.json')):
        continue
      fields = run_folder.read_json(summary)
      if run_report.is_finished(fields):
        validation = fields.get('validation')
        loss = validation.get('loss') if isinstance(validation, dict) else None
        config = runner.flat(run_folder.read(folder))
        ended = str(fields.get('date') or '') or utc(files.modified(summary))  # of older versions
        found.append(_Finished(config, _loss(loss), ended))
  return found


def _loss(value):
  return float(value) if metrics.is_number(value) else math.nan


def _row(record, entry, cell, runs):
  first = min(run.date for run in runs)
  runs = [run for _, run in sorted({run.seed: run for run in runs}.items())]
  measured = seeds.mean([run.loss for run in runs])
  miss = seeds.Estimate(*(value - entry['loss'] for value in measured))
  if entry['fitted']:
    verdict = 'none: the fit was made with this run'
  elif first <= record['date']:
    verdict = 'none: predicted after a run had ended'
  else:
    verdict = 'hit' if entry['low'] <= measured.value <= entry['high'] else '**miss**'
  values = (
    record['date'][:10],
    _short_commit(record['commit']),
    record['fit_sha256'][:10],
    cell.name,
    short(cell.params),
    short(cell.tokens),
    str(cell.granularity) if cell.granularity else 'dense',
    f'{cell.expansion_rate:g}',
    f'{entry["loss"]:.3f} ({entry["low"]:.3f} to {entry["high"]:.3f})',
    f'{measured:.3f}',
    ', '.join(str(run.seed) for run in runs),
    f'{miss:+.3f}',
    verdict,
  )
  return f'| {" | ".join(values)} |'


def _short_commit(commit):
  """With the mark of a tree that differs from it."""
  name, dash, mark = commit.partition('-')
  return name[:10] + dash + mark
