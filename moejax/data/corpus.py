"""Documents of the sources that are read as text, each with its split.

With `data.validation_files`, they are validation and everything else is training. Otherwise about
one document in twenty is validation, chosen by a hash:
  stdlib, text: of the file's path relative to the root of the corpus, so that moving the corpus or
    changing another file changes nothing.
  jsonl, parquet, datasets without a validation split, environment: of the document's text, so that
    its duplicates are in the same split.
If that leaves a split empty (a single file, for example), the end of every document is validation
instead.
"""

import dataclasses
import functools
import hashlib
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tqdm
from absl import logging

from moejax.data import (
  config as config_lib,
  python_files,
  text_files,
  tokenizer as tokenizer_lib,
)

SPLITS = ('train', 'validation')
VALIDATION_ONE_IN = 20
_GROUP_BYTES = 2**22


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
  if config.source == 'datasets':
    return _dataset_documents(config)
  if config.source == 'environment':
    return _with_both_splits(functools.partial(_unique_documents, python_files.environment()))
  read = functools.partial(_documents, config, *_files(config, 'files'))
  if not config.validation_files:
    return _with_both_splits(read)
  held_out = _documents(config, *_files(config, 'validation_files'))
  parts = {'train': read(), 'validation': held_out}
  return (dataclasses.replace(d, split=split) for split, part in parts.items() for d in part)


def _files(config: config_lib.DataConfig, option: str) -> tuple[pathlib.Path, list[str]]:
  """Returns the folder and names of the files that an option of the config names."""
  if config.source == 'stdlib':
    return python_files.standard_library()
  return text_files.matching(getattr(config, option), f'data.{option}')


def _documents(
  config: config_lib.DataConfig, root: pathlib.Path, names: list[str]
) -> Iterator[Document]:
  """Yields the documents of files, with splits by hashes."""
  source = 'text' if config.source == 'stdlib' else config.source
  for name in names:
    for number, data in text_files.texts(source, root / name, config.field):
      key = name.encode('utf-8', 'surrogateescape') if source == 'text' else data
      yield Document(name + number, split_of(key), data)


def _unique_documents(named: list[tuple[str, pathlib.Path]]) -> Iterator[Document]:
  """Yields the documents of files, with splits by hashes of their text; equal texts only once.

  Files that this user may not read are left out, as are broken links.
  """
  seen = set()
  for name, path in named:
    try:
      data = path.read_bytes()
    except OSError:
      continue
    digest = hashlib.blake2b(data, digest_size=16).digest()
    if digest not in seen:
      seen.add(digest)
      yield Document(name, split_of(digest), data)


def _dataset_documents(config: config_lib.DataConfig) -> Iterator[Document]:
  """Yields the documents of a Hugging Face dataset, with its own splits if it has both."""
  from moejax.data import hf_datasets

  splits = hf_datasets.open_splits(config)

  def read():
    for split, content in splits.items():
      for shard in range(content.num_shards):
        for number, data in enumerate(content.texts(shard)):
          own = split if len(splits) > 1 else split_of(data)
          yield Document(f'{split}/{shard}:{number}', own, data)

  return read() if len(splits) > 1 else _with_both_splits(read)


def _with_both_splits(read: Callable[[], Iterator[Document]]) -> Iterator[Document]:
  """Yields the documents that `read` yields, or two for each if one split would be empty."""
  found = set()
  for document in read():
    found.add(document.split)
    if len(found) == len(SPLITS):
      return read()
  return _split_each(read())


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
  for group in groups(progress(documents(config))):
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


def progress(documents: Iterable[Document]) -> Iterator[Document]:
  """Yields documents and shows how many bytes were read, if that takes more than five seconds."""
  interval = 0.5 if sys.stderr.isatty() else 10
  options = {'unit': 'B', 'unit_scale': True, 'delay': 5, 'mininterval': interval}
  with tqdm.tqdm(desc='Tokenizing', **options) as bar:
    for document in documents:
      yield document
      bar.update(len(document.data))


def groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
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


def _split_each(documents: Iterable[Document]) -> Iterator[Document]:
  """Yields the beginning of every document as a training document, its end as validation."""
  for document in documents:
    cut = _cut(document.data)
    yield dataclasses.replace(document, split='train', data=document.data[:cut])
    yield dataclasses.replace(document, split='validation', data=document.data[cut:])


def split_of(key: bytes) -> str:
  hashed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), 'big')
  return 'validation' if hashed % VALIDATION_ONE_IN == 0 else 'train'


def _cut(data: bytes) -> int:
  """Where the last twentieth begins: after a nearby newline, or else between characters."""
  size = len(data) // VALIDATION_ONE_IN
  cut = len(data) - size
  if newline := data.rfind(b'\n', cut - size, cut) + 1:
    return newline
  begins = lambda i: not b'\x80' <= data[i : i + 1] < b'\xc0'  # a character of UTF-8, or the end
  return next(filter(begins, range(cut, max(cut - 4, 0), -1)), cut)
