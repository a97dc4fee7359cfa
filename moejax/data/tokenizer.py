"""Text to token ids and back.

Bytes, SentencePiece models and `gpt2:FOLDER` reserve the same three ids: 0 is unused (batches mark
padding by `segments`), 1 ends a document, 2 is unknown. A tokenizer.json keeps its own ids, as
imported models need. No text encodes to the id that ends a document.
"""

import functools
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moejax import buckets, files
from moejax.data import tokenizer_json
from moejax.data.tokenizer_json import EOS_ID, NUM_SPECIAL, PAD_ID, UNK_ID, gpt2_alphabet

_gpt2_alphabet = gpt2_alphabet  # its former name

GPT2_PREFIX = 'gpt2:'
_KINDS = (
  "'bytes', a SentencePiece .model file, a tokenizer.json or its folder, or gpt2:FOLDER with "
  f'{" and ".join(tokenizer_json.GPT2_FILES)}'
)
_BOUNDARY = re.compile(r'(?<=[A-Za-z])(?=\n)')
_PIECE = 2**16  # characters
_SUFFIXES = ('.json', '.txt', '.model')  # of files that a tokenizer may need


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

  def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
    """`encode_bytes` of each of several documents, in parallel if the tokenizer can."""
    return [self.encode_bytes(data) for data in documents]

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
    lengths = self._lengths.take(targets, mode='clip')
    if not self._adds_space:
      return lengths
    first = np.isin(inputs, (self.eos_id, self.pad_id))
    begins_with_space = self._begins_with_space.take(targets, mode='clip')
    return lengths - (first & begins_with_space).astype(np.int32)

  @functools.cached_property
  def _lengths(self) -> np.ndarray:
    lengths = np.zeros(self.vocab_size + 1, np.int32)  # the last is for ids beyond the vocabulary
    lengths[: len(self._bytes)] = [len(data) for data in self._bytes]
    lengths[self.eos_id] = 0
    return lengths

  @functools.cached_property
  def _begins_with_space(self) -> np.ndarray:
    begins = [data.startswith(b' ') for data in self._bytes]
    return np.pad(np.array(begins), (0, self.vocab_size + 1 - len(begins)))

  @functools.cached_property
  def _adds_space(self) -> bool:
    """Whether texts begin with a space that the model prepends."""
    return any(self._bytes[i].startswith(b' ') for i in self.encode('a')[:1])

  def save_pretrained(self, directory: pathlib.Path) -> None:
    """Writes a folder that transformers' AutoTokenizer loads with the same ids for any text.

    The files are tokenizer.json and tokenizer_config.json, and those that a tokenizer.json had
    beside it. What looks like a special token is one there, but not here.

    Raises ValueError if the tokenizer cannot be expressed there.
    """
    tokenizer_json.write(directory, self._to_json(), self.eos_id)

  def _to_json(self) -> dict[str, Any]:
    """Returns the content of a tokenizer.json with the same ids."""
    raise NotImplementedError


class BytesTokenizer(Tokenizer):
  """One token per byte of UTF-8: byte b has id b + 3."""

  vocab_size = 256 + NUM_SPECIAL
  keeps_bytes = True
  _bytes = [b''] * NUM_SPECIAL + [bytes([byte]) for byte in range(256)]

  def __init__(self):
    self.fingerprint = _fingerprint(b'bytes')

  def encode_bytes(self, data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8).astype(np.int32) + NUM_SPECIAL

  def _to_json(self) -> dict[str, Any]:
    return tokenizer_json.of_bytes()


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
    self._bytes = [b''] * self.shift + [
      self._piece_bytes(i) for i in range(processor.get_piece_size())
    ]

  def encode_bytes(self, data: bytes) -> np.ndarray:
    ids = np.asarray(self._processor.encode(data.decode('utf-8', 'replace')), np.int32)
    return np.where(ids == self._processor.unk_id(), UNK_ID, ids + self.shift).astype(np.int32)

  def _piece_bytes(self, i: int) -> bytes:
    piece = self._processor.id_to_piece(i)
    if self._processor.is_byte(i):
      return bytes([int(piece[3:-1], 16)])  # <0x0A>
    if self._processor.is_control(i) or self._processor.is_unknown(i):
      return b''
    return piece.replace('\u2581', ' ').encode()

  def _to_json(self) -> dict[str, Any]:
    return tokenizer_json.of_sentencepiece(self.model, self.shift)


class JsonTokenizer(Tokenizer):
  """A tokenizer.json: byte-level BPE (GPT-2, OLMoE, Llama 3) or SentencePiece-like (Llama 2, T5).

  Ids are those of the file. Text is encoded as it is: what looks like a special token is no special
  token, and no template adds one. Normalizers and the space that some models prepend apply, because
  the ids depend on them; what they change, decoding does not change back.
  """

  pad_id = -1  # none: every id may stand for text

  def __init__(
    self, spec: dict[str, Any], eos_id: int, fingerprint: str = '', path: pathlib.Path | None = None
  ):
    """Takes the content of a tokenizer.json.

    Args:
      spec: the content.
      eos_id: of the token that ends documents.
      fingerprint: instead of one of the content.
      path: the file, if `spec` comes from one.

    Raises ValueError if `spec` is not valid.
    """
    import tokenizers

    self._original, self._path = spec, path
    spec = tokenizer_json.for_documents(spec, eos_id)
    try:
      library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises nothing more specific
      raise ValueError(f'the library tokenizers cannot read it: {error}') from error
    if library.get_vocab(with_added_tokens=True) != tokenizer_json.vocabulary(spec):
      raise ValueError('the ids of its added tokens are not those after its vocabulary')
    library.encode_special_tokens = True
    self._library, self.eos_id = library, eos_id
    self._bytes = tokenizer_json.token_bytes(spec)
    self._cuts = tokenizer_json.splits_lines(spec)
    self.vocab_size = max(len(self._bytes), eos_id + 1)
    decides = ('model', 'added_tokens', 'normalizer', 'pre_tokenizer', 'decoder')
    content = json.dumps({name: spec[name] for name in decides}, sort_keys=True).encode()
    self.fingerprint = fingerprint or _fingerprint(b'json', content, b'%d' % eos_id)

  def encode_bytes(self, data: bytes) -> np.ndarray:
    return self.encode_documents([data])[0]

  def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
    pieces = [list(self._pieces(data.decode('utf-8', 'replace'))) for data in documents]
    joined = list(itertools.chain.from_iterable(pieces))
    try:
      encoded = self._library.encode_batch_fast(joined, add_special_tokens=False)
    except Exception as error:  # the library raises nothing more specific
      raise ValueError(f'data.tokenizer: it cannot encode a text: {error}.') from error
    ids = (np.array(piece.ids, np.int32) for piece in encoded)
    return [np.concatenate([next(ids) for _ in some]) for some in pieces]

  def _pieces(self, text: str) -> Iterator[str]:
    """Cuts a long text where no token crosses: less memory, and pieces run in parallel."""
    start = 0
    while self._cuts and (cut := _BOUNDARY.search(text, start + _PIECE)):
      yield text[start : cut.start()]
      start = cut.start()
    yield text[start:]

  def save_pretrained(self, directory: pathlib.Path) -> None:
    super().save_pretrained(directory)
    if self._path:
      tokenizer_json.copy_companions(self._path, directory)

  def _to_json(self) -> dict[str, Any]:
    return self._original


class Gpt2Tokenizer(JsonTokenizer):
  """GPT-2's vocab.json and merges.txt, or others in this format; ids are shifted by 3."""

  def __init__(self, vocab_path: pathlib.Path, merges_path: pathlib.Path):
    vocab, merges = vocab_path.read_bytes(), merges_path.read_bytes()
    spec = tokenizer_json.gpt2(vocab, merges, NUM_SPECIAL)
    super().__init__(spec, EOS_ID, _fingerprint(b'gpt2', vocab, merges))


def make_tokenizer(config) -> Tokenizer:
  """Returns the tokenizer of a DataConfig; its `eos_id`, unless it is -1, replaces the own one.

  Raises ValueError if a file is missing or invalid.
  """
  tokenizer = _tokenizer_named(config.tokenizer, config.eos_id)
  if config.eos_id not in (-1, tokenizer.eos_id):
    tokenizer.eos_id = config.eos_id
    tokenizer.vocab_size = max(tokenizer.vocab_size, config.eos_id + 1)
    tokenizer.fingerprint = _fingerprint(tokenizer.fingerprint.encode(), b'%d' % config.eos_id)
  return tokenizer


def _tokenizer_named(name: str, eos_id: int) -> Tokenizer:
  if name == 'bytes':
    return BytesTokenizer()
  paths = tokenizer_files(name)
  for path in paths:
    if not path.is_file():
      remedy = 'python -m moejax.tokenizer trains a SentencePiece model'
      if name.startswith(GPT2_PREFIX):
        remedy = (
          f'hf download openai-community/gpt2 {" ".join(tokenizer_json.GPT2_FILES)} --local-dir '
          f'{path.parent} fetches those of GPT-2'
        )
      raise ValueError(
        f'data.tokenizer: expected {_KINDS}; got {name!r}, but there is no file {path.resolve()}. '
        f'{remedy} (docs/data.md).'
      )
  try:
    if name.startswith(GPT2_PREFIX):
      return Gpt2Tokenizer(*paths)
    if paths[0].suffix == '.json':
      return _from_json(paths, eos_id)
    return SentencePieceTokenizer(paths[0])
  except (ValueError, OSError) as error:
    raise ValueError(f'data.tokenizer: cannot use {name!r}: {error}.') from error
  except (LookupError, TypeError, AttributeError) as error:  # of content that is of other types
    what = f'{type(error).__name__}: {error}'
    raise ValueError(f'data.tokenizer: cannot use {name!r}, it is damaged: {what}.') from error


def _from_json(paths: Sequence[pathlib.Path], eos_id: int) -> JsonTokenizer:
  """Returns the tokenizer of a tokenizer.json, or of vocab.json and merges.txt."""
  spec = tokenizer_json.read(*paths)
  if eos_id < 0:
    eos_id = tokenizer_json.end_of_text(paths[0], spec)
  return JsonTokenizer(spec, eos_id, path=paths[0])


def tokenizer_files(name: str) -> tuple[pathlib.Path, ...]:
  """Returns the files that a `data.tokenizer` value names; none for 'bytes'."""
  if name == 'bytes':
    return ()
  path = _on_disk(name.removeprefix(GPT2_PREFIX))
  gpt2_files = tuple(path / file for file in tokenizer_json.GPT2_FILES)
  if name.startswith(GPT2_PREFIX):
    return gpt2_files
  if not path.is_dir():
    return (path,)
  own = path / tokenizer_json.FILE
  return gpt2_files if gpt2_files[0].is_file() and not own.is_file() else (own,)


def _on_disk(name: str) -> pathlib.Path:
  """The path of a tokenizer, or of its copy if it is in a bucket."""
  if not buckets.is_bucket(name):
    return pathlib.Path(name).expanduser()
  path = files.path(name)
  if names := [n for n in files.children(path) if n.endswith(_SUFFIXES) and n != path.name]:
    return files.fetched(path, names)
  return files.fetched(path.parent, [path.name]) / path.name


def tokenizer_in(name: str, directory) -> str:
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
