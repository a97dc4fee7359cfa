"""Checks shape suffixes while code runs: is x_BLD really [B, L, D], with one B per function?

  with shapes.checked():
    jax.eval_shape(function, *args)  # tracing is enough; nothing is computed

A name such as `x_BLD` promises three axes, and that every other B, L and D among the locals of the
same call is as long. A digit promises its own value: `qkv_D3HP`. A local integer `B` counts too.
"""

import contextlib
import pathlib
import re
import sys

import moejax

_PACKAGE = pathlib.Path(moejax.__file__).parent
_NAME = re.compile(r'_?[a-z][a-z0-9_]*_(?=[A-Z0-9]*[A-Z])([A-Z0-9]+)')


def suffix(name):
  """The axes that a variable's name promises, '' if it promises nothing."""
  match = _NAME.fullmatch(name)
  return match[1] if match else ''


@contextlib.contextmanager
def checked(directory=_PACKAGE):
  """Raises AssertionError on leaving, if a function in `directory` ended with a false name."""
  found = set()
  outer = sys.getprofile()

  def on_event(frame, event, result):
    if outer:
      outer(frame, event, result)
    code = frame.f_code
    if event == 'return' and code.co_filename.startswith(f'{directory}/'):
      where = f'{pathlib.Path(code.co_filename).relative_to(directory)}, {code.co_name}'
      found.update(f'{where}: {text}' for text in contradictions(frame.f_locals))

  sys.setprofile(on_event)
  try:
    yield
  finally:
    sys.setprofile(outer)
  assert not found, '\n'.join(sorted(found))


def contradictions(variables):
  """Yields a sentence for every array whose shape its own name, or another name, contradicts."""
  length = {name: (value, name) for name, value in variables.items() if _is_size(name, value)}
  for name, value in variables.items():
    axes, shape = suffix(name), getattr(value, 'shape', None)
    if not axes or shape is None:
      continue
    if len(axes) != len(shape):
      yield f'{name} has shape {tuple(shape)}'
      continue
    for axis, n in zip(axes, shape, strict=True):
      expected, source = (
        (int(axis), 'its name') if axis.isdigit() else length.setdefault(axis, (n, name))
      )
      if n != expected:
        yield f'{name} has shape {tuple(shape)}, but {axis} is {expected} in {source}'


def _is_size(name, value):
  return re.fullmatch('[A-Z]', name) and isinstance(value, int)
