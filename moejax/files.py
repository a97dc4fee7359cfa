"""Atomic writing of files and folders; the cache folder."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator


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

  Missing parent folders are created. On an error, what was written is deleted.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{os.getpid()}-{path.name}')  # keeps the suffix: savefig reads it
  try:
    yield temporary
    temporary.replace(path)
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
