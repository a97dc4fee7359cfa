import json
import subprocess
import sys

import numpy as np
import pytest

from moejax import data, tokenize
from moejax.data import token_files


@pytest.fixture(params=['bytes', 'sentencepiece'])
def source(request, make_config, text_folder, sentencepiece_file):
  """A text source with each kind of tokenizer."""
  name = 'bytes' if request.param == 'bytes' else str(sentencepiece_file)
  return make_config(source='text', files=f'{text_folder}/**/*.txt', tokenizer=name)


@pytest.fixture
def written(make_config, text_folder, tmp_path):
  """A directory of byte tokens."""
  directory = tmp_path / 'tokens'
  tokenize.write(make_config(source='text', files=f'{text_folder}/**/*.txt'), directory)
  return directory


def _edit_index(directory, edit):
  path = directory / 'index.json'
  index = json.loads(path.read_text())
  edit(index)
  path.write_text(json.dumps(index))


def test_files_give_the_batches_of_the_source(source, make_config, tmp_path):
  directory = tmp_path / 'out' / 'tokens'
  message = tokenize.tokenize(source, directory)
  index = json.loads((directory / 'index.json').read_text())
  tokenizer = 'bytes' if source.tokenizer == 'bytes' else str(directory / 'tokenizer.model')
  assert f'--config.data.tokenizer={tokenizer}' in message
  config = make_config(source='tokens', files=str(directory), tokenizer=tokenizer)
  for split in ('train', 'validation'):
    direct, read = data.make_loader(source, split), data.make_loader(config, split)
    assert read.fingerprint == direct.fingerprint
    assert read.num_batches == direct.num_batches
    for step in (0, 7):
      for key, value in direct.batch(step).items():
        np.testing.assert_array_equal(read.batch(step)[key], value)
  assert index['splits']['train']['documents'] + index['splits']['validation']['documents'] == 60
  assert index['vocab_size'] == data.make_tokenizer(config).vocab_size
  assert [path.name for path in directory.parent.iterdir()] == ['tokens']


def test_dtype_of_the_ids():
  assert token_files.dtype_for(65_536).itemsize == 2
  assert token_files.dtype_for(65_537).itemsize == 4


def test_an_interrupted_run_leaves_nothing(make_config, text_folder, tmp_path, monkeypatch):
  class Interrupted(BaseException):
    pass

  def copy(*_):
    raise Interrupted

  monkeypatch.setattr(tokenize, '_copy_tokenizer', copy)
  config = make_config(source='text', files=f'{text_folder}/**/*.txt')
  with pytest.raises(Interrupted):
    tokenize.write(config, tmp_path / 'out' / 'tokens')
  assert not list((tmp_path / 'out').iterdir())


def test_invalid_outputs_are_rejected(make_config, written, text_folder, tmp_path):
  config = make_config(source='text', files=f'{text_folder}/**/*.txt')
  with pytest.raises(ValueError, match=r'--output: .*tokens already exists'):
    tokenize.write(config, written)
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError, match='file'):
    tokenize.write(config, tmp_path / 'file' / 'tokens')
  with pytest.raises(ValueError, match=r"data\.source: 'tokens' is already tokenised"):
    tokenize.write(make_config(source='tokens', files=str(written)), tmp_path / 'again')


def test_another_tokenizer_is_rejected(make_config, written, sentencepiece_file):
  config = make_config(source='tokens', files=str(written), tokenizer=str(sentencepiece_file))
  with pytest.raises(
    ValueError, match=r'data\.tokenizer: .*another tokenizer.*data\.tokenizer=bytes'
  ):
    data.make_loader(config, 'train')


def test_an_id_beyond_the_vocabulary_is_rejected(make_config, written):
  _edit_index(written, lambda index: index['splits']['train'].update(max_id=300))
  with pytest.raises(ValueError, match=r'data\.tokenizer: .*vocabulary of 259.*hold id 300'):
    data.make_loader(make_config(source='tokens', files=str(written)), 'train')


def test_damaged_directories(make_config, written, tmp_path):
  with pytest.raises(ValueError, match=r'data\.files: .*no .*nothing/index\.json'):
    data.make_loader(make_config(source='tokens', files=str(tmp_path / 'nothing')), 'train')
  config = make_config(source='tokens', files=str(written))
  with open(written / 'train.bin', 'ab') as file:
    file.write(b'x')
  with pytest.raises(ValueError, match=r'data\.files: .*train\.bin has .* bytes, its index says'):
    data.make_loader(config, 'train')
  data.make_loader(config, 'validation')
  _edit_index(written, lambda index: index.update(format=2))
  with pytest.raises(ValueError, match=r'data\.files: .*format 2, expected 1'):
    data.make_loader(config, 'validation')
  index = json.loads((written / 'index.json').read_text()) | {'format': 1}
  damaged = ['[]', 'null', '{"format": 1, "tok', json.dumps(index | {'dtype': 'x', 'splits': []})]
  for name in index.keys() - {'source', 'vocab_size'}:  # which nobody reads
    damaged.append(json.dumps({n: value for n, value in index.items() if n != name}))
  for content in damaged:
    (written / 'index.json').write_text(content)
    with pytest.raises(ValueError, match=r'data\.files: .*index\.json is damaged'):
      data.make_loader(config, 'validation')


def test_no_tensorflow_for_token_files(make_config, written):
  config = make_config(source='tokens', files=str(written))
  code = f"""
import sys
from moejax import data
config = data.DataConfig(**{vars(config)!r})
data.make_loader(config, 'train').batch(0)
assert not {{'tensorflow', 'seqio', 'jax'}} & set(sys.modules)
"""
  subprocess.run([sys.executable, '-c', code], check=True)
