"""Batches of tokens.

A batch is a dict of int32 arrays [B, L]: `inputs`, `targets`, `segments` (1, 2, ... for the
documents packed into a row, 0 for padding) and `positions` (inside the segment). The loss counts
where `segments > 0`. With several processes, each gets its part of the rows of the global batch.
"""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from moejax.data import config as config_lib, corpus, token_files, tokenizer as tokenizer_lib

Batch = dict[str, np.ndarray]


class Loader(Protocol):
  """A source of batches."""

  fingerprint: str  # 16 hex digits for corpus and tokenizer, the same in every run
  bytes_per_token: float | None  # bytes of text per target; None where nobody has counted
  num_batches: int | None  # full batches in one pass; None likewise

  def batch(self, step: int) -> Batch:
    """Returns this process's rows of the global batch of a step."""
    ...

  def save(self, directory: pathlib.Path) -> None:
    """Writes this process's position into a directory; nothing where the step is the position."""
    ...

  def load(self, directory: pathlib.Path) -> None:
    """Continues from what `save` wrote."""
    ...


def make_loader(
  config: config_lib.DataConfig,
  split: str,
  *,
  part: int = 0,
  num_parts: int = 1,
  rows: Sequence[int] | None = None,
) -> Loader:
  """Returns the loader of a split, 'train' or 'validation'.

  Args:
    config: what to read.
    split: of `corpus.SPLITS`.
    part, num_parts: which of how many equal parts of every batch this process reads.
    rows: the rows of the global batch that are this part; default: the block number `part`.

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
  size = config.batch_size // num_parts
  return TokenLoader(config, split, range(part * size, (part + 1) * size) if rows is None else rows)


class TokenLoader:
  """Cuts one long array of tokens into rows; keeps no state.

  Documents follow each other, each closed by its end-of-document id, and are cut into chunks of L
  tokens. Row i of the corpus has tokens i*L .. (i+1)*L - 1 as inputs and those one further on as
  targets, so every token but the first is a target once per pass (up to L - 1 at the end are left
  over). Attention may look across the borders of documents in a row, as in GPT-2: `segments` is 1
  everywhere, `positions` counts the row.

  Training visits the rows of every pass in a pseudo-random order that is a function of seed and
  pass; validation goes through its full batches in order, again and again. Hence `batch(step)`
  depends on corpus, seed and step alone: any step at once, the same rows for any number of
  processes.
  """

  def __init__(self, config, split, rows):
    if config.source == 'tokens':
      index = token_files.read_index(config)
      self._tokens = token_files.read(config, index, split)
      num_bytes, corpus_fingerprint = index['splits'][split]['bytes'], index['fingerprint']
      tokenizer_fingerprint = index['tokenizer_fingerprint']
    else:
      tokenizer = tokenizer_lib.make_tokenizer(config)
      self._tokens, num_bytes, corpus_fingerprint = _read_tokens(config, tokenizer, split)
      tokenizer_fingerprint = tokenizer.fingerprint
    size, length = config.batch_size, config.sequence_length
    if len(self._tokens) <= size * length:
      raise ValueError(
        f'data.batch_size: the {split} split has {len(self._tokens)} tokens, but one batch of '
        f'{size} rows of {length} needs {size * length + 1}; lower data.batch_size or '
        'data.sequence_length, or give more text.'
      )
    self.fingerprint = fingerprint(corpus_fingerprint, tokenizer_fingerprint)
    self.bytes_per_token = num_bytes / len(self._tokens) if num_bytes else None
    self.num_rows = (len(self._tokens) - 1) // length
    self.num_batches = self.num_rows // size
    self._length, self._size, self._seed = length, size, config.seed
    self._shuffle = split == 'train'
    self._in_batch = np.array(rows)

  def batch(self, step: int) -> Batch:
    """Returns this process's rows of the global batch of any step."""
    length = self._length
    starts = self._rows(step) * length
    tokens = np.stack([self._tokens[start : start + length + 1] for start in starts])
    tokens = tokens.astype(np.int32)
    shape = (len(starts), length)
    return {
      'inputs': np.ascontiguousarray(tokens[:, :-1]),
      'targets': np.ascontiguousarray(tokens[:, 1:]),
      'segments': np.ones(shape, np.int32),
      'positions': np.tile(np.arange(length, dtype=np.int32), (len(starts), 1)),
    }

  def save(self, directory: pathlib.Path) -> None:
    """Nothing to write: the step says where we are."""

  def load(self, directory: pathlib.Path) -> None:
    """Nothing to read."""

  def _rows(self, step: int) -> np.ndarray:
    """Returns which rows of the corpus this process reads at a step."""
    if not self._shuffle:
      return step % self.num_batches * self._size + self._in_batch
    place = step * self._size + self._in_batch
    passes = place // self.num_rows
    rows = np.empty_like(place)
    for number in np.unique(passes):  # a batch may end one pass and begin the next
      here = passes == number
      rows[here] = permute(place[here] % self.num_rows, self.num_rows, (self._seed, int(number)))
    return rows


def permute(index: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
  """A pseudo-random permutation of range(size), evaluated at some places only.

  A Feistel network of four rounds over the next power of four, applied again and again until the
  result is below `size` (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
  2002). Its memory does not grow with `size`.

  Args:
    index: int64 array of places in [0, size).
    size: how many there are.
    key: non-negative integers that choose the permutation.

  Returns:
    int64 array like `index`.
  """
  bits = max(1, ((size - 1).bit_length() + 1) // 2)
  keys = np.random.SeedSequence(key).generate_state(4, np.uint64)
  x = _feistel(index.astype(np.uint64), bits, keys)
  while (outside := x >= size).any():
    x[outside] = _feistel(x[outside], bits, keys)
  return x.astype(np.int64)


def fingerprint(*parts: str) -> str:
  """Returns 16 hex digits for some fingerprints together."""
  return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:16]


def _feistel(x: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
  """One pass of the network over numbers of 2 * bits bits."""
  mask = np.uint64(2**bits - 1)
  left, right = x >> np.uint64(bits), x & mask
  for key in keys:
    left, right = right, left ^ (_mix(right + key) & mask)
  return left << np.uint64(bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
  """The finaliser of SplitMix64 (Steele et al., 2014): every input bit moves every output bit."""
  x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
  return x ^ x >> np.uint64(31)


def _read_tokens(config, tokenizer, split) -> tuple[np.ndarray, int, str]:
  """Returns the tokens of a split, its bytes of text, and the fingerprint of the whole corpus."""
  digest = hashlib.sha256()
  dtype = token_files.dtype_for(tokenizer.vocab_size)
  pieces, num_bytes = [np.zeros(0, dtype)], 0
  for document in corpus.encode(config, tokenizer, digest, splits=(split,)):
    pieces.append(document.ids.astype(dtype))
    num_bytes += document.num_bytes
  return np.concatenate(pieces), num_bytes, corpus.short_digest(digest)
