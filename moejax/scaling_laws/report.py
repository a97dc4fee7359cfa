"""Fitted laws as files and as text."""

import contextlib
import dataclasses
import json
import math
import re

from moejax import files
from moejax.scaling_laws import collect, grid, laws

_MOST = 1e15  # of a coefficient or a number of experts; more is a mistake


def save(fits, path):
  """Writes a dict of expansion rate to `Fit` as JSON; 1 is the dense law, 0 the joint law."""
  text = json.dumps({f'{rate:g}': _as_dict(one) for rate, one in fits.items()}, indent=2)
  text = re.sub(r'\[[^][{}]*\]', _on_a_line, text)
  files.write(path, text + '\n')


def _on_a_line(match):
  """A list of plain values."""
  return '[' + ' '.join(match[0].strip('[]').split()) + ']'


def _as_dict(one):
  return dataclasses.asdict(one) | {'coefficients': one.coefficients._asdict()}


def load(name):
  """Coefficients by expansion rate: published ones by name, or from a file of `save`.

  A joint law has some for every number of experts of its runs, and the powers of two up to it.

  Raises:
    ValueError: it is neither.
  """
  if name in laws.PUBLISHED:
    return laws.PUBLISHED[name]
  found = {}
  with reading(name):
    for rate, one in files.parse_json(files.read(files.path(name))).items():
      coefficients = _coefficients(one['coefficients'])
      if isinstance(coefficients, laws.Joint):
        found |= {rate: coefficients.at(rate) for rate in _numbers_of_experts(one)}
      elif 1 <= float(rate) < _MOST:
        found[float(rate)] = coefficients
      else:
        raise ValueError(f'expansion rate {rate}')
    if not found:
      raise ValueError('it holds no law')
  return found


@contextlib.contextmanager
def reading(name):
  """A context in which the file `name` of `save` is read: one error for whatever is wrong in it."""
  try:
    yield
  except OSError as error:
    raise ValueError(
      f'--coefficients={name}: expected {" or ".join(laws.PUBLISHED)}, or a fit.json.'
    ) from error
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
    raise ValueError(f'--coefficients={name} is not a valid fit.json: {error!r}.') from error


def _coefficients(fields):
  kind = laws.Joint if 'delta' in fields else laws.Coefficients
  for name, value in fields.items():
    if value is None and name in kind._field_defaults:
      continue
    if not isinstance(value, int | float) or not -_MOST < value < _MOST:
      raise ValueError(f'{name} = {value}')
  if kind is laws.Coefficients and (fields.get('g') is None) != (fields.get('gamma') is None):
    raise ValueError('g without gamma, or gamma without g')
  return kind(**fields)


def _numbers_of_experts(one):
  fitted = one['expansion_rates']
  if not all(type(rate) in (int, float) and 1 <= rate < _MOST for rate in fitted):
    raise ValueError(f'expansion_rates = {fitted}')
  return sorted({*fitted, *(2**i for i in range(int(math.log2(max(fitted))) + 1))})


def fitted_runs(name, expansion_rate):
  """(N, D, G) of the runs behind the coefficients of `load(name)`; empty if not known."""
  law = load(name)[expansion_rate]
  if name == 'joint':  # the smallest and the largest of Appendix E
    return [(79e6, 0.5e9, 1), (2.7e9, 80e9, 1)]
  if name in laws.PUBLISHED:
    runs = grid.make('paper')
  else:
    table = files.path(name).with_name('runs.csv')
    runs = collect.collect([table], expansion_rate)[0] if files.is_file(table) else []
  if law.vocabulary is not None:
    return [(run.active_params, run.tokens, 1) for run in runs]
  same = [run for run in runs if run.expansion_rate == expansion_rate]
  return [(run.params, run.tokens, run.granularity) for run in same]


def beyond(params, tokens, granularity, fitted):
  """How far a model is outside of the fitted runs, as texts; `fitted` as from `fitted_runs`."""
  texts = []
  sizes = {'parameters': params, 'tokens': tokens, 'granularity': granularity}
  for index, (what, value) in enumerate(sizes.items()):
    known = [run[index] for run in fitted if run[index]]
    if not (known and value):
      continue
    if value > max(known):
      texts.append(f'{value / max(known):.3g} times the {what} of the largest fitted run')
    elif value < min(known):
      texts.append(f'{min(known) / value:.3g} times fewer {what} than the smallest fitted run')
  return texts


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
    kind = {0: 'dense models and experts', 1: 'dense models'}.get(rate, f'expansion rate {rate:g}')
    lines.append(f'{one.form} law of {kind}, from {len(one.used)} runs')
    for name, value in one.coefficients._asdict().items():
      if value is not None:
        interval = ' to '.join(map(_digits, one.intervals.get(name, ())))
        lines.append(f'  {name:6} {_digits(value)} {interval}'.rstrip())
    lines.append(f'  RMSE {one.rmse:.5f} nats' + _held_out(one))
    lines += [f'  warning: {warning}' for warning in one.warnings]
    lines += [f'  not used: {name}: {reason}' for name, reason in one.excluded.items()]
  by_reason = {}
  for name, reason in excluded.items():
    by_reason.setdefault(reason, []).append(name)
  for reason, names in by_reason.items():
    more = f' and {len(names) - 3} more' if len(names) > 3 else ''
    lines.append(f'not used: {", ".join(names[:3])}{more}: {reason}')
  return '\n'.join(lines)


def _digits(value):
  return f'{value:10.4g}'


def _held_out(one):
  if one.held_out_rmse is None:
    return ''
  return f'; {one.held_out_rmse:.5f} on the runs of lowest loss, by a fit without them'
