"""Text to token ids and back.

Every tokenizer keeps the same three ids free: 0 is padding, 1 ends a document, 2 is unknown. No
text encodes to 0 or 1, so padding can always be told from data.
"""

import hashlib
import io
import json
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

PAD_ID = 0
EOS_ID = 1
UNK_ID = 2
NUM_SPECIAL = 3

_GPT2_PREFIX = 'gpt2:'
_GPT2_FILES = ('vocab.json', 'merges.txt')
# The pre-tokenizer of GPT-2: contractions, words, numbers, signs (each with the space before it).
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# A sentence of the trainer is a line of text; longer ones (minified code, data) are left out.
_MAX_SENTENCE_BYTES = 16_384


class Tokenizer(Protocol):
  """What the rest of the package knows about a tokenizer."""

  vocab_size: int
  fingerprint: str  # 16 hex digits that change with every change of the ids
  keeps_bytes: bool  # whether bytes that are not UTF-8 survive
  pad_id: int
  eos_id: int

  def encode(self, text: str) -> np.ndarray:
    """Returns the int32 ids of a text, without an end-of-document id."""
    ...

  def encode_bytes(self, data: bytes) -> np.ndarray:
    """`encode` of UTF-8 bytes; invalid ones become U+FFFD unless `keeps_bytes`."""
    ...

  def decode(self, ids: Any) -> str:
    """Returns the text of ids; special ids and ids beyond the vocabulary have none."""
    ...


class BytesTokenizer:
  """One token per byte of UTF-8: byte b has id b + 3."""

  vocab_size = 256 + NUM_SPECIAL
  keeps_bytes = True
  pad_id = PAD_ID
  eos_id = EOS_ID

  def __init__(self):
    self.fingerprint = _fingerprint(b'bytes')

  def encode(self, text: str) -> np.ndarray:
    return self.encode_bytes(to_bytes(text))

  def encode_bytes(self, data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8).astype(np.int32) + NUM_SPECIAL

  def decode(self, ids: Any) -> str:
    data = _text_ids(ids, NUM_SPECIAL, self.vocab_size) - NUM_SPECIAL
    return data.astype(np.uint8).tobytes().decode('utf-8', 'replace')


class SentencePieceTokenizer:
  """A SentencePiece model.

  A model trained with pad 0, end of sentence 1, unknown 2 (ours, T5's) keeps its ids. Any other
  (no padding, or Llama's unknown 0) has its ids moved up by 3, so that the first three mean what
  they mean everywhere here; its own unknown id becomes 2.
  """

  keeps_bytes = False
  pad_id = PAD_ID
  eos_id = EOS_ID

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

  def encode(self, text: str) -> np.ndarray:
    ids = np.asarray(self._processor.encode(to_bytes(text).decode('utf-8', 'replace')), np.int32)
    return np.where(ids == self._processor.unk_id(), UNK_ID, ids + self.shift).astype(np.int32)

  def encode_bytes(self, data: bytes) -> np.ndarray:
    return self.encode(data.decode('utf-8', 'replace'))

  def decode(self, ids: Any) -> str:
    # With unshifted ids the unknown piece is one of the model's own and prints as such.
    first = NUM_SPECIAL if self.shift else UNK_ID
    return self._processor.decode((_text_ids(ids, first, self.vocab_size) - self.shift).tolist())


class Gpt2Tokenizer:
  """GPT-2's byte-level BPE from a local vocab.json and merges.txt, ids moved up by 3.

  GPT-2 uses id 0 for '!' and its last id, <|endoftext|>, for the end of a document; here they are
  id 3 and an id that never occurs, and the end of a document is id 1.
  """

  keeps_bytes = False
  pad_id = PAD_ID
  eos_id = EOS_ID

  def __init__(self, vocab_path: pathlib.Path, merges_path: pathlib.Path):
    """Reads the two files; raises ValueError if they do not fit together."""
    try:
      import tiktoken
    except ModuleNotFoundError as error:
      raise ValueError('needs the package tiktoken: pip install tiktoken') from error
    vocab, merges = vocab_path.read_bytes(), merges_path.read_bytes()
    ids = json.loads(vocab)
    self._encoding = tiktoken.Encoding(
      'gpt2', pat_str=_GPT2_PATTERN, mergeable_ranks=_gpt2_ranks(ids, merges), special_tokens={}
    )
    self.vocab_size = max(ids.values()) + 1 + NUM_SPECIAL
    self.fingerprint = _fingerprint(b'gpt2', vocab, merges)

  def encode(self, text: str) -> np.ndarray:
    text = to_bytes(text).decode('utf-8', 'replace')
    return np.asarray(self._encoding.encode_ordinary(text), np.int32) + np.int32(NUM_SPECIAL)

  def encode_bytes(self, data: bytes) -> np.ndarray:
    return self.encode(data.decode('utf-8', 'replace'))

  def decode(self, ids: Any) -> str:
    ids = _text_ids(ids, NUM_SPECIAL, self._encoding.max_token_value + 1 + NUM_SPECIAL)
    return self._encoding.decode((ids - NUM_SPECIAL).tolist())


def make_tokenizer(config) -> Tokenizer:
  """Returns the tokenizer that `data.tokenizer` names.

  Args:
    config: a DataConfig.

  Raises:
    ValueError: a file is missing or is not what its name says.
  """
  name = config.tokenizer
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
  kind = Gpt2Tokenizer if name.startswith(_GPT2_PREFIX) else SentencePieceTokenizer
  try:
    return kind(*paths)
  except (ValueError, OSError) as error:
    raise ValueError(f'data.tokenizer: cannot use {name!r}: {error}.') from error


def known_vocab_size(name: str) -> int:
  """Number of ids of a tokenizer whose files need not be there.

  Raises:
    ValueError: only its file tells, and is not there.
  """
  if name == 'bytes':
    return BytesTokenizer.vocab_size
  if name.startswith(_GPT2_PREFIX):
    return 50257 + NUM_SPECIAL  # the published vocabulary
  (path,) = tokenizer_files(name)
  if not path.is_file():
    raise ValueError(
      f'data.tokenizer = {name!r} is not here to tell how many ids it has; set model.vocab_size.'
    )
  return SentencePieceTokenizer(path).vocab_size


def tokenizer_files(name: str) -> tuple[pathlib.Path, ...]:
  """Returns the files that a `data.tokenizer` value stands for; none for 'bytes'."""
  if name == 'bytes':
    return ()
  if name.startswith(_GPT2_PREFIX):
    folder = pathlib.Path(name.removeprefix(_GPT2_PREFIX)).expanduser()
    return tuple(folder / file for file in _GPT2_FILES)
  return (pathlib.Path(name).expanduser(),)


def copy_tokenizer(name: str, directory: pathlib.Path) -> str:
  """Copies the files of a tokenizer into a directory and returns its name relative to it."""
  if name == 'bytes':
    return name
  if name.startswith(_GPT2_PREFIX):
    for path in tokenizer_files(name):
      shutil.copyfile(path, directory / path.name)
    return _GPT2_PREFIX
  shutil.copyfile(tokenizer_files(name)[0], directory / 'tokenizer.model')
  return 'tokenizer.model'


def tokenizer_in(name: str, directory: pathlib.Path) -> str:
  """Returns the `data.tokenizer` value for a name that `copy_tokenizer` returned."""
  if name == 'bytes':
    return name
  return f'{_GPT2_PREFIX}{directory}' if name == _GPT2_PREFIX else str(directory / name)


def train_sentencepiece(texts: Iterable[bytes], vocab_size: int) -> bytes:
  """Trains a BPE model that gives back texts exactly, code and emoji included.

  (Only U+2581, with which SentencePiece marks spaces, comes back as a space.) Characters outside
  the vocabulary fall back to their bytes, nothing is normalised, and runs of spaces may be one
  piece (indentation: a third fewer tokens on Python code).

  Args:
    texts: UTF-8 documents.
    vocab_size: number of ids, the three special ones and 256 bytes included.

  Returns:
    The bytes of a .model file, the same for the same texts.

  Raises:
    ValueError: `vocab_size` is too small for the characters, or too large for the texts.
  """
  import sentencepiece

  lines = (line for text in texts for line in text.decode('utf-8', 'replace').split('\n') if line)
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=lines,
      model_writer=model,
      vocab_size=vocab_size,
      model_type='bpe',
      byte_fallback=True,
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      allow_whitespace_only_pieces=True,
      user_defined_symbols=['\n', '\t'],
      pad_id=PAD_ID,
      eos_id=EOS_ID,
      unk_id=UNK_ID,
      bos_id=-1,
      max_sentence_length=_MAX_SENTENCE_BYTES,
      minloglevel=2,
    )
  except RuntimeError as error:
    reason = str(error).rpartition('] ')[2]  # after the place in its source and the condition
    raise ValueError(f'--vocab_size: {vocab_size} does not fit these texts: {reason}') from error
  return model.getvalue()


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


def _text_ids(ids: Any, first: int, end: int) -> np.ndarray:
  ids = np.asarray(ids, np.int64).reshape(-1)
  return ids[(ids >= first) & (ids < end)]


def _gpt2_ranks(ids: dict[str, int], merges: bytes) -> dict[bytes, int]:
  """Returns {bytes of a token: its id}, which is also its priority in merging.

  Raises ValueError where the order of the ids is not the order of the merges.
  """
  to_byte = _gpt2_alphabet()
  tokens = list(to_byte)
  lines = merges.decode('utf-8').split('\n')
  if lines[0].startswith('#version'):
    lines = lines[1:]
  for line in filter(None, lines):
    left, separator, right = line.rstrip('\r').partition(' ')
    if not separator:
      raise ValueError(f'merges.txt: expected two tokens in a line, got {line!r}')
    tokens.append(left + right)
  missing = [token for token in tokens if token not in ids]
  if missing:
    raise ValueError(f'vocab.json lacks {len(missing)} tokens of merges.txt, e.g. {missing[0]!r}')
  merged = [ids[token] for token in tokens[len(to_byte) :]]
  if merged != sorted(set(merged)):
    raise ValueError('the ids of vocab.json are not in the order of merges.txt')
  return {bytes(to_byte[c] for c in token): ids[token] for token in tokens}


def _gpt2_alphabet() -> dict[str, int]:
  """The printable character that stands for each byte in GPT-2's files.

  Printable Latin-1 bytes stand for themselves, the others for the characters from 256 on.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {
    chr(256 + i): byte for i, byte in enumerate(others)
  }
