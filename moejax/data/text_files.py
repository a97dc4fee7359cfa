"""The files of a corpus: which match a glob, and the texts in them.

Files may be compressed (gzip, bzip2, xz, zstd), whatever their names. Errors name the file and what
to do.
"""

import bz2
import codecs
import contextlib
import functools
import glob
import gzip
import io
import json
import lzma
import os
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from absl import logging

from moejax import buckets, files
from moejax.data import tokenizer as tokenizer_lib


def texts(source: str, path: pathlib.Path, field: str) -> Iterator[tuple[str, bytes]]:
  """Yields the texts of a file, each with the end of its name; UTF-8, not validated.

  Args:
    source: 'text' (one text per file), 'jsonl' (one per line) or 'parquet' (one per row).
    path: the file.
    field: of a line or row, that holds the text.

  Raises ValueError if the file cannot be read or has no such field.
  """
  if source == 'text':
    with _open(path) as file:
      yield '', file.read()
  elif source == 'jsonl':
    with _open(path) as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          yield f':{number}', _json_text(line, field, f'{path}, line {number}')
  else:
    yield from _parquet_texts(path, field)


def matching(pattern: str, option: str) -> tuple[pathlib.Path, list[str]]:
  """Returns the part of a glob before its first wildcard, and the sorted paths below it.

  Every file is listed once, however many links lead to it: by its real path, if that matches.
  """
  if buckets.is_bucket(pattern):
    return _matching_in_bucket(pattern, option)
  pattern = os.path.abspath(os.path.expanduser(pattern))
  root, wild = _parts(pattern)
  paths = _glob(os.path.join(glob.escape(str(root)), wild)) if wild else [pattern]
  root = root if wild else root.parent
  if broken := [path for path in paths if not os.path.exists(path) and os.path.islink(path)]:
    logging.warning('Skipped %d broken links, the first %s.', len(broken), min(broken))
  names = _one_per_file(root, [pathlib.Path(path) for path in paths if os.path.isfile(path)])
  if not names:
    raise ValueError(f'{option}: no file matches {pattern!r}: {_describe(pattern, root)}.')
  return root, names


def _matching_in_bucket(pattern: str, option: str) -> tuple[pathlib.Path, list[str]]:
  """`matching`, of copies of the files."""
  fixed = pattern[: match.start()] if (match := re.search(r'[*?[]', pattern)) else pattern
  root = files.path(fixed.rpartition('/')[0])
  start = f'{root}/'
  if not (found := sorted(buckets.glob(pattern))):
    raise ValueError(
      f'{option}: no file matches {pattern!r}; for all in a folder, write FOLDER/**.'
    )
  names = [path.removeprefix(start) for path in found]
  return files.fetched(root, names), names


def _describe(pattern: str, root: pathlib.Path) -> str:
  """Says what is there instead of files that match."""
  if os.path.isdir(pattern):
    return f'it is a folder; for all files in it, write {pattern}/**/*'
  if not root.is_dir():
    return f'the folder {root} does not exist'
  names = sorted(os.listdir(root))
  shown = ', '.join(names[:3] + ['...'] * (len(names) > 3))
  return f'{root} holds {len(names)} entries' + (f' ({shown})' if names else '')


def _parts(pattern: str) -> tuple[pathlib.Path, str]:
  """Splits a path before its first wildcard; brackets in a name that exists are none."""
  first, *others = pathlib.Path(pattern).parts
  fixed = pathlib.Path(first)
  for i, part in enumerate(others):
    literal = '*' not in part and '?' not in part and os.path.lexists(fixed / part)
    if glob.has_magic(part) and not literal:
      return fixed, os.path.join(*others[i:])
    fixed /= part
  return fixed, ''


def _glob(pattern: str) -> list[str]:
  """`glob.glob(pattern, recursive=True)` that enters every real folder below `**` only once."""
  recursive = re.search(r'/\*\*(/|$)', pattern)
  if not recursive:
    return glob.glob(pattern)
  before, after = pattern[: recursive.start()], pattern[recursive.end() :] or '*'
  folders = (folder for top in glob.glob(before or '/') for folder in _folders(top))
  return [p for folder in folders for p in _glob(os.path.join(glob.escape(folder), after))]


def _folders(top: str) -> Iterator[str]:
  """Yields a folder and its subfolders, each once: links are followed last."""
  seen, pending = set(), [top]
  for link in pending:
    for folder, subfolders, _ in os.walk(link):
      status = os.stat(folder)
      if (status.st_dev, status.st_ino) in seen:
        subfolders.clear()
        continue
      seen.add((status.st_dev, status.st_ino))
      yield folder
      subfolders[:] = sorted(name for name in subfolders if not name.startswith('.'))
      paths = (os.path.join(folder, name) for name in subfolders)
      pending += [path for path in paths if os.path.islink(path)]


def _one_per_file(root: pathlib.Path, paths: list[pathlib.Path]) -> list[str]:
  """Returns sorted paths relative to `root`, one per file, preferably without links."""
  real_path = functools.cache(os.path.realpath)  # of folders; resolved once
  name_of = {}
  for path in paths:
    name, status = path.relative_to(root).as_posix(), path.stat()
    real = os.path.join(real_path(path.parent), path.name)
    real = os.path.realpath(real) if os.path.islink(real) else real
    file = (status.st_dev, status.st_ino) if status.st_nlink > 1 else real
    is_link = os.path.join(real_path(root), name) != real
    name_of[file] = min(name_of.get(file, (True, name)), (is_link, name))
  return sorted(name for _, name in name_of.values())


def _json_text(line: bytes, field: str, place: str) -> bytes:
  """Returns one field of a JSON object as bytes; invalid UTF-8 passes through."""
  try:
    record = json.loads(line.decode('utf-8', 'surrogateescape'))
  except (ValueError, RecursionError) as error:
    raise ValueError(f'data.files: {place} is not JSON in UTF-8: {error}.') from error
  if not isinstance(record, dict):
    raise ValueError(f'data.files: {place}: expected a JSON object, got a {type(record).__name__}.')
  if field not in record:
    raise ValueError(
      f'data.field: {place} has no field {field!r}, only {", ".join(map(repr, record))}.'
    )
  return text_of(record[field], field, place)


def text_of(value: Any, field: str, place: str) -> bytes:
  """Returns a field that holds text as UTF-8; lone surrogates pass through."""
  if not isinstance(value, str):
    raise ValueError(
      f'data.field: {place}: expected text in {field!r}, got a {type(value).__name__}.'
    )
  return tokenizer_lib.to_bytes(value)


def _parquet_texts(path: pathlib.Path, field: str) -> Iterator[tuple[str, bytes]]:
  pyarrow = _pyarrow('a Parquet file', path)
  with _clear_errors(path, pyarrow.ArrowException, UnicodeDecodeError), open(path, 'rb') as raw:
    if raw.read(4) != b'PAR1':
      raise ValueError(
        f"data.files: {path} is not a Parquet file; data.source='jsonl' reads JSON lines, 'text' "
        'plain text.'
      )
    with pyarrow.parquet.ParquetFile(raw) as file:
      names = file.schema_arrow.names
      if field not in names:
        raise ValueError(
          f'data.field: {path} has no field {field!r}, only {", ".join(map(repr, names))}.'
        )
      number = 0
      for batch in file.iter_batches(1024, columns=[field]):
        for text in batch.column(0).to_pylist():
          number += 1
          yield f':{number}', text_of(text, field, f'{path}, row {number}')


def _pyarrow(what: str, path: pathlib.Path) -> Any:
  try:
    import pyarrow
    import pyarrow.parquet
  except ModuleNotFoundError as error:
    raise ValueError(
      f'data.files: {path} is {what}, which needs the package pyarrow: pip install '
      "'moejax[datasets]'."
    ) from error
  return pyarrow


def _open_zstd(path: pathlib.Path, mode: str) -> BinaryIO:
  del mode  # always 'rb'
  pyarrow = _pyarrow('compressed by zstd', path)
  return io.BufferedReader(pyarrow.input_stream(str(path), compression='zstd'))


# First bytes of compressed files, and how to open them.
_COMPRESSED = {
  b'\x1f\x8b\x08': gzip.open,
  b'\xfd7zXZ\0': lzma.open,
  b'\x28\xb5\x2f\xfd': _open_zstd,
}
_COMPRESSED |= {b'BZh%d1AY&SY' % level: bz2.open for level in range(1, 10)}
# First bytes of files in formats that are not supported.
_UNSUPPORTED = {
  b'\x04\x22\x4d\x18': 'compressed by lz4; unpack it (lz4 -d)',
  b'PK\x03\x04': 'a zip archive; unpack it',
  b'7z\xbc\xaf\x27\x1c': 'a 7z archive; unpack it',
  b'%PDF': 'a PDF; extract its text',
  b'PAR1': "a Parquet file; set data.source='parquet'",
  b'ARROW1': 'an Arrow file; write its text as JSON lines',
  codecs.BOM_UTF16_LE: 'in UTF-16; write it as UTF-8 (iconv -f UTF-16 -t UTF-8)',
  codecs.BOM_UTF16_BE: 'in UTF-16; write it as UTF-8 (iconv -f UTF-16 -t UTF-8)',
  b'\x89HDF': 'an HDF5 file; write its text as JSON lines',
}


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[BinaryIO]:
  """Opens a file to read its bytes, decompressed and without a byte order mark.

  Raises ValueError, naming the file, if it cannot be read.
  """
  with _clear_errors(path):
    with open(path, 'rb') as file:
      start = file.read(16)
    unpack = next((how for magic, how in _COMPRESSED.items() if start.startswith(magic)), open)
    with unpack(path, 'rb') as file:
      peek = file.peek(512)[:512]
      what = next((what for magic, what in _UNSUPPORTED.items() if peek.startswith(magic)), '')
      what = 'a tar archive; unpack it' if peek[257:262] == b'ustar' else what
      if what:
        raise ValueError(f'data.files: {path} is {what}.')
      if peek.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
      yield file


@contextlib.contextmanager
def _clear_errors(path: pathlib.Path, *others: type[Exception]) -> Iterator[None]:
  """Names the file in errors of reading and decompressing."""
  try:
    yield
  except (OSError, EOFError, lzma.LZMAError, zlib.error, *others) as error:
    reason = getattr(error, 'strerror', None) or error
    raise ValueError(f'data.files: cannot read {path}: {reason}.') from error
