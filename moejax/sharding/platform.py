"""The platform that programs are compiled for, for layers that choose an implementation by it.

It is the default device's, unless a program is compiled ahead of time for another machine.
"""

import contextlib
import contextvars

import jax

_TARGET = contextvars.ContextVar('target', default=None)


def current():
  """'cpu', 'gpu' or 'tpu'."""
  return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform):
  """Ops traced inside are those for `platform`; trace functions that were not traced before."""
  token = _TARGET.set(platform)
  try:
    yield
  finally:
    _TARGET.reset(token)
