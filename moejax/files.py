"""Atomic, durable writing of files and folders; the cache folder; JSON of other people."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from moejax import lease

_NO_FLUSH = {
  errno.EINVAL,
  errno.ENOSYS,
  errno.ENOTSUP,
  errno.EBADF,
}  # some shared disks, of folders

_DEEPEST = 100  # levels of JSON; nothing of ours has ten, and Python recurses into each


def parse_json(content: str | bytes) -> Any:
  """What JSON says; ValueError if it is damaged, or nested so deeply that nobody meant it."""
  try:
    value = json.loads(content.decode('utf-8-sig') if isinstance(content, bytes) else content)
  except RecursionError:
    value = None
  else:
    level = [value]
    for _ in range(_DEEPEST):
      level = [inner for outer in level for inner in _inside(outer)]
    if not level:
      return value
  raise ValueError(f'nested more than {_DEEPEST} levels deep')


def _inside(value):
  return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def cache_folder(name: str) -> pathlib.Path | None:
  """Returns a private folder for what can be made again; None if there is none to write to.

  It is `moejax/NAME` of the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`), created if it
  does not exist.
  """
  parent = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  folder = pathlib.Path(parent, 'moejax', name)
  if not folder.is_absolute():  # there is no home
    return None
  with contextlib.suppress(OSError):
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  return folder if os.access(folder, os.W_OK | os.X_OK) else None


@contextlib.contextmanager
def atomic_output(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary path for a file or folder, which is renamed to `path` at the end.

  Missing parent folders are created. On an error, what was written is deleted. After a power cut at
  any time, `path` is what it was before, or all of what was written.
  """
  lease.check()
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{os.getpid()}-{path.name}')  # keeps the suffix: savefig reads it
  try:
    yield temporary
    flush(temporary)
    lease.check()
    temporary.replace(path)
    _flush_one(path.parent)
  except BaseException as error:
    if isinstance(error, OSError) and not error.filename:
      error.filename = os.fspath(path)  # that a disk is full is said of no file
    if temporary.is_dir():
      shutil.rmtree(temporary, ignore_errors=True)
    else:
      with contextlib.suppress(OSError):
        temporary.unlink()
    raise


def write(path: str | os.PathLike, content: str | bytes) -> None:
  """Writes a file atomically, text as UTF-8, replacing an existing one."""
  with atomic_output(path) as temporary:
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def flush(path: pathlib.Path) -> None:
  """Waits until the disk has a file, or a folder and all that is in it."""
  if path.is_dir():
    for child in path.iterdir():
      flush(child)
  _flush_one(path)


def flush_name(path: pathlib.Path) -> None:
  """Waits until the disk has the name of a file or folder, and those of the folders above it."""
  for folder in path.resolve().parents:
    with contextlib.suppress(PermissionError):  # no folder of ours
      _flush_one(folder)


def _flush_one(path):
  """Flushes a file's content, or the names in a folder."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if not (path.is_dir() and error.errno in _NO_FLUSH):
      raise
  finally:
    os.close(descriptor)
