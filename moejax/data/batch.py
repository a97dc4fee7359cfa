"""The interface of data loaders.

A batch is a dict of int32 arrays [B, L]: `inputs`, `targets`, `segments` (1, 2, ... for the
documents of a sequence, 0 for padding) and `positions` (within the segment). Segments are those of
the targets: where `positions` is 0, the input is the token before the document (the end-of-document
id of the previous one, or 0), or the sequence starts inside a document. The loss covers
`segments > 0`; `model.document_mask` decides whether tokens see other documents of their sequence.
With several processes, each loads its part of the sequences of the global batch.
"""

import hashlib
import pathlib
from typing import Protocol

import numpy as np

from moejax.data import tokenizer as tokenizer_lib

Batch = dict[str, np.ndarray]


class Loader(Protocol):
  """A source of batches."""

  fingerprint: str  # 16 hex digits that identify corpus and tokenizer
  tokenizer: tokenizer_lib.Tokenizer

  def batch(self, step: int) -> Batch:
    """Returns this process's sequences of the global batch of a step.

    Training repeats the data forever. Validation has one epoch; later batches are padding.
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


def padding(num_sequences: int, length: int) -> Batch:
  """Returns a batch that is all padding."""
  names = ('inputs', 'targets', 'segments', 'positions')
  return {name: np.zeros((num_sequences, length), np.int32) for name in names}


def fingerprint(*parts: str) -> str:
  """Combines fingerprints into one of 16 hex digits."""
  return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:16]
