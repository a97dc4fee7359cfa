"""Folders in buckets, gs://BUCKET/FOLDER and s3://BUCKET/FOLDER.

A path in a bucket is an `etils.epath.Path`, whose files gcsfs and s3fs read and write. Arrays are
read and written by orbax and TensorStore. All of them find credentials as the tools of the clouds
do. An object is written as a whole or not at all; there are no folders, and nothing is renamed.
"""

import contextlib
import errno
import functools
import importlib.util
import os
import pathlib
import re
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

_PACKAGES = {'gs': 'gcsfs', 's3': 's3fs'}
_EXTRAS = {'gs': 'gcs', 's3': 's3'}
_SECONDS = 30  # between two times that an object which grows is written
_CHUNK = 1 << 24  # bytes that are read at once


def is_bucket(path) -> bool:
  """Whether a text or a path names something in a bucket."""
  return os.fspath(path).startswith(tuple(f'{scheme}://' for scheme in _PACKAGES))


def path(text: str) -> Any:
  """The epath.Path of something in a bucket.

  Raises:
    ValueError: no such path is possible, or a package is missing.
  """
  scheme, _, name = text.partition('://')
  if not re.match('[^/]', name) or set(name) & set('*?[]#') or '..' in name.split('/'):
    raise ValueError(
      f'expected {scheme}://BUCKET/FOLDER without any of * ? [ ] # or .., which storage libraries '
      f'take for patterns, got {text}.'
    )
  if not importlib.util.find_spec(_PACKAGES[scheme]):
    raise ValueError(
      f"{text} is in a bucket: pip install 'moejax[{_EXTRAS[scheme]}]', or mount the bucket (see "
      'docs/launch.md).'
    )
  _configure()
  from etils import epath

  return epath.Path(text)


@functools.cache
def _configure():
  """Tells the libraries that others, TensorStore among them, write to the same folders."""
  from etils.epath import gpath
  from fsspec import config

  os.environ.setdefault('EPATH_USE_TF', 'false')  # TensorFlow knows gs:// alone
  tf_is_installed: Any = gpath._is_tf_installed
  tf_is_installed.cache_clear()  # local paths have asked, too
  for name in ('gcs', 's3'):
    config.conf.setdefault(name, {}).setdefault('use_listings_cache', False)


class Failed(RuntimeError):
  """A storage service, or what speaks with it, failed; trying again may help."""


@contextlib.contextmanager
def _filesystem(path):
  """The fsspec filesystem of a path, and the path as text; says clearly what fails with it.

  An object that is not there is a FileNotFoundError, as a file is. Everything else is never taken
  for a file that is missing or damaged, as an OSError might be.
  """
  import fsspec

  text = os.fspath(path)
  try:
    yield fsspec.filesystem(text.partition('://')[0]), text
  except FileNotFoundError as error:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), text) from error
  except FileExistsError:
    raise
  except Exception as error:
    why = ' '.join(str(error).split()) or type(error).__name__
    raise Failed(f'{text}: the storage service failed: {why[:400]}') from error


def read(path) -> bytes:
  """The content of an object."""
  with _filesystem(path) as (filesystem, name):
    return filesystem.cat_file(name)


def chunks(path) -> Iterator[bytes]:
  """The content of an object, part by part."""
  with _filesystem(path) as (filesystem, name), filesystem.open(name, block_size=_CHUNK) as file:
    while chunk := file.read(_CHUNK):
      yield chunk


def write(path, content: bytes) -> None:
  """Writes a whole object; nobody ever sees a part of it."""
  try:
    with _filesystem(path) as (filesystem, name):
      filesystem.pipe_file(name, content)
  except FileNotFoundError as error:
    raise ValueError(f'{path}: there is no bucket {os.fspath(path).split("/")[2]}.') from error


def create(path, content: bytes) -> None:
  """Writes a whole object; FileExistsError if it is there.

  Of those who do so at once, one succeeds, as the services promise.
  """
  try:
    with _filesystem(path) as (filesystem, name):
      filesystem.pipe_file(name, content, mode='create')
  except FileExistsError:
    if read(path) != content:  # else a request whose answer was lost was sent again
      raise


def modified(path) -> float:
  """When an object was written, in seconds, by the clock of the service."""
  with _filesystem(path) as (filesystem, name):
    return filesystem.modified(name).timestamp()


def status(path) -> tuple[int, str] | None:
  """The bytes of an object, and what tells its content from others; None if there is none.

  Not when it was written: S3 knows that to the second.
  """
  try:
    with _filesystem(path) as (filesystem, name):
      info = filesystem.info(name)
  except FileNotFoundError:
    return None
  if info['type'] != 'file':
    return None
  return info['size'], info.get('generation') or info['ETag']


def exists(path) -> bool:
  """Whether there is an object, or one in the folder."""
  try:
    with _filesystem(path) as (filesystem, name):
      filesystem.info(name)
  except FileNotFoundError:
    return False
  return True


def names(folder) -> set[str]:
  """The names of all objects in a folder and those below, relative to it."""
  found, name = [], os.fspath(folder)
  with contextlib.suppress(FileNotFoundError), _filesystem(folder) as (filesystem, _):
    found = filesystem.find(name)
  start = name.partition('://')[2].rstrip('/') + '/'
  return {path.removeprefix(start) for path in found if path.startswith(start)} - {''}


def glob(pattern: str) -> list[str]:
  """The objects that match a pattern of *, ?, [...] and **, as texts."""
  with _filesystem(pattern) as (filesystem, name):
    found = filesystem.glob(name, detail=True)
  scheme = pattern.partition('://')[0]
  return [f'{scheme}://{name}' for name, info in found.items() if info['type'] == 'file']


def children(folder) -> set[str]:
  """The names in a folder."""
  with contextlib.suppress(FileNotFoundError), _filesystem(folder) as (filesystem, name):
    found = filesystem.ls(name, detail=False)
    return {path.rstrip('/').rpartition('/')[2] for path in found} - {''}
  return set()


def delete(path) -> None:
  """Deletes an object, or all in a folder."""
  with contextlib.suppress(FileNotFoundError), _filesystem(path) as (filesystem, name):
    filesystem.rm(name, recursive=True)


class Growing:
  """An object to which is appended: it is written anew, now and then, and when `sync` is called.

  As objects cannot grow, its content is kept in memory.
  """

  def __init__(self, path):
    self.name, self.closed = path, False
    self._content = read(path) if exists(path) else b''
    self._written, self._due = len(self._content), 0.0

  def write(self, content: bytes) -> int:
    """Appends all of `content`, or nothing if it raises Failed."""
    before, self._content = self._content, self._content + content
    if time.monotonic() > self._due:
      try:
        self.sync()
      except BaseException:
        self._content = before
        raise
    return len(content)

  def sync(self) -> None:
    """Writes the object, if it has grown."""
    if self._written < len(self._content):
      started = time.monotonic()
      self._due = started + _SECONDS
      write(self.name, self._content)
      self._written = len(self._content)
      self._due = max(self._due, time.monotonic() + 20 * (time.monotonic() - started))

  def close(self) -> None:
    self.sync()
    self.closed = True


def copy(source, target) -> None:
  """Copies an object; within one service, that does it alone."""
  if os.fspath(source)[:2] != os.fspath(target)[:2]:
    return write(target, read(source))
  with _filesystem(target) as (filesystem, name):
    filesystem.cp_file(os.fspath(source), name)


def upload(source: pathlib.Path, target) -> None:
  """Copies a file."""
  with _filesystem(target) as (filesystem, name):
    filesystem.put_file(str(source), name)


def download(source, target: pathlib.Path) -> None:
  """Copies an object to a file."""
  with _filesystem(source) as (filesystem, name):
    filesystem.get_file(name, str(target))


@functools.cache
def let_orbax_write_s3() -> None:
  """Lets orbax, which knows gs://, use TensorStore's driver for s3:// in the same way."""
  from orbax.checkpoint._src.serialization import tensorstore_utils

  build = tensorstore_utils.build_kvstore_tspec
  endpoint = os.environ.get('AWS_ENDPOINT_URL_S3') or os.environ.get('AWS_ENDPOINT_URL')
  more = {'endpoint': endpoint} if endpoint else {}

  def to_s3(spec):
    if isinstance(spec, dict) and spec.get('driver') == 'gcs':
      return spec | {'driver': 's3'} | more
    if isinstance(spec, dict):
      return {name: to_s3(value) for name, value in spec.items()}
    if isinstance(spec, str) and spec.startswith('gs://'):
      url = urllib.parse.urlparse(spec)
      return {'driver': 's3', 'bucket': url.netloc, 'path': url.path.lstrip('/')} | more
    return spec

  def build_kvstore_tspec(directory, *args, **kwargs):
    if not directory.startswith('s3://'):
      return build(directory, *args, **kwargs)
    return to_s3(build(directory.replace('s3://', 'gs://', 1), *args, **kwargs))

  tensorstore_utils.build_kvstore_tspec = build_kvstore_tspec
