"""Sections of a config: frozen dataclasses whose fields carry default, meaning and allowed values.

  @dataclasses.dataclass(frozen=True)
  class MoEConfig(fields.Section):
    PATH = 'model.moe'
    granularity: int = fields.default(1, 'experts are d_ff / granularity wide', minimum=1)

The baseline, validation, `--help` and docs/configuration.md are generated from this, so a new field
is one line. Constraints between fields go into the method `conflicts`.
"""

import ast
import dataclasses
import inspect
import math
import operator
import re
from typing import Any

import yaml

from moejax import text

# Of a number without a maximum: sizes, steps and arrays have 32 bits.
_MOST = {int: 2**31 - 1, float: 1e38}
MAX_SEED = 2**32 - 1  # JAX keys take 32 bits and silently truncate the rest
OF_OWN = 'If it is of your own, --imports=FILE imports it.'  # of a table that code may add to
_KINDS = {
  int: 'an integer',
  float: 'a finite number',
  bool: 'True or False',
  str: 'a string',
  tuple: 'a tuple',
}
_HOLDS = {
  'at least': operator.ge,
  'above': operator.gt,
  'at most': operator.le,
  'below': operator.lt,
}


def default(
  value, meaning, *, choices=None, minimum=None, maximum=None, above=None, below=None
) -> Any:
  """A field of a Section: its default, one line of meaning, and its allowed values.

  Args:
    choices: the allowed values, of a tuple those of its elements; or a function that returns them,
      if they are defined later.
    minimum, maximum, above, below: bounds of a number; the last two are exclusive.
  """
  bounds = {'at least': minimum, 'above': above, 'at most': maximum, 'below': below}
  bounds = {relation: bound for relation, bound in bounds.items() if bound is not None}
  metadata = {
    'meaning': meaning,
    'choices': choices if callable(choices) else lambda: choices or (),
    'bounds': bounds,
  }
  return dataclasses.field(default=value, metadata=metadata)


def section(kind, meaning) -> Any:
  """A field that holds a nested Section; a mapping of its fields is converted to one."""
  return dataclasses.field(default_factory=kind, metadata={'meaning': meaning})


class Section:
  """Base class of the sections; raises ValueError with one line per invalid field."""

  PATH = ''  # in a config: 'model.moe'

  def __post_init__(self):
    problems = []
    for f in of(type(self)):
      try:
        value = checked(_path(self.PATH, f.name), f, getattr(self, f.name))
        object.__setattr__(self, f.name, value)
      except ValueError as error:
        problems.append(str(error))
    problems = problems or list(self.conflicts())
    if problems:
      raise ValueError('\n'.join(problems))

  def conflicts(self):
    """Yields one message per invalid combination of values."""
    return ()


def make(kind, values):
  """Makes a Section from a mapping of its fields; raises ValueError for unknown ones."""
  known = [f.name for f in dataclasses.fields(kind)]
  unknown = [
    f'{_path(kind.PATH, name)}: no such field{text.did_you_mean(name, known)}'
    for name in values
    if name not in known
  ]
  if unknown:
    raise ValueError('\n'.join(unknown))
  return kind(**values)


def _path(section, name):
  """The full name of a field; that of a Section that is not part of a config stands alone."""
  return f'{section}.{name}' if section else name


def of_layer(layer, kind, config, changes):
  """The Section `kind` of a layer from the arguments of its constructor.

  Args:
    layer: the class.
    config: a Section, or None for its defaults.
    changes: keyword arguments that are fields of it.

  Raises:
    ValueError: `config` is no such Section, a keyword is unknown, or a value is invalid.
  """
  if not isinstance(config, kind | None):
    raise ValueError(
      f'{layer.__name__}: config must be a {kind.__name__} or left out, got {config!r}; all other '
      'arguments are keywords, as in d_model=64.'
    )
  fields = [f.name for f in dataclasses.fields(kind)]
  for name in changes:
    if name not in fields:
      sizes = [
        key
        for key, parameter in inspect.signature(layer.__init__).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
      ]
      hint = text.did_you_mean(name, [*sizes, *fields])
      raise ValueError(
        f'{layer.__name__}: no argument {name!r}{hint} It takes {", ".join(sizes)}, and of '
        f'{kind.__name__} {", ".join(fields)}.'
      )
  return dataclasses.replace(config or kind(), **changes)


def check(problems):
  """Raises ValueError with one line per problem if there are any."""
  if lines := '\n'.join(problems):
    raise ValueError(lines)


def of(kind):
  """The fields of a Section that appear in a config; its owner derives the others."""
  return [f for f in dataclasses.fields(kind) if 'meaning' in f.metadata]


def is_section(f):
  """Whether a field holds a nested section."""
  return 'choices' not in f.metadata


def baseline(kind):
  """The default values of a Section, as nested dicts."""
  return {f.name: baseline(f.type) if is_section(f) else f.default for f in of(kind)}


def flat(kind):
  """All fields of a Section and its nested sections: 'model.moe.granularity' -> field."""
  found = {}
  for f in of(kind):
    found |= flat(f.type) if is_section(f) else {f'{kind.PATH}.{f.name}': f}
  return found


def allowed(f):
  """The allowed values of a field, such as 'at least 1'; '' if its type is the only limit."""
  choices = f.metadata['choices']()
  if choices:
    one = 'names of' if f.type is tuple else 'one of'
    return f'{one} ' + ', '.join(choice or "''" for choice in choices)
  bounds = f.metadata['bounds'].items()
  return ' and '.join(f'{name} {bound}' for name, bound in bounds).replace('above 0', 'positive')


def as_yaml(kind, values, indent=''):
  """Yields lines of YAML: the fields of a Section and their values, with comments.

  A comment tells the default, if the value is another, and the meaning. Tuples are lists.
  """
  for f in of(kind):
    value = values[f.name]
    if is_section(f):
      yield f'{indent}{f.name}:  # {f.metadata["meaning"]}'
      yield from as_yaml(f.type, value, f'{indent}  ')
    else:
      default = '' if value == f.default else f'[default: {_one_line(f.default)}] '
      limits = allowed(f)
      meaning = f.metadata['meaning'] + (f' ({limits})' if limits else '')
      yield f'{f"{indent}{f.name}: {_one_line(value)}":31}  # {default}{meaning}'


def _one_line(value):
  text = yaml.safe_dump(lists(value), default_flow_style=True, width=math.inf)
  return text.removesuffix('...\n').rstrip()


def lists(value) -> Any:
  """Converts nested tuples to lists."""
  return list(map(lists, value)) if isinstance(value, tuple) else value


def checked(name, f, value: Any):
  """A value converted to the field's type; raises ValueError, naming it `name`, if invalid."""
  if is_section(f):
    return value if isinstance(value, f.type) else make(f.type, value)
  if (f.type, type(value)) == (float, int) and abs(value) < 10**300:
    value = float(value)
  if f.type is tuple:
    value = tuples(value)
  if type(value) is not f.type or (f.type is float and not math.isfinite(value)):
    raise ValueError(f'{name} must be {_KINDS[f.type]}, got {value!r}.')
  choices = f.metadata['choices']()
  for chosen in value if f.type is tuple else (value,):
    if choices and chosen not in [*choices]:
      hint = text.did_you_mean(str(chosen), choices)
      own = f' {OF_OWN}' if isinstance(choices, dict) else ''
      raise ValueError(f'{name} must be {allowed(f)}; got {chosen!r}{hint}{own}')
  if not all(_HOLDS[relation](value, bound) for relation, bound in f.metadata['bounds'].items()):
    raise ValueError(f'{name} must be {allowed(f)}, got {shown(value)}.')
  if 'at most' not in f.metadata['bounds'] and f.type in _MOST and value > _MOST[f.type]:
    raise ValueError(f'{name} must be at most {_MOST[f.type]}, got {shown(value)}.')
  return value


def shown(number):
  """A number for a message; Python writes none of thousands of digits."""
  return str(number) if abs(number) < 10**300 else 'one of more than 300 digits'


def read(name, f, written):
  """The value that a text stands for, as the command line has it: '4', 'true', "(('mlp',), 2)".

  Raises:
    ValueError: it is invalid; the error names it `name`.
  """
  try:
    value = _READERS[f.type](written)
  except (KeyError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
    value = written  # for the error message
  return checked(name, f, value)


def _read_tuple(text):
  """A tuple as Python writes it, or names separated by commas."""
  if re.fullmatch(r'([a-z_]\w*(,[a-z_]\w*)*)?', text):
    return tuple(filter(None, text.split(',')))
  return ast.literal_eval(text)


_BOOLEANS = {'true': True, '1': True, 'false': False, '0': False}
_READERS = {
  str: str,
  int: int,
  float: float,
  bool: lambda text: _BOOLEANS[text.lower()],
  tuple: _read_tuple,
}


def tuples(value) -> Any:
  """Converts nested lists, as JSON has them, to tuples."""
  return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value
