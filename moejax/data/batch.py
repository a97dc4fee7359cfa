"""What every source of batches gives.

A batch is a dict of int32 arrays [B, L]: `inputs`, `targets`, `segments` (1, 2, ... for the
documents in a row, 0 for padding) and `positions` (inside the segment). A target's segment is its
document's: where `positions` is 0, the input is what came before the document (its predecessor's
end-of-document id, or 0), or the row begins in the middle of one. The loss counts where
`segments > 0`; whether tokens see other documents of their row is `model.document_mask`'s to say.
With several processes, each gets its part of the rows of the global batch.
"""

import hashlib
import pathlib
from typing import Protocol

import numpy as np

from moejax.data import tokenizer as tokenizer_lib

Batch = dict[str, np.ndarray]


class Loader(Protocol):
  """A source of batches."""

  fingerprint: str  # 16 hex digits for corpus and tokenizer, the same in every run
  tokenizer: tokenizer_lib.Tokenizer

  def batch(self, step: int) -> Batch:
    """Returns this process's rows of the global batch of a step.

    Training never ends. Beyond one pass of validation, every row is padding.
    """
    ...

  def save(self, directory: pathlib.Path) -> None:
    """Writes this process's position into a directory; nothing where the step is the position."""
    ...

  def load(self, directory: pathlib.Path) -> None:
    """Continues from what `save` wrote."""
    ...


def padding(num_rows: int, length: int) -> Batch:
  """Rows in which nothing counts."""
  names = ('inputs', 'targets', 'segments', 'positions')
  return {name: np.zeros((num_rows, length), np.int32) for name in names}


def fingerprint(*parts: str) -> str:
  """Returns 16 hex digits for some fingerprints together."""
  return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:16]
