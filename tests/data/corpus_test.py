import bz2
import gzip
import hashlib
import json
import lzma
import shutil
import sys
import sysconfig

import numpy as np
import pytest
from absl import logging

from moejax import data, tokenize
from moejax.data import blocks, corpus, python_files, token_files, tokenizer as tokenizer_lib

pyarrow = pytest.importorskip('pyarrow')
pytest.importorskip('pyarrow.parquet')


def _fingerprint(config):
  digest = hashlib.sha256()
  for _ in corpus.encode(config, tokenizer_lib.BytesTokenizer(), digest):
    pass
  return digest.hexdigest()[:16]


def _texts(config, split):
  return [d.data for d in corpus.documents(config) if d.split == split]


def test_stdlib_has_both_splits_and_no_tests(make_config):
  documents = list(corpus.documents(make_config()))
  names = [d.name for d in documents]
  assert names == sorted(names)
  assert 'json/decoder.py' in names
  assert not any('test' in n.split('/') or 'site-packages' in n or 'idlelib' in n for n in names)
  validation = sum(len(d.data) for d in documents if d.split == 'validation')
  total = sum(len(d.data) for d in documents)
  assert total > 5e6
  assert 0.01 < validation / total < 0.12


def test_stdlib_without_files(make_config, monkeypatch, tmp_path):
  monkeypatch.setattr(sysconfig, 'get_paths', lambda: {'stdlib': str(tmp_path)})
  with pytest.raises(ValueError, match=r"data\.source: 'stdlib' .*data\.source='text'"):
    list(corpus.documents(make_config()))


def test_text_splits_are_disjoint_and_complete(make_config, text_folder):
  config = make_config(source='text', files=f'{text_folder}/**/*.txt')
  names = {s: {d.name for d in corpus.documents(config) if d.split == s} for s in corpus.SPLITS}
  assert names['validation']
  assert not names['train'] & names['validation']
  assert len(names['train'] | names['validation']) == 60


def test_moving_the_folder_changes_nothing(make_config, text_folder, tmp_path):
  moved = tmp_path / 'elsewhere' / 'copy'
  shutil.copytree(text_folder, moved)
  first, second = (
    make_config(source='text', files=f'{folder}/**/*.txt') for folder in (text_folder, moved)
  )
  assert list(corpus.documents(first)) == list(corpus.documents(second))
  assert _fingerprint(first) == _fingerprint(second)


def test_fingerprint_changes_with_a_byte_or_a_name(make_config, text_folder):
  config = make_config(source='text', files=f'{text_folder}/**/*.txt')
  first = _fingerprint(config)
  (text_folder / '0.txt').write_text('document 1\n')
  second = _fingerprint(config)
  (text_folder / '0.txt').rename(text_folder / '00.txt')
  assert len({first, second, _fingerprint(config)}) == 3


def test_a_single_file_is_cut_at_a_newline(make_config, tmp_path):
  data = b''.join(b'line %d\n' % i for i in range(1000))
  (tmp_path / 'one.txt').write_bytes(data)
  config = make_config(source='text', files=str(tmp_path / 'one.txt'))
  (train,), (validation,) = _texts(config, 'train'), _texts(config, 'validation')
  assert train + validation == data
  assert train.endswith(b'\n')
  assert 0.05 <= len(validation) / len(data) < 0.06


def test_few_files_without_newlines_are_cut_between_characters(make_config, tmp_path):
  for i in range(2):
    (tmp_path / f'{i}.txt').write_text('漢' * 500)
  config = make_config(source='text', files=f'{tmp_path}/*.txt')
  train, validation = _texts(config, 'train'), _texts(config, 'validation')
  assert [len(t.decode()) for t in train] == [475, 475]
  assert [len(t.decode()) for t in validation] == [25, 25]


def test_a_file_of_other_bytes_is_cut_too(make_config, tmp_path):
  (tmp_path / 'one.txt').write_bytes(b'\x80' * 1000)  # that begin no character of UTF-8
  config = make_config(source='text', files=f'{tmp_path}/one.txt')
  assert [len(d.data) for d in corpus.documents(config)] == [950, 50]


def test_nothing_matches(make_config, text_folder):
  with pytest.raises(ValueError, match=r'data\.files: .*\*\.md.* holds 21 entries \(0\.txt'):
    list(corpus.documents(make_config(source='text', files=f'{text_folder}/*.md')))
  with pytest.raises(ValueError, match=r'data\.files: .*it is a folder; .*, write /.*/\*\*/\*\.'):
    list(corpus.documents(make_config(source='text', files=f'{text_folder}/')))
  with pytest.raises(ValueError, match=r'data\.files: .*nowhere does not exist'):
    list(corpus.documents(make_config(source='text', files=f'{text_folder}/nowhere/*.txt')))


@pytest.mark.parametrize('source', ['text', 'jsonl'])
def test_invalid_utf8_is_kept_by_bytes_and_counted_otherwise(
  make_config, tmp_path, monkeypatch, sentencepiece_file, source
):
  warnings = []
  monkeypatch.setattr(logging, 'warning', lambda *args: warnings.append(args[0] % args[1:]))
  raw = [b'good', b'bad \xff and \xfe.', b'bad \xe9t\xe9', b'\xef\xbf\xbd replaced before']
  for i, text in enumerate(raw):
    (tmp_path / f'{i}.txt').write_bytes(text)
  (tmp_path / 'all.jsonl').write_bytes(b''.join(b'{"text": "%s"}\n' % text for text in raw))
  files = str(tmp_path / ('*.txt' if source == 'text' else '*.jsonl'))

  def encode(name):
    config = make_config(source=source, files=files, tokenizer=name)
    tokenizer = tokenizer_lib.make_tokenizer(config)
    return list(corpus.encode(config, tokenizer, hashlib.sha256()))

  ids = np.concatenate([ids for _, ids, _ in encode('bytes')])
  assert (ids[ids != 1] - 3).astype(np.uint8).tobytes() == b''.join(raw)
  assert not warnings
  encode(str(sentencepiece_file))
  (warning,) = warnings
  assert 'Replaced 4 ' in warning
  assert ('1.txt' if source == 'text' else 'all.jsonl:2') in warning


def test_json_lines(make_config, tmp_path):
  texts = [f'text {i} "quoted" 🎉\n' for i in range(200)]
  lines = [json.dumps({'body': t, 'n': i}) for i, t in enumerate(texts)]
  (tmp_path / 'a.jsonl').write_text('\n\n'.join(lines) + '\n')
  config = make_config(source='jsonl', files=f'{tmp_path}/*.jsonl', field='body')
  found = {split: [d.decode() for d in _texts(config, split)] for split in corpus.SPLITS}
  assert sorted(found['train'] + found['validation']) == sorted(texts)
  assert 0 < len(found['validation']) < 30
  (tmp_path / 'a.jsonl').write_text('\n'.join(reversed(lines)))
  assert sorted(d.decode() for d in _texts(config, 'validation')) == sorted(found['validation'])


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"text": ', r'data\.files: .*a\.jsonl, line 2 is not JSON'),
    ('{"text": ' + '1' * 5000 + '}', r'data\.files: .*a\.jsonl, line 2 is not JSON'),
    ('[' * 100_000, r'data\.files: .*a\.jsonl, line 2 is not JSON'),
    ('\ud800{"text": "x"}', r'data\.files: .*a\.jsonl, line 2 is not JSON'),
    ('[1]', r'data\.files: .*line 2: expected a JSON object, got a list'),
    ('{"body": "x", "id": 1}', r"data\.field: .*line 2 has no field 'text', only 'body', 'id'"),
    ('{"text": 3}', r"data\.field: .*line 2: expected text in 'text', got a int"),
  ],
)
def test_bad_json_lines(make_config, tmp_path, line, message):
  content = '{"text": "good"}\n' + line
  (tmp_path / 'a.jsonl').write_bytes(content.encode('utf-8', 'surrogatepass'))
  with pytest.raises(ValueError, match=message):
    list(corpus.documents(make_config(source='jsonl', files=f'{tmp_path}/*.jsonl')))


def test_a_lone_surrogate_in_json(make_config, tmp_path):
  (tmp_path / 'a.jsonl').write_text(r'{"text": "half \ud83c"}')
  document, _ = corpus.documents(make_config(source='jsonl', files=f'{tmp_path}/*.jsonl'))
  assert document.data.startswith(b'half ')
  assert corpus.num_invalid(document.data)


def test_one_json_document_is_cut(make_config, tmp_path):
  text = 'a line of a book\n' * 1000
  (tmp_path / 'a.jsonl').write_text(json.dumps({'text': text}))
  config = make_config(source='jsonl', files=f'{tmp_path}/a.jsonl')
  (train,), (validation,) = _texts(config, 'train'), _texts(config, 'validation')
  assert (train + validation).decode() == text
  assert 0.05 <= len(validation) / len(text) < 0.06


def test_a_byte_order_mark_is_skipped(make_config, tmp_path):
  lines = [json.dumps({'text': f'text {i}'}) for i in range(100)]
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines), encoding='utf-8-sig')
  config = make_config(source='jsonl', files=f'{tmp_path}/a.jsonl')
  assert len(list(corpus.documents(config))) == 100
  config = make_config(source='text', files=f'{tmp_path}/a.jsonl')
  assert next(corpus.documents(config)).data.startswith(b'{"text"')


def _zstd(data):
  sink = pyarrow.BufferOutputStream()
  with pyarrow.CompressedOutputStream(sink, 'zstd') as file:
    file.write(data)
  return sink.getvalue().to_pybytes()


COMPRESS = {
  '.gz': gzip.compress,
  '.bz2': bz2.compress,
  '.xz': lzma.compress,
  '.zst': _zstd,
  '.two.gz': lambda data: gzip.compress(data[:50]) + gzip.compress(data[50:]),
  '.two.zst': lambda data: _zstd(data[:50]) + _zstd(data[50:]),
}


@pytest.mark.parametrize('suffix', COMPRESS)
def test_compressed_text_is_read(make_config, tmp_path, suffix):
  lines = [json.dumps({'text': f'text {i}'}) for i in range(100)]
  data = '\n'.join(lines).encode()
  (tmp_path / f'a.json{suffix}').write_bytes(COMPRESS[suffix](data))
  config = make_config(source='jsonl', files=f'{tmp_path}/*.json*')
  assert [d.data.decode() for d in corpus.documents(config)] == [f'text {i}' for i in range(100)]
  config = make_config(source='text', files=f'{tmp_path}/*.json*')
  assert b''.join(d.data for d in corpus.documents(config)) == data


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (gzip.compress(b'text ' * 1000)[:-30], 'cannot read .*a.x: .*end-of-stream'),
    (lzma.compress(b'text ' * 1000)[:-30], 'cannot read .*a.x: .*end-of-stream'),
    (gzip.compress(bytes(range(256)))[:20] + b'xx' * 50, 'cannot read .*a.x'),
    (_zstd(b'text ' * 1000)[:-3], 'cannot read .*a.x: Truncated'),
    (_zstd(bytes(range(256)))[:20] + b'xx' * 50, 'cannot read .*a.x'),
    (b'PK\x03\x04....', 'a.x is a zip archive'),
    (b'PAR1....', "a.x is a Parquet file; set data.source='parquet'"),
    (gzip.compress(b'a' * 257 + b'ustar  \0' + b'text' * 99), 'a.x is a tar archive'),
    ('{"text": "a"}'.encode('utf-16-le').join([b'\xff\xfe', b'']), 'a.x is in UTF-16; write it as'),
    (gzip.compress(b'\xfe\xff' + 'text'.encode('utf-16-be')), 'a.x is in UTF-16'),
  ],
  ids=[
    'cut_gzip',
    'cut_xz',
    'damaged_gzip',
    'cut_zstd',
    'damaged_zstd',
    'zip',
    'parquet',
    'tar',
    'utf_16',
    'gzip_utf_16',
  ],
)
@pytest.mark.parametrize('source', ['text', 'jsonl'])
def test_unreadable_files_are_rejected(make_config, tmp_path, source, content, message):
  (tmp_path / 'a.x').write_bytes(content)
  with pytest.raises(ValueError, match=f'data.files: .*{message}'):
    list(corpus.documents(make_config(source=source, files=f'{tmp_path}/a.x')))


def _write_parquet(path, **columns):
  pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=30)


def test_parquet_is_read_like_json_lines(make_config, tmp_path):
  texts = [f'text {i} 🎉\n' for i in range(100)]
  for name, part in (('a', texts[:70]), ('b', texts[70:])):
    _write_parquet(tmp_path / f'{name}.parquet', n=list(range(len(part))), body=part)
    lines = (json.dumps({'body': text}) for text in part)
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines))
  rows, lines = (
    list(corpus.documents(make_config(source=s, files=f'{tmp_path}/*.{s}', field='body')))
    for s in ('parquet', 'jsonl')
  )
  assert [d.data.decode() for d in rows] == texts
  assert [(d.split, d.data) for d in rows] == [(d.split, d.data) for d in lines]
  assert rows[75].name == 'b.parquet:6'


@pytest.mark.parametrize(
  ('columns', 'message'),
  [
    ({'body': ['x'], 'id': [1]}, r"data\.field: .*has no field 'text', only 'body', 'id'"),
    ({'text': [1, 2]}, r"data\.field: .*row 1: expected text in 'text', got a int"),
    ({'text': ['a', None]}, r"data\.field: .*row 2: expected text in 'text', got a NoneType"),
  ],
)
def test_bad_parquet_rows(make_config, tmp_path, columns, message):
  _write_parquet(tmp_path / 'a.parquet', **columns)
  with pytest.raises(ValueError, match=message):
    list(corpus.documents(make_config(source='parquet', files=f'{tmp_path}/*.parquet')))


def test_bad_parquet_files(make_config, tmp_path):
  path = tmp_path / 'a.parquet'
  config = make_config(source='parquet', files=str(path))
  path.write_text('{"text": "a"}')
  with pytest.raises(ValueError, match=r"a\.parquet is not a Parquet file; data\.source='jsonl'"):
    list(corpus.documents(config))
  _write_parquet(path, text=[f'{i}' * 1000 for i in range(100)])
  whole = path.read_bytes()
  middle = len(whole) // 2
  for damaged in (whole[:-50], whole[:middle] + bytes(500) + whole[middle + 500 :], whole[:100]):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r'data\.files: cannot read .*a\.parquet: '):
      list(corpus.documents(config))


@pytest.mark.parametrize('source', ['parquet', 'text'])
def test_without_pyarrow(make_config, tmp_path, monkeypatch, source):
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  (tmp_path / 'a.x').write_bytes(b'\x28\xb5\x2f\xfd....')
  with pytest.raises(ValueError, match=r'a\.x is .*needs the package pyarrow: pip install'):
    list(corpus.documents(make_config(source=source, files=f'{tmp_path}/a.x')))


def test_validation_files(make_config, text_folder, tmp_path):
  (tmp_path / 'held_out.txt').write_text('held out')
  files = f'{text_folder}/**/*.txt'
  config = make_config(source='text', files=files, validation_files=f'{tmp_path}/held*.txt')
  everything = [d.data for d in corpus.documents(make_config(source='text', files=files))]
  assert _texts(config, 'train') == everything
  assert _texts(config, 'validation') == [b'held out']
  assert _fingerprint(config) != _fingerprint(make_config(source='text', files=files))
  config = make_config(source='text', files=files, validation_files=f'{tmp_path}/none*')
  with pytest.raises(ValueError, match=r'data\.validation_files: no file matches'):
    list(corpus.documents(config))


def _names(config):
  return [document.name for document in corpus.documents(config)]


def test_every_real_file_is_one_document(make_config, text_folder):
  config = make_config(source='text', files=f'{text_folder}/**/*.txt')
  names, fingerprint = _names(config), _fingerprint(config)
  (text_folder / 'self').symlink_to('.')
  (text_folder / 'Again').symlink_to(text_folder)  # two: without care, 2**40 paths
  (text_folder / 'Latest').symlink_to('below')
  (text_folder / '00.txt').symlink_to('3.txt')
  (text_folder / 'below' / 'up').symlink_to('..')
  (text_folder / 'zero.txt').hardlink_to(text_folder / '3.txt')
  (text_folder / 'nothing.txt').symlink_to('nowhere')
  (text_folder / 'loop.txt').symlink_to('loop.txt')
  (text_folder / '.hidden').mkdir()
  (text_folder / '.hidden' / 'x.txt').write_text('x')
  assert _names(config) == names and _fingerprint(config) == fingerprint
  flat = make_config(source='text', files=f'{text_folder}/*/*.txt')
  assert sorted(_names(flat)) == sorted(set(_names(flat)))
  assert len({d.data for d in corpus.documents(flat)}) == 60


def test_folders_reached_only_by_links_are_read(make_config, text_folder, tmp_path):
  outside = tmp_path / 'outside' / 'deep'
  outside.mkdir(parents=True)
  (outside / 'new.txt').write_text('new')
  (text_folder / 'link').symlink_to(outside.parent)
  (text_folder / 'other').symlink_to(outside.parent)
  names = _names(make_config(source='text', files=f'{text_folder}/**/*.txt'))
  assert len(names) == 61 and 'link/deep/new.txt' in names
  for pattern, number in [('**', 61), ('**/deep/*', 1), ('**/deep/**', 1), ('**/**/*.txt', 61)]:
    assert len(set(_names(make_config(source='text', files=f'{text_folder}/{pattern}')))) == number


@pytest.mark.parametrize('pattern', ['a[1].txt', '*.txt', '**/*.txt', '?[[]1].txt', 'a[[]*'])
def test_names_with_brackets(make_config, tmp_path, pattern):
  folder = tmp_path / 'corpus[1]'
  folder.mkdir()
  (folder / 'a[1].txt').write_text('some text\n' * 100)
  config = make_config(source='text', files=f'{folder}/{pattern}')
  assert set(_names(config)) == {'a[1].txt'}


def test_reading_shows_progress_after_five_seconds(make_config, monkeypatch, capsys):
  documents = [corpus.Document('a', 'train', b'x' * 1000)] * 20
  clock = iter(range(10**6))
  for seconds, shown in ((0.1, False), (10, True)):
    monkeypatch.setattr('tqdm.std.time', lambda seconds=seconds: next(clock) * seconds)
    assert len(list(corpus.progress(documents))) == 20
    assert ('Tokenizing: 20.0kB' in capsys.readouterr().err) == shown


@pytest.fixture
def environment(tmp_path, monkeypatch):
  """A Python with three packages in two folders, and a cache folder."""
  packages = tmp_path / 'packages'
  for i in range(60):
    path = packages / f'a/b{i}.py'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'x = {i}\n' * 20)
  (packages / 'a' / 'copy_of_b7.py').write_text('x = 7\n' * 20)
  (packages / 'a' / 'data.txt').write_text('no code')
  (packages / 'a' / 'broken.py').symlink_to('nowhere')
  (packages / 'a' / '__pycache__').mkdir()
  (packages / 'a' / '__pycache__' / 'c.py').write_text('cached')
  (tmp_path / 'user').mkdir()
  (tmp_path / 'user' / 'own.py').write_text('own = 1\n')
  library = tmp_path / 'lib'
  (library / 'site-packages').mkdir(parents=True)
  (library / 'site-packages' / 'not_here.py').write_text('not twice')
  (library / 'os.py').write_text('"""OS routines."""\n')
  paths = {'stdlib': library, 'purelib': packages, 'platlib': packages}
  monkeypatch.setattr(sysconfig, 'get_paths', lambda: {k: str(v) for k, v in paths.items()})
  monkeypatch.setattr(python_files.site, 'getsitepackages', lambda: [str(packages)])
  monkeypatch.setattr(python_files.site, 'ENABLE_USER_SITE', True)
  monkeypatch.setattr(python_files.site, 'getusersitepackages', lambda: str(tmp_path / 'user'))
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return packages


def test_the_environment_is_the_library_and_all_packages_without_copies(environment, make_config):
  config = make_config(source='environment')
  documents = list(corpus.documents(config))
  names = [d.name for d in documents]
  assert names[0] == 'stdlib/os.py' and names[-1] == 'packages/own.py' and len(names) == 62
  assert names[1:-1] == sorted(f'packages/a/b{i}.py' for i in range(60))
  assert 0 < sum(d.split == 'validation' for d in documents) < 15
  assert _fingerprint(config) == _fingerprint(config)


def test_the_split_of_a_file_of_the_environment_is_by_its_text(environment, make_config):
  splits = lambda: {d.data: d.split for d in corpus.documents(make_config(source='environment'))}
  before = splits()
  environment.joinpath('a').rename(environment / 'moved')
  assert splits() == before


def test_the_tokens_of_the_environment_are_kept_until_a_file_changes(
  environment, make_config, tmp_path, monkeypatch
):
  config = make_config(source='environment')
  kept = tmp_path / 'cache' / 'moejax' / 'corpora'
  monkeypatch.setenv('XDG_CACHE_HOME', 'relative')  # no place to keep them
  in_memory = {split: data.make_loader(config, split) for split in corpus.SPLITS}
  assert not kept.exists()
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  first, again = ({s: data.make_loader(config, s) for s in corpus.SPLITS} for _ in range(2))
  (folder,) = kept.iterdir()
  for split in corpus.SPLITS:
    loaders = in_memory[split], first[split], again[split]
    assert len({loader.fingerprint for loader in loaders}) == 1
    for step in range(3):
      batches = [loader.batch(step)['targets'].tolist() for loader in loaders]
      assert batches[0] == batches[1] == batches[2]
  assert isinstance(again['train']._tokens, blocks.TokenFile)
  written = make_config(source='tokens', files=str(tmp_path / 'code'))
  tokenize.write(config, written.files)
  assert data.make_loader(written, 'train').fingerprint == again['train'].fingerprint
  for i in range(5):
    (environment / 'a' / 'b0.py').write_text(f'changed = {i}\n' * (i + 1))
    changed = data.make_loader(config, 'train')
    assert changed.fingerprint != first['train'].fingerprint
  assert len(list(kept.iterdir())) == 3 and folder not in kept.iterdir()


def test_one_process_may_keep_the_tokens_before_another(environment, make_config, monkeypatch):
  """Both have found nothing; the slower one uses what the faster one wrote."""
  config = make_config(source='environment')
  write = token_files._write_kept

  def slower(directory, *args):
    write(directory, *args)
    shutil.copytree(directory, directory.parent / directory.name.split('-', 1)[1])

  monkeypatch.setattr(token_files, '_write_kept', slower)
  loader = data.make_loader(config, 'train')
  monkeypatch.setattr(token_files, '_write_kept', None)
  assert data.make_loader(config, 'train').fingerprint == loader.fingerprint
