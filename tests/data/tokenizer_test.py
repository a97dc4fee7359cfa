import json

import numpy as np
import pytest
import sentencepiece

from moejax import tokenizer as program
from moejax.data import tokenizer as tokenizer_lib

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
  tokens = list(tokenizer_lib._gpt2_alphabet())
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
  assert tokenizer.decode(ids) == 'the quick dog'
  assert tokenizer.encode('dog 漢').tolist()[-1] == 2  # unknown


def test_sentencepiece_replaces_invalid_bytes(make_config, sentencepiece_file):
  tokenizer = tokenizer_lib.make_tokenizer(make_config(tokenizer=str(sentencepiece_file)))
  assert tokenizer.decode(tokenizer.encode_bytes(b'a\xffb')) == 'a\ufffdb'
  assert tokenizer.decode(tokenizer.encode('lone \ud83c')).startswith('lone \ufffd')


def test_gpt2_from_local_files(make_config, gpt2_folder):
  pytest.importorskip('tiktoken')
  tokenizer = tokenizer_lib.make_tokenizer(make_config(tokenizer=f'gpt2:{gpt2_folder}'))
  assert tokenizer.vocab_size == 256 + 4 + 1 + 3
  assert tokenizer.encode('!').tolist() == [3]
  assert tokenizer.encode(' lore!').tolist() == [259 + 3, 3]  # the last merge, then '!'
  assert tokenizer.encode(' lo re').tolist() == [257 + 3, tokenizer.encode(' ')[0], 258 + 3]
  for text in TEXTS:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode([0, *ids, 1, 263, 300]) == text


def test_gpt2_files_that_disagree(make_config, gpt2_folder):
  pytest.importorskip('tiktoken')
  (gpt2_folder / 'merges.txt').write_text('r e\nl o\n')
  with pytest.raises(ValueError, match=r'data\.tokenizer: .*not in the order of merges\.txt'):
    tokenizer_lib.make_tokenizer(make_config(tokenizer=f'gpt2:{gpt2_folder}'))
  (gpt2_folder / 'merges.txt').write_text('x y\n')
  with pytest.raises(ValueError, match=r"lacks 1 tokens of merges\.txt, e\.g\. 'xy'"):
    tokenizer_lib.make_tokenizer(make_config(tokenizer=f'gpt2:{gpt2_folder}'))


def test_missing_and_broken_files(make_config, tmp_path):
  with pytest.raises(ValueError, match=r'data\.tokenizer: .*no file .*nowhere\.model'):
    tokenizer_lib.make_tokenizer(make_config(tokenizer=str(tmp_path / 'nowhere.model')))
  with pytest.raises(ValueError, match=r'data\.tokenizer: .*no file .*vocab\.json'):
    tokenizer_lib.make_tokenizer(make_config(tokenizer=f'gpt2:{tmp_path}'))
  (tmp_path / 'broken.model').write_bytes(b'not a model')
  with pytest.raises(ValueError, match=r'data\.tokenizer: .*not a SentencePiece model'):
    tokenizer_lib.make_tokenizer(make_config(tokenizer=str(tmp_path / 'broken.model')))


def test_fingerprints_tell_tokenizers_apart(
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


def test_program_errors(make_config, text_folder, tmp_path):
  config = make_config(source='text', files=f'{text_folder}/**/*.txt')
  for size in (20, 100_000):
    with pytest.raises(ValueError, match=r'--vocab_size: '):
      program.train(config, size, tmp_path / 'tok.model', max_megabytes=1)
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match=r'--output: cannot write'):
    program.train(config, 290, tmp_path / 'file' / 'tok.model', max_megabytes=1)
  with pytest.raises(ValueError, match=r"data\.source: 'tokens' holds no text"):
    program.train(make_config(source='tokens', files='x'), 290, tmp_path / 'tok.model', 1)
