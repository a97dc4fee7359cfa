"""Fitted laws as files and as text."""

import dataclasses
import json
import math
import pathlib

from moejax import files
from moejax.scaling_laws import collect, grid, laws


def save(fits, path):
  """Writes a dict of expansion rate to `Fit` as JSON; 1 is the dense law."""
  text = json.dumps({f'{rate:g}': _as_dict(one) for rate, one in fits.items()}, indent=2)
  files.write(path, text + '\n')


def _as_dict(one):
  return dataclasses.asdict(one) | {'coefficients': one.coefficients._asdict()}


def load(name):
  """Coefficients by expansion rate: published ones by name, or from a file of `save`.

  Raises:
    ValueError: it is neither.
  """
  if name in laws.PUBLISHED:
    return laws.PUBLISHED[name]
  try:
    fits = json.loads(pathlib.Path(name).read_text('utf-8'))
    return {float(rate): _coefficients(one['coefficients']) for rate, one in fits.items()}
  except OSError as error:
    raise ValueError(
      f'--coefficients={name}: expected {" or ".join(laws.PUBLISHED)}, or a fit.json.'
    ) from error
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f'--coefficients={name} is not a valid fit.json: {error!r}.') from error


def _coefficients(fields):
  for name, value in fields.items():
    if value is not None and not math.isfinite(value):
      raise ValueError(f'{name} = {value}')
  return laws.Coefficients(**fields)


def fitted_runs(name, expansion_rate):
  """(params, tokens) of the runs behind the coefficients of `load(name)`; empty if not known."""
  if name in laws.PUBLISHED:
    runs = grid.make('paper')
  else:
    table = pathlib.Path(name).with_name('runs.csv')
    runs = collect.collect([table], expansion_rate)[0] if table.is_file() else []
  return [(run.params, run.tokens) for run in runs if run.expansion_rate == expansion_rate]


def choose_rate(coefficients, expansion_rate=None):
  """The expansion rate, checked to have coefficients; for None, the largest that has.

  Raises:
    ValueError: it has no coefficients.
  """
  if expansion_rate is None:
    return max(coefficients)
  if expansion_rate not in coefficients:
    known = ', '.join(f'{rate:g}' for rate in sorted(coefficients))
    raise ValueError(
      f'--expansion_rate={expansion_rate:g}: these coefficients are for {known} (1 is dense). '
      'A law holds for one expansion rate; run `fit` for others.'
    )
  return expansion_rate


def describe(fits, excluded):
  """The fits as text.

  Args:
    fits: dict of expansion rate to `fit.Fit`.
    excluded: runs that were not fitted: name -> reason.
  """
  lines = []
  for rate, one in fits.items():
    kind = 'dense models' if rate == 1 else f'expansion rate {rate:g}'
    lines.append(f'{one.form} law of {kind}, from {len(one.used)} runs')
    for name, value in one.coefficients._asdict().items():
      if value is not None:
        interval = ' to '.join(map(_digits, one.intervals.get(name, ())))
        lines.append(f'  {name:6} {_digits(value)} {interval}'.rstrip())
    lines.append(f'  RMSE {one.rmse:.5f} nats' + _held_out(one))
    lines += [f'  warning: {warning}' for warning in one.warnings]
    lines += [f'  not used: {name}: {reason}' for name, reason in one.excluded.items()]
  lines += [f'not used: {name}: {reason}' for name, reason in excluded.items()]
  return '\n'.join(lines)


def _digits(value):
  return f'{value:10.4g}'


def _held_out(one):
  if one.held_out_rmse is None:
    return ''
  return f'; {one.held_out_rmse:.5f} on the runs of lowest loss, by a fit without them'
