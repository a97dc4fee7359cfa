"""Batches from the tokens of a corpus; `make_loader` for every source."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from moejax.data import (
  batch as batch_lib,
  blocks,
  config as config_lib,
  corpus,
  python_files,
  token_files,
  tokenizer as tokenizer_lib,
)
from moejax.data.order import permute


def make_loader(
  config: config_lib.DataConfig,
  split: str,
  *,
  part: int = 0,
  num_parts: int = 1,
  sequences: Sequence[int] | None = None,
) -> batch_lib.Loader:
  """Returns the loader of a split, 'train' or 'validation'.

  Args:
    config: what to read.
    split: of `corpus.SPLITS`.
    part, num_parts: index and number of the equal parts of a batch; this process reads this part.
    sequences: indices of its sequences in the global batch; default: contiguous.

  Raises ValueError, naming the config field, if the source cannot be read or is too small.
  """
  if split not in corpus.SPLITS:
    raise ValueError(f'expected a split of {corpus.SPLITS}, got {split!r}')
  if config.batch_size % num_parts:
    raise ValueError(
      f'data.batch_size: expected a multiple of the {num_parts} processes, got {config.batch_size}.'
    )
  if config.source == 'seqio':
    from moejax.data import seqio_loader

    return seqio_loader.SeqioLoader(config, split, part, num_parts)
  if sequences is None:
    size = config.batch_size // num_parts
    sequences = range(part * size, (part + 1) * size)
  if config.source == 'datasets':
    from moejax.data import stream_loader

    return stream_loader.StreamLoader(config, split, sequences, is_first=part == 0)
  return TokenLoader(config, split, sequences)


class TokenLoader:
  """Cuts one long array of tokens into sequences; stateless.

  Documents are concatenated, each closed by its end-of-document id, and cut into chunks of L
  tokens. Sequence i of the corpus has tokens i*L .. (i+1)*L - 1 as inputs and the tokens one later
  as targets, so every token but the first is a target once per epoch (in training, up to L - 1 at
  the end are dropped).

  `segments` counts the documents of a sequence, `positions` the tokens of each document within the
  sequence. As an input, the end-of-document id has position 0 of the next document, because that
  document's first token is predicted from it. No text encodes to that id; a seqio task that writes
  it inside its documents splits them.

  Training visits the sequences of every epoch in a pseudo-random order, a function of seed and
  epoch; validation visits all of them once, in a fixed one, and fills up its last batch with others
  that are not counted. The first token of `data.validation_files` is a target too: it follows an
  end of document. Hence `batch(step)` depends only on corpus, seed and step: steps are random
  access, and the same for any number of processes.
  """

  def __init__(self, config, split, sequences):
    self.tokenizer = tokenizer_lib.make_tokenizer(config)
    read = _READERS.get(config.source, _read_tokens)
    self._tokens, corpus_fingerprint = read(config, self.tokenizer, split)
    size, length = config.batch_size, config.sequence_length
    if len(self._tokens) < 2:
      raise ValueError(f'data.files: no text for the {split} split; add more text.')
    self._is_train = split == 'train'
    if not self._is_train and config.validation_files:
      self._tokens = np.append(self._tokens.dtype.type(self.tokenizer.eos_id), self._tokens[:])
    elif len(self._tokens) <= size * length:
      raise ValueError(
        f'data.batch_size: the {split} split has {len(self._tokens)} tokens, but one batch of '
        f'{size} sequences of {length} needs {size * length + 1}; lower data.batch_size or '
        'data.sequence_length, or add more text.'
      )
    self.fingerprint = batch_lib.fingerprint(corpus_fingerprint, self.tokenizer.fingerprint)
    self._length, self._size, self._seed = length, size, config.seed
    if self._is_train:
      self.num_sequences = (len(self._tokens) - 1) // length
      self.num_batches = self.num_sequences // size
    else:
      self.num_sequences = batch_lib.num_sequences(self._tokens, length)
      self.num_batches = -(-self.num_sequences // size)
    self._in_batch = np.array(sequences)

  def batch(self, step: int) -> batch_lib.Batch:
    """Returns this process's sequences of the global batch of any step."""
    places, length = step * self._size + self._in_batch, self._length
    if self._is_train:
      return batch_lib.cut(self._tokens, self._shuffled(places), length, self.tokenizer)
    if step >= self.num_batches:
      return batch_lib.padding(len(places), length)
    return batch_lib.validation(self._tokens, places, self._size, length, self.tokenizer)

  def save(self, directory: pathlib.Path) -> None:
    """Nothing to write: the step is the position."""

  def load(self, directory: pathlib.Path) -> None:
    """Nothing to read."""

  def _shuffled(self, places: np.ndarray) -> np.ndarray:
    """Returns which sequences of the corpus stand at these places of training."""
    epochs, place = np.divmod(places, self.num_sequences)
    indices = np.empty_like(place)
    for epoch in np.unique(epochs):  # a batch may end one epoch and begin the next
      here = epochs == epoch
      indices[here] = permute(place[here], self.num_sequences, (self._seed, int(epoch)))
    return indices


def _open_tokens(config, tokenizer, split) -> tuple[np.ndarray | blocks.TokenFile, str]:
  """`_read_tokens` of token files."""
  index = token_files.read_index(config.files, tokenizer)
  if not config.validation_files:
    return token_files.open_split(index, split), index.fingerprint
  other = token_files.read_index(config.validation_files, tokenizer)
  fingerprint = batch_lib.fingerprint(index.fingerprint, other.fingerprint)
  if split == 'train':
    return token_files.open_split(index, split), fingerprint
  parts = [token_files.open_split(other, part)[:] for part in corpus.SPLITS]
  return np.concatenate(parts), fingerprint


def _open_environment(config, tokenizer, split) -> tuple[np.ndarray | blocks.TokenFile, str]:
  """`_read_tokens` of Python files, which are many and change rarely: their tokens are kept."""
  paths = (path for _, path in python_files.environment())
  if folder := token_files.kept(config, tokenizer, paths):
    config = dataclasses.replace(config, source='tokens', files=folder)
    return _open_tokens(config, tokenizer, split)
  return _read_tokens(config, tokenizer, split)


def _read_tokens(config, tokenizer, split) -> tuple[np.ndarray, str]:
  """Returns the tokens of a split, and the fingerprint of the whole corpus."""
  digest, tokens = hashlib.sha256(), bytearray()  # which grows in place
  for _, ids, _ in corpus.encode(config, tokenizer, digest, splits=(split,)):
    tokens += token_files.to_bytes(ids, tokenizer.vocab_size)
  dtype = token_files.dtype_for(tokenizer.vocab_size)
  return np.frombuffer(tokens, dtype), digest.hexdigest()[:16]


# Where a split's tokens come from, of sources that are not read as text every time.
_READERS = {'tokens': _open_tokens, 'environment': _open_environment}
