"""A corpus as flat files of token ids, written by moejax.tokenize and memory-mapped.

A directory holds train.bin and validation.bin (ids of all documents, little-endian uint16 or
uint32, each document closed by its end-of-document id), index.json, and the files of the tokenizer,
if any. Reading needs only numpy.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np

from moejax import files
from moejax.data import config as config_lib, corpus, tokenizer as tokenizer_lib

INDEX = 'index.json'
FORMAT = 1
_KEPT = 3  # folders of `kept`


def dtype_for(vocab_size: int) -> np.dtype:
  """Returns the smallest dtype that holds every id of a vocabulary."""
  return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


def read_index(folder: str, tokenizer: tokenizer_lib.Tokenizer) -> dict[str, Any]:
  """Returns the index of the token files in a folder, checked against the tokenizer.

  Raises ValueError if there is none, or if it was written with another tokenizer.
  """
  directory = pathlib.Path(folder).expanduser()
  path = directory / INDEX
  if not path.is_file():
    raise ValueError(
      f'data.files: expected a directory written by python -m moejax.tokenize, '
      f'but there is no {path.resolve()}.'
    )
  with _explain_damage(path):
    index = json.loads(path.read_text())
    version = index['format']
  if version != FORMAT:
    raise ValueError(
      f'data.files: {path} has format {version!r}, expected {FORMAT}; write it again.'
    )
  with _explain_damage(path):
    _ = np.dtype(index['dtype']), index['fingerprint']
    splits = [index['splits'][split] for split in corpus.SPLITS]
    max_id, _ = max((int(split['max_id']), int(split['tokens'])) for split in splits)
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
  return index


def write_splits(
  directory: pathlib.Path, documents: Iterable[tuple[str, np.ndarray, int]], dtype: np.dtype
) -> dict[str, dict[str, int]]:
  """Writes the files of both splits, and returns `splits` of their index.

  Args:
    directory: where to write.
    documents: as `corpus.encode` yields them.
    dtype: from `dtype_for`.
  """
  zeros = {'documents': 0, 'tokens': 0, 'bytes': 0, 'max_id': 0}
  splits = {split: dict(zeros) for split in corpus.SPLITS}
  with contextlib.ExitStack() as stack:
    outputs = {s: stack.enter_context(open(directory / f'{s}.bin', 'wb')) for s in splits}
    for split, ids, num_bytes in documents:
      outputs[split].write(ids.astype(dtype).tobytes())
      counts = splits[split]
      counts['documents'] += 1
      counts['tokens'] += len(ids)
      counts['bytes'] += num_bytes
      counts['max_id'] = max(counts['max_id'], int(ids.max()))
  return splits


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
  digest, dtype = hashlib.sha256(), dtype_for(tokenizer.vocab_size)
  splits = write_splits(directory, corpus.encode(config, tokenizer, digest), dtype)
  index = {'format': FORMAT, 'dtype': dtype.str, 'splits': splits}
  index |= {'tokenizer': config.tokenizer, 'tokenizer_fingerprint': tokenizer.fingerprint}
  index |= {'fingerprint': digest.hexdigest()[:16]}
  (directory / INDEX).write_text(json.dumps(index, indent=2) + '\n')


@contextlib.contextmanager
def _explain_damage(path):
  try:
    yield
  except (KeyError, TypeError, ValueError) as error:
    what = f'no {error}' if isinstance(error, KeyError) else error
    raise ValueError(f'data.files: {path} is damaged: {what}; copy it again.') from error


def read(folder: str, index: dict[str, Any], split: str) -> np.ndarray:
  """Maps the tokens of a split into memory, uint16 or uint32 [n].

  Raises ValueError if the file is missing or not as long as the index says.
  """
  path = pathlib.Path(folder).expanduser() / f'{split}.bin'
  dtype, num_tokens = np.dtype(index['dtype']), index['splits'][split]['tokens']
  num_bytes = path.stat().st_size if path.is_file() else 0
  if num_bytes != num_tokens * dtype.itemsize:
    raise ValueError(
      f'data.files: {path} has {num_bytes} bytes, its index says {num_tokens * dtype.itemsize}; '
      'copy it again.'
    )
  if not num_tokens:  # an empty file cannot be mapped
    return np.zeros(0, dtype)
  return np.memmap(path, dtype, mode='r')
