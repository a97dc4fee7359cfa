"""Documents of the sources that need no TensorFlow, each with its split.

About one document in twenty is validation, chosen by a hash:
  stdlib, text: of the file's path relative to the root of the corpus, so that moving the corpus or
    changing another file changes nothing.
  jsonl: of the document's text, so that its duplicates are in the same split.
If that leaves a split empty (a single file, for example), the end of every document is validation
instead.
"""

import bz2
import codecs
import contextlib
import dataclasses
import functools
import glob
import gzip
import hashlib
import json
import lzma
import os
import pathlib
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from moejax.data import config as config_lib, tokenizer as tokenizer_lib

SPLITS = ('train', 'validation')
_VALIDATION_ONE_IN = 20
_GROUP_BYTES = 2**22

# Tests and bundled programs, which not every distribution includes, and installed packages.
_NOT_LIBRARY = {'test', 'tests', 'idle_test', 'idlelib', 'lib2to3'}
_NOT_LIBRARY |= {'site-packages', 'dist-packages', '__pycache__'}


@dataclasses.dataclass(frozen=True)
class Document:
  """A text as UTF-8 (not validated), its name within the corpus, and its split."""

  name: str
  split: str
  data: bytes


def documents(config: config_lib.DataConfig) -> Iterator[Document]:
  """Yields every document of both splits, always in the same order.

  Raises ValueError, naming the config field, if there is nothing to read.
  """
  if config.source == 'stdlib':
    return _from_files(*_stdlib_files())
  if config.source == 'text':
    return _from_files(*_matching_files(config.files))
  return _from_json_lines(*_matching_files(config.files), config.field)


def encode(
  config: config_lib.DataConfig,
  tokenizer: tokenizer_lib.Tokenizer,
  digest: Any,
  splits: tuple[str, ...] = SPLITS,
) -> Iterator[tuple[str, np.ndarray, int]]:
  """Yields split, int32 ids [n] and number of bytes of documents; the last id ends the document.

  Args:
    config: what to read.
    tokenizer: how to encode it.
    digest: a hashlib object, updated with names and bytes of all documents of both splits, so that
      it identifies the corpus.
    splits: the splits to encode.

  Warns once, with a count, if invalid UTF-8 was replaced.
  """
  num_replaced, first = 0, ''
  for group in _groups(documents(config)):
    for document in group:
      digest.update(f'{document.name}\0{len(document.data)}\0'.encode('utf-8', 'surrogateescape'))
      digest.update(document.data)
    group = [document for document in group if document.split in splits]
    encoded = tokenizer.encode_documents([document.data for document in group])
    for document, ids in zip(group, encoded, strict=True):
      if not tokenizer.keeps_bytes and (replaced := num_invalid(document.data)):
        num_replaced, first = num_replaced + replaced, first or document.name
      yield document.split, np.append(ids, np.int32(tokenizer.eos_id)), len(document.data)
  if num_replaced:
    logging.warning(
      f'Replaced {num_replaced} invalid UTF-8 sequences by U+FFFD, the first in {first}. '
      "data.tokenizer='bytes' would keep them."
    )


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
  """Yields lists of about `_GROUP_BYTES`, which tokenizers encode in parallel."""
  group, size = [], 0
  for document in documents:
    group.append(document)
    size += len(document.data)
    if size >= _GROUP_BYTES:
      yield group
      group, size = [], 0
  yield group


def num_invalid(data: bytes) -> int:
  """Counts the replacement characters that decoding as UTF-8 inserts."""
  try:
    data.decode('utf-8')
  except UnicodeDecodeError:
    return data.decode('utf-8', 'replace').count('\ufffd') - data.count('\ufffd'.encode())
  return 0


def _stdlib_files() -> tuple[pathlib.Path, list[str]]:
  """Returns the folder of Python's standard library and the sorted paths of its .py files."""
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  names = []
  for folder, subfolders, files in os.walk(root):
    subfolders[:] = [
      name for name in subfolders if name not in _NOT_LIBRARY and not name.startswith('config-')
    ]
    below = pathlib.Path(folder).relative_to(root)
    names += [(below / name).as_posix() for name in files if name.endswith('.py')]
  if not names:
    raise ValueError(
      f"data.source: 'stdlib' reads the source files of Python's standard library, but {root} "
      "has none (a frozen or stripped Python); use data.source='text' with your own files."
    )
  return root, sorted(names)


def _matching_files(pattern: str) -> tuple[pathlib.Path, list[str]]:
  """Returns the part of a glob before its first wildcard, and the sorted paths below it.

  Every file is listed once, however many links lead to it: by its real path, if that matches.
  """
  pattern = os.path.abspath(os.path.expanduser(pattern))
  root, wild = _parts(pattern)
  paths = _glob(os.path.join(glob.escape(str(root)), wild)) if wild else [pattern]
  root = root if wild else root.parent
  if broken := [path for path in paths if not os.path.exists(path) and os.path.islink(path)]:
    logging.warning('Skipped %d broken links, the first %s.', len(broken), min(broken))
  names = _one_per_file(root, [pathlib.Path(path) for path in paths if os.path.isfile(path)])
  if not names:
    raise ValueError(f'data.files: no file matches {pattern!r}: {_describe(pattern, root)}.')
  return root, names


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


def _one_per_file(root: pathlib.Path, files: list[pathlib.Path]) -> list[str]:
  """Returns sorted paths relative to `root`, one per file, preferably without links."""
  real_path = functools.cache(os.path.realpath)  # of folders; resolved once
  name_of = {}
  for path in files:
    name, status = path.relative_to(root).as_posix(), path.stat()
    real = os.path.join(real_path(path.parent), path.name)
    real = os.path.realpath(real) if os.path.islink(real) else real
    file = (status.st_dev, status.st_ino) if status.st_nlink > 1 else real
    is_link = os.path.join(real_path(root), name) != real
    name_of[file] = min(name_of.get(file, (True, name)), (is_link, name))
  return sorted(name for _, name in name_of.values())


def _from_files(root: pathlib.Path, names: list[str]) -> Iterator[Document]:
  """Yields one document per file, or two if the files themselves must be split."""
  splits = [_split_of(name.encode('utf-8', 'surrogateescape')) for name in names]
  documents = (
    Document(name, split, _read(root / name)) for name, split in zip(names, splits, strict=True)
  )
  return documents if set(splits) == set(SPLITS) else _split_each(documents)


def _from_json_lines(root: pathlib.Path, names: list[str], field: str) -> Iterator[Document]:
  """Yields one document per line, or two if the lines themselves must be split."""
  splits = set()
  for document in _json_documents(root, names, field):
    splits.add(document.split)
    if len(splits) == len(SPLITS):
      return _json_documents(root, names, field)
  return _split_each(_json_documents(root, names, field))


def _split_each(documents: Iterable[Document]) -> Iterator[Document]:
  """Yields the beginning of every document as a training document, its end as validation."""
  for document in documents:
    cut = _cut(document.data)
    yield dataclasses.replace(document, split='train', data=document.data[:cut])
    yield dataclasses.replace(document, split='validation', data=document.data[cut:])


def _json_documents(root: pathlib.Path, names: list[str], field: str) -> Iterator[Document]:
  for name in names:
    with _open(root / name) as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          data = _json_text(line, field, f'{root / name}, line {number}')
          yield Document(f'{name}:{number}', _split_of(data), data)


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
  if not isinstance(record[field], str):
    raise ValueError(
      f'data.field: {place}: expected text in {field!r}, got a {type(record[field]).__name__}.'
    )
  return tokenizer_lib.to_bytes(record[field])


def _split_of(key: bytes) -> str:
  hashed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), 'big')
  return 'validation' if hashed % _VALIDATION_ONE_IN == 0 else 'train'


def _cut(data: bytes) -> int:
  """Where the last twentieth begins: after a nearby newline, or else between characters."""
  size = len(data) // _VALIDATION_ONE_IN
  cut = len(data) - size
  if newline := data.rfind(b'\n', cut - size, cut) + 1:
    return newline
  begins = lambda i: not b'\x80' <= data[i : i + 1] < b'\xc0'  # a character of UTF-8, or the end
  return next(filter(begins, range(cut, max(cut - 4, 0), -1)), cut)


# First bytes of compressed files, and how to open them.
_COMPRESSED = {b'\x1f\x8b\x08': gzip.open, b'\xfd7zXZ\0': lzma.open}
_COMPRESSED |= {b'BZh%d1AY&SY' % level: bz2.open for level in range(1, 10)}
# First bytes of files in formats that are not supported.
_UNSUPPORTED = {
  b'\x28\xb5\x2f\xfd': 'compressed by zstd; unpack it (zstd -d)',
  b'\x04\x22\x4d\x18': 'compressed by lz4; unpack it (lz4 -d)',
  b'PK\x03\x04': 'a zip archive; unpack it',
  b'7z\xbc\xaf\x27\x1c': 'a 7z archive; unpack it',
  b'%PDF': 'a PDF; extract its text',
  b'PAR1': 'a Parquet file; write its text as JSON lines',
  b'ARROW1': 'an Arrow file; write its text as JSON lines',
  codecs.BOM_UTF16_LE: 'in UTF-16; write it as UTF-8 (iconv -f UTF-16 -t UTF-8)',
  codecs.BOM_UTF16_BE: 'in UTF-16; write it as UTF-8 (iconv -f UTF-16 -t UTF-8)',
  b'\x89HDF': 'an HDF5 file; write its text as JSON lines',
}


def _read(path: pathlib.Path) -> bytes:
  with _open(path) as file:
    return file.read()


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[BinaryIO]:
  """Opens a file to read its bytes, decompressed and without a byte order mark.

  Raises ValueError, naming the file, if it cannot be read.
  """
  try:
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
  except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
    reason = getattr(error, 'strerror', None) or error
    raise ValueError(f'data.files: cannot read {path}: {reason}.') from error
