"""Batches from a dataset that is streamed: never whole in memory, resumed exactly."""

import collections
import concurrent.futures
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moejax import files
from moejax.data import batch as batch_lib, corpus, hf_datasets, tokenizer as tokenizer_lib
from moejax.data.order import permute

_BLOCK = 4096  # sequences, at least: pieces of a long document would otherwise stay together
_FILE = 'stream.json'


class Position(NamedTuple):
  """A token of a stream."""

  epoch: int = 0
  place: int = 0  # of the shard, in the order of the epoch
  document: int = 0  # of the shard
  token: int = 0  # of the document


class StreamLoader:
  """Cuts the documents of a streamed dataset into sequences, as TokenLoader does.

  The order of the shards is a function of seed and epoch; their documents come in order. Sequences
  are shuffled within blocks of about 4096, so a position is the first token of a block and the
  step. Every process reads the whole stream and keeps its sequences: batches do not depend on the
  number of processes, and a run may resume with another one.

  Steps must be consecutive, from 0 or from the step after the saved one; step 0 always restarts.
  Validation reads its split once, shuffled likewise, and fills up its last batch as TokenLoader
  does. Where it is a twentieth of the training documents, which may never end, it ends after about
  4096 sequences, and its blocks are as much smaller, so that they do not take longer to find.
  """

  def __init__(self, config, split: str, sequences: Sequence[int], is_first: bool):
    """`sequences` are those of this process in a batch; the first process saves the position."""
    self.tokenizer = tokenizer_lib.make_tokenizer(config)
    splits = hf_datasets.open_splits(config)
    self._split = splits.get(split, splits['train'])
    self._hashed = 'validation' not in splits  # then a twentieth of train is validation
    self._name, self._is_train, self._is_first = split, split == 'train', is_first
    self._seed, self._length, self._size = config.seed, config.sequence_length, config.batch_size
    share = corpus.VALIDATION_ONE_IN if self._hashed and not self._is_train else 1
    self._batches = -(-_BLOCK // share // self._size)  # of a block
    self._max_blocks = share if share > 1 else None
    self._in_batch = np.array(sequences)
    name = hf_datasets.fingerprint(config)
    self.fingerprint = batch_lib.fingerprint(
      'datasets', name, config.field, self.tokenizer.fingerprint
    )
    self._identity = {'fingerprint': self.fingerprint, 'num_shards': self._split.num_shards}
    self._pool = concurrent.futures.ThreadPoolExecutor(1)
    self._start(0, Position())
    if not self._is_train and not self._has_a_batch():
      raise ValueError(
        f'data.batch_size: the validation split of {config.task!r} has fewer tokens than one batch '
        f'of {self._size} sequences of {self._length}; lower it or data.sequence_length.'
      )

  def batch(self, step: int) -> batch_lib.Batch:
    """Returns this process's sequences of a step, which must be in this block or the next."""
    number, step_in_block = divmod(step, self._batches)
    if number == 0 and self._number > 0:
      self._start(0, Position())
    if not self._number <= number <= self._number + 1:
      raise ValueError(
        f'expected a step after the last one (a stream is read in order), got {step}'
      )
    while self._tokens is None or self._number < number:
      self._advance()
    first, length = step_in_block * self._size, self._length
    places = first + self._in_batch
    if self._is_train:
      places = permute(places, self._batches * self._size, (self._seed, number))
      return batch_lib.cut(self._tokens, places, length, self.tokenizer)
    if first >= batch_lib.num_sequences(self._tokens, length):
      return batch_lib.padding(len(places), length)
    return batch_lib.validation(self._tokens, places, self._size, length, self.tokenizer)

  def save(self, directory: pathlib.Path) -> None:
    """Writes where the block of the last batch begins; it is the same for all processes."""
    if self._is_first:
      state = {'block': self._number, 'position': self._position._asdict()} | self._identity
      directory.mkdir(parents=True, exist_ok=True)
      files.write(directory / _FILE, json.dumps(state))

  def load(self, directory: pathlib.Path) -> None:
    """Restores the position that `save` wrote.

    Raises ValueError if nothing was saved there, or by a run with other data, or if it is damaged.
    """
    path = directory / _FILE
    if not path.is_file():
      raise ValueError(f'the checkpoint has no position in a stream ({path} is missing).')
    try:
      state = files.parse_json(path.read_bytes())
      saved = {key: state[key] for key in self._identity}
      block, position = state['block'], Position(**state['position'])
      if not all(type(number) is int and number >= 0 for number in (block, *position)):
        raise ValueError('expected numbers')
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(f'{path} is damaged ({type(error).__name__}: {error}).') from error
    for key, value in self._identity.items():
      if saved[key] != value:
        raise ValueError(f'data.task: the saved position has {key} {saved[key]}, this run {value}.')
    self._start(block, position)

  def _start(self, number: int, position: Position) -> None:
    """Goes to a block, which begins at a position."""
    self._number, self._position, self._tokens = number, position, None
    self._blocks = itertools.islice(self._read_blocks(position), self._max_blocks)
    self._next = self._pool.submit(next, self._blocks, None)

  def _has_a_batch(self) -> bool:
    """Whether the first block has the tokens of a full batch."""
    position_and_tokens = self._next.result()
    return bool(position_and_tokens) and (len(position_and_tokens[1]) > self._size * self._length)

  def _advance(self) -> None:
    """Takes the next block, and lets the one after it be read meanwhile."""
    self._number += self._tokens is not None
    self._position, self._tokens = self._next.result() or (self._position, np.zeros(1, np.int32))
    self._next = self._pool.submit(next, self._blocks, None)

  def _read_blocks(self, position: Position) -> Iterator[tuple[Position, np.ndarray]]:
    """Yields where blocks begin, and their tokens [sequences * L + 1]; the last is the next's.

    The last block of validation is shorter.
    """
    size = self._batches * self._size * self._length
    pending, total, used = collections.deque(), 0, position.token
    for document in self._documents(position):
      pending.append(document)
      total += len(document[1])
      if used >= total:
        raise ValueError(f'data.task: the saved position, {position}, is not in the data.')
      while total - used > size:
        tokens = np.concatenate([ids for _, ids in pending])[used : used + size + 1]
        yield pending[0][0]._replace(token=used), tokens
        used += size
        while used >= len(pending[0][1]):
          num_tokens = len(pending.popleft()[1])
          used, total = used - num_tokens, total - num_tokens
    if total - used > 1:
      yield pending[0][0]._replace(token=used), np.concatenate([ids for _, ids in pending])[used:]

  def _documents(self, position: Position) -> Iterator[tuple[Position, np.ndarray]]:
    """Yields documents from that of a position on, as where they begin and their ids."""
    epoch, start, first, _ = position
    while True:
      is_empty = True
      order = np.arange(self._split.num_shards)
      if self._is_train:
        order = permute(order, len(order), (self._seed, epoch))
      for place in range(start, len(order)):
        for number, ids in self._encoded(int(order[place]), first):
          is_empty = False
          yield Position(epoch, place, number), ids
        first = 0
      if is_empty and position.place == position.document == 0:
        raise ValueError(f'data.task: no text for the {self._name} split.')
      if not self._is_train:
        return
      epoch, start, position = epoch + 1, 0, Position()

  def _encoded(self, shard: int, first: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields number and ids of the documents of a shard that are of this split."""
    texts = enumerate(self._split.texts(shard, first), first)
    documents = (
      corpus.Document(str(number), corpus.split_of(data) if self._hashed else self._name, data)
      for number, data in texts
    )
    for group in corpus.groups(document for document in documents if document.split == self._name):
      encoded = self.tokenizer.encode_documents([document.data for document in group])
      for document, ids in zip(group, encoded, strict=True):
        yield int(document.name), np.append(ids, np.int32(self.tokenizer.eos_id))
