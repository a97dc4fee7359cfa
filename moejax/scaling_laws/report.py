"""Fitted laws on disk and on the screen."""

import dataclasses
import json
import math
import pathlib

from moejax import files
from moejax.scaling_laws import laws


def save(fits, path):
  """Writes a dict of expansion rate to `Fit` as JSON; 1 is the dense law."""
  text = json.dumps({f'{rate:g}': _as_dict(one) for rate, one in fits.items()}, indent=2)
  files.write(path, text + '\n')


def _as_dict(one):
  return dataclasses.asdict(one) | {'coefficients': one.coefficients._asdict()}


def load(name):
  """Coefficients by expansion rate: published ones by name, or those of a file of `save`.

  Raises:
    ValueError: there is neither.
  """
  if name in laws.PUBLISHED:
    return laws.PUBLISHED[name]
  try:
    fits = json.loads(pathlib.Path(name).read_text('utf-8'))
    return {float(rate): _coefficients(one['coefficients']) for rate, one in fits.items()}
  except OSError as error:
    raise ValueError(
      f'--coefficients={name}: expected {" or ".join(laws.PUBLISHED)}, or a file that `fit` wrote.'
    ) from error
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f'--coefficients={name} is not a file that `fit` wrote: {error!r}.') from error


def _coefficients(fields):
  for name, value in fields.items():
    if value is not None and not math.isfinite(value):
      raise ValueError(f'{name} = {value}')
  return laws.Coefficients(**fields)


def choose_rate(coefficients, expansion_rate=None):
  """The expansion rate if there are coefficients for it; of None, the largest that there is.

  Raises:
    ValueError: there are none.
  """
  if expansion_rate is None:
    return max(coefficients)
  if expansion_rate not in coefficients:
    known = ', '.join(f'{rate:g}' for rate in sorted(coefficients))
    raise ValueError(
      f'--expansion_rate={expansion_rate:g}: these coefficients are for {known} (1 is dense). '
      'A law holds for one expansion rate; `fit` finds that of other runs.'
    )
  return expansion_rate


def describe(fits, excluded):
  """What a fit found, for people.

  Args:
    fits: dict of expansion rate to `fit.Fit`.
    excluded: runs that were not fitted at all, and why.
  """
  lines = []
  for rate, one in fits.items():
    kind = 'dense models' if rate == 1 else f'expansion rate {rate:g}'
    lines.append(f'{one.form} law of {kind}, from {len(one.used)} runs')
    for name, value in one.coefficients._asdict().items():
      if value is not None:
        spread = ' to '.join(map(_digits, one.intervals.get(name, ())))
        lines.append(f'  {name:6} {_digits(value)} {spread}'.rstrip())
    lines.append(f'  RMSE {one.rmse:.5f} nats' + _held_out(one))
    lines += [f'  warning: {warning}' for warning in one.warnings]
    lines += [f'  not used: {name}: {why}' for name, why in one.excluded.items()]
  lines += [f'not used: {name}: {why}' for name, why in excluded.items()]
  return '\n'.join(lines)


def _digits(value):
  return f'{value:10.4g}'


def _held_out(one):
  if one.held_out_rmse is None:
    return ''
  return f'; {one.held_out_rmse:.5f} on the runs of lowest loss, by a fit without them'
