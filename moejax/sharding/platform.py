"""The platform that programs are compiled for, by which layers choose an implementation.

It is that of the default device, except in ahead-of-time compilation for another machine.
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
  """Ops traced inside are for `platform`; functions traced before keep theirs."""
  token = _TARGET.set(platform)
  try:
    yield
  finally:
    _TARGET.reset(token)
