"""Watching the file operations of this process, those of libraries in Python included."""

import contextlib
import sys

_hooks = []


@contextlib.contextmanager
def hook(function):
  """A context in which `function(event, arguments)` is called before audited operations."""
  if not _hooks:
    sys.addaudithook(_audit)  # it cannot be removed
    _hooks.append(None)
  _hooks.append(function)
  try:
    yield
  finally:
    _hooks.remove(function)


def _audit(event, args):
  for function in filter(None, list(_hooks)):
    function(event, args)
