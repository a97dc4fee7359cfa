import json

import numpy as np
import pytest
import sentencepiece

from moejax import data, tokenizer as program
from moejax.aot import step
from moejax.data import tokenizer as tokenizer_lib, tokenizer_json

TEXTS = [
  '',
  'def f(x):\n\treturn {x!r}  # naïve\n\n    trailing  ',
  'emoji 🎉👩‍👩‍👧 and 漢字, NUL-free \x7f\u00a0\ufffd',
  '<pad></s><unk> <|endoftext|> ⁇',
  "we'll  it's 1234\r\n  \n",
]


@pytest.fixture
def gpt2_folder(tmp_path):
  """A made-up vocabulary in GPT-2's file format: 256 bytes, four merges, the end of text."""
  tokens = list(tokenizer_json.gpt2_alphabet())
  merges = ['l o', 'Ġ lo', 'r e', 'Ġlo re']
  tokens = ['!', *(t for t in tokens if t != '!'), *(m.replace(' ', '') for m in merges)]
  vocab = {token: i for i, token in enumerate([*tokens, '<|endoftext|>'])}
  (tmp_path / 'vocab.json').write_text(json.dumps(vocab))
  (tmp_path / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(merges) + '\n')
  return tmp_path


def test_bytes_are_shifted_by_three(make_config):
  tokenizer = tokenizer_lib.make_tokenizer(make_config())
  assert tokenizer.encode('A\0').tolist() == [ord('A') + 3, 3]
  assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (259, 0, 1)
  assert tokenizer.encode_bytes(b'\xff').tolist() == [258]
  assert tokenizer.decode([0, 1, 2, 68, 258, 259, 1000]) == 'A\ufffd'


@pytest.mark.parametrize('text', TEXTS)
def test_bytes_round_trip(make_config, text):
  tokenizer = tokenizer_lib.make_tokenizer(make_config())
  assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize('text', TEXTS)
def test_sentencepiece_round_trip(make_config, sentencepiece_file, text):
  tokenizer = tokenizer_lib.make_tokenizer(make_config(tokenizer=str(sentencepiece_file)))
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert not np.isin(ids, [0, 1, 2]).any()
  assert tokenizer.decode(ids) == text
  assert tokenizer.decode([0, *ids, 1, 0, 10_000]) == text


def test_our_sentencepiece_model_keeps_its_ids(make_config, sentencepiece_file):
  tokenizer = tokenizer_lib.make_tokenizer(make_config(tokenizer=str(sentencepiece_file)))
  assert (tokenizer.shift, tokenizer.vocab_size) == (0, 320)
  processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
  assert tokenizer.encode('def f').tolist() == processor.encode('def f')


@pytest.mark.parametrize(
  'options',
  [
    {},  # no padding, unknown 0, beginning 1, end 2
    {'pad_id': 3},
    {'pad_id': 0, 'unk_id': 1, 'bos_id': 2, 'eos_id': 3},
    {'pad_id': 2, 'eos_id': 1, 'unk_id': 0, 'bos_id': -1},
  ],
)
def test_foreign_sentencepiece_models_are_shifted(make_config, tmp_path, train_foreign, options):
  path = train_foreign(tmp_path / 'foreign.model', **options)
  tokenizer = tokenizer_lib.make_tokenizer(make_config(tokenizer=str(path)))
  assert tokenizer.vocab_size == 48
  ids = tokenizer.encode('the quick dog')
  assert ids.min() >= 3
  assert ids.max() < 48
  assert tokenizer.decode(ids) == ' the quick dog'  # with the space that the model prepends
  assert tokenizer.encode('dog 漢').tolist()[-1] == 2  # unknown


def test_texts_of_successive_ids_can_be_joined(make_config, foreign_file, tmp_path, train_foreign):
  unshifted = train_foreign(tmp_path / 't5.model', pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
  for path in (foreign_file, unshifted):
    tokenizer = tokenizer_lib.make_tokenizer(make_config(tokenizer=str(path)))
    ids, n = tokenizer.encode('the quick fox'), len(tokenizer.encode('the'))
    assert 'the' + tokenizer.decode(ids[n:]) == 'the quick fox'


def _direct_bytes(tokenizer, texts):
  """Bytes per target of a stream of documents, counted from the texts."""
  ids = np.concatenate([[1], *(np.append(tokenizer.encode(t), 1) for t in texts)])
  counted = tokenizer.num_bytes(ids[:-1], ids[1:])
  assert counted.dtype == np.int32
  ends = np.flatnonzero(ids[1:] == 1)
  assert (counted[ends] == 0).all()
  return [part.sum() for part in np.split(counted, ends + 1)[:-1]]


def test_bytes_of_ids_are_those_of_the_text(
  make_config, sentencepiece_file, gpt2_folder, foreign_file, tmp_path, train_foreign
):
  for name in ('bytes', str(sentencepiece_file), f'gpt2:{gpt2_folder}'):
    tokenizer = tokenizer_lib.make_tokenizer(make_config(tokenizer=name))
    assert _direct_bytes(tokenizer, TEXTS) == [len(t.encode()) for t in TEXTS]
    assert tokenizer.num_bytes([1], [tokenizer.vocab_size + 5]).tolist() == [0]
  # Models that prepend a space, which is not part of the text; Llama's kind falls back to bytes.
  llama = train_foreign(tmp_path / 'llama.model', byte_fallback=True, vocab_size=320)
  keeps_spaces = train_foreign(tmp_path / 'spaces.model', remove_extra_whitespaces=False)
  texts = ['the quick dog', 'dog', 'jugs again the']
  for path in (foreign_file, llama, keeps_spaces):
    tokenizer = tokenizer_lib.make_tokenizer(make_config(tokenizer=str(path)))
    assert _direct_bytes(tokenizer, texts) == [len(t.encode()) for t in texts]
  tokenizer = tokenizer_lib.make_tokenizer(make_config(tokenizer=str(llama)))
  assert _direct_bytes(tokenizer, ['dog 漢', '漢字 the']) == [7, 10]
  tokenizer = tokenizer_lib.make_tokenizer(make_config(tokenizer=str(foreign_file)))
  assert _direct_bytes(tokenizer, ['dog 漢']) == [4]  # the text of the unknown id is lost


def test_sentencepiece_replaces_invalid_bytes(make_config, sentencepiece_file):
  tokenizer = tokenizer_lib.make_tokenizer(make_config(tokenizer=str(sentencepiece_file)))
  assert tokenizer.decode(tokenizer.encode_bytes(b'a\xffb')) == 'a\ufffdb'
  assert tokenizer.decode(tokenizer.encode('lone \ud83c')).startswith('lone \ufffd')


def test_gpt2_from_local_files(make_config, gpt2_folder):
  tokenizer = tokenizer_lib.make_tokenizer(make_config(tokenizer=f'gpt2:{gpt2_folder}'))
  assert tokenizer.vocab_size == 256 + 4 + 1 + 3
  assert tokenizer.encode('!').tolist() == [3]
  assert tokenizer.encode(' lore!').tolist() == [259 + 3, 3]  # the last merge, then '!'
  assert tokenizer.encode(' lo re').tolist() == [257 + 3, tokenizer.encode(' ')[0], 258 + 3]
  for text in TEXTS:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode([0, *ids, 1, 263, 300]) == text


def _gpt2(folder):
  return tokenizer_lib.make_tokenizer(data.DataConfig(tokenizer=f'gpt2:{folder}'))


def test_special_tokens_and_gaps_anywhere(gpt2_folder):
  """Like RoBERTa (whose ids are not in merge order) and Hugging Face's trainer."""
  plain = _gpt2(gpt2_folder)
  vocab = json.loads((gpt2_folder / 'vocab.json').read_text())
  ids = {token: 4 + 2 * i for i, token in enumerate(reversed(vocab))}
  ids |= {'<s>': 0, '<pad>': 1, '</s>': 2, '<mask>': max(ids.values()) + 5}
  (gpt2_folder / 'vocab.json').write_text(json.dumps(ids))
  tokenizer = _gpt2(gpt2_folder)
  assert tokenizer.vocab_size == ids['<mask>'] + 1 + 3
  for text in TEXTS:
    names = [list(vocab)[i - 3] for i in plain.encode(text)]
    assert tokenizer.encode(text).tolist() == [ids[name] + 3 for name in names]
    assert tokenizer.decode(tokenizer.encode(text)) == text
  everything = np.arange(-1, tokenizer.vocab_size + 1)
  assert len(''.join(tokenizer.decode([i]) for i in everything)) > 256  # none fails
  for special in ('<s>', '<mask>', '<|endoftext|>'):
    assert tokenizer.decode([ids[special] + 3]) == ''


@pytest.mark.parametrize('mark', [b'', b'\xef\xbb\xbf'])
@pytest.mark.parametrize('end', ['', '\n', '\n\n'])
def test_gpt2_files_saved_on_windows(gpt2_folder, mark, end):
  expected = _gpt2(gpt2_folder).encode(TEXTS[1]).tolist()
  merges = (gpt2_folder / 'merges.txt').read_text().rstrip('\n') + end
  (gpt2_folder / 'merges.txt').write_bytes(mark + merges.replace('\n', '\r\n').encode())
  vocab = (gpt2_folder / 'vocab.json').read_bytes()
  (gpt2_folder / 'vocab.json').write_bytes(mark + vocab)
  assert _gpt2(gpt2_folder).encode(TEXTS[1]).tolist() == expected


@pytest.mark.parametrize('space', [' ', '\n', ' \t'])
def test_a_long_run_of_whitespace(gpt2_folder, space):
  tokenizer = _gpt2(gpt2_folder)
  text = 'a lore' + space * 1_200_000 + ' lore' + space * 5 + 'b'
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  np.testing.assert_array_equal(ids[:3], tokenizer.encode('a lore' + space)[:3])
  np.testing.assert_array_equal(ids[-7:], tokenizer.encode(' lore' + space * 5 + 'b')[-7:])


@pytest.mark.parametrize(
  ('file', 'content', 'message'),
  [
    ('merges.txt', 'x y\n', r"lacks 1 tokens of merges\.txt, e\.g\. 'xy'"),
    ('merges.txt', 'l o\nxyz\n', "expected two tokens in a line, got 'xyz'"),
    ('merges.txt', 'l o\nr e\nl o\n', "merges.txt makes 'lo' twice"),
    ('vocab.json', '["a"]', 'expected an object of tokens and their ids'),
    ('vocab.json', '{"a": "0"}', 'expected tokens and their ids'),
    ('vocab.json', '{"a": 0, "b": 0}', 'expected unique ids'),
    ('vocab.json', '{"a": 2147483647}', 'ids from 0 to 65551 for 1 tokens, got 2147483647'),
    ('vocab.json', '{"a":' * 10_000, 'nested'),
    ('vocab.json', '{"a"', 'cannot use'),
  ],
)
def test_invalid_gpt2_files_are_rejected(make_config, gpt2_folder, file, content, message):
  (gpt2_folder / file).write_text(content)
  with pytest.raises(ValueError, match=f'data.tokenizer: .*{message}'):
    tokenizer_lib.make_tokenizer(make_config(tokenizer=f'gpt2:{gpt2_folder}'))


def test_known_vocabulary_sizes(gpt2_folder, sentencepiece_file, tmp_path):
  sizes = {'bytes': 259, f'gpt2:{gpt2_folder}': 264, str(sentencepiece_file): 320}
  for name, size in (sizes | {f'gpt2:{tmp_path}/nowhere': 50_260}).items():
    assert step.known_vocab_size(name) == size
  with pytest.raises(ValueError, match='set model.vocab_size'):
    step.known_vocab_size(f'{tmp_path}/nowhere.model')


def test_missing_and_broken_files(make_config, tmp_path):
  with pytest.raises(ValueError, match=r'data\.tokenizer: .*no file .*nowhere\.model'):
    tokenizer_lib.make_tokenizer(make_config(tokenizer=str(tmp_path / 'nowhere.model')))
  with pytest.raises(ValueError, match=r'no file .*vocab\.json\. hf download .* --local-dir '):
    tokenizer_lib.make_tokenizer(make_config(tokenizer=f'gpt2:{tmp_path}'))
  (tmp_path / 'broken.model').write_bytes(b'not a model')
  with pytest.raises(ValueError, match=r'data\.tokenizer: .*not a SentencePiece model'):
    tokenizer_lib.make_tokenizer(make_config(tokenizer=str(tmp_path / 'broken.model')))


def test_fingerprints_distinguish_tokenizers(
  make_config, sentencepiece_file, foreign_file, tmp_path
):
  names = ['bytes', str(sentencepiece_file), str(foreign_file)]
  prints = [tokenizer_lib.make_tokenizer(make_config(tokenizer=n)).fingerprint for n in names]
  assert len(set(prints)) == 3
  copy = tmp_path / 'copy.model'
  copy.write_bytes(sentencepiece_file.read_bytes())
  assert tokenizer_lib.make_tokenizer(make_config(tokenizer=str(copy))).fingerprint == prints[1]


def test_program_trains_on_the_training_split(make_config, text_folder, tmp_path):
  config = make_config(source='text', files=f'{text_folder}/**/*.txt', tokenizer='does not matter')
  output = tmp_path / 'new' / 'tok.model'
  message = program.train(config, 290, output, max_megabytes=1)
  assert '290 ids' in message
  tokenizer = tokenizer_lib.make_tokenizer(make_config(tokenizer=str(output)))
  assert tokenizer.vocab_size == 290
  assert tokenizer.decode(tokenizer.encode('abc déf 🎉')) == 'abc déf 🎉'
  assert [p.name for p in output.parent.iterdir()] == ['tok.model']
  first = output.read_bytes()
  program.train(config, 290, output, max_megabytes=1)
  assert output.read_bytes() == first


def test_lines_with_the_trainers_reserved_character_are_trained_on():
  texts = [f'bar ▅▅▅ of number {i} is done\n'.encode() for i in range(300)]
  pieces = sentencepiece.SentencePieceProcessor(model_proto=program.train_sentencepiece(texts, 300))
  assert len(pieces.encode(' of number 1 is done')) < 10


def test_documents_without_line_breaks_are_trained_on():
  texts = [(f'{i} ' + 'a sentence without a line break. ' * 3000).encode() for i in range(3)]
  short = [line.encode() + b'\n' for text in texts for line in text.decode().split('. ')]
  model = program.train_sentencepiece(texts, 300)
  pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
  assert len(pieces.encode('a sentence without a line break.')) < 12
  assert len(pieces.encode(short[1].decode())) < 12
  cut = list(program._sentences(texts[0].decode()))
  assert ''.join(cut) == texts[0].decode() and max(map(len, cut)) <= 16_384
  assert all(part.startswith(' ') for part in cut[1:])
  assert list(program._sentences('é' * 8192)) == ['é' * 8192]
  assert ''.join(program._sentences('漢' * 10_000)) == '漢' * 10_000


def test_program_errors(make_config, text_folder, tmp_path):
  config = make_config(source='text', files=f'{text_folder}/**/*.txt')
  for size in (20, 100_000):
    with pytest.raises(ValueError, match=r'--vocab_size: '):
      program.train(config, size, tmp_path / 'tok.model', max_megabytes=1)
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError, match='file'):
    program.train(config, 290, tmp_path / 'file' / 'tok.model', max_megabytes=1)
  with pytest.raises(ValueError, match=r"data\.source: 'tokens' holds no text"):
    program.train(make_config(source='tokens', files='x'), 290, tmp_path / 'tok.model', 1)
