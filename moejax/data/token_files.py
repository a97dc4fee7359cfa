"""A corpus as flat files of token ids, written by moejax.tokenize and memory-mapped.

A directory holds train.bin and validation.bin (ids of all documents, little-endian uint16 or
uint32, each document closed by its end-of-document id), index.json, and the files of the tokenizer,
if any. Reading needs only numpy.
"""

import contextlib
import json
import pathlib
from typing import Any

import numpy as np

from moejax.data import corpus, tokenizer as tokenizer_lib

INDEX = 'index.json'
FORMAT = 1


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
