"""The order of sequences: a permutation without a table."""

import numpy as np


def permute(index: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
  """A pseudo-random permutation of range(size), evaluated only at `index`.

  A Feistel network of four rounds over the next power of four, applied repeatedly until the result
  is below `size` (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
  Its memory does not grow with `size`.

  Args:
    index: int64 array of indices in [0, size).
    size: the length of the permutation.
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


def _feistel(x: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
  """Applies the network once to numbers of 2 * bits bits."""
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
