"""Files and folders, of the disk and of buckets; the cache folder; JSON of other people.

Files are written atomically and durably. A path is a `pathlib.Path`, or in a bucket an epath.Path,
which has the same names, parents and `/`; what is done with the files of a run goes through here.
"""

import concurrent.futures
import contextlib
import csv
import errno
import fcntl
import io
import json
import math
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from moejax import buckets, lease

_NO_FLUSH = {
  errno.EINVAL,
  errno.ENOSYS,
  errno.ENOTSUP,
  errno.EBADF,
}  # some shared disks, of folders

_LONG = 10**8  # bytes; to copy more takes so long that it is said
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


def path(name: str | os.PathLike) -> Any:
  """The path of a file or folder, in a bucket or not.

  Raises:
    ValueError: it cannot be in a bucket, or a package for that is missing.
  """
  return buckets.path(os.fspath(name)) if buckets.is_bucket(name) else pathlib.Path(name)


def absolute(name: str | os.PathLike) -> Any:
  """`path`, independent of the working directory."""
  return path(name) if buckets.is_bucket(name) else pathlib.Path(name).absolute()


def real(path) -> Any:
  """`absolute`, without links."""
  return path if buckets.is_bucket(path) else path.resolve()


def read(path) -> bytes:
  """The content of a file."""
  return buckets.read(path) if buckets.is_bucket(path) else pathlib.Path(path).read_bytes()


def chunks(path) -> Iterator[bytes]:
  """The content of a file, part by part."""
  if buckets.is_bucket(path):
    yield from buckets.chunks(path)
    return
  with path.open('rb') as file:
    while chunk := file.read(1 << 20):
      yield chunk


def exists(path) -> bool:
  """Whether there is such a file or folder; a folder of a bucket is one with a file in it."""
  return buckets.exists(path) if buckets.is_bucket(path) else pathlib.Path(path).exists()


def is_file(path) -> bool:
  """Whether there is a file of this name."""
  if buckets.is_bucket(path):
    return buckets.status(path) is not None
  return pathlib.Path(path).is_file()


def modified(path) -> float:
  """When a file was written, in seconds."""
  return buckets.modified(path) if buckets.is_bucket(path) else path.stat().st_mtime


def names(folder) -> set[str]:
  """The files in a folder and those below, by their names relative to it."""
  if buckets.is_bucket(folder):
    return buckets.names(folder)
  # Not rglob, which fails if a folder vanishes meanwhile.
  paths = (pathlib.Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
  return {path.relative_to(folder).as_posix() for path in paths if path.is_file()}


def children(folder) -> set[str]:
  """The names of files and folders in a folder; none if it does not exist."""
  if buckets.is_bucket(folder):
    return buckets.children(folder)
  return {path.name for path in folder.glob('*')}


def delete(path) -> None:
  """Deletes a file, or a folder with all that can be deleted in it."""
  if buckets.is_bucket(path):
    buckets.delete(path)
  elif path.is_file():
    path.unlink()
  else:
    shutil.rmtree(path, ignore_errors=True)


def make_folder(path) -> None:
  """Creates a folder and those above it; a bucket needs none."""
  if not buckets.is_bucket(path):
    path.mkdir(parents=True, exist_ok=True)


def append(path) -> Any:
  """Opens a file to append to it, without a buffer."""
  return buckets.Growing(path) if buckets.is_bucket(path) else path.open('ab', buffering=0)


def sync(file) -> None:
  """Waits until the disk, or the bucket, has all that was written to a file of `append`."""
  if isinstance(file, buckets.Growing):
    file.sync()
  else:
    os.fsync(file)


def try_to_write(folder) -> None:
  """Raises OSError or RuntimeError unless files can be written in a folder."""
  if buckets.is_bucket(folder):
    probe = folder / f'probe-{uuid.uuid4()}'
    buckets.write(probe, b'')
    buckets.delete(probe)
    return
  with tempfile.NamedTemporaryFile(dir=folder) as probe:
    probe.write(bytes(1 << 16))  # more than fits on a nearly full disk


def free_bytes(folder) -> float:
  """How many bytes can still be written to a folder."""
  return math.inf if buckets.is_bucket(folder) else shutil.disk_usage(folder).free


@contextlib.contextmanager
def atomic_output(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary path for a file or folder, which is renamed to `path` at the end.

  Missing parent folders are created. On an error, what was written is deleted. After a power cut at
  any time, `path` is what it was before, or all of what was written. In a bucket, that holds for
  every file of a folder alone.
  """
  lease.check()
  if buckets.is_bucket(path):
    with tempfile.TemporaryDirectory() as folder:
      yield (temporary := pathlib.Path(folder, os.path.basename(path)))
      upload(temporary, path)
    return
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
  content = content.encode() if isinstance(content, str) else content
  if buckets.is_bucket(path):
    lease.check()
    return buckets.write(path, content)
  with atomic_output(path) as temporary:
    temporary.write_bytes(content)


def write_csv(path: str | os.PathLike, rows: Iterable[Iterable]) -> None:
  """`write`, rows of values as CSV; the first one is the heading."""
  output = io.StringIO()
  csv.writer(output, lineterminator='\n').writerows(rows)
  write(path, output.getvalue())


def upload(source: pathlib.Path, target) -> None:
  """Copies a file of this disk, or a folder and all in it, to a bucket."""
  if source.is_file():
    buckets.upload(source, target)
  is_last = lambda name: name.endswith('.json')  # an index, which says what there is
  for name in sorted(sorted(names(source)), key=is_last):
    buckets.upload(source / name, target / name)


def copy(source, target) -> None:
  """Copies a file; one of the two is in a bucket."""
  if buckets.is_bucket(source) and buckets.is_bucket(target):
    return buckets.copy(source, target)
  if buckets.is_bucket(target):
    return buckets.upload(source, target)
  target.parent.mkdir(parents=True, exist_ok=True)
  buckets.download(source, target)


@contextlib.contextmanager
def to_fill(folder) -> Iterator[pathlib.Path]:
  """A folder of the disk whose files `folder` has at the end: itself, or a temporary one."""
  if not buckets.is_bucket(folder):
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    return
  with tempfile.TemporaryDirectory() as temporary:
    yield pathlib.Path(temporary)
    upload(pathlib.Path(temporary), folder)


@contextlib.contextmanager
def on_disk(folder) -> Iterator[pathlib.Path]:
  """A folder of the disk with the files of a folder: itself, or a temporary copy of a bucket's."""
  if not buckets.is_bucket(folder):
    yield folder
    return
  with tempfile.TemporaryDirectory() as temporary:
    for name in buckets.names(folder):
      copy(folder / name, pathlib.Path(temporary, name))
    yield pathlib.Path(temporary)


def fetched(folder, names: Collection[str]) -> pathlib.Path:
  """A folder of the disk that has some files of a folder: itself, or a copy of a bucket's.

  Copies are kept in the user's cache folder, and made again when an object has changed.

  Args:
    folder: in a bucket or not.
    names: of files, relative to it; those that do not exist are left out.

  Raises:
    ValueError: the copies cannot be written.
  """
  if not buckets.is_bucket(folder):
    return folder
  if not (cache := cache_folder('buckets')):
    raise ValueError(
      f'{folder}: files of a bucket are copied to the cache folder, and there is none; set '
      'XDG_CACHE_HOME to one that can be written.'
    )
  copy = cache.joinpath(*str(folder).replace('://', '/').split('/'))
  with (cache / 'lock').open('w') as lock, concurrent.futures.ThreadPoolExecutor() as pool:
    with contextlib.suppress(OSError):  # some shared disks have no locks: files are copied twice
      fcntl.flock(lock, fcntl.LOCK_EX)
    statuses = pool.map(lambda name: buckets.status(folder / name), names)
    wanted = {}
    for name, status in zip(names, statuses, strict=True):
      if status is None:
        (copy / name).unlink(missing_ok=True)
      elif not _is_copy(copy / name, *status):
        wanted[name] = status
    size, free = sum(size for size, _ in wanted.values()), free_bytes(cache)
    if size > free:
      raise ValueError(
        f'{folder}: {size / 1e6:.1f} MB are to be copied to {copy}, whose disk has only '
        f'{free / 1e6:.1f} MB left. Make room, set XDG_CACHE_HOME to a folder of another disk, or '
        'mount the bucket (see docs/launch.md).'
      )
    if size > _LONG:
      print(f'copying {size / 1e6:.0f} MB of {folder} to {copy}', flush=True)
    for _ in pool.map(lambda name: _fetch(folder / name, copy / name, wanted[name][1]), wanted):
      pass
  return copy


def _fetch(source, target, version):
  with atomic_output(target) as temporary:
    buckets.download(source, temporary)
  _version_of(target).write_text(version)


def _is_copy(path, size, version):
  """Whether a file is a copy of an object of this size and version."""
  try:
    return path.stat().st_size == size and _version_of(path).read_text(errors='replace') == version
  except FileNotFoundError:
    return False


def _version_of(copy):
  return copy.with_name(f'.{copy.name}.version')


def flush(path) -> None:
  """Waits until the disk has a file, or a folder and all that is in it; a bucket has it at once."""
  if buckets.is_bucket(path):
    return
  if path.is_dir():
    for child in path.iterdir():
      flush(child)
  _flush_one(path)


def flush_name(path) -> None:
  """Waits until the disk has the name of a file or folder, and those of the folders above it."""
  if buckets.is_bucket(path):
    return
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
