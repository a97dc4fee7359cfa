"""A section of a config is a frozen dataclass whose fields say all there is to know about them.

  @dataclasses.dataclass(frozen=True)
  class MoEConfig(fields.Section):
    PATH = 'model.moe'
    granularity: int = fields.default(1, 'experts are d_ff / granularity wide', minimum=1)

The baseline, the checks of single values, `--help` and docs/configuration.md are made from this, so
that a new field is one line (docs/configuration.md). What several fields must fulfil together is a
method beside them.
"""

import dataclasses
import math
from typing import Any

from moejax import text

MAX_SEED = 2**32 - 1  # JAX's keys take 32 bits; more would silently be cut off
_KINDS = {
  int: 'an integer',
  float: 'a finite number',
  bool: 'True or False',
  str: 'a text',
  tuple: 'a tuple',
}


def default(
  value, meaning, *, choices=None, minimum=None, maximum=None, above=None, below=None
) -> Any:
  """A field of a Section: its default, one line of meaning, and the values it takes.

  Args:
    choices: the values allowed, or a function that returns them, where they are not known yet.
    minimum, maximum, above, below: bounds of a number; the last two are excluded themselves.
  """
  bounds = {'at least': minimum, 'above': above, 'at most': maximum, 'below': below}
  bounds = {words: bound for words, bound in bounds.items() if bound is not None}
  metadata = {
    'meaning': meaning,
    'choices': choices if callable(choices) else lambda: choices or (),
    'bounds': bounds,
  }
  return dataclasses.field(default=value, metadata=metadata)


def section(kind, meaning) -> Any:
  """A field of a Section that is a Section itself; a mapping of its fields becomes one."""
  return dataclasses.field(default_factory=kind, metadata={'meaning': meaning})


class Section:
  """Base of the dataclasses; raises ValueError, with one line for every field that is wrong."""

  PATH = ''  # in a config: 'model.moe'

  def __post_init__(self):
    problems = []
    for f in of(type(self)):
      try:
        value = checked(f'{self.PATH}.{f.name}', f, getattr(self, f.name))
        object.__setattr__(self, f.name, value)
      except ValueError as error:
        problems.append(str(error))
    problems = problems or list(self.conflicts())
    if problems:
      raise ValueError('\n'.join(problems))

  def conflicts(self):
    """Yields one sentence per combination of values that cannot work."""
    return ()


def make(kind, values):
  """A Section of a mapping of its fields; ValueError if it has one that there is not."""
  known = [f.name for f in dataclasses.fields(kind)]
  unknown = [
    f'{kind.PATH}.{name}: there is no such field{text.did_you_mean(name, known)}'
    for name in values
    if name not in known
  ]
  if unknown:
    raise ValueError('\n'.join(unknown))
  return kind(**values)


def of(kind):
  """The fields of a Section that a config has; others are what its owner derives from them."""
  return [f for f in dataclasses.fields(kind) if 'meaning' in f.metadata]


def is_section(f):
  """Whether a field is a section itself."""
  return 'choices' not in f.metadata


def baseline(kind):
  """The fields of a Section and their defaults, nested."""
  return {f.name: baseline(f.type) if is_section(f) else f.default for f in of(kind)}


def flat(kind):
  """All fields of a Section and of those inside of it: 'model.moe.granularity' -> field."""
  found = {}
  for f in of(kind):
    found |= flat(f.type) if is_section(f) else {f'{kind.PATH}.{f.name}': f}
  return found


def allowed(f):
  """Which values a field takes, such as 'at least 1', or '' for all of its type."""
  choices = f.metadata['choices']()
  if choices:
    return 'one of ' + ', '.join(choice or "''" for choice in choices)
  bounds = f.metadata['bounds'].items()
  return ' and '.join(f'{words} {bound}' for words, bound in bounds).replace('above 0', 'positive')


def checked(name, f, value: Any):
  """A value as the field's type has it; ValueError, which calls the field `name`, if it is none."""
  if is_section(f):
    return value if isinstance(value, f.type) else make(f.type, value)
  if f.type is float and type(value) is int:
    value = float(value)
  if f.type is tuple:
    value = tuples(value)
  if type(value) is not f.type or (f.type is float and not math.isfinite(value)):
    raise ValueError(f'{name} must be {_KINDS[f.type]}, got {value!r}.')
  choices = f.metadata['choices']()
  if choices and value not in choices:
    hint = text.did_you_mean(value, choices)
    raise ValueError(f'{name} must be {allowed(f)}; got {value!r}{hint}')
  if not _within(value, f.metadata['bounds']):
    raise ValueError(f'{name} must be {allowed(f)}, got {value}.')
  return value


def _within(value, bounds):
  holds = {
    'at least': lambda bound: value >= bound,
    'above': lambda bound: value > bound,
    'at most': lambda bound: value <= bound,
    'below': lambda bound: value < bound,
  }
  return all(holds[words](bound) for words, bound in bounds.items())


def tuples(value) -> Any:
  """Lists, as JSON has them, as tuples, however nested."""
  return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value
