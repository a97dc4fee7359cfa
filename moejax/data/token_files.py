"""A corpus as flat files of token ids, written once and memory-mapped for reading.

A directory holds train.bin and validation.bin (ids of all documents, little-endian uint16 or
uint32, each document closed by its end-of-document id), index.json, and the files of the tokenizer,
if any. Reading needs only numpy.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np
import tqdm

from moejax import files
from moejax.data import config as config_lib, corpus, tokenizer as tokenizer_lib

_INDEX = 'index.json'
_FORMAT = 1


def dtype_for(vocab_size: int) -> np.dtype:
  """Returns the smallest dtype that holds every id of a vocabulary."""
  return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


def write(config: config_lib.DataConfig, directory: str | os.PathLike) -> dict[str, Any]:
  """Tokenises both splits of a source into a new directory.

  The directory is renamed into place when it is complete.

  Args:
    config: what to read and how to encode it; any source but 'tokens'.
    directory: where to write; must not exist.

  Returns:
    The index: `tokenizer` (relative to the directory), `tokenizer_fingerprint`, `vocab_size`,
    `dtype`, `source`, `fingerprint` (of the corpus) and `splits`, which gives `documents`,
    `tokens`, `bytes` (0 if the text is unknown) and `max_id` for each split.

  Raises:
    ValueError: the directory exists, or the source cannot be read.
    OSError: the directory cannot be written.
  """
  if config.source == 'tokens':
    raise ValueError("data.source: 'tokens' is already tokenised; use the source of the text.")
  directory = pathlib.Path(directory).expanduser()
  if directory.exists():
    raise ValueError(f'--output: {directory} already exists; remove it or choose another name.')
  tokenizer = tokenizer_lib.make_tokenizer(config)
  with files.atomic_output(directory) as temporary:
    temporary.mkdir()
    return _write_into(temporary, config, tokenizer)


def read_index(config: config_lib.DataConfig, tokenizer: tokenizer_lib.Tokenizer) -> dict[str, Any]:
  """Returns the index of the token files that `data.files` names, checked against the tokenizer.

  Raises ValueError if there is none, or if it was written with another tokenizer.
  """
  directory = pathlib.Path(config.files).expanduser()
  path = directory / _INDEX
  if not path.is_file():
    raise ValueError(
      f'data.files: expected a directory written by python -m moejax.tokenize, '
      f'but there is no {path.resolve()}.'
    )
  try:
    index = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'data.files: {path} is damaged: {error}; copy it again.') from error
  if index.get('format') != _FORMAT:
    raise ValueError(
      f'data.files: {path} has format {index.get("format")!r}, expected {_FORMAT}; write it again.'
    )
  remedy = f'set data.tokenizer={tokenizer_lib.tokenizer_in(index["tokenizer"], directory)}'
  max_id = max(split['max_id'] for split in index['splits'].values())
  if max_id >= tokenizer.vocab_size:
    raise ValueError(
      f'data.tokenizer: {config.tokenizer!r} has a vocabulary of {tokenizer.vocab_size}, '
      f'but the files in {directory} hold id {max_id}; {remedy}.'
    )
  if index['tokenizer_fingerprint'] != tokenizer.fingerprint:
    raise ValueError(
      f'data.tokenizer: the files in {directory} were written with another tokenizer than '
      f'{config.tokenizer!r}; {remedy}.'
    )
  return index


def read(config: config_lib.DataConfig, index: dict[str, Any], split: str) -> np.ndarray:
  """Maps the tokens of a split into memory, uint16 or uint32 [n].

  Raises ValueError if the file is missing or not as long as the index says.
  """
  path = pathlib.Path(config.files).expanduser() / f'{split}.bin'
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


def _write_into(directory, config, tokenizer) -> dict[str, Any]:
  digest = hashlib.sha256()
  if config.source == 'seqio':
    from moejax.data import seqio_loader

    documents = seqio_loader.encode(config, tokenizer, digest)
  else:
    documents = corpus.encode(config, tokenizer, digest)
  dtype = dtype_for(tokenizer.vocab_size)
  splits = {
    split: {'documents': 0, 'tokens': 0, 'bytes': 0, 'max_id': 0} for split in corpus.SPLITS
  }
  with contextlib.ExitStack() as stack:
    outputs = {s: stack.enter_context(open(directory / f'{s}.bin', 'wb')) for s in splits}
    for document in tqdm.tqdm(documents, unit=' documents', disable=None):
      outputs[document.split].write(document.ids.astype(dtype).tobytes())
      counts = splits[document.split]
      counts['documents'] += 1
      counts['tokens'] += len(document.ids)
      counts['bytes'] += document.num_bytes
      counts['max_id'] = max(counts['max_id'], int(document.ids.max()))
  index = {
    'format': _FORMAT,
    'tokenizer': tokenizer_lib.copy_tokenizer(config.tokenizer, directory),
    'tokenizer_fingerprint': tokenizer.fingerprint,
    'vocab_size': tokenizer.vocab_size,
    'dtype': dtype.str,
    'source': {key: getattr(config, key) for key in ('source', 'files', 'field', 'task')},
    'fingerprint': corpus.short_digest(digest),
    'splits': splits,
  }
  (directory / _INDEX).write_text(json.dumps(index, indent=2) + '\n')
  return index
