r"""Trains a SentencePiece tokenizer on the training split of a corpus.

  python -m moejax.tokenizer --config=configs/mot.py --vocab_size=4096 --output=tok.model

`--config.data.*` chooses the corpus; `data.tokenizer` is ignored.
"""

import io
import os
import pathlib
import re
from collections.abc import Iterable, Iterator

import sentencepiece
from absl import flags

from moejax import cli, data, files
from moejax.data import corpus, tokenizer as tokenizer_lib

_MAX_SENTENCE_BYTES = 16_384  # longer lines (minified code, flattened books) are split


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
  model = train_sentencepiece(documents, vocab_size)
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


def train_sentencepiece(texts: Iterable[bytes], vocab_size: int) -> bytes:
  """Trains a BPE model that reproduces texts exactly, except that U+2581 becomes a space.

  (SentencePiece marks spaces with it.) Characters outside the vocabulary fall back to their bytes,
  nothing is normalised, and runs of spaces may be one piece (indentation: a third fewer tokens on
  Python code).

  Args:
    texts: UTF-8 documents.
    vocab_size: number of ids, including the three special ones and 256 bytes.

  Returns:
    The bytes of a .model file, the same for the same texts.

  Raises:
    ValueError: `vocab_size` is too small for the characters, or too large for the texts.
  """
  # The trainer reserves U+2585 and would skip every line that contains it.
  split = re.compile('[\n\u2585]').split
  lines = (line for text in texts for line in split(text.decode('utf-8', 'replace')) if line)
  sentences = (sentence for line in lines for sentence in _sentences(line))
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=sentences,
      model_writer=model,
      vocab_size=vocab_size,
      model_type='bpe',
      byte_fallback=True,
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      allow_whitespace_only_pieces=True,
      user_defined_symbols=['\n', '\t'],
      pad_id=tokenizer_lib.PAD_ID,
      eos_id=tokenizer_lib.EOS_ID,
      unk_id=tokenizer_lib.UNK_ID,
      bos_id=-1,
      max_sentence_length=_MAX_SENTENCE_BYTES,
      minloglevel=2,
    )
  except RuntimeError as error:
    # The reason follows the source location and the condition.
    reason = str(error).rpartition('] ')[2] or 'there is too little text'
    raise ValueError(f'--vocab_size: {vocab_size} does not fit these texts: {reason}') from error
  return model.getvalue()


def _sentences(line: str) -> Iterator[str]:
  """Cuts a line that is too long for the trainer, before spaces if it has any."""
  is_long, size = len(line.encode()) > _MAX_SENTENCE_BYTES, _MAX_SENTENCE_BYTES // 4  # characters
  start = 0
  while is_long and start + size < len(line):
    space = line.rfind(' ', start + 1, start + size)
    end = start + size if space < 0 else space
    yield line[start:end]
    start = end
  yield line[start:]


def _texts(config: data.DataConfig) -> Iterator[bytes]:
  """Yields the documents of the training split."""
  if config.source == 'tokens':
    raise ValueError("data.source: 'tokens' holds no text; use the source it was written from.")
  if config.source == 'seqio':
    return _task_texts(config)
  return (document.data for document in corpus.documents(config) if document.split == 'train')


def _task_texts(config: data.DataConfig) -> Iterator[bytes]:
  """Yields the training split of a seqio task; raises ValueError if it does not keep its text."""
  from moejax.data import seqio_loader

  for _, example in seqio_loader.examples(config, None, ('train',)):
    if 'targets_pretokenized' not in example:
      raise ValueError(f'data.task: {config.task!r} does not keep the text of its targets.')
    yield example['targets_pretokenized']


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
  with cli.waiting_for('training the tokenizer'):
    done = train(section, values.vocab_size, values.output, values.max_megabytes)
  print(done)


if __name__ == '__main__':
  cli.define_path('output', None, 'The model file to write.', required=True)
  flags.DEFINE_integer('vocab_size', 4096, 'Number of token ids.', lower_bound=1)
  flags.DEFINE_integer('max_megabytes', 100, 'Most text to train on, in MB.', lower_bound=1)
  cli.run(main)
