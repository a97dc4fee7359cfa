import json
import os
import re
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

from moejax import cli, data, exit_codes, tokenize
from moejax.data import blocks, token_files, tokenizer


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
  _edit_index(written, lambda index: index.update(format=3))
  with pytest.raises(ValueError, match=r'data\.files: .*format 3, expected 2'):
    data.make_loader(config, 'validation')
  index = json.loads((written / 'index.json').read_text()) | {'format': 2}
  damaged = ['[]', 'null', '{"format": 2, "tok', json.dumps(index | {'dtype': 'x', 'splits': []})]
  damaged += [json.dumps(index | {'dtype': dtype}) for dtype in ('>u2', 'O', '|u1', ['<u2'])]
  damaged += [json.dumps(index | {'fingerprint': text}) for text in ('\ud800', '', 3.5)]
  for name in ('tokens', 'max_id', 'crc32'):
    for value in (-1, 1.0, '9', True, None):
      splits = {s: entry | {name: value} for s, entry in index['splits'].items()}
      damaged.append(json.dumps(index | {'splits': splits}))
  for name in index.keys() - {'source', 'vocab_size'}:  # which nobody reads
    damaged.append(json.dumps({n: value for n, value in index.items() if n != name}))
  for content in damaged:
    (written / 'index.json').write_text(content)
    with pytest.raises(ValueError, match=r'data\.files: .*index\.json is damaged'):
      data.make_loader(config, 'validation')


@pytest.fixture(scope='module')
def several_blocks(tmp_path_factory):
  folder = tmp_path_factory.mktemp('large')
  for i in range(40):
    text = np.random.default_rng(i).integers(97, 123, 10_000, np.uint8).tobytes()
    (folder / f'{i}.txt').write_bytes(text)
  tokenize.write(data.DataConfig(source='text', files=f'{folder}/*'), folder / 'tokens')
  for path in (folder / 'tokens').iterdir():
    os.utime(path, (0, 0))  # its clock may tick only every few milliseconds
  return folder / 'tokens'


@pytest.fixture
def large(several_blocks, tmp_path):
  """A directory of byte tokens in several blocks, of text without repetition."""
  return shutil.copytree(several_blocks, tmp_path / 'tokens')


def _as_before_checksums(folder):
  """Makes of token files what earlier versions wrote."""
  _edit_index(
    folder,
    lambda index: (
      [index.update(format=1)] + [entry.pop('crc32') for entry in index['splits'].values()]
    ),
  )
  for path in folder.glob('*.crc32'):
    path.unlink()


def _beyond(ids):
  ids[:] = 65535


def _one_in_a_thousand_beyond(ids):
  ids[::1000] = 300


def _other_byte_order(ids):
  ids.byteswap(inplace=True)


def _another_text(ids):
  ids[:] = ids[::-1].copy()


@pytest.mark.parametrize('is_live', [False, True])
@pytest.mark.parametrize('has_checksums', [True, False])
@pytest.mark.parametrize(
  'damage', [_beyond, _one_in_a_thousand_beyond, _other_byte_order, _another_text]
)
def test_tokens_that_are_not_those_of_the_corpus(
  make_config, large, damage, has_checksums, is_live
):
  """Whether they were damaged before a run begins or are overwritten in place while it reads."""
  if not has_checksums:
    _as_before_checksums(large)
  config = make_config(source='tokens', files=str(large), batch_size=16)
  loader = data.make_loader(config, 'train')
  for step in range(20 if is_live else 0):
    loader.batch(step)
  ids = np.fromfile(large / 'train.bin', '<u2')
  damage(ids)
  ids.tofile(large / 'train.bin')
  if not is_live:
    os.utime(large / 'train.bin', (0, 0))
    loader = data.make_loader(config, 'train')
  if damage is _another_text and not (has_checksums or is_live):
    return  # which is all that is not noticed
  with pytest.raises(blocks.DamagedData, match=r'data\.files: .*train\.bin .*\.$') as raised:
    for step in range(20, 200):  # a thousand tokens are soon read
      loader.batch(step)
  if not is_live:
    message = str(raised.value)
    swapped = has_checksums and damage is _other_byte_order
    place = 'is in the other byte order' if swapped else r'byte (\d+)'
    found = re.search(place, message)
    assert found
    if not swapped:
      assert (int(found[1]) % blocks.BLOCK == 0) if has_checksums else (' has id ' in message)


def test_the_id_and_its_byte_are_named(make_config, large):
  _as_before_checksums(large)
  ids = np.fromfile(large / 'train.bin', '<u2')
  ids[5] = 259
  ids.tofile(large / 'train.bin')
  config = make_config(source='tokens', files=str(large), batch_size=4096)
  loader = data.make_loader(config, 'train')
  message = r'train\.bin at byte 10 has id 259, but .* ids 0 to 258'
  with pytest.raises(blocks.DamagedData, match=message) as raised:
    for step in range(loader.num_batches):
      loader.batch(step)
  assert cli.exit_code(raised.value) == exit_codes.FAILS_AGAIN


@pytest.mark.parametrize('has_checksums', [True, False])
def test_a_file_that_is_truncated_while_it_is_read(make_config, large, has_checksums):
  if not has_checksums:
    _as_before_checksums(large)
  loader = data.make_loader(make_config(source='tokens', files=str(large)), 'train')
  loader.batch(0)
  os.truncate(large / 'train.bin', 100)
  with pytest.raises(blocks.DamagedData, match=r'train\.bin was written to .* not 100; '):
    loader.batch(1)


def test_a_file_that_is_only_touched_is_read_on(make_config, large):
  config = make_config(source='tokens', files=str(large))
  loader, expected = data.make_loader(config, 'train'), data.make_loader(config, 'train').batch(3)
  loader.batch(3)
  os.utime(large / 'train.bin')
  for name, value in loader.batch(3).items():
    np.testing.assert_array_equal(value, expected[name])


def test_only_the_blocks_that_are_read_are_checked(make_config, large):
  """So that a start does not read a terabyte, and every later read costs no more than itself."""
  loader = data.make_loader(make_config(source='tokens', files=str(large), batch_size=1), 'train')
  read, checks = blocks.TokenFile._read, []

  def counted(self, start, stop):
    checks.append(stop - start)
    return read(self, start, stop)

  with mock.patch.object(blocks.TokenFile, '_read', counted):
    loader.batch(0)
    loader.batch(0)
  assert checks in ([blocks.BLOCK, 16, 16], [blocks.BLOCK, blocks.BLOCK, 16, 16])


def test_the_checksums_are_checked(make_config, large):
  config = make_config(source='tokens', files=str(large))
  content = (large / 'train.crc32').read_bytes()
  (large / 'train.crc32').write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  with pytest.raises(ValueError, match=r'train\.crc32 is not what its index says'):
    data.make_loader(config, 'train')
  (large / 'train.crc32').unlink()
  with pytest.raises(ValueError, match=r'train\.crc32 has 0 bytes'):
    data.make_loader(config, 'train')


def test_files_of_earlier_versions_are_read_with_one_warning(make_config, large, caplog):
  config = make_config(source='tokens', files=str(large))
  expected = data.make_loader(config, 'train').batch(0)
  _as_before_checksums(large)
  for split in ('train', 'validation'):
    data.make_loader(config, split)
  assert [record.message.count('has no checksums') for record in caplog.records] == [1]
  np.testing.assert_array_equal(
    data.make_loader(config, 'train').batch(0)['inputs'], expected['inputs']
  )


def test_a_document_beyond_the_vocabulary_is_not_written(make_config, text_folder, tmp_path):
  config = make_config(source='text', files=f'{text_folder}/**/*.txt')
  wrong = lambda self, data: np.array([65536 + 5], np.int32)  # 5 in two bytes
  with mock.patch.object(tokenizer.BytesTokenizer, 'encode_bytes', wrong):
    for use in (
      lambda: tokenize.write(config, tmp_path / 'out'),
      lambda: data.make_loader(config, 'train'),
    ):
      with pytest.raises(blocks.DamagedData, match=r'token 0 of a document has id 65541'):
        use()
  assert not (tmp_path / 'out').exists()


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
