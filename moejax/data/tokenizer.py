"""Text to token ids and back.

Every tokenizer reserves the same three ids: 0 is unused (batches mark padding by `segments`), 1
ends a document, 2 is unknown. No text encodes to 0 or 1.
"""

import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

PAD_ID = 0
EOS_ID = 1
UNK_ID = 2
NUM_SPECIAL = 3

GPT2_PREFIX = 'gpt2:'
_GPT2_FILES = ('vocab.json', 'merges.txt')
# The pre-tokenizer of GPT-2: contractions, words, numbers, symbols (each with a space before it).
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# tiktoken's regular expression panics on a longer run of whitespace.
_LONGEST_WHITESPACE = 999_000
_MAX_IDS = 2**24  # beyond any real vocabulary: larger ids are typing errors


class Tokenizer:
  """Maps text to token ids, each of which represents some bytes."""

  vocab_size: int
  fingerprint: str  # 16 hex digits that identify the ids of all texts
  keeps_bytes = False  # whether invalid UTF-8 is preserved
  pad_id = PAD_ID
  eos_id = EOS_ID

  _bytes: list[bytes]  # of every id; b'' for special ones

  def encode(self, text: str) -> np.ndarray:
    """Returns the int32 ids of a text, without an end-of-document id."""
    return self.encode_bytes(to_bytes(text))

  def encode_bytes(self, data: bytes) -> np.ndarray:
    """`encode` of UTF-8 bytes; invalid ones become U+FFFD unless `keeps_bytes`."""
    raise NotImplementedError

  def decode(self, ids: Any) -> str:
    """Returns the text of ids; special ids and ids beyond the vocabulary are skipped.

    Ids are decoded as a continuation, so that texts of successive ids can be joined: the space that
    some SentencePiece models prepend to a text is included.
    """
    ids, end = np.asarray(ids, np.int64).reshape(-1), len(self._bytes)
    ids = ids[(ids >= 0) & (ids < end) & (ids != self.eos_id)].tolist()
    return b''.join(self._bytes[i] for i in ids).decode('utf-8', 'replace')

  def num_bytes(self, inputs: Any, targets: Any) -> np.ndarray:
    """Counts the bytes of UTF-8 that each target represents, int32 like `targets`.

    `inputs` are the ids before the targets: after the end of a document (or padding, with which
    seqio begins one), the space that a model prepends is not part of the text. Special ids count 0,
    and so does the unknown id, whose text is lost.
    """
    del inputs
    return self._lengths.take(targets, mode='clip')

  @functools.cached_property
  def _lengths(self) -> np.ndarray:
    lengths = np.zeros(self.vocab_size + 1, np.int32)  # the last is for ids beyond the vocabulary
    lengths[: len(self._bytes)] = [len(data) for data in self._bytes]
    lengths[self.eos_id] = 0
    return lengths


class BytesTokenizer(Tokenizer):
  """One token per byte of UTF-8: byte b has id b + 3."""

  vocab_size = 256 + NUM_SPECIAL
  keeps_bytes = True
  _bytes = [b''] * NUM_SPECIAL + [bytes([byte]) for byte in range(256)]

  def __init__(self):
    self.fingerprint = _fingerprint(b'bytes')

  def encode_bytes(self, data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8).astype(np.int32) + NUM_SPECIAL


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model.

  A model trained with pad 0, end of sentence 1, unknown 2 (ours, T5's) keeps its ids. Those of any
  other (no padding, or Llama's unknown 0) are shifted by 3, to make room for the reserved ids; its
  own unknown id becomes 2.
  """

  def __init__(self, path: pathlib.Path):
    """Reads a .model file; raises ValueError if it is not one."""
    import sentencepiece

    sentencepiece.set_min_log_level(2)  # one line per load otherwise
    model = path.read_bytes()
    self._processor = sentencepiece.SentencePieceProcessor()
    try:
      self._processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
      raise ValueError('not a SentencePiece model') from error
    processor = self._processor
    special = (processor.pad_id(), processor.eos_id(), processor.unk_id())
    self.shift = 0 if special == (PAD_ID, EOS_ID, UNK_ID) else NUM_SPECIAL
    self.vocab_size = processor.get_piece_size() + self.shift
    self.path, self.model = path, model
    self.fingerprint = _fingerprint(b'sentencepiece', model)

  def encode_bytes(self, data: bytes) -> np.ndarray:
    ids = np.asarray(self._processor.encode(data.decode('utf-8', 'replace')), np.int32)
    return np.where(ids == self._processor.unk_id(), UNK_ID, ids + self.shift).astype(np.int32)

  def num_bytes(self, inputs: Any, targets: Any) -> np.ndarray:
    first = np.isin(inputs, (self.eos_id, self.pad_id))
    at_start = self._lengths_at_start.take(targets, mode='clip')
    return np.where(first, at_start, super().num_bytes(inputs, targets))

  @functools.cached_property
  def _bytes(self) -> list[bytes]:
    number = self._processor.get_piece_size()
    return [b''] * self.shift + [self._piece_bytes(i) for i in range(number)]

  def _piece_bytes(self, i: int) -> bytes:
    piece = self._processor.id_to_piece(i)
    if self._processor.is_byte(i):
      return bytes([int(piece[3:-1], 16)])  # <0x0A>
    if self._processor.is_control(i) or self._processor.is_unknown(i):
      return b''
    return piece.replace('\u2581', ' ').encode()

  @functools.cached_property
  def _lengths_at_start(self) -> np.ndarray:
    """Lengths at the start of a text: without the space, if the model prepends one."""
    adds_space = self._processor.encode('a', out_type=str)[0].startswith('\u2581')
    begins = [data.startswith(b' ') for data in self._bytes]
    lengths = self._lengths.copy()
    lengths[: len(begins)] -= np.array(begins, np.int32) * adds_space
    return lengths


class Gpt2Tokenizer(Tokenizer):
  """Byte-level BPE in GPT-2's format, a local vocab.json and merges.txt; ids are shifted by 3.

  GPT-2's id 0, '!', is 3 here. Its last id, <|endoftext|>, never occurs, because id 1 ends a
  document; nor do the special tokens of other vocabularies (RoBERTa's).
  """

  def __init__(self, vocab_path: pathlib.Path, merges_path: pathlib.Path):
    """Reads the two files; raises ValueError if they are inconsistent."""
    import tiktoken

    vocab, merges = vocab_path.read_bytes(), merges_path.read_bytes()
    ids = _gpt2_vocabulary(vocab)
    tokens = _gpt2_tokens(merges)
    if missing := [token for token in tokens if token not in ids]:
      raise ValueError(f'vocab.json lacks {len(missing)} tokens of merges.txt, e.g. {missing[0]!r}')
    to_byte = _gpt2_alphabet()
    data = [bytes(to_byte[c] for c in token) for token in tokens]
    ranks = {token: rank for rank, token in enumerate(data)}
    self._encoding = tiktoken.Encoding(
      'gpt2', pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    self.vocab_size = max(ids.values()) + 1 + NUM_SPECIAL
    self._ids = np.array([ids[token] + NUM_SPECIAL for token in tokens], np.int32)  # by rank
    self._bytes = [b''] * self.vocab_size
    for i, token in zip(self._ids, data, strict=True):
      self._bytes[i] = token
    self.fingerprint = _fingerprint(b'gpt2', vocab, merges)

  def encode_bytes(self, data: bytes) -> np.ndarray:
    parts = _whitespace_cut(data.decode('utf-8', 'replace'))
    return self._ids[[rank for part in parts for rank in self._encoding.encode_ordinary(part)]]


def make_tokenizer(config) -> Tokenizer:
  """Returns the tokenizer of a DataConfig; its `eos_id`, unless it is -1, replaces the own one.

  Raises ValueError if a file is missing or invalid.
  """
  tokenizer = _tokenizer_named(config.tokenizer)
  if config.eos_id not in (-1, tokenizer.eos_id):
    tokenizer.eos_id = config.eos_id
    tokenizer.vocab_size = max(tokenizer.vocab_size, config.eos_id + 1)
    tokenizer.fingerprint = _fingerprint(tokenizer.fingerprint.encode(), b'%d' % config.eos_id)
  return tokenizer


def _tokenizer_named(name: str) -> Tokenizer:
  if name == 'bytes':
    return BytesTokenizer()
  paths = tokenizer_files(name)
  for path in paths:
    if not path.is_file():
      raise ValueError(
        f"data.tokenizer: expected 'bytes', a SentencePiece model file or 'gpt2:DIR' with "
        f'{" and ".join(_GPT2_FILES)}; got {name!r}, but there is no file {path.resolve()}. '
        'python -m moejax.tokenizer trains a SentencePiece model.'
      )
  kind = Gpt2Tokenizer if name.startswith(GPT2_PREFIX) else SentencePieceTokenizer
  try:
    return kind(*paths)
  except (ValueError, OSError) as error:
    raise ValueError(f'data.tokenizer: cannot use {name!r}: {error}.') from error


def tokenizer_files(name: str) -> tuple[pathlib.Path, ...]:
  """Returns the files that a `data.tokenizer` value names; none for 'bytes'."""
  if name == 'bytes':
    return ()
  if name.startswith(GPT2_PREFIX):
    folder = pathlib.Path(name.removeprefix(GPT2_PREFIX)).expanduser()
    return tuple(folder / file for file in _GPT2_FILES)
  return (pathlib.Path(name).expanduser(),)


def tokenizer_in(name: str, directory: pathlib.Path) -> str:
  """Returns the `data.tokenizer` value of files in a directory; `name` is relative to it."""
  if name == 'bytes':
    return name
  return f'{GPT2_PREFIX}{directory}' if name == GPT2_PREFIX else str(directory / name)


def _fingerprint(*parts: bytes) -> str:
  digest = hashlib.sha256()
  for part in parts:
    digest.update(len(part).to_bytes(8, 'big') + part)
  return digest.hexdigest()[:16]


def to_bytes(text: str) -> bytes:
  """UTF-8, with lone surrogates (half an emoji, escaped bytes) kept as their bytes."""
  try:
    return text.encode('utf-8', 'surrogateescape')
  except UnicodeEncodeError:
    return text.encode('utf-8', 'surrogatepass')


def _whitespace_cut(text: str) -> Iterator[str]:
  """Cuts a text within runs of whitespace that are too long; usually yields it unchanged."""
  start = 0
  if len(text) > _LONGEST_WHITESPACE:
    for run in re.finditer(r'\s+', text):
      for end in range(run.start() + _LONGEST_WHITESPACE, run.end(), _LONGEST_WHITESPACE):
        yield text[start:end]
        start = end
  yield text[start:]


def _gpt2_vocabulary(vocab: bytes) -> dict[str, int]:
  """Returns the content of vocab.json; raises ValueError if it is not {token: id}."""
  ids = json.loads(vocab)
  if not isinstance(ids, dict) or not ids or not all(type(i) is int for i in ids.values()):
    raise ValueError('vocab.json: expected an object of tokens and their ids')
  if len(set(ids.values())) < len(ids) or not all(0 <= i < _MAX_IDS for i in ids.values()):
    raise ValueError(f'vocab.json: expected unique ids from 0 to {_MAX_IDS - 1}')
  return ids


def _gpt2_tokens(merges: bytes) -> list[str]:
  """Returns the tokens in merge order: the alphabet, then those of merges.txt."""
  alphabet = _gpt2_alphabet()
  tokens = dict.fromkeys(alphabet)
  lines = merges.decode('utf-8-sig').splitlines()  # no token holds any kind of white space
  if lines and lines[0].startswith('#version'):
    lines = lines[1:]
  for line in filter(str.strip, lines):
    parts = line.split()
    if len(parts) != 2 or not alphabet.keys() >= set(parts[0] + parts[1]):
      raise ValueError(f'merges.txt: expected two tokens in a line, got {line!r}')
    token = parts[0] + parts[1]
    if token in tokens:
      raise ValueError(f'merges.txt makes {token!r} twice')
    tokens[token] = None
  return list(tokens)


def _gpt2_alphabet() -> dict[str, int]:
  """The printable character that stands for each byte in GPT-2's files.

  Printable Latin-1 bytes stand for themselves, the others for the characters from 256 on.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  characters = [*printable, *range(256, 256 + len(others))]
  return {chr(c): byte for c, byte in zip(characters, printable + others, strict=True)}
