r"""Trains a SentencePiece tokenizer on the training split of a corpus.

  python -m moejax.tokenizer --config=configs/mot.py --vocab_size=4096 --output=tok.model

`--config.data.*` chooses the corpus; `data.tokenizer` is ignored.
"""

import os
import pathlib
from collections.abc import Iterable, Iterator

from absl import flags

from moejax import cli, data, files
from moejax.data import corpus, tokenizer as tokenizer_lib


def train(
  config: data.DataConfig, vocab_size: int, output: str | os.PathLike, max_megabytes: int
) -> str:
  """Trains a model on the first `max_megabytes` of the training split and writes it.

  Args:
    config: the corpus to read.
    vocab_size: number of ids.
    output: the file to write, replaced if it exists.
    max_megabytes: the most text to read, in 10^6 bytes.

  Returns:
    A summary of the result.

  Raises:
    ValueError: the corpus cannot be read, or the vocabulary size does not fit it.
    OSError: the file cannot be written.
  """
  documents = list(_first_bytes(_texts(config), max_megabytes * 10**6))
  model = tokenizer_lib.train_sentencepiece(documents, vocab_size)
  path = pathlib.Path(output).expanduser()
  files.write(path, model)
  num_bytes = sum(map(len, documents))
  trained = tokenizer_lib.SentencePieceTokenizer(path)
  sample = list(_first_bytes(documents, 10**6))
  tokens = sum(len(trained.encode_bytes(text)) for text in sample)
  return (
    f'Wrote {output}: {trained.vocab_size} ids from {num_bytes / 1e6:.1f} MB of text, '
    f'{sum(map(len, sample)) / tokens:.2f} bytes per token.'
  )


def _texts(config: data.DataConfig) -> Iterator[bytes]:
  """Yields the documents of the training split."""
  if config.source == 'tokens':
    raise ValueError("data.source: 'tokens' holds no text; use the source it was written from.")
  if config.source == 'seqio':
    from moejax.data import seqio_loader

    return seqio_loader.texts(config)
  return (document.data for document in corpus.documents(config) if document.split == 'train')


def _first_bytes(texts: Iterable[bytes], limit: int) -> Iterator[bytes]:
  """Yields texts until they hold `limit` bytes; the last one may exceed it."""
  for text in texts:
    yield text
    limit -= len(text)
    if limit <= 0:
      return


def main(config):
  values = flags.FLAGS
  section = data.DataConfig(**config.data)
  print(train(section, values.vocab_size, values.output, values.max_megabytes))


if __name__ == '__main__':
  cli.define_path('output', None, 'The model file to write.', required=True)
  flags.DEFINE_integer('vocab_size', 4096, 'Number of token ids.', lower_bound=1)
  flags.DEFINE_integer('max_megabytes', 100, 'Most text to train on, in MB.', lower_bound=1)
  cli.run(main)
