"""Documents of the sources that need no TensorFlow, each with the split it belongs to.

Who decides about the split:
  stdlib, text: a hash of the file's path below the corpus' root, so that moving the corpus, or
    changing another file, changes nothing; one file in twenty is validation. Where that leaves a
    split without any file (a single file, say), the end of every file is validation instead.
  jsonl: a hash of the document's text, so that copies of it stay on one side.
"""

import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import sysconfig
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging

from moejax.data import config as config_lib, tokenizer as tokenizer_lib

SPLITS = ('train', 'validation')
_VALIDATION_ONE_IN = 20

# Tests and bundled programs: distributions disagree about shipping them, and packages are not ours.
_NOT_LIBRARY = {'test', 'tests', 'idle_test', 'idlelib', 'lib2to3'}
_NOT_LIBRARY |= {'site-packages', 'dist-packages', '__pycache__'}


@dataclasses.dataclass(frozen=True)
class Document:
  """A text as UTF-8 (not checked), its place in the corpus, and its split."""

  name: str
  split: str
  data: bytes


@dataclasses.dataclass(frozen=True)
class EncodedDocument:
  """A document as int32 ids [n], the end-of-document id included; bytes 0 where unknown."""

  split: str
  ids: np.ndarray
  num_bytes: int


def documents(config: config_lib.DataConfig) -> Iterator[Document]:
  """Yields every document of both splits, always in the same order.

  Raises ValueError, naming the config field, where there is nothing to read.
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
) -> Iterator[EncodedDocument]:
  """Yields the documents of some splits as token ids.

  Args:
    config: what to read.
    tokenizer: how to encode it.
    digest: a hashlib object; at the end it has taken in names and bytes of all documents of both
      splits, so it identifies the corpus.
    splits: the splits to encode.

  Warns once, with a count, where bytes that are not UTF-8 had to be replaced.
  """
  num_replaced, first = 0, ''
  for document in documents(config):
    digest.update(f'{document.name}\0{len(document.data)}\0'.encode('utf-8', 'surrogateescape'))
    digest.update(document.data)
    if document.split not in splits:
      continue
    if not tokenizer.keeps_bytes and (replaced := num_invalid(document.data)):
      num_replaced, first = num_replaced + replaced, first or document.name
    ids = tokenizer.encode_bytes(document.data)
    yield EncodedDocument(
      document.split, np.append(ids, np.int32(tokenizer.eos_id)), len(document.data)
    )
  if num_replaced:
    logging.warning(
      'Replaced %d stretches of bytes that are not UTF-8 by U+FFFD, the first in %s. '
      "data.tokenizer='bytes' would keep them.",
      num_replaced,
      first,
    )


def num_invalid(data: bytes) -> int:
  """Counts the replacement characters that decoding as UTF-8 puts in."""
  try:
    data.decode('utf-8')
  except UnicodeDecodeError:
    return data.decode('utf-8', 'replace').count('\ufffd') - data.count('\ufffd'.encode())
  return 0


def short_digest(digest: Any) -> str:
  """Returns the 16 hex digits by which a corpus is known."""
  return digest.hexdigest()[:16]


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
  """Returns the part of a glob before its first wildcard, and the sorted paths below it."""
  pattern = os.path.abspath(os.path.expanduser(pattern))
  path = pathlib.Path(pattern)
  fixed = next((i for i, part in enumerate(path.parts) if glob.has_magic(part)), None)
  root = path.parent if fixed is None else pathlib.Path(*path.parts[:fixed])
  matches = map(pathlib.Path, glob.glob(pattern, recursive=True))
  names = sorted(match.relative_to(root).as_posix() for match in matches if match.is_file())
  if not names:
    if not root.is_dir():
      seen = f'the folder {root} does not exist'
    else:
      entries = sorted(entry.name for entry in root.iterdir())
      seen = f'{root} holds {len(entries)} entries'
      if entries:
        seen += f' ({", ".join(entries[:3])}{", ..." if len(entries) > 3 else ""})'
    raise ValueError(f'data.files: no file matches {pattern!r}: {seen}.')
  return root, names


def _from_files(root: pathlib.Path, names: list[str]) -> Iterator[Document]:
  """Yields one document per file, or two where the files themselves must be split."""
  splits = [_split_of(name.encode('utf-8', 'surrogateescape')) for name in names]
  whole_files = set(splits) == set(SPLITS)
  for name, split in zip(names, splits, strict=True):
    data = _read(root / name)
    if whole_files:
      yield Document(name, split, data)
    else:
      cut = _cut(data)
      yield Document(name, 'train', data[:cut])
      yield Document(name, 'validation', data[cut:])


def _from_json_lines(root: pathlib.Path, names: list[str], field: str) -> Iterator[Document]:
  for name in names:
    try:
      with open(root / name, 'rb') as file:
        for number, line in enumerate(file, 1):
          if line.strip():
            data = _json_text(line, field, f'{root / name}, line {number}')
            yield Document(f'{name}:{number}', _split_of(data), data)
    except OSError as error:
      raise ValueError(f'data.files: cannot read {root / name}: {error.strerror}.') from error


def _json_text(line: bytes, field: str, place: str) -> bytes:
  """Returns one field of a JSON object as bytes; bytes that are not UTF-8 pass through."""
  try:
    record = json.loads(line.decode('utf-8', 'surrogateescape'))
  except json.JSONDecodeError as error:
    raise ValueError(f'data.files: {place} is not JSON: {error}.') from error
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
  """Where the last twentieth begins: after a newline near there, or else before a character."""
  size = len(data) // _VALIDATION_ONE_IN
  cut = len(data) - size
  if newline := data.rfind(b'\n', cut - size, cut) + 1:
    return newline
  while 0 < cut < len(data) and data[cut] & 0xC0 == 0x80:  # inside a UTF-8 character
    cut -= 1
  return cut


def _read(path: pathlib.Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise ValueError(f'data.files: cannot read {path}: {error.strerror}.') from error
