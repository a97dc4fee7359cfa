import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from moejax import data, tokenize
from moejax.data import blocks, corpus, loader, tokenizer as tokenizer_lib


@pytest.fixture
def config(make_config, text_folder):
  return make_config(source='text', files=f'{text_folder}/**/*.txt')


def _equal(first, second):
  assert first.keys() == second.keys()
  for key in first:
    np.testing.assert_array_equal(first[key], second[key])


@pytest.mark.parametrize('size', [1, 2, 3, 16, 17, 1000])
def test_permutation_is_bijective_and_depends_on_its_key(size):
  places = np.arange(size)
  first, second = loader.permute(places, size, (0, 0)), loader.permute(places, size, (0, 1))
  np.testing.assert_array_equal(np.sort(first), places)
  np.testing.assert_array_equal(np.sort(second), places)
  np.testing.assert_array_equal(loader.permute(places[-1:], size, (0, 0)), first[-1:])
  if size >= 16:
    assert (first != second).any()
    assert (first != places).any()


def test_permutation_is_pinned():
  # Checkpoints rely on it: another order would silently repeat and skip data on resuming.
  assert loader.permute(np.arange(8), 8, (3, 1)).tolist() == [1, 0, 2, 5, 7, 6, 3, 4]


def test_permutation_looks_random():
  """Neighbours are separated: on average by a third of the range, here with 10^4 indices."""
  order = loader.permute(np.arange(10_000), 10_000, (5,))
  assert abs(np.abs(np.diff(order)).mean() / 10_000 - 1 / 3) < 0.02
  assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05


def test_batch_has_the_documented_format(config):
  batch = data.make_loader(config, 'train').batch(0)
  assert set(batch) == {'inputs', 'targets', 'segments', 'positions'}
  for array in batch.values():
    assert array.shape == (4, 7)
    assert array.dtype == np.int32
  np.testing.assert_array_equal(batch['inputs'][:, 1:], batch['targets'][:, :-1])
  assert batch['inputs'].min() >= 1


def _check_documents(batch, eos_id=1):
  """Checks segment and position of every token, one after the other."""
  for b, inputs in enumerate(batch['inputs']):
    segment, position = 0, 0
    for i, token in enumerate(inputs):
      begins = token == eos_id or i == 0
      segment, position = segment + begins, 0 if begins else position + 1
      assert batch['segments'][b, i] == segment
      assert batch['positions'][b, i] == position


def test_ids_beyond_the_vocabulary_stop_a_run(config):
  read = data.make_loader(config, 'train')
  read.tokenizer.vocab_size = 50
  with pytest.raises(blocks.DamagedData, match=r'data: token \d+ of the text has id .* 0 to 49'):
    read.batch(0)


def test_segments_and_positions_are_of_documents(make_config, tmp_path, sentencepiece_file):
  lines = [{'text': 'def f'[: i % 4]} for i in range(200)]
  (tmp_path / 'all.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  for i, line in enumerate(lines):
    (tmp_path / f'{i}.txt').write_text(line['text'])
  for tokenizer in ('bytes', str(sentencepiece_file)):
    jsonl = make_config(source='jsonl', files=f'{tmp_path}/*.jsonl', tokenizer=tokenizer)
    text = make_config(source='text', files=f'{tmp_path}/*.txt', tokenizer=tokenizer)
    directory = tmp_path / tokenizer.replace('/', '_')
    tokenize.write(jsonl, directory)
    tokens = make_config(source='tokens', files=str(directory), tokenizer=tokenizer)
    for config in (jsonl, text, tokens):
      train = data.make_loader(config, 'train')
      batches = [train.batch(step) for step in range(5)]
      assert max(batch['segments'].max() for batch in batches) > 2
      for batch in batches:
        _check_documents(batch)


def test_random_access_equals_iterating(config):
  in_order = data.make_loader(config, 'train')
  batches = [in_order.batch(step) for step in range(50)]
  for step in (49, 3, 17):
    _equal(data.make_loader(config, 'train').batch(step), batches[step])
  data.make_loader(config, 'train').batch(10**9)


@pytest.mark.parametrize('split', ['train', 'validation'])
@pytest.mark.parametrize('count', [2, 4])
def test_processes_share_one_global_batch(config, split, count):
  whole = data.make_loader(config, split)
  parts = [data.make_loader(config, split, part=i, num_parts=count) for i in range(count)]
  for step in (0, 5, whole.num_batches - 1, 1000):
    joined = [part.batch(step) for part in parts]
    _equal({k: np.concatenate([b[k] for b in joined]) for k in joined[0]}, whole.batch(step))


def test_a_process_may_read_scattered_sequences(config):
  whole, some = (
    data.make_loader(config, 'train'),
    data.make_loader(config, 'train', part=1, num_parts=2, sequences=(0, 3)),
  )
  _equal(some.batch(7), {k: v[[0, 3]] for k, v in whole.batch(7).items()})


def test_an_epoch_visits_every_sequence_once(config):
  train = data.make_loader(config, 'train')
  n = train.num_sequences
  steps = -(-2 * n // 4)
  targets = np.concatenate([train.batch(step)['targets'] for step in range(steps)])
  first, second = targets[:n], targets[n : 2 * n]
  tokenizer = tokenizer_lib.BytesTokenizer()
  documents = [d.data for d in corpus.documents(config) if d.split == 'train']
  tokens = np.concatenate([np.append(tokenizer.encode_bytes(d), 1) for d in documents])
  expected = tokens[1 : 1 + n * 7].reshape(-1, 7)
  order = lambda x: x[np.lexsort(x.T)]
  np.testing.assert_array_equal(order(first), order(expected))
  np.testing.assert_array_equal(order(second), order(expected))
  assert (first != second).any()


def _tokens_of(config, split):
  """The concatenated documents of a split."""
  encode = tokenizer_lib.BytesTokenizer().encode_bytes
  documents = [d.data for d in corpus.documents(config) if d.split == split]
  return np.concatenate([np.append(encode(text), 1) for text in documents])


@pytest.mark.parametrize('source', ['text', 'tokens'])
def test_validation_counts_every_token_once_in_a_fixed_random_order(
  config, make_config, tmp_path, source
):
  tokens = _tokens_of(config, 'validation')
  if source == 'tokens':
    tokenize.write(config, tmp_path / 'tokens')
    config = make_config(source='tokens', files=str(tmp_path / 'tokens'))
  validation = data.make_loader(config, 'validation')
  n, number = validation.num_batches, -(-(len(tokens) - 1) // 7)
  assert (number, n) == (validation.num_sequences, -(-number // 4)) and number % 4
  batches = [validation.batch(step) for step in range(n)]
  rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
  is_counted = np.arange(4 * n) < number  # the last batch is filled up with the first sequences
  np.testing.assert_array_equal(rows['counted'], np.repeat(is_counted[:, None], 7, axis=1))
  np.testing.assert_array_equal(rows['targets'][number:], rows['targets'][: 4 * n - number])
  assert (rows['segments'][number:] > 0).all()
  order = loader.permute(np.arange(number), number, (0,))
  assert np.abs(np.diff(order)).mean() > number / 5
  for place, first in enumerate(7 * order):
    targets = rows['targets'][place][rows['segments'][place] > 0]
    np.testing.assert_array_equal(targets, tokens[first + 1 : first + 8])
  after = validation.batch(n)
  assert after.keys() == batches[0].keys() and after['inputs'].shape == (4, 7)
  assert not any(array.any() for array in after.values())


def test_a_split_smaller_than_a_batch_is_filled_up_with_padding(make_config, tmp_path):
  (tmp_path / 'a.txt').write_text('0123456789' * 10)
  (tmp_path / 'b.txt').write_text('some words')
  files = {'files': f'{tmp_path}/a.txt', 'validation_files': f'{tmp_path}/b.txt'}
  batch = data.make_loader(make_config(source='text', **files), 'validation').batch(0)
  assert batch['segments'].astype(bool).sum(1).tolist() in ([7, 4, 0, 0], [4, 7, 0, 0])
  assert batch['counted'].all(1).tolist() == [True, True, False, False]


def test_seed_changes_training_only(config, make_config):
  other = make_config(source='text', files=config.files, seed=1)
  assert (
    data.make_loader(config, 'train').batch(0)['inputs']
    != data.make_loader(other, 'train').batch(0)['inputs']
  ).any()
  _equal(*(data.make_loader(c, 'validation').batch(0) for c in (config, other)))


def test_fingerprint(config, make_config, sentencepiece_file, text_folder):
  train = data.make_loader(config, 'train')
  assert train.fingerprint == data.make_loader(config, 'validation').fingerprint
  pieces = make_config(source='text', files=config.files, tokenizer=str(sentencepiece_file))
  assert data.make_loader(pieces, 'train').fingerprint != train.fingerprint
  (text_folder / '3.txt').write_text('changed')
  assert data.make_loader(config, 'train').fingerprint != train.fingerprint


def test_no_state(config, tmp_path):
  train = data.make_loader(config, 'train')
  train.save(tmp_path / 'state')
  train.load(tmp_path / 'state')
  assert not (tmp_path / 'state').exists()


def test_too_little_text(make_config, tmp_path):
  (tmp_path / 'a.txt').write_text('x\n' * 200)
  config = make_config(source='text', files=f'{tmp_path}/a.txt')
  message = (
    r'data\.batch_size: the validation split has 21 tokens, but one batch of 4 sequences of 7 '
    r'needs 29; lower data\.batch_size or data\.sequence_length'
  )
  with pytest.raises(ValueError, match=message):
    data.make_loader(config, 'validation')


def test_a_batch_that_is_just_large_enough(make_config, tmp_path):
  (tmp_path / 'a.txt').write_text('x\n' * 200)
  config = make_config(source='text', files=f'{tmp_path}/a.txt', sequence_length=5)
  assert data.make_loader(config, 'validation').num_batches == 1  # 21 tokens = 4 * 5 + 1


@pytest.mark.parametrize('kind', ['bytes', 'json', 'tokens'])
def test_all_of_validation_files_is_evaluated(config, make_config, tmp_path, kind):
  (tmp_path / 'a.txt').write_text('some text, ' * 5)
  (tmp_path / 'b.txt').write_text('in two documents')
  name = str(pathlib.Path(__file__).parent / 'bpe') if kind == 'json' else 'bytes'
  held_out = make_config(source='text', files=f'{tmp_path}/?.txt', tokenizer=name)
  fields = {'source': 'text', 'files': config.files, 'validation_files': held_out.files}
  if kind == 'tokens':
    tokenize.write(held_out, tmp_path / 'tokens')
    fields |= {'source': 'tokens', 'files': f'{tmp_path}/tokens'}
    fields |= {'validation_files': f'{tmp_path}/tokens'}
  validation = data.make_loader(make_config(**fields, tokenizer=name), 'validation')
  batches = [validation.batch(step) for step in range(validation.num_batches)]
  tokens, inputs, segments, counted = (
    np.concatenate([batch[key] for batch in batches])
    for key in ('targets', 'inputs', 'segments', 'counted')
  )
  counted = counted & (segments > 0)
  expected = [validation.tokenizer.encode(t) for t in ('some text, ' * 5, 'in two documents')]
  ends = [validation.tokenizer.eos_id]
  if kind != 'tokens':  # there, a part of each document was the validation split
    in_order = np.concatenate([ends, expected[0], ends, expected[1], ends])
    rows = [in_order[i + 1 : i + 8].tolist() for i in range(0, len(in_order) - 1, 7)]
    found = [row[mask].tolist() for row, mask in zip(tokens, counted, strict=True) if mask.any()]
    assert sorted(found) == sorted(rows)
  assert (inputs[:, 0] == ends[0]).any()
  assert validation.tokenizer.num_bytes(inputs, tokens)[counted].sum() == 55 + 16
  assert not validation.batch(len(batches))['segments'].any()
  for batch in batches:
    is_full = (batch['segments'] > 0).all(1)  # all but the shorter one at the end of the text
    _check_documents({name: values[is_full] for name, values in batch.items()}, ends[0])


def test_no_text(make_config, tmp_path):
  (tmp_path / 'a.jsonl').write_text('\n')
  with pytest.raises(ValueError, match=r'data\.files: no text for the train split'):
    data.make_loader(make_config(source='jsonl', files=f'{tmp_path}/a.jsonl'), 'train')


def test_wrong_process_count_or_split(config):
  with pytest.raises(ValueError, match=r'data\.batch_size: expected a multiple of the 3 processes'):
    data.make_loader(config, 'train', num_parts=3)
  with pytest.raises(ValueError, match='valid'):
    data.make_loader(config, 'valid')


def test_no_tensorflow_and_no_jax_for_the_embedded_corpus():
  code = """
import sys
from moejax import data
config = data.DataConfig(source='stdlib', files='', field='text', task='', tfds_data_dir='',
                         tokenizer='bytes', sequence_length=64, batch_size=8, seed=0)
data.make_tokenizer(config)
data.make_loader(config, 'train').batch(0)
data.make_loader(config, 'validation').batch(0)
loaded = {'tensorflow', 'seqio', 'jax', 'sentencepiece', 'tokenizers'} & set(sys.modules)
assert not loaded, loaded
"""
  subprocess.run([sys.executable, '-c', code], check=True)
