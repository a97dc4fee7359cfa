"""Streamed Hugging Face datasets, from folders made here."""

import gzip
import json
import sys

import numpy as np
import pytest

from moejax import data, tokenize
from moejax.data import blocks, corpus, hf_datasets, stream_loader

datasets = pytest.importorskip('datasets')

SHORT = '\n'.join(json.dumps({'text': f'{i}'}) for i in range(40))
TEXTS = [f'document {i} ' + 'word ' * (i % 17) for i in range(90)]


def _write(path, texts, **fields):
  lines = '\n'.join(json.dumps({'text': text, 'id': i} | fields) for i, text in enumerate(texts))
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(gzip.compress(lines.encode()) if path.suffix == '.gz' else lines.encode())


@pytest.fixture
def folder(tmp_path):
  """Five shards of training text and one of validation, as C4 has them."""
  for i in range(5):
    _write(tmp_path / 'c4' / f'c4-train.{i:05d}-of-00005.json.gz', TEXTS[i * 16 : i * 16 + 16])
  _write(tmp_path / 'c4' / 'c4-validation.00000-of-00001.json.gz', TEXTS[80:])
  return tmp_path / 'c4'


@pytest.fixture
def config(folder, make_config, monkeypatch):
  monkeypatch.setattr(stream_loader, '_BLOCK', 12)  # three batches
  return make_config(source='datasets', task=str(folder))


def _equal(first, second):
  assert first.keys() == second.keys()
  for key in first:
    np.testing.assert_array_equal(first[key], second[key])


def _batches(loader, steps):
  return [loader.batch(step) for step in steps]


def _documents(batches, eos_id=1):
  """The texts between ends of documents in the targets of batches, in their order."""
  tokens = np.concatenate([batch['targets'].reshape(-1) for batch in batches])
  tokenizer = data.make_tokenizer(data.DataConfig())
  parts = np.split(tokens, np.flatnonzero(tokens == eos_id) + 1)
  return [tokenizer.decode(part) for part in parts]


def _counted(batches):
  """The counted targets of every sequence, as lists."""
  rows = [row for batch in batches for row in zip(*map(batch.get, _NAMES), strict=True)]
  rows = [targets[counted & (segments > 0)].tolist() for targets, segments, counted in rows]
  return [row for row in rows if row]


_NAMES = ('targets', 'segments', 'counted')


def test_validation_is_all_of_the_datasets_own_shuffled_within_blocks(config):
  loader = data.make_loader(config, 'validation')
  batches = _batches(loader, range(40))
  tokens = np.concatenate([np.append(loader.tokenizer.encode(text), 1) for text in TEXTS[80:]])
  expected = [tokens[i + 1 : i + 8].tolist() for i in range(0, len(tokens) - 1, 7)]
  found = _counted(batches)
  assert sorted(found) == sorted(expected)
  for first in range(0, len(found), 12):
    block = found[first : first + 12], expected[first : first + 12]
    assert sorted(block[0]) == sorted(block[1]) and block[0] != block[1]
  assert not any(array.any() for array in batches[-1].values())
  _equal(loader.batch(0), batches[0])  # again, from the beginning


def test_processes_share_one_global_batch_of_validation(config):
  whole = data.make_loader(config, 'validation')
  parts = [data.make_loader(config, 'validation', part=i, num_parts=2) for i in range(2)]
  for step in range(40):
    joined = [part.batch(step) for part in parts]
    batch = whole.batch(step)
    _equal({k: np.concatenate([b[k] for b in joined]) for k in batch}, batch)


def test_validation_by_a_hash_ends_although_the_stream_goes_on(make_config, tmp_path, monkeypatch):
  monkeypatch.setattr(stream_loader, '_BLOCK', 40)  # 20 blocks of one batch
  _write(tmp_path / 'one' / 'all.jsonl', [f'{i} ' + 'word ' * 9 for i in range(900)])
  config = make_config(source='datasets', task=str(tmp_path / 'one'), batch_size=2)
  loader = data.make_loader(config, 'validation')
  batches = _batches(loader, range(41))
  assert all(batch['counted'].all() for batch in batches[:20])
  assert not any(batch['segments'].any() for batch in batches[20:])


def test_an_epoch_has_every_document_once(config):
  length = sum(len(text) + 1 for text in TEXTS[:80])
  blocks = length // (12 * 7)
  loader = data.make_loader(config, 'train')
  batches = _batches(loader, range(blocks * 3))
  assert all(batch['segments'].all() for batch in batches)
  sequences = np.concatenate([batch['targets'] for batch in batches])
  counts = np.bincount(sequences.reshape(-1), minlength=259)
  everything = np.frombuffer(''.join(TEXTS[:80]).encode(), np.uint8).astype(int)
  expected = np.bincount(everything + 3, minlength=259)
  assert (counts[3:] <= expected[3:]).all() and (expected - counts)[3:].sum() < 12 * 7
  assert counts[1] in range(75, 81)


def test_ids_beyond_the_vocabulary_stop_a_run(config):
  loader = data.make_loader(config, 'train')
  loader.tokenizer.vocab_size = 50
  with pytest.raises(blocks.DamagedData, match=r'data: token \d+ of the text has id .* 0 to 49'):
    loader.batch(0)


def test_processes_share_one_global_batch(config):
  whole = data.make_loader(config, 'train')
  parts = [data.make_loader(config, 'train', part=i, num_parts=2) for i in range(2)]
  some = data.make_loader(config, 'train', part=1, num_parts=2, sequences=(0, 3))
  for step in range(8):
    batch = whole.batch(step)
    joined = [part.batch(step) for part in parts]
    _equal({k: np.concatenate([b[k] for b in joined]) for k in batch}, batch)
    _equal(some.batch(step), {k: v[[0, 3]] for k, v in batch.items()})


@pytest.mark.parametrize('saved_after', [1, 2, 3, 7, 50, 200])
def test_a_run_resumes_exactly_with_any_number_of_processes(config, tmp_path, saved_after):
  """Within blocks, documents and shards, and after several epochs."""
  parts = [data.make_loader(config, 'train', part=i, num_parts=2) for i in range(2)]
  for part in parts:
    _batches(part, range(saved_after))
    part.save(tmp_path)
  assert len(list(tmp_path.glob('*.json'))) == 1
  resumed = data.make_loader(config, 'train')
  resumed.batch(0)
  resumed.load(tmp_path)
  for step in range(saved_after, saved_after + 7):
    joined = [part.batch(step) for part in parts]
    batch = {k: np.concatenate([b[k] for b in joined]) for k in joined[0]}
    _equal(resumed.batch(step), batch)


def test_before_the_first_batch_and_out_of_order(config, tmp_path):
  loader = data.make_loader(config, 'train')
  loader.save(tmp_path)
  first = _batches(loader, range(7))
  _equal(loader.batch(6), first[6])
  for step in (3, 13):
    with pytest.raises(ValueError, match=f'a stream is read in order.*got {step}'):
      loader.batch(step)
  _equal(loader.batch(0), first[0])
  loader.batch(5)
  loader.load(tmp_path)
  _equal(loader.batch(3), first[3])


def test_the_seed_decides_the_order_and_epochs_differ(config, make_config):
  other = make_config(source='datasets', task=config.task, seed=1)
  loader = data.make_loader(config, 'train')
  batches = _batches(loader, range(60))
  assert (batches[0]['inputs'] != data.make_loader(other, 'train').batch(0)['inputs']).any()
  firsts = [next(loader._documents(stream_loader.Position(epoch)))[1] for epoch in range(6)]
  assert len({ids.tobytes() for ids in firsts}) > 1


def test_what_cannot_be_resumed(config, make_config, folder, tmp_path):
  loader = data.make_loader(config, 'train')
  loader.save(tmp_path)
  with pytest.raises(ValueError, match='no position in a stream'):
    loader.load(tmp_path / 'nowhere')
  _write(folder / 'c4-train.00005-of-00005.json.gz', ['more'])
  changed = data.make_loader(config, 'train')
  assert changed.fingerprint != loader.fingerprint
  with pytest.raises(ValueError, match=r'data\.task: the saved position has fingerprint'):
    changed.load(tmp_path)


def test_one_file_without_a_validation_split(make_config, tmp_path):
  _write(tmp_path / 'one' / 'all.jsonl', TEXTS)
  config = make_config(source='datasets', task=str(tmp_path / 'one'))
  texts = {s: {d.data for d in corpus.documents(config) if d.split == s} for s in corpus.SPLITS}
  assert len(texts['train'] | texts['validation']) == 90
  assert len(texts['validation']) in range(1, 15)
  assert not texts['train'] & texts['validation']
  validation = data.make_loader(make_config(**vars(config) | {'batch_size': 1}), 'validation')
  (found, *_) = _counted([validation.batch(0)])
  held_out = b'\n'.join(texts['validation'])
  assert bytes(i - 3 if i > 1 else ord('\n') for i in found) in held_out


def test_a_folder_of_save_to_disk_and_parquet(make_config, tmp_path):
  table = datasets.Dataset.from_dict({'text': TEXTS})
  table.save_to_disk(tmp_path / 'saved')
  splits = datasets.DatasetDict({'train': table.select(range(80)), 'validation': table})
  splits.save_to_disk(tmp_path / 'splits')
  (tmp_path / 'parquet').mkdir()
  table.to_parquet(tmp_path / 'parquet' / 'train.parquet')
  for name in ('saved', 'parquet'):
    config = make_config(source='datasets', task=str(tmp_path / name))
    assert {d.data.decode() for d in corpus.documents(config)} == set(TEXTS)
  config = make_config(source='datasets', task=str(tmp_path / 'splits'))
  assert sum(d.split == 'validation' for d in corpus.documents(config)) == 90


def test_token_files_hold_the_same_documents(config, make_config, tmp_path, monkeypatch):
  monkeypatch.setattr(stream_loader, '_BLOCK', 4096)  # the whole split
  tokenize.write(config, tmp_path / 'tokens')
  tokens = make_config(source='tokens', files=str(tmp_path / 'tokens'))
  validation = data.make_loader(tokens, 'validation')
  streamed = data.make_loader(config, 'validation')
  for step in range(validation.num_batches + 1):
    _equal(validation.batch(step), streamed.batch(step))


@pytest.mark.parametrize(
  ('lines', 'message'),
  [
    ('{"body": "x"}', r"data\.field: .*shard 0 of 1 has no field 'text', only 'body'"),
    ('{"text": 3}', r"data\.field: .*document 0: expected text in 'text', got a int"),
    ('{"text": "a"}\n{"text', r'data\.task: cannot (open|read) '),
    ('{"text": "a"}', r'data\.task: no text for the validation split'),
    (SHORT, r'data\.batch_size: the validation split of .* fewer tokens than one batch'),
  ],
)
def test_bad_files(make_config, tmp_path, lines, message):
  (tmp_path / 'bad').mkdir()
  (tmp_path / 'bad' / 'a.jsonl').write_text(lines)
  with pytest.raises(ValueError, match=message):
    data.make_loader(make_config(source='datasets', task=str(tmp_path / 'bad')), 'validation')


def test_an_empty_split_and_a_cut_file(make_config, config, folder):
  shard = folder / 'c4-train.00003-of-00005.json.gz'
  shard.write_bytes(shard.read_bytes()[:-20])
  loader = data.make_loader(config, 'train')
  with pytest.raises(ValueError, match=r'data\.task: cannot read .*split train, shard 3 of 5'):
    _batches(loader, range(100))
  for path in folder.glob('*train*'):
    _write(path, [])
  with pytest.raises(ValueError, match=r'data\.task: (no text|cannot (open|read))'):
    data.make_loader(config, 'train').batch(0)


def test_what_cannot_be_opened(make_config, tmp_path, monkeypatch):
  open_task = lambda task: hf_datasets.open_splits(make_config(source='datasets', task=task))
  with pytest.raises(ValueError, match=r"task: cannot open 'owner/name:en'.*; without a network"):
    open_task('owner/name:en')
  with pytest.raises(ValueError, match=r'task: cannot open .*nowhere'):
    open_task(str(tmp_path / 'nowhere'))
  _write(tmp_path / 'test.jsonl', TEXTS)
  with pytest.raises(ValueError, match=r"has the splits \['test'\], but no 'train'"):
    open_task(str(tmp_path))
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(ValueError, match=r'needs the package datasets: pip install'):
    open_task('owner/name')


def test_a_damaged_position_is_refused(config, tmp_path):
  loader = data.make_loader(config, 'train')
  loader.save(tmp_path)
  path = tmp_path / 'stream.json'
  state = json.loads(path.read_text())
  numbers = state['position']
  damaged = ['[]', '{}', '{"', '[' * 10_000, json.dumps(state | {'block': -1})]
  damaged += [json.dumps(state | {'position': numbers | {'x': 1}})]
  damaged += [json.dumps(state | {'position': numbers | {'document': n}}) for n in (-1, '3', 0.5)]
  for content in damaged:
    path.write_text(content)
    with pytest.raises(ValueError, match=r'stream\.json is damaged'):
      loader.load(tmp_path)
  path.write_text(json.dumps(state | {'position': numbers | {'token': 10**12}}))
  loader.load(tmp_path)
  with pytest.raises(ValueError, match=r'the saved position, .* is not in the data'):
    loader.batch(0)
