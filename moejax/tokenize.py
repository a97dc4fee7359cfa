r"""Writes a corpus to token files: for text of any size, read without TensorFlow or the network.

  python -m moejax.tokenize --config=configs/mot.py:medium --output=/data/c4_tokens
  python -m moejax.main --config=configs/mot.py:medium --config.data.source=tokens \
    --config.data.files=/data/c4_tokens
"""

import hashlib
import json
import os
import pathlib
import shlex
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm
from absl import flags

from moejax import cli, data, files
from moejax.data import corpus, token_files, tokenizer as tokenizer_lib

_WHERE = ('source', 'files', 'validation_files', 'field', 'task')


def tokenize(config: data.DataConfig, output: str | os.PathLike) -> str:
  """`write`; returns a summary of the result."""
  index = write(config, output)
  counts = ', '.join(
    f'{split["tokens"]} tokens of {split["documents"]} documents for {name}'
    for name, split in index['splits'].items()
  )
  tokenizer = tokenizer_lib.tokenizer_in(index['tokenizer'], files.path(output))
  fields = {'source': 'tokens', 'files': output, 'tokenizer': tokenizer}
  flags = shlex.join(f'--config.data.{name}={value}' for name, value in fields.items())
  return f'Wrote {output}: {counts}. Read them with {flags}'


def write(config: data.DataConfig, directory: str | os.PathLike) -> dict[str, Any]:
  """Tokenises both splits of a source into a new directory, renamed into place when complete.

  In a bucket, the index is written last.

  Args:
    config: what to read and how to encode it; any source but 'tokens'.
    directory: where to write; must not exist.

  Returns:
    The index: `tokenizer` (relative to the directory), `tokenizer_fingerprint`, `vocab_size`,
    `dtype`, `source`, `fingerprint` (of the corpus) and `splits`, which gives `documents`,
    `tokens`, `bytes` (0 if the text is unknown), `max_id` and `crc32` (of the checksums) for each
    split.

  Raises:
    ValueError: the directory exists, or the source cannot be read.
    OSError: the directory cannot be written.
  """
  if config.source == 'tokens':
    raise ValueError("data.source: 'tokens' is already tokenised; use the source of the text.")
  directory = files.path(os.path.expanduser(directory))
  if files.exists(directory):
    raise ValueError(f'--output: {directory} already exists; remove it or choose another name.')
  tokenizer = tokenizer_lib.make_tokenizer(config)
  with files.atomic_output(directory) as temporary:
    temporary.mkdir()
    return _write_into(temporary, config, tokenizer)


def _write_into(directory, config, tokenizer) -> dict[str, Any]:
  digest = hashlib.sha256()
  encode = _encode_task if config.source == 'seqio' else corpus.encode
  documents = encode(config, tokenizer, digest)
  splits = token_files.write_splits(directory, documents, tokenizer.vocab_size)
  index = {
    'format': token_files.FORMAT,
    'tokenizer': _copy_tokenizer(config.tokenizer, tokenizer, directory),
    'tokenizer_fingerprint': tokenizer.fingerprint,
    'vocab_size': tokenizer.vocab_size,
    'dtype': token_files.dtype_for(tokenizer.vocab_size).str,
    'source': {key: getattr(config, key) for key in _WHERE},
    'fingerprint': digest.hexdigest()[:16],
    'splits': splits,
  }
  (directory / token_files.INDEX).write_text(json.dumps(index, indent=2) + '\n')
  return index


def _encode_task(config, tokenizer, digest) -> Iterator[tuple[str, np.ndarray, int]]:
  """`corpus.encode` of a seqio task; updates `digest` with the ids."""
  from moejax.data import seqio_loader

  examples = seqio_loader.examples(config, tokenizer, corpus.SPLITS)
  for split, example in tqdm.tqdm(examples, unit=' documents', delay=5, disable=None):
    ids = example['targets']
    if not len(ids) or ids[-1] != tokenizer.eos_id:
      ids = np.append(ids, np.int32(tokenizer.eos_id))
    digest.update(f'{split}\0{len(ids)}\0'.encode() + ids.astype('<i4').tobytes())
    yield split, ids, len(example.get('targets_pretokenized', b''))


def _copy_tokenizer(name: str, tokenizer, directory: pathlib.Path) -> str:
  """Copies the files of a tokenizer into a directory and returns its name relative to it."""
  if name == 'bytes':
    return name
  paths = tokenizer_lib.tokenizer_files(name)
  if name.startswith(tokenizer_lib.GPT2_PREFIX):
    for path in paths:
      shutil.copyfile(path, directory / path.name)
    return tokenizer_lib.GPT2_PREFIX
  if isinstance(tokenizer, tokenizer_lib.JsonTokenizer):
    tokenizer.save_pretrained(directory / 'tokenizer')
    return 'tokenizer'
  shutil.copyfile(paths[0], directory / 'tokenizer.model')
  return 'tokenizer.model'


def main(config):
  print(tokenize(data.DataConfig(**config.data), flags.FLAGS.output))


if __name__ == '__main__':
  meaning = 'The directory to write; must not exist.'
  cli.define_path('output', None, meaning, required=True, bucket=True)
  cli.run(main)
