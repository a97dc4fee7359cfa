"""Files that are there entirely or not at all."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator


@contextlib.contextmanager
def atomic_output(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Gives a name to write a file or a folder to, which becomes `path` at the end.

  Missing parent folders are created. After an error nothing is left.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{os.getpid()}-{path.name}')  # keeps the ending, which some look at
  try:
    yield temporary
    temporary.replace(path)
  except BaseException:
    if temporary.is_dir():
      shutil.rmtree(temporary, ignore_errors=True)
    else:
      with contextlib.suppress(OSError):
        temporary.unlink()
    raise


def write(path: str | os.PathLike, content: str | bytes) -> None:
  """Writes a file, text as UTF-8, replacing what is there."""
  with atomic_output(path) as temporary:
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
