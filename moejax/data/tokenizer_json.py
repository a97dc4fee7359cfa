"""Tokenizers as data: the content of a tokenizer.json, the format of the library `tokenizers`.

GPT-2's two files and the byte tokenizer are written in this format too, so that one library encodes
all of them and transformers can load what a run was trained with.
"""

import functools
import importlib
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from moejax import files

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2  # of our own tokenizers
_RESERVED = {'<|pad|>': PAD_ID, '<|eos|>': EOS_ID, '<|unk|>': UNK_ID}
NUM_SPECIAL = len(_RESERVED)

FILE = 'tokenizer.json'
GPT2_FILES = ('vocab.json', 'merges.txt')
_CONFIG = 'tokenizer_config.json'
# Other files beside tokenizer.json that transformers reads.
_COMPANIONS = ('special_tokens_map.json', 'chat_template.jinja')
_USUAL_ENDS = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '<|eos|>')
_NO_TEXT = '\ufdd0'  # a code point that is no character


def read(path: pathlib.Path, merges: pathlib.Path | None = None) -> dict[str, Any]:
  """Returns the content of a tokenizer.json, or that of GPT-2's vocab.json and merges.txt.

  Without options of training with it: texts are not cut, padded, or encoded at random (dropout).

  Raises ValueError if it is none.
  """
  if merges:
    return gpt2(path.read_bytes(), merges.read_bytes(), first_id=0)
  spec = _json(path)
  try:
    spec = dict.fromkeys(('normalizer', 'pre_tokenizer', 'decoder')) | {'added_tokens': []} | spec
    vocabulary(spec)
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f'{path.name} is no tokenizer.json: expected an object with "model" and "added_tokens" '
      f'({type(error).__name__}: {error})'
    ) from error
  model = spec['model'] | ({'dropout': None} if 'dropout' in spec['model'] else {})
  return spec | {'model': model, 'truncation': None, 'padding': None}


def vocabulary(spec: dict[str, Any]) -> dict[str, int]:
  """Returns all tokens and their ids; ValueError if they are not such."""
  vocab = spec['model']['vocab']
  if not isinstance(vocab, dict):  # Unigram
    vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
  return _checked(vocab | {token['content']: token['id'] for token in spec['added_tokens']})


def _checked(vocab: dict[str, int]) -> dict[str, int]:
  """Returns a vocabulary whose ids leave few gaps: arrays over all ids are about as large."""
  if not all(isinstance(token, str) and type(i) is int for token, i in vocab.items()):
    raise ValueError('expected tokens and their ids')
  limit = 2**16 + 16 * len(vocab)
  if wrong := [i for i in vocab.values() if not 0 <= i < limit]:
    raise ValueError(f'expected ids from 0 to {limit - 1} for {len(vocab)} tokens, got {wrong[0]}')
  return vocab


def gpt2(vocab: bytes, merges: bytes, first_id: int) -> dict[str, Any]:
  """Returns the tokenizer of GPT-2's vocab.json and merges.txt, with ids from `first_id` on.

  With `first_id` > 0 the ids before it are reserved for padding, end and unknown. Tokens that no
  merge makes are special: <|endoftext|>, <s>. Raises ValueError if the files are inconsistent.
  """
  ids = {token: i + first_id for token, i in _gpt2_vocabulary(vocab).items()}
  pairs = _gpt2_merges(merges)
  made = {*gpt2_alphabet(), *map(''.join, pairs)}
  if missing := [token for token in made if token not in ids]:
    raise ValueError(f'vocab.json lacks {len(missing)} tokens of merges.txt, e.g. {min(missing)!r}')
  special = {token: i for token, i in ids.items() if token not in made}
  special |= _RESERVED if first_id else {}
  return _byte_level(ids, pairs, special, use_regex=True)


def of_bytes() -> dict[str, Any]:
  """Returns the tokenizer with one id per byte: byte b has id b + 3."""
  ids = {character: byte + NUM_SPECIAL for character, byte in gpt2_alphabet().items()}
  return _byte_level(ids, [], _RESERVED, use_regex=False)


def of_sentencepiece(model: bytes, shift: int) -> dict[str, Any]:
  """Returns a SentencePiece model, with ids that are larger by `shift`.

  Raises ValueError unless it is byte-pair encoding that falls back to bytes and normalises nothing
  (as moejax.tokenizer trains, and Llama's): others give other ids there.
  """
  # Its types are made when it is imported, where no type checker sees them.
  messages: Any = importlib.import_module('sentencepiece.sentencepiece_model_pb2')
  proto = messages.ModelProto.FromString(model)
  trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
  if (
    trainer.model_type != trainer.BPE
    or not trainer.byte_fallback
    or (normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces)
  ):
    raise ValueError(
      'data.tokenizer: this SentencePiece model cannot be written as tokenizer.json, only BPE with '
      'byte_fallback and without normalization can.'
    )
  pieces = {piece.piece: (i + shift, piece) for i, piece in enumerate(proto.pieces)}
  of_type = lambda *types: {t: i for t, (i, piece) in pieces.items() if piece.type in types}
  kinds = messages.ModelProto.SentencePiece
  special = of_type(kinds.CONTROL, kinds.UNKNOWN) | (_RESERVED if shift else {})
  unknown = '<|unk|>' if shift else next(iter(of_type(kinds.UNKNOWN)))
  ordinary = of_type(kinds.NORMAL)
  pairs = [
    (pieces[token][1].score, ordinary[token[:cut]], ordinary[token[cut:]], token[:cut], token[cut:])
    for token in ordinary
    for cut in range(1, len(token))
    if token[:cut] in ordinary and token[cut:] in ordinary
  ]
  merges = [list(pair[3:]) for pair in sorted(pairs, key=lambda pair: (-pair[0], *pair[1:3]))]
  space = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '\u2581'}
  prefix = [{'type': 'Prepend', 'prepend': '\u2581'}] if normalizer.add_dummy_prefix else []
  back = {'type': 'Replace', 'pattern': {'String': '\u2581'}, 'content': ' '}
  strip = [{'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}] if prefix else []
  return _spec(
    {'type': 'BPE', 'vocab': {t: i for t, (i, _) in pieces.items()} | special, 'merges': merges}
    | {'unk_token': unknown, 'fuse_unk': True, 'byte_fallback': True},
    special,
    of_type(kinds.USER_DEFINED),
    normalizer={'type': 'Sequence', 'normalizers': [*prefix, space]},
    decoder={
      'type': 'Sequence',
      'decoders': [back, {'type': 'ByteFallback'}, {'type': 'Fuse'}, *strip],
    },
  )


def _byte_level(ids, merges, special, use_regex):
  step = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
  step |= {'use_regex': use_regex}
  model = {'type': 'BPE', 'vocab': ids | special, 'merges': [list(pair) for pair in merges]}
  return _spec(model, special, {}, pre_tokenizer=step, decoder=step)


def _spec(model, special, added, **steps):
  """The content of a tokenizer.json; `special` and `added` are tokens of `model` and their ids."""
  options = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  tokens = [{'id': i, 'content': t, 'special': t in special} for t, i in (special | added).items()]
  return {
    'version': '1.0',
    **dict.fromkeys(('truncation', 'padding', 'normalizer', 'pre_tokenizer')),
    **dict.fromkeys(('post_processor', 'decoder')),
    'added_tokens': [token | options for token in sorted(tokens, key=lambda token: token['id'])],
    'model': model,
    **steps,
  }


def for_documents(spec: dict[str, Any], eos_id: int) -> dict[str, Any]:
  """Returns what encodes documents: no template puts special tokens around or into them."""
  special = {token['id'] for token in spec['added_tokens'] if token['special']} | {eos_id}
  added = [token | {'special': token['id'] in special} for token in spec['added_tokens']]
  model = spec['model']
  if not isinstance(model['vocab'], dict):
    # Unigram finds every piece of its vocabulary in a text, so special ones get names of no text.
    hide = lambda i, token: _NO_TEXT + token if i in special else token
    pieces = [[hide(i, piece), score] for i, (piece, score) in enumerate(model['vocab'])]
    model = model | {'vocab': pieces}
    added = [token | {'content': hide(token['id'], token['content'])} for token in added]
  return spec | {'model': model, 'added_tokens': added, 'post_processor': None}


def special_ids(spec: dict[str, Any]) -> set[int]:
  """Returns the ids that stand for no text: special tokens, and unknown text."""
  special = {token['id'] for token in spec['added_tokens'] if token['special']}
  model = spec['model']
  if isinstance(model['vocab'], dict):
    unknown = model['vocab'].get(model.get('unk_token'))
  else:
    unknown = model.get('unk_id')
  return special | ({unknown} - {None})


def token_bytes(spec: dict[str, Any]) -> list[bytes]:
  """Returns the bytes of every id up to the largest; b'' for special ids and gaps.

  Raises ValueError if tokens do not stand for bytes of the text (WordPiece, for example).
  """
  kinds = {kind for part in ('pre_tokenizer', 'decoder') for kind in _kinds(spec[part])}
  added = {token['id'] for token in spec['added_tokens']}
  falls_back = bool(spec['model'].get('byte_fallback'))
  if 'ByteLevel' in kinds:
    of_token = _byte_level_bytes
  elif 'Metaspace' in kinds or falls_back:
    of_token = functools.partial(_piece_bytes, falls_back=falls_back)
  else:
    raise ValueError(
      f'its tokens ({spec["model"].get("type")} without ByteLevel, Metaspace or byte_fallback) do '
      'not say which spaces and bytes of a text they stand for, so texts and bits per byte would '
      'be wrong'
    )
  vocab = vocabulary(spec)
  result = [b''] * (max(vocab.values()) + 1)
  special = special_ids(spec)
  for token, i in vocab.items():
    if i not in special:
      literal = i in added and 'ByteLevel' in kinds
      result[i] = token.encode('utf-8', 'replace') if literal else of_token(token)
  return result


def _byte_level_bytes(token: str) -> bytes:
  alphabet = gpt2_alphabet()
  if all(character in alphabet for character in token):
    return bytes(alphabet[character] for character in token)
  return token.encode('utf-8', 'replace')


def _piece_bytes(piece: str, falls_back: bool) -> bytes:
  """The bytes of a SentencePiece piece, which marks spaces by U+2581."""
  if falls_back and len(piece) == 6 and piece.startswith('<0x') and piece.endswith('>'):
    return bytes([int(piece[3:5], 16)])  # <0x0A>
  return piece.replace('\u2581', ' ').encode('utf-8', 'replace')


def splits_lines(spec: dict[str, Any]) -> bool:
  """Whether no token holds a letter and the line break after it, so that texts can be cut there."""
  steps = [*_steps(spec['pre_tokenizer'])]
  kinds = {step['type'] for step in steps}
  regex = any(step['type'] == 'ByteLevel' and step.get('use_regex', True) for step in steps)
  return 'ByteLevel' in kinds and (regex or 'Split' in kinds)


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
  """Yields a normalizer, pre-tokenizer or decoder, or the members of a sequence of them."""
  if part:
    members = [
      m for name in ('normalizers', 'pretokenizers', 'decoders') for m in part.get(name, [])
    ]
    for member in members:
      yield from _steps(member)
    if not members:
      yield part


def _kinds(part: dict[str, Any] | None) -> set[str]:
  return {step['type'] for step in _steps(part)}


def end_of_text(path: pathlib.Path, spec: dict[str, Any]) -> int:
  """Returns the id that ends a document, from the files beside `path`, or by its usual names.

  Raises ValueError, with the special tokens, if nothing says it.
  """
  vocab = vocabulary(spec)
  for name in (_CONFIG, 'special_tokens_map.json'):
    token = _field(path.parent / name, 'eos_token')
    token = token.get('content') if isinstance(token, dict) else token
    if isinstance(token, str) and token in vocab:
      return vocab[token]
  for name in ('generation_config.json', 'config.json'):
    ids = _field(path.parent / name, 'eos_token_id')
    for i in ids if isinstance(ids, list) else [ids]:
      if type(i) is int and i in vocab.values():
        return i
  usual = [token for token in _USUAL_ENDS if token in vocab]
  if len(usual) == 1:
    return vocab[usual[0]]
  special = [f'{t["content"]!r} is {t["id"]}' for t in spec['added_tokens'] if t['special']]
  raise ValueError(
    f'nothing says which token ends a text (no eos_token in {_CONFIG} beside it); set data.eos_id '
    f'to its id: {", ".join(special[:12]) or "it has no special tokens"}'
  )


def _field(path: pathlib.Path, name: str) -> Any:
  """Returns a field of a JSON file; None if there is no such file or field."""
  content = _json(path) if path.is_file() else {}
  return content.get(name) if isinstance(content, dict) else None


def _json(path: pathlib.Path) -> Any:
  try:
    return files.parse_json(path.read_bytes())
  except ValueError as error:
    raise ValueError(f'{path.name} is not JSON ({error})') from error


def write(directory: pathlib.Path, spec: dict[str, Any], eos_id: int) -> None:
  """Writes tokenizer.json and tokenizer_config.json, as transformers' AutoTokenizer loads them."""
  directory.mkdir(parents=True, exist_ok=True)
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
  names = {i: token for token, i in vocabulary(spec).items()}
  roles = {'eos_token': eos_id}
  if eos_id == EOS_ID:  # one of ours
    roles |= {'pad_token': PAD_ID, 'unk_token': UNK_ID}
  config |= {role: names[i] for role, i in roles.items() if i in names}
  files.write(directory / FILE, json.dumps(spec, ensure_ascii=False))
  files.write(directory / _CONFIG, json.dumps(config, ensure_ascii=False, indent=2) + '\n')


def copy_companions(path: pathlib.Path, directory: pathlib.Path) -> None:
  """Copies what transformers reads beside a tokenizer.json to the folder that `write` filled."""
  for name in _COMPANIONS:
    if (path.parent / name).is_file():
      shutil.copyfile(path.parent / name, directory / name)
  if (path.parent / _CONFIG).is_file():
    own, written = _json(path.parent / _CONFIG), _json(directory / _CONFIG)
    own = own if isinstance(own, dict) else {}
    config = own | {'eos_token': written['eos_token']}
    files.write(directory / _CONFIG, json.dumps(config, ensure_ascii=False, indent=2) + '\n')


def _gpt2_vocabulary(vocab: bytes) -> dict[str, int]:
  """Returns the content of vocab.json; raises ValueError if it is not {token: id}."""
  ids = files.parse_json(vocab)
  if not isinstance(ids, dict) or not ids:
    raise ValueError('vocab.json: expected an object of tokens and their ids')
  if len({*_checked(ids).values()}) < len(ids):
    raise ValueError('vocab.json: expected unique ids')
  return ids


def _gpt2_merges(merges: bytes) -> list[tuple[str, str]]:
  """Returns the pairs of merges.txt, in order."""
  alphabet = gpt2_alphabet()
  pairs, made = [], set(alphabet)
  lines = merges.decode('utf-8-sig').splitlines()  # no token holds any kind of white space
  if lines and lines[0].startswith('#version'):
    lines = lines[1:]
  for line in filter(str.strip, lines):
    parts = line.split()
    if len(parts) != 2 or not alphabet.keys() >= set(parts[0] + parts[1]):
      raise ValueError(f'merges.txt: expected two tokens in a line, got {line!r}')
    token = parts[0] + parts[1]
    if token in made:
      raise ValueError(f'merges.txt makes {token!r} twice')
    made.add(token)
    pairs.append((parts[0], parts[1]))
  return pairs


@functools.cache
def gpt2_alphabet() -> dict[str, int]:
  """The printable character that stands for each byte in byte-level vocabularies.

  Printable Latin-1 bytes stand for themselves, the others for the characters from 256 on.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  characters = [*printable, *range(256, 256 + len(others))]
  return {chr(c): byte for c, byte in zip(characters, printable + others, strict=True)}
