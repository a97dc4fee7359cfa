"""Files of token ids whose content is checked, block by block, as it is read.

Beside `train.bin` stands `train.crc32`, the CRC-32 of each of its blocks as little-endian uint32.
A block is 64 KiB, about what a disk reads ahead for a random access: checking it when it is read
for the first time costs no more reading, and a start does not wait until a terabyte is checked.
"""

import os
import pathlib
import weakref
import zlib

import numpy as np

from moejax.exit_codes import FAILS_AGAIN

BLOCK = 2**16  # bytes
_REMEDY = 'copy the folder again, or delete it and write it again'


class DamagedData(ValueError):
  """Data is not what was written, or not of this vocabulary; the message names the place."""

  exit_code = FAILS_AGAIN  # the same step reads it again


class BlockWriter:
  """A context that writes a file and, at its end, the checksums of its blocks."""

  crc32: int  # of the checksums, when they are written

  def __init__(self, path: pathlib.Path):
    self._path, self._file = path, path.open('wb')
    self._pending, self._crcs = bytearray(), bytearray()

  def __enter__(self):
    return self

  def __exit__(self, *error):
    with self._file:
      if self._pending:
        self._write_block()
    checksums_path(self._path).write_bytes(self._crcs)
    self.crc32 = zlib.crc32(self._crcs)

  def write(self, data: bytes) -> None:
    self._pending += data
    while len(self._pending) >= BLOCK:
      self._write_block()

  def _write_block(self):
    block = self._pending[:BLOCK]
    del self._pending[:BLOCK]
    self._file.write(block)
    self._crcs += zlib.crc32(block).to_bytes(4, 'little')


def checksums_path(path: pathlib.Path) -> pathlib.Path:
  return path.with_suffix('.crc32')


class TokenFile:
  """The token ids of a file, uint16 or uint32 [n]: `tokens[start:stop]` reads some of them.

  A block is checked when it is first read, and again when the file was written to since then. It is
  read, not mapped into memory, because a mapped file that somebody truncates kills the process.
  """

  def __init__(self, path: pathlib.Path, dtype: np.dtype, num_tokens: int, crc32: int | None):
    """Opens a file.

    Args:
      path: of the file.
      dtype: of the ids.
      num_tokens: in the file.
      crc32: of its checksums; None if there are none, so that blocks cannot be checked.

    Raises ValueError if there is no such file, if it is not as long, or if its checksums are not
    those that were written.
    """
    self.dtype = dtype
    self._path, self._length, self._num_bytes = path, num_tokens, num_tokens * dtype.itemsize
    found = path.stat().st_size if path.is_file() else 0
    if found != self._num_bytes:
      raise ValueError(
        f'data.files: {path} has {found} bytes, its index says {self._num_bytes}; {_REMEDY}.'
      )
    self._crcs = None if crc32 is None else self._read_checksums(crc32)
    self._descriptor = os.open(path, os.O_RDONLY)
    weakref.finalize(self, os.close, self._descriptor)
    self._forget()

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, part: slice) -> np.ndarray:
    start, stop, _ = part.indices(self._length)
    start, stop = start * self.dtype.itemsize, stop * self.dtype.itemsize
    while True:
      if self._crcs is not None:
        for block in range(start // BLOCK, -(-stop // BLOCK)):
          if not self._checked[block]:
            self._check(block, self._crcs[block])
      data = self._read(start, stop)
      if self._status() == self._known:
        return np.frombuffer(data, self.dtype)
      if self._crcs is None:
        raise self._written_to('has no checksums that could show whether it is right')
      self._forget()

  def place(self, index: int) -> str:
    """Says where a token stands, for the beginning of an error."""
    return f'data.files: {self._path} at byte {index * self.dtype.itemsize}'

  def _read_checksums(self, crc32: int) -> np.ndarray:
    path = checksums_path(self._path)
    size = -(-self._num_bytes // BLOCK) * 4
    found = path.stat().st_size if path.is_file() else 0
    if found != size:
      raise ValueError(f'data.files: {path} has {found} bytes, expected {size}; {_REMEDY}.')
    content = path.read_bytes()
    if zlib.crc32(content) != crc32:
      raise ValueError(f'data.files: {path} is not what its index says; {_REMEDY}.')
    return np.frombuffer(content, '<u4')

  def _status(self):
    status = os.fstat(self._descriptor)
    if status.st_size != self._num_bytes:
      raise self._written_to(f'says {self._num_bytes} bytes, not {status.st_size}')
    return status.st_mtime_ns

  def _written_to(self, index_says: str) -> DamagedData:
    return DamagedData(
      f'data.files: {self._path} was written to while it was read, and its index {index_says}; '
      f'{_REMEDY}.'
    )

  def _forget(self):
    """Lets every block be checked again."""
    self._known = self._status()
    self._checked = bytearray(-(-self._num_bytes // BLOCK))

  def _check(self, block: int, expected: int):
    start = block * BLOCK
    data = self._read(start, min(start + BLOCK, self._num_bytes))
    if zlib.crc32(data) != expected:
      self._status()  # a new size says more
      swapped = np.frombuffer(data, self.dtype).byteswap().tobytes()
      what = (
        'is in the other byte order'
        if zlib.crc32(swapped) == expected
        else f'was changed after it was written, from byte {start} to {start + len(data) - 1}'
      )
      raise DamagedData(f'data.files: {self._path} {what}; {_REMEDY}.')
    self._checked[block] = True

  def _read(self, start: int, stop: int) -> bytes:
    """Reads bytes, fewer if the file ends."""
    parts = [b'']
    while start < stop:
      try:
        parts.append(os.pread(self._descriptor, stop - start, start))  # at most 2 GiB at a time
      except OSError as error:
        error.filename = str(self._path)
        raise
      if not parts[-1]:
        break
      start += len(parts[-1])
    return b''.join(parts)
