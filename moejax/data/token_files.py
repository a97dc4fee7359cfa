"""A corpus as flat files of token ids, written by moejax.tokenize.

A directory holds train.bin and validation.bin (ids of all documents, little-endian uint16 or
uint32, each document closed by its end-of-document id), train.crc32 and validation.crc32 (checksums
of their blocks: moejax.data.blocks), index.json, and the files of the tokenizer, if any. Reading
needs only numpy. Folders of format 1, which had no checksums, are still read.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np
from absl import logging

from moejax import files
from moejax.data import (
  batch as batch_lib,
  blocks,
  config as config_lib,
  corpus,
  tokenizer as tokenizer_lib,
)

INDEX = 'index.json'
FORMAT = 2
_DTYPES = {np.dtype(code).str: np.dtype(code) for code in ('<u2', '<u4')}
_KEPT = 3  # folders of `kept`


@dataclasses.dataclass(frozen=True)
class Index:
  """What the index of a folder says."""

  folder: pathlib.Path  # on this disk
  dtype: np.dtype
  fingerprint: str  # of the corpus
  num_tokens: dict[str, int]  # by split
  crc32s: dict[str, int | None]  # of the checksums, by split; None: of format 1, without


def dtype_for(vocab_size: int) -> np.dtype:
  """Returns the smallest dtype that holds every id of a vocabulary."""
  return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


def to_bytes(ids: np.ndarray, vocab_size: int) -> bytes:
  """Returns int32 ids in the dtype for a vocabulary; raises DamagedData for an id beyond it."""
  batch_lib.check_ids(ids, vocab_size, lambda i: f'data: token {i} of a document')
  return ids.astype(dtype_for(vocab_size)).tobytes()


def read_index(folder: str, tokenizer: tokenizer_lib.Tokenizer) -> Index:
  """Returns the index of the token files in a folder, checked against the tokenizer.

  Raises ValueError if there is none, or if it was written with another tokenizer.
  """
  directory = files.path(os.path.expanduser(folder))
  path = directory / INDEX
  if not files.is_file(path):
    raise ValueError(
      f'data.files: expected a directory written by python -m moejax.tokenize, '
      f'but there is no {files.real(path)}.'
    )
  with _explain_damage(path):
    index = files.parse_json(files.read(path))
    version = index['format']
  if version not in (1, FORMAT):
    raise ValueError(
      f'data.files: {path} has format {str(version)[:20]}, expected {FORMAT}; write it again.'
    )
  with _explain_damage(path):
    splits = {split: index['splits'][split] for split in corpus.SPLITS}
    number = lambda name: {split: _number(splits[split], name) for split in splits}
    max_id, num_tokens = max(number('max_id').values()), number('tokens')
    crc32s = number('crc32') if version == FORMAT else dict.fromkeys(splits)
    if index['dtype'] not in _DTYPES:
      raise ValueError(f'dtype is {index["dtype"]!r}, expected one of {", ".join(_DTYPES)}')
    dtype, fingerprint = _DTYPES[index['dtype']], str(index['fingerprint'])
    if not re.fullmatch('[0-9a-f]+', fingerprint):
      raise ValueError(f'fingerprint is {fingerprint[:20]!r}, expected hexadecimal digits')
    written_with = index['tokenizer_fingerprint']
    remedy = f'set data.tokenizer={tokenizer_lib.tokenizer_in(index["tokenizer"], directory)}'
  if max_id >= tokenizer.vocab_size:
    raise ValueError(
      f'data.tokenizer: the given one has a vocabulary of {tokenizer.vocab_size}, '
      f'but the files in {directory} hold id {max_id}; {remedy}.'
    )
  if written_with != tokenizer.fingerprint:
    raise ValueError(
      f'data.tokenizer: the files in {directory} were written with another tokenizer; {remedy}.'
    )
  if version != FORMAT:
    _say_unchecked(path)
  names = [f'{split}{suffix}' for split in corpus.SPLITS for suffix in ('.bin', '.crc32')]
  return Index(files.fetched(directory, names), dtype, fingerprint, num_tokens, crc32s)


def _number(entry: dict[str, Any], name: str) -> int:
  if type(entry[name]) is not int or entry[name] < 0:
    raise ValueError(f'{name} is {str(entry[name])[:20]!r}, expected a number')
  return entry[name]


@functools.cache
def _say_unchecked(path: pathlib.Path) -> None:
  logging.warning(
    'data.files: %s is of an earlier version and has no checksums: sizes and ids are checked, but '
    'damage that leaves ids of the vocabulary is not noticed. Write it again to have it checked.',
    path,
  )


@contextlib.contextmanager
def _explain_damage(path):
  try:
    yield
  except (KeyError, TypeError, ValueError) as error:
    what = f'no {error}' if isinstance(error, KeyError) else error
    raise ValueError(f'data.files: {path} is damaged: {what}; copy it again.') from error


def open_split(index: Index, split: str) -> blocks.TokenFile:
  """Opens the tokens of a split.

  Raises ValueError if the file is missing or not as long as the index says.
  """
  path = index.folder / f'{split}.bin'
  return blocks.TokenFile(path, index.dtype, index.num_tokens[split], index.crc32s[split])


def write_splits(
  directory: pathlib.Path, documents: Iterable[tuple[str, np.ndarray, int]], vocab_size: int
) -> dict[str, dict[str, int]]:
  """Writes the files of both splits, and returns `splits` of their index.

  Args:
    directory: where to write.
    documents: as `corpus.encode` yields them.
    vocab_size: number of ids of the tokenizer.

  Raises DamagedData if a document has an id beyond the vocabulary.
  """
  zeros = {'documents': 0, 'tokens': 0, 'bytes': 0, 'max_id': 0}
  splits = {split: dict(zeros) for split in corpus.SPLITS}
  with contextlib.ExitStack() as stack:
    outputs = {
      s: stack.enter_context(blocks.BlockWriter(directory / f'{s}.bin')) for s in corpus.SPLITS
    }
    for split, ids, num_bytes in documents:
      outputs[split].write(to_bytes(ids, vocab_size))
      counts = splits[split]
      counts['documents'] += 1
      counts['tokens'] += len(ids)
      counts['bytes'] += num_bytes
      counts['max_id'] = max(counts['max_id'], int(ids.max()))
  return {split: counts | {'crc32': outputs[split].crc32} for split, counts in splits.items()}


def kept(
  config: config_lib.DataConfig,
  tokenizer: tokenizer_lib.Tokenizer,
  paths: Iterable[pathlib.Path],
) -> str:
  """Returns the folder with the tokens of a corpus in the user's cache folder, written at need.

  Args:
    config: what to read.
    tokenizer: how to encode it.
    paths: of its files; the folder serves until name, size or time of one changes.

  '' if it cannot be written. Folders that were not used for longest are deleted.
  """
  key = hashlib.sha256(f'{FORMAT} {tokenizer.fingerprint}\n'.encode())
  for path in paths:
    with contextlib.suppress(OSError):
      status = path.stat()
      key.update(f'{path}\0{status.st_size}\0{status.st_mtime_ns}\n'.encode('utf-8', 'replace'))
  if not (parent := files.cache_folder('corpora')):
    return ''
  folder = parent / f'{config.source}-{key.hexdigest()[:16]}'
  with contextlib.suppress(OSError):  # a full disk; or another process was faster
    if not folder.exists():
      with files.atomic_output(folder) as temporary:
        temporary.mkdir()
        _write_kept(temporary, config, tokenizer)
      for old in sorted(parent.iterdir(), key=os.path.getmtime)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    os.utime(folder)
  return str(folder) if folder.exists() else ''


def _write_kept(directory, config, tokenizer) -> None:
  digest, vocab_size = hashlib.sha256(), tokenizer.vocab_size
  splits = write_splits(directory, corpus.encode(config, tokenizer, digest), vocab_size)
  index = {'format': FORMAT, 'dtype': dtype_for(vocab_size).str, 'splits': splits}
  index |= {'tokenizer': config.tokenizer, 'tokenizer_fingerprint': tokenizer.fingerprint}
  index |= {'fingerprint': digest.hexdigest()[:16]}
  (directory / INDEX).write_text(json.dumps(index, indent=2) + '\n')
