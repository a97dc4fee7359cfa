"""Memory that is freed and allocated again."""

import ctypes
import os
import subprocess
import sys

import pytest

from moejax import allocator

# Allocates, fills and frees 64 MiB again and again, in a thread, as XLA does in every step.
PROGRAM = """
import ctypes, resource, threading
from moejax import cli

def work():
  libc = ctypes.CDLL(None)
  libc.malloc.restype = ctypes.c_void_p
  for _ in range(9):
    pointer = libc.malloc(ctypes.c_size_t(2**26))
    ctypes.memset(pointer, 1, 2**26)
    libc.free(ctypes.c_void_p(pointer))

def main():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

cli.run(main, needs_config=False)
"""


def _page_faults(**settings):
  environment = {name: v for name, v in os.environ.items() if not name.startswith('MALLOC_')}
  environment |= {'JAX_PLATFORMS': 'cpu'} | settings
  run = [sys.executable, '-c', PROGRAM]
  return int(subprocess.run(run, env=environment, capture_output=True, check=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'mallopt'), reason='needs glibc')
def test_programs_get_the_pages_that_they_freed():
  once = 2**26 // os.sysconf('SC_PAGE_SIZE')
  assert _page_faults() < 1.5 * once
  assert _page_faults(MALLOC_ARENA_MAX='2') > 5 * once  # the user's setting is left alone


@pytest.fixture
def settings(monkeypatch):
  """What is set, of a user without settings of their own and a machine with a CPU alone."""
  made = {}

  class Library:
    accepts = True

    def mallopt(self, parameter, value):
      made[parameter] = value
      return self.accepts

  monkeypatch.setattr(ctypes, 'CDLL', lambda name: Library())
  monkeypatch.setattr(allocator, '_accelerators', lambda: [])
  for name in [name for name in os.environ if name.startswith(('MALLOC_', 'GLIBC_', 'JAX_PLAT'))]:
    monkeypatch.delenv(name)
  return made, Library


def test_it_is_set_where_jax_computes_on_the_cpu(settings, monkeypatch):
  made, _ = settings
  allocator.keep_pages()
  assert made == allocator._SETTINGS
  made.clear()
  monkeypatch.setattr(allocator, '_accelerators', lambda: ['/dev/accel0'])
  allocator.keep_pages()
  assert not made
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  allocator.keep_pages()
  assert made == allocator._SETTINGS


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('MALLOC_ARENA_MAX', '4'),
    ('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1'),
    ('JAX_PLATFORMS', 'cuda,cpu'),
  ],
)
def test_settings_of_the_user_win(settings, monkeypatch, name, value):
  monkeypatch.setenv(name, value)
  allocator.keep_pages()
  assert not settings[0]


def test_a_glibc_that_keeps_no_large_arrays_stays_as_it_is(settings):
  made, library = settings
  library.accepts = False
  allocator.keep_pages()
  assert len(made) == 1  # the others alone would make it slower


def test_without_mallopt_nothing_happens(settings, monkeypatch):
  monkeypatch.setattr(ctypes, 'CDLL', lambda name: object())
  allocator.keep_pages()
