"""JAX's persistent compilation cache, on in every program: a model's second run starts sooner.

Compiled programs are kept in `moejax/xla` of the user's cache folder (`XDG_CACHE_HOME`, or
`~/.cache`). JAX's own environment variables win: `JAX_COMPILATION_CACHE_DIR` names another folder,
or none if it is empty.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import re
import sys
import warnings
from typing import Any

from moejax import files

_MAX_BYTES = 2 * 2**30  # above this, the oldest programs are deleted until half is left
_SETTINGS = {'jax_persistent_cache_min_compile_time_secs': 0.1}  # JAX's default is a second


def enable() -> None:
  """Turns the cache on in this process; call it before JAX compiles anything."""
  # A damaged entry, or a full disk: JAX warns and compiles.
  warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache')
  if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  folder = files.cache_folder(f'xla/{_kind_of_cpu()}')
  if not folder:
    return
  _prune(folder)
  jax: Any = sys.modules.get('jax')  # importing it takes a second; not every program needs it
  for name, value in (_SETTINGS | {'jax_compilation_cache_dir': str(folder)}).items():
    if jax is None:
      os.environ.setdefault(name.upper(), str(value))
    elif name.upper() not in os.environ:
      jax.config.update(name, value)


def _kind_of_cpu():
  """8 digits: programs for one kind may not run on another machine that has the same home."""
  kind = platform.machine() + platform.processor()
  with contextlib.suppress(OSError):
    features = re.search('^(flags|Features).*', pathlib.Path('/proc/cpuinfo').read_text(), re.M)
    kind += features[0] if features else ''
  return hashlib.sha256(kind.encode()).hexdigest()[:8]


def _prune(folder):
  """Deletes the programs that were not used for longest, if there are too many."""
  found = []
  for path in filter(pathlib.Path.is_file, folder.rglob('*')):  # XLA makes folders of its own
    with contextlib.suppress(OSError):  # deleted by another process
      stat = path.stat()
      found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
  total = sum(size for _, size, _ in found)
  if total <= _MAX_BYTES:
    return
  for _, size, path in sorted(found):
    if total <= _MAX_BYTES // 2:
      return
    with contextlib.suppress(OSError):
      path.unlink()
      total -= size
