"""The interface of data loaders.

A batch is a dict of int32 arrays [B, L]: `inputs`, `targets`, `segments` (1, 2, ... for the
documents of a sequence, 0 for padding) and `positions` (within the segment). Segments are those of
the targets: where `positions` is 0, the input is the token before the document (the end-of-document
id of the previous one, or 0), or the sequence starts inside a document. The loss covers
`segments > 0`; `model.document_mask` decides whether tokens see other documents of their sequence.
Batches of validation also have `counted`, bool [B, L]: where it is False, a sequence only fills up
the last batch, so that it is grouped as in training, and the loss does not cover it. With several
processes, each loads its part of the sequences of the global batch. Every id is one of the
vocabulary: an array that is indexed beyond its end gives no error on an accelerator.
"""

import hashlib
import pathlib
from collections.abc import Callable
from typing import Protocol

import numpy as np

from moejax.data import tokenizer as tokenizer_lib
from moejax.data.blocks import DamagedData, TokenFile
from moejax.data.order import permute

Batch = dict[str, np.ndarray]

_VALIDATION_ORDER = (0,)  # key of its permutation


class Loader(Protocol):
  """A source of batches."""

  fingerprint: str  # 16 hex digits that identify corpus and tokenizer
  tokenizer: tokenizer_lib.Tokenizer

  def batch(self, step: int) -> Batch:
    """Returns this process's sequences of the global batch of a step.

    Training repeats the data forever. Validation has every token of its split once, in a fixed
    pseudo-random order of sequences that does not depend on `data.seed`; later batches are padding.
    """
    ...

  def save(self, directory: pathlib.Path) -> None:
    """Writes this process's position to a directory; nothing if the step is the position."""

  def load(self, directory: pathlib.Path) -> None:
    """Restores the position that `save` wrote."""


def from_tokens(tokens: np.ndarray, eos_id: int) -> Batch:
  """Returns the batch of consecutive tokens [B, L + 1] of documents that `eos_id` closes.

  As an input, `eos_id` has position 0 of the next document, because that document's first token is
  predicted from it.
  """
  tokens = tokens.astype(np.int32)
  inputs = np.ascontiguousarray(tokens[:, :-1])
  begins = inputs == eos_id
  begins[:, 0] = True
  places = np.arange(inputs.shape[1], dtype=np.int32)
  return {
    'inputs': inputs,
    'targets': np.ascontiguousarray(tokens[:, 1:]),
    'segments': np.cumsum(begins, axis=1, dtype=np.int32),
    'positions': places - np.maximum.accumulate(np.where(begins, places, 0), axis=1),
  }


def check_ids(ids: np.ndarray, vocab_size: int, place: Callable[[int], str]) -> None:
  """Raises DamagedData if an id is none of the vocabulary.

  Args:
    ids: int32 array.
    vocab_size: number of ids.
    place: says where the i-th of them stands, as the beginning of a sentence.
  """
  unsigned = ids.view(np.uint32)  # negative ids are large ones
  if ids.size and unsigned.max() >= vocab_size:
    first = int(np.argmax(unsigned.reshape(-1) >= vocab_size))
    raise DamagedData(
      f'{place(first)} has id {ids.reshape(-1)[first]}, but the tokenizer (data.tokenizer) has ids '
      f'0 to {vocab_size - 1}; write the data again with this tokenizer.'
    )


def cut(
  tokens: np.ndarray | TokenFile,
  places: np.ndarray,
  length: int,
  tokenizer: tokenizer_lib.Tokenizer,
) -> Batch:
  """Returns sequences of one array of tokens, such as number 2 from token 2 * L on.

  The last sequence may be shorter than L tokens; it ends in padding. Raises DamagedData if an id is
  none of the tokenizer's.
  """
  starts = places * length
  rows = np.zeros((len(starts), length + 1), np.int32)
  for row, start in zip(rows, starts, strict=True):
    text = tokens[start : start + length + 1]
    row[: len(text)] = text
  place = lambda i: _place(tokens, int(starts[i // (length + 1)]) + i % (length + 1))
  check_ids(rows, tokenizer.vocab_size, place)
  batch = from_tokens(rows, tokenizer.eos_id)
  batch['segments'] *= starts[:, None] + np.arange(length) < len(tokens) - 1
  return batch


def _place(tokens: np.ndarray | TokenFile, index: int) -> str:
  return (
    tokens.place(index) if isinstance(tokens, TokenFile) else f'data: token {index} of the text'
  )


def validation(
  tokens: np.ndarray | TokenFile,
  places: np.ndarray,
  size: int,
  length: int,
  tokenizer: tokenizer_lib.Tokenizer,
) -> Batch:
  """Returns the sequences at these places of the order in which validation visits an array.

  Places beyond the last sequence are filled from the beginning of the order. If there is no full
  batch of `size`, a sequence would meet copies of itself; they are padding then.
  """
  number = num_sequences(tokens, length)
  counted = places < number
  batch = cut(tokens, permute(places % number, number, _VALIDATION_ORDER), length, tokenizer)
  if number < size:
    batch['segments'] *= counted[:, None]
  return batch | {'counted': np.repeat(counted[:, None], length, axis=1)}


def num_sequences(tokens: np.ndarray | TokenFile, length: int) -> int:
  """Of an array in which every token but the first is a target; the last may be shorter."""
  return -(-(len(tokens) - 1) // length)


def padding(num_sequences: int, length: int) -> Batch:
  """Returns a batch of validation that is all padding."""
  names = ('inputs', 'targets', 'segments', 'positions')
  batch = {name: np.zeros((num_sequences, length), np.int32) for name in names}
  return batch | {'counted': np.zeros((num_sequences, length), bool)}


def fingerprint(*parts: str) -> str:
  """Combines fingerprints into one of 16 hex digits."""
  return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:16]
