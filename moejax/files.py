"""Atomic writing of files and folders."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator


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
