"""Memory on a CPU: what a training step frees is kept for the next one.

glibc gives large arrays back to the system, which fills every page with zeros when they are
allocated again: a third of the CPU time of a small model's step.
"""

import contextlib
import ctypes
import importlib.util
import os
import pathlib

# Parameters of mallopt, as glibc's malloc.h numbers them, and their values.
_SETTINGS = {
  # M_MMAP_THRESHOLD: larger arrays go back at once. In the heap, a small object can take part of
  # the place of a large array, which then gets a new one. Old versions of glibc refuse this.
  -3: 2**29,
  -1: 2**31 - 1,  # M_TRIM_THRESHOLD: bytes that it keeps when they are free; an int holds no more
  -8: 1,  # M_ARENA_MAX: one heap for all threads; in others, arrays above 64 MiB have no room
}


def keep_pages() -> None:
  """Lets glibc keep freed memory; call it before threads start.

  Nothing changes where JAX may have an accelerator, under another C library, or if the environment
  has settings of the allocator.
  """
  tunables = os.environ.get('GLIBC_TUNABLES', '')
  if 'glibc.malloc.' in tunables or any(name.startswith('MALLOC_') for name in os.environ):
    return
  platforms = os.environ.get('JAX_PLATFORMS')
  if platforms != 'cpu' and (platforms or _accelerators()):
    return
  # macOS and musl have no mallopt, Windows no library without a name.
  with contextlib.suppress(AttributeError, OSError, TypeError):
    mallopt = ctypes.CDLL(None).mallopt
    all(mallopt(*setting) for setting in _SETTINGS.items())  # the first failure ends it


def _accelerators():
  """What JAX may find if it looks for more than the CPU: plugins for GPUs, the files of TPUs.

  libtpu says little, because compiling ahead of time needs it, too.
  """
  dev = pathlib.Path('/dev')
  plugin = importlib.util.find_spec('jax_plugins')
  return [*filter(None, [plugin]), *dev.glob('accel[0-9]*'), *dev.glob('vfio/[0-9]*')]
