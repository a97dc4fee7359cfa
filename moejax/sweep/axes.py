"""The axes of a sweep, and the cells that they make."""

import dataclasses
import itertools
import re
import zlib
from typing import Any, NamedTuple

from moejax import cli, config as config_lib, flops, runner
from moejax.text import did_you_mean, split_values


class Axis(NamedTuple):
  """Fields that change together, and the texts of their values at every point."""

  fields: tuple[str, ...]
  points: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(runner.Cell):
  """One run of a sweep."""

  values: dict[str, Any]  # of the fields of all axes


def parse(grid: list[str], zipped: list[str]) -> list[Axis]:
  """The axes of the flags --grid, one each, and --zip, one together.

  Args:
    grid, zipped: texts 'FIELD=VALUE,VALUE,...', whose values are as `text.split_values` takes them.

  Raises:
    ValueError: a field is unknown or given twice, it has no values, or lengths differ.
  """
  axes, known = [], set()
  for flag, texts in (('grid', grid), ('zip', zipped)):
    fields, columns = [], []
    for text in texts:
      field, equals, values = text.partition('=')
      if not equals or not values:
        raise ValueError(f'--{flag} {text}: expected values, as in FIELD=VALUE,VALUE.')
      _check_field(flag, field)
      if field in known:
        raise ValueError(f'--{flag} {field}: it is an axis already; give all its values at once.')
      known.add(field)
      fields.append(field)
      columns.append(split_values(values))
    if flag == 'grid':
      axes += [Axis((field,), tuple(zip(c))) for field, c in zip(fields, columns, strict=True)]
    elif fields:
      if len({*map(len, columns)}) > 1:
        lengths = ', '.join(
          f'{field} has {len(c)}' for field, c in zip(fields, columns, strict=True)
        )
        raise ValueError(f'--zip: all fields need as many values: {lengths}.')
      axes.append(Axis(tuple(fields), tuple(zip(*columns, strict=True))))
  if not axes:
    raise ValueError('expected an axis, such as --grid optimizer.peak_lr=1e-3,3e-3,1e-2.')
  return axes


def _check_field(flag, field):
  known = config_lib.flat_fields()
  if field in known:
    return
  same = [name for name in known if name.endswith(f'.{field}')]
  hint = f'; did you mean {" or ".join(map(repr, same))}?' if same else did_you_mean(field, known)
  raise ValueError(f'--{flag} {field}: the config has no such field{hint}')


def make_cells(config: str, overrides: dict[str, str], axes: list[Axis]) -> list[Cell]:
  """The cells of all combinations of the points of the axes; the last axis changes fastest.

  Args:
    config: as --config takes it.
    overrides: of all cells: 'section.field' -> the text of its flag.
    axes: of `parse`.

  Raises:
    ValueError: one line for each thing that is wrong with the config or with a value.
  """
  both = [field for axis in axes for field in axis.fields if field in overrides]
  if both:
    raise ValueError(
      f'--config.{both[0]}: {both[0]} is an axis of the sweep; leave out one of both.'
    )
  base = cli.config_of([f'--config={config}', *_flags(overrides)])
  short = _short_names([field for axis in axes for field in axis.fields])
  cells, problems = [], {}
  for points in itertools.product(*(axis.points for axis in axes)):
    texts = {
      field: text
      for axis, point in zip(axes, points, strict=True)
      for field, text in zip(axis.fields, point, strict=True)
    }
    changed = base.copy_and_resolve_references()
    try:
      config_lib.set_fields(changed, texts)
      run_config = config_lib.resolve(changed)
    except ValueError as error:
      problems |= {line.removeprefix('--config.'): texts for line in str(error).splitlines()}
      continue
    values = {field: _value(changed, field) for field in texts}
    tokens = run_config.train.steps * run_config.data.tokens_per_step
    per_token = flops.training_flops_per_token(run_config.model, run_config.data.sequence_length)
    cells.append(
      Cell(
        name='_'.join(f'{short[field]}={_slug(value)}' for field, value in values.items()),
        config=config,
        fields=overrides | texts,
        steps=run_config.train.steps,
        params=flops.param_counts(run_config.model)['total'],
        flops=float(per_token['model'] * tokens),
        values=values,
      )
    )
  names = [cell.name for cell in cells]
  for name in {name for name in names if names.count(name) > 1}:
    problems['give every value once.'] = next(c.values for c in cells if c.name == name)
  if problems:
    raise ValueError('\n'.join(f'{_setting(texts)}: {line}' for line, texts in problems.items()))
  return cells


def _flags(texts):
  return [f'--config.{field}={text}' for field, text in texts.items()]


def _setting(texts):
  return ', '.join(f'{field}={text}' for field, text in texts.items())


def _value(config, field):
  for part in field.split('.'):
    config = config[part]
  return config


def _short_names(fields):
  """The last part of every field, or all of it where another field has the same."""
  last = [field.rpartition('.')[2] for field in fields]
  return {
    field: name if last.count(name) == 1 else field
    for field, name in zip(fields, last, strict=True)
  }


def _slug(value):
  """A value as a part of a folder's name; the same for all spellings of a number."""
  text = str(value)
  slug = re.sub(r'[^\w.+-]+', '-', text).strip('-')[:40]
  return slug if slug == text else f'{slug}-{zlib.crc32(text.encode()):08x}'
