"""Tokenizers of the library `tokenizers`, as other people's models have them."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from moejax import data, tokenize
from moejax.data import tokenizer_json

BPE = pathlib.Path(__file__).parent / 'bpe'
TEXTS = [
  '',
  'def f(x):\n\treturn {x!r}  # naïve\n\n    trailing  ',
  'emoji 🎉👩‍👩‍👧 and 漢字, NUL-free \x7f\u00a0\ufffd',
  '<pad></s><unk> <|endoftext|> <s> ⁇',
  "we'll  it's 1234\r\n  \n",
]
CORPUS = ['the quick brown fox jumps', 'over the lazy dog again', 'pack my box with jugs'] * 9
LLAMA3 = r"(?i:'s|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
LLAMA3 += r'|\s+(?!\S)|\s+'


def _train(library, trainer, special=(), **options):
  """Trains on CORPUS; `special` tokens come first, or where the trainer puts them."""
  options |= {'special_tokens': [*special], 'show_progress': False}
  library.train_from_iterator(CORPUS, trainer(**options))
  return library


def _gpt_neox():
  library = tokenizers.Tokenizer(models.BPE())
  library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  library.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  special = ['<|endoftext|>', '<|padding|>']
  _train(library, trainers.BpeTrainer, special, vocab_size=320, initial_alphabet=alphabet)
  library.add_tokens([tokenizers.AddedToken(' ' * n, normalized=False) for n in (4, 3, 2)])
  return library


def _llama3():
  library = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
  library.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(LLAMA3), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  library.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  _train(library, trainers.BpeTrainer, vocab_size=320, initial_alphabet=alphabet)
  library.add_special_tokens(['<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>'])
  begin = ('<|begin_of_text|>', library.token_to_id('<|begin_of_text|>'))
  library.post_processor = processors.TemplateProcessing(
    single='<|begin_of_text|> $A', special_tokens=[begin]
  )
  library.enable_truncation(5)
  library.enable_padding(length=50)
  library.model.dropout = 0.5
  return library


def _llama2():
  library = tokenizers.Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True, byte_fallback=True))
  library.normalizer = normalizers.Sequence(
    [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
  )
  back = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
  library.decoder = decoders.Sequence([*back, decoders.Strip(' ', 1, 0)])
  special = ['<unk>', '<s>', '</s>']
  byte_tokens = [f'<0x{byte:02X}>' for byte in range(256)]
  _train(library, trainers.BpeTrainer, [*special, *byte_tokens], vocab_size=320)
  spec = json.loads(library.to_str())
  spec['added_tokens'] = spec['added_tokens'][:3]  # bytes are ordinary tokens
  return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _t5():
  library = tokenizers.Tokenizer(models.Unigram())
  library.pre_tokenizer = pre_tokenizers.Metaspace()
  library.decoder = decoders.Metaspace()
  special = ['<pad>', '</s>', '<unk>']
  _train(library, trainers.UnigramTrainer, special, vocab_size=60, unk_token='<unk>')
  return library


FAMILIES = {
  'gpt_neox': (_gpt_neox, '<|endoftext|>'),
  'llama3': (_llama3, '<|end_of_text|>'),
  'llama2': (_llama2, '</s>'),
  't5': (_t5, '</s>'),
}


@pytest.fixture(scope='session')
def folders(tmp_path_factory):
  """A folder per family, as from_pretrained reads it."""
  top = tmp_path_factory.mktemp('families')
  for name, (make, end) in FAMILIES.items():
    (top / name).mkdir()
    make().save(str(top / name / 'tokenizer.json'))
    (top / name / 'tokenizer_config.json').write_text(json.dumps({'eos_token': end}))
  return top


def _make(path, **fields):
  return data.make_tokenizer(data.DataConfig(tokenizer=str(path), **fields))


def test_ids_are_those_that_tiktoken_gives():
  """Recorded when tiktoken encoded GPT-2's files: runs of that time resume."""
  recorded = json.loads((BPE / 'tiktoken_ids.json').read_text())
  shifted, own = _make(f'gpt2:{BPE}'), _make(BPE)
  assert shifted.fingerprint == recorded['fingerprint'] != own.fingerprint
  for case in recorded['ids']:
    assert shifted.encode(case['text']).tolist() == case['ids']
    assert (own.encode(case['text']) + 3).tolist() == case['ids']
  assert (shifted.eos_id, own.eos_id) == (1, 500)
  assert (shifted.vocab_size, own.vocab_size) == (504, 501)


@pytest.mark.parametrize('family', FAMILIES)
def test_ids_are_those_of_the_library_and_texts_come_back(folders, family):
  end = FAMILIES[family][1]
  tokenizer = _make(folders / family)
  library = tokenizers.Tokenizer.from_file(str(folders / family / 'tokenizer.json'))
  assert tokenizer.eos_id == library.token_to_id(end)
  assert tokenizer.vocab_size == library.get_vocab_size()
  library.no_truncation()
  library.no_padding()
  if family == 'llama3':
    library.model.dropout = None
  special = tokenizer_json.special_ids(json.loads(library.to_str()))
  texts = [text for text in TEXTS if '<' not in text] if family != 't5' else CORPUS[:3]
  for text in texts:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
    space = ' ' if family in ('llama2', 't5') and text else ''  # which the model prepends
    assert tokenizer.decode(ids) == space + text
    assert tokenizer.decode([*ids, tokenizer.eos_id, 10_000, -1]) == space + text
  for text in TEXTS:
    assert not special - {library.token_to_id('<unk>')} & {*tokenizer.encode(text).tolist()}
  batch = tokenizer.encode_documents([text.encode() for text in TEXTS])
  for text, ids in zip(TEXTS, batch, strict=True):
    np.testing.assert_array_equal(ids, tokenizer.encode(text))


@pytest.mark.parametrize('family', FAMILIES)
def test_bytes_of_ids_are_those_of_the_text(folders, family):
  tokenizer = _make(folders / family)
  for text in CORPUS[:3] if family == 't5' else TEXTS:
    ids = [tokenizer.eos_id, *tokenizer.encode(text), tokenizer.eos_id]
    counted = tokenizer.num_bytes(ids[:-1], ids[1:])
    assert counted.sum() == len(text.encode()) and counted[-1] == 0
  assert tokenizer.num_bytes([3], [tokenizer.vocab_size + 7]).tolist() == [0]  # padded vocabularies


def test_id_zero_is_text_and_unknown_text_has_no_bytes(folders):
  own = _make(BPE)
  assert own.encode('!').tolist() == [0] and own.decode([0, 0]) == '!!'
  assert own.num_bytes([500, 0], [0, 0]).tolist() == [1, 1]
  t5 = _make(folders / 't5')
  ids = t5.encode('the 漢')
  assert 2 in ids and t5.decode(ids) == ' the '


@pytest.mark.parametrize('family', ['gpt_neox', 'llama3'])
def test_a_long_document_is_cut_where_no_token_crosses(folders, family):
  tokenizer = _make(folders / family)
  text = ''.join(TEXTS[1] + f'the fox {i}\n over\n\n   dogs\n' for i in range(4000))
  pieces = list(tokenizer._pieces(text))
  assert len(pieces) > 2 and ''.join(pieces) == text
  cut = tokenizer.encode(text)
  tokenizer._cuts = False
  np.testing.assert_array_equal(cut, tokenizer.encode(text))
  assert list(tokenizer._pieces(text)) == [text]


def test_where_the_end_of_text_is_found(folders, tmp_path):
  source = folders / 'llama3' / 'tokenizer.json'
  ids = json.loads(source.read_text())['added_tokens']
  begin, end, turn = (token['id'] for token in ids)
  shutil.copy(source, tmp_path)
  path = tmp_path / 'tokenizer.json'

  def put(name, **content):
    (tmp_path / name).write_text(json.dumps(content))
    return [_make(given).eos_id for given in (path, tmp_path)]

  assert [_make(path).eos_id] == [end]  # by its usual name
  assert put('config.json', eos_token_id=begin) == [begin, begin]
  assert put('generation_config.json', eos_token_id=[turn, end]) == [turn, turn]
  assert put('special_tokens_map.json', eos_token='<|end_of_text|>') == [end, end]
  assert put('tokenizer_config.json', eos_token={'content': '<|eot_id|>'}) == [turn, turn]
  assert put('tokenizer_config.json', eos_token=None) == [end, end]
  assert _make(path, eos_id=begin).eos_id == begin
  assert _make(path, eos_id=end).fingerprint == _make(path).fingerprint
  assert _make(path, eos_id=9999).vocab_size == 10_000
  (tmp_path / 'tokenizer_config.json').write_text('{"eos')
  with pytest.raises(ValueError, match=r'data\.tokenizer: .*tokenizer_config\.json is not JSON'):
    _make(path)


def test_an_unknown_end_of_text_names_the_choices(tmp_path):
  library = _gpt_neox()
  spec = json.loads(library.to_str().replace('<|endoftext|>', '<end>'))
  (tmp_path / 'tokenizer.json').write_text(json.dumps(spec))
  with pytest.raises(
    ValueError, match=r"set data\.eos_id to its id: '<end>' is 0, '<\|padding\|>'"
  ):
    _make(tmp_path)
  assert _make(tmp_path, eos_id=0).encode('<end>').tolist() != [0]


def test_fingerprints_depend_on_what_decides_ids(folders, tmp_path):
  prints = {_make(folders / family).fingerprint for family in FAMILIES}
  assert len(prints) == len(FAMILIES)
  shutil.copytree(folders / 'llama3', tmp_path / 'copy')
  path = tmp_path / 'copy' / 'tokenizer.json'
  spec = json.loads(path.read_text())
  path.write_text(json.dumps(spec | {'post_processor': None, 'truncation': None}, indent=3))
  assert _make(tmp_path / 'copy').fingerprint == _make(folders / 'llama3').fingerprint
  spec['model']['merges'].pop()
  path.write_text(json.dumps(spec))
  assert _make(tmp_path / 'copy').fingerprint not in prints
  assert _make(folders / 'llama3', eos_id=2).fingerprint not in prints


@pytest.mark.parametrize('family', FAMILIES)
def test_token_files_hold_the_tokenizer(folders, family, text_folder, make_config, tmp_path):
  config = make_config(
    source='text', files=f'{text_folder}/**/*.txt', tokenizer=str(folders / family)
  )
  message = tokenize.tokenize(config, tmp_path / 'tokens')
  name = str(tmp_path / 'tokens' / 'tokenizer')
  assert f'--config.data.tokenizer={name}' in message
  tokens = make_config(source='tokens', files=str(tmp_path / 'tokens'), tokenizer=name)
  direct, read = data.make_loader(config, 'train'), data.make_loader(tokens, 'train')
  assert direct.fingerprint == read.fingerprint
  for key, value in direct.batch(3).items():
    np.testing.assert_array_equal(read.batch(3)[key], value)
  assert direct.batch(3)['segments'].min() > 0


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'{"mod', r'tokenizer\.json is not JSON'),
    (b'\xff\xfe', r'tokenizer\.json is not JSON'),
    (b'[]', r'is no tokenizer\.json: expected an object with "model"'),
    (b'{"model": {"type": "BPE"}}', r'is no tokenizer\.json'),
    (b'{"model": {"vocab": [1]}}', r'is no tokenizer\.json'),
    (b'{"model": {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": 3}}', 'cannot read it'),
  ],
)
def test_damaged_files(tmp_path, content, message):
  (tmp_path / 'tokenizer.json').write_bytes(content)
  with pytest.raises(ValueError, match=f'data.tokenizer: cannot use .*{message}'):
    _make(tmp_path)


def test_tokenizers_that_cannot_be_used(folders, tmp_path):
  library = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
  library.pre_tokenizer = pre_tokenizers.Whitespace()
  _train(library, trainers.WordPieceTrainer, ['[UNK]', '</s>'], vocab_size=60)
  library.save(str(tmp_path / 'bert.json'))
  with pytest.raises(ValueError, match='WordPiece without ByteLevel.*bits per byte would be wrong'):
    _make(tmp_path / 'bert.json')
  spec = json.loads((folders / 'llama3' / 'tokenizer.json').read_text())
  spec['added_tokens'][-1]['id'] += 5
  (tmp_path / 'moved.json').write_text(json.dumps(spec))
  with pytest.raises(ValueError, match='ids of its added tokens are not those after'):
    _make(tmp_path / 'moved.json')
  with pytest.raises(ValueError, match=r'data\.tokenizer: expected .*no file .*tokenizer\.json'):
    _make(tmp_path)


@pytest.mark.heavy
def test_transformers_loads_what_is_saved(folders, sentencepiece_file, train_foreign, tmp_path):
  transformers = pytest.importorskip('transformers')
  options = {'byte_fallback': True, 'normalization_rule_name': 'identity', 'vocab_size': 320}
  llama = train_foreign(tmp_path / 'llama.model', remove_extra_whitespaces=False, **options)
  names = ['bytes', f'gpt2:{BPE}', BPE, sentencepiece_file, llama]
  for i, name in enumerate([*names, *(folders / family for family in FAMILIES)]):
    tokenizer, folder = _make(name), tmp_path / str(i)
    tokenizer.save_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == tokenizer.eos_id
    again = _make(folder)
    for text in [*(text for text in TEXTS if '<' not in text), *CORPUS[:3]]:
      expected = tokenizer.encode(text).tolist()
      assert theirs(text, add_special_tokens=False)['input_ids'] == expected, (name, text)
      assert again.encode(text).tolist() == expected
    assert (again.eos_id, again.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)


def test_what_cannot_be_saved_for_transformers(foreign_file, tmp_path):
  with pytest.raises(ValueError, match=r'cannot be written as tokenizer\.json, only BPE with'):
    _make(foreign_file).save_pretrained(tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
