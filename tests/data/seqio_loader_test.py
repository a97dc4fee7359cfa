import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from moejax import data, tokenize, tokenizer as tokenizer_program
from moejax.data import blocks, seqio_loader, token_files, tokenizer as tokenizer_lib

# TensorFlow's own dependencies warn about each other.
pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings('ignore')]


@pytest.fixture(scope='session')
def tfds_data_dir(tmp_path_factory):
  """A directory with a prepared c4/en 3.0.1, in 4 + 1 shards."""
  modules = seqio_loader._modules()
  tf, tfds = modules.tf, modules.tfds
  root = tmp_path_factory.mktemp('tfds')
  directory = root / 'c4' / 'en' / '3.0.1'
  directory.mkdir(parents=True)
  names = ('text', 'timestamp', 'url', 'content-type', 'content-length')
  features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in names})
  infos = []
  for split, num_shards in (('train', 4), ('validation', 1)):
    for shard in range(num_shards):
      file = directory / f'c4-{split}.tfrecord-{shard:05d}-of-{num_shards:05d}'
      with tf.io.TFRecordWriter(str(file)) as writer:
        for text in _shard_texts(split, shard):
          example = dict.fromkeys(names, '-') | {'text': text}
          writer.write(features.serialize_example(example))
    template = tfds.core.ShardedFileTemplate(
      data_dir=directory, dataset_name='c4', split=split, filetype_suffix='tfrecord'
    )
    infos.append(
      tfds.core.SplitInfo(
        name=split, shard_lengths=[20] * num_shards, num_bytes=1, filename_template=template
      )
    )
  tfds.folder_dataset.write_metadata(data_dir=directory, features=features, split_infos=infos)
  return root


def _shard_texts(split, shard):
  """Texts of 10 to 130 bytes: shorter and longer than a sequence."""
  return [f'{split} {shard}.{i} ' + 'né!🎉' * ((7 * i) % 18) for i in range(20)]


def _all_texts(split):
  return [t for s in range(4 if split == 'train' else 1) for t in _shard_texts(split, s)]


@pytest.fixture
def config(make_config, tfds_data_dir):
  return make_config(
    source='seqio', task='c4_en', tfds_data_dir=str(tfds_data_dir), sequence_length=32
  )


def _segments(batch):
  """Yields the targets of every segment of a batch, sequence by sequence."""
  for targets, segments in zip(batch['targets'], batch['segments'], strict=True):
    for number in range(1, segments.max() + 1):
      yield targets[segments == number]


def _equal(first, second):
  for key in first:
    np.testing.assert_array_equal(first[key], second[key])


def test_packing_loses_no_token_and_repeats_none(make_config, config):
  one_sequence = make_config(**vars(config) | {'batch_size': 1})
  validation = data.make_loader(one_sequence, 'validation')
  batches = [validation.batch(step) for step in range(100)]
  found = [s for batch in batches for s in _segments(batch)]
  tokenizer = tokenizer_lib.BytesTokenizer()
  expected = []
  for text in _all_texts('validation'):
    ids = np.append(tokenizer.encode(text), 1)
    expected += [ids[i : i + 32] for i in range(0, len(ids), 32)]
  key = lambda ids: tuple(ids.tolist())
  assert sorted(map(key, found)) == sorted(map(key, expected))
  sizes = [validation.tokenizer.num_bytes(b['inputs'], b['targets']).sum() for b in batches]
  assert sum(sizes) == sum(len(text.encode()) for text in _all_texts('validation'))
  assert not any(array.any() for array in batches[-1].values())
  _equal(validation.batch(0), batches[0])


@pytest.mark.parametrize('size', [3, 4, 5, 100])
def test_validation_fills_up_its_last_batch(config, make_config, size):
  """Every sequence counts once, in one order at any batch size; the seed changes nothing."""
  config = vars(config) | {'batch_size': size}
  rows = lambda batch, mask: [tuple(row) for row in batch['targets'][mask]]
  one = data.make_loader(make_config(**config | {'batch_size': 1}), 'validation')
  singles = [one.batch(step) for step in range(100)]
  expected = [row for batch in singles for row in rows(batch, batch['counted'][:, 0])]
  validation = data.make_loader(make_config(**config), 'validation')
  batches = [validation.batch(step) for step in range(-(-len(expected) // size) + 1)]
  found = [row for batch in batches for row in rows(batch, batch['counted'][:, 0])]
  assert found == expected and found != sorted(found)
  *_, last, after = batches
  fillers = last['segments'][~last['counted'][:, 0]]
  assert (fillers > 0).any(1).all() if size < 100 else not fillers.any()
  assert not any(array.any() for array in after.values())
  other = data.make_loader(make_config(**config | {'seed': 3}), 'validation')
  _equal(other.batch(0), batches[0])


def test_processes_count_every_sequence_of_validation_once(config):
  parts = [data.make_loader(config, 'validation', part=i, num_parts=2) for i in range(2)]
  batches = [part.batch(step) for step in range(40) for part in parts]
  assert {batch['inputs'].shape for batch in batches} == {(2, 32)}
  found = [
    s
    for batch in batches
    for s in _segments({k: v[batch['counted'][:, 0]] for k, v in batch.items()})
  ]
  ids = [np.append(tokenizer_lib.BytesTokenizer().encode(t), 1) for t in _all_texts('validation')]
  expected = [text[i : i + 32] for text in ids for i in range(0, len(text), 32)]
  key = lambda ids: tuple(ids.tolist())
  assert sorted(map(key, found)) == sorted(map(key, expected))
  assert not any(array.any() for batch in batches[-2:] for array in batch.values())


def test_training_sees_every_document(config):
  train = data.make_loader(config, 'train')
  tokenizer = tokenizer_lib.BytesTokenizer()
  seen = ' '.join(tokenizer.decode(s) for step in range(300) for s in _segments(train.batch(step)))
  for shard in range(4):
    for i in range(20):
      assert f'train {shard}.{i} ' in seen


def test_format_of_a_batch(config):
  batch = data.make_loader(config, 'train').batch(0)
  assert set(batch) == {'inputs', 'targets', 'segments', 'positions'}
  for array in batch.values():
    assert (array.shape, array.dtype) == ((4, 32), np.int32)
  start = batch['positions'] == 0
  assert (batch['inputs'][start] == 0).all()
  later = ~start[:, 1:]
  np.testing.assert_array_equal(batch['inputs'][:, 1:][later], batch['targets'][:, :-1][later])
  np.testing.assert_array_equal(batch['targets'] == 0, batch['segments'] == 0)
  for positions, segments in zip(batch['positions'], batch['segments'], strict=True):
    for number in range(1, segments.max() + 1):
      found = positions[segments == number]
      np.testing.assert_array_equal(found, np.arange(len(found)))


def test_ids_beyond_the_vocabulary_stop_a_run(config):
  loader = data.make_loader(config, 'train')
  loader.tokenizer.vocab_size = 50
  message = r"data\.task: 'c4_en': token \d+ of sequence \d has id .* ids 0 to 49"
  with pytest.raises(blocks.DamagedData, match=message):
    loader.batch(0)


def test_saved_position_continues_exactly(config, tmp_path):
  straight = data.make_loader(config, 'train')
  batches = [straight.batch(step) for step in range(12)]
  stopped = data.make_loader(config, 'train')
  for step in range(5):
    _equal(stopped.batch(step), batches[step])
  stopped.save(tmp_path / 'state')
  resumed = data.make_loader(config, 'train')
  resumed.load(tmp_path / 'state')
  for step in range(5, 12):
    _equal(resumed.batch(step), batches[step])
  assert any((batches[5][k] != batches[0][k]).any() for k in batches[0])


def test_steps_must_be_consecutive_or_restart(config):
  train = data.make_loader(config, 'train')
  with pytest.raises(ValueError, match='expected step 0 .* got 3'):
    train.batch(3)
  first = train.batch(0)
  train.batch(1)
  with pytest.raises(ValueError, match='expected step 2 .* got 1'):
    train.batch(1)
  _equal(train.batch(0), first)
  train.batch(1)


@pytest.mark.parametrize('begun, resumed', [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(config, tmp_path, begun, resumed):
  def batch(loaders, step):
    parts = [loader.batch(step) for loader in loaders]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

  def loaders(number):
    return [data.make_loader(config, 'train', part=i, num_parts=number) for i in range(number)]

  first, others = loaders(begun), loaders(resumed)
  for step in range(3):
    batch(first, step)
  for loader in first:
    loader.save(tmp_path / 'first')
  for loader in others:
    loader.load(tmp_path / 'first')
  for step in (3, 4):
    _equal(batch(others, step), batch(first, step))
  for loader in others:
    loader.save(tmp_path / 'others')
  again = loaders(begun)
  for loader in again:
    loader.load(tmp_path / 'others')
  _equal(batch(again, 5), batch(first, 5))


def test_streams_of_another_batch_cannot_be_divided(config, make_config, tmp_path):
  for i in range(4):
    part = data.make_loader(config, 'train', part=i, num_parts=4)
    part.batch(0)
    part.save(tmp_path)
  fields = {'source': 'seqio', 'task': 'c4_en', 'tfds_data_dir': config.tfds_data_dir}
  other = data.make_loader(make_config(**fields, sequence_length=32, batch_size=6), 'train')
  with pytest.raises(ValueError, match=r'data\.batch_size: expected a multiple of 4, .* got 6'):
    other.load(tmp_path)


def test_a_different_run_cannot_restore_the_position(config, make_config, tmp_path):
  train = data.make_loader(config, 'train')
  train.batch(0)
  train.save(tmp_path)
  with pytest.raises(ValueError, match=r'no data position of every stream in .*, only \[\]'):
    train.load(tmp_path / 'other')
  fields = {'source': 'seqio', 'task': 'c4_en', 'tfds_data_dir': config.tfds_data_dir}
  longer = data.make_loader(make_config(**fields, sequence_length=64), 'train')
  with pytest.raises(ValueError, match='sequence_length 32, this run 64'):
    longer.load(tmp_path)


def test_processes_read_different_documents(config):
  def texts(index):
    part = data.make_loader(config, 'train', part=index, num_parts=2)
    batches = [part.batch(step) for step in range(60)]
    assert batches[0]['inputs'].shape == (2, 32)
    starts = [s for b in batches for s in _segments(b) if s[0] == ord('t') + 3]
    decoded = {tokenizer_lib.BytesTokenizer().decode(s).split(' ')[1] for s in starts}
    return {name for name in decoded if '.' in name}

  first, second = texts(0), texts(1)
  assert not {n.split('.')[0] for n in first} & {n.split('.')[0] for n in second}  # whole shards


def test_seed_determines_the_order(config, make_config):
  fields = {'source': 'seqio', 'task': 'c4_en', 'tfds_data_dir': config.tfds_data_dir}
  first, same, other = (
    data.make_loader(make_config(**fields, sequence_length=32, seed=seed), 'train').batch(0)
    for seed in (0, 0, 1)
  )
  _equal(first, same)
  assert (first['targets'] != other['targets']).any()


@pytest.mark.parametrize('kind', ['bytes', 'sentencepiece', 'shifted'])
def test_vocabulary_has_the_ids_of_the_tokenizer(
  make_config, sentencepiece_file, foreign_file, kind
):
  name = {'bytes': 'bytes', 'sentencepiece': sentencepiece_file, 'shifted': foreign_file}[kind]
  tokenizer = data.make_tokenizer(make_config(tokenizer=str(name)))
  vocabulary = seqio_loader.vocabulary(tokenizer)
  assert vocabulary.vocab_size == tokenizer.vocab_size
  assert vocabulary.eos_id == 1
  for text in ('def f(x):\n\t  return 1  # naïve 🎉', 'train 0.3 né🎉', ''):
    ids = vocabulary.encode_tf(seqio_loader._modules().tf.constant(text)).numpy()
    np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_position_with_a_wrapped_tokenizer(config, make_config, foreign_file, tmp_path):
  """A tokenizer that is called from the graph must not keep the iterator from being saved."""
  fields = {'source': 'seqio', 'task': 'c4_en', 'tfds_data_dir': config.tfds_data_dir}
  wrapped = make_config(**fields, tokenizer=str(foreign_file), sequence_length=16)
  train = data.make_loader(wrapped, 'train')
  train.batch(0)
  train.save(tmp_path / 'state')
  resumed = data.make_loader(wrapped, 'train')
  resumed.load(tmp_path / 'state')
  _equal(resumed.batch(1), train.batch(1))


def test_a_tokenizer_whose_id_0_is_text(config, make_config, tmp_path):
  name = str(pathlib.Path(__file__).parent / 'bpe')  # '!' is 0
  fields = {'source': 'seqio', 'task': 'c4_en', 'tfds_data_dir': config.tfds_data_dir}
  fields |= {'tokenizer': name, 'sequence_length': 500, 'batch_size': 1}
  validation = data.make_loader(make_config(**fields), 'validation')
  batches = [validation.batch(step) for step in range(20)]
  tokenizer = validation.tokenizer
  segments = [s for batch in batches for s in _segments(batch)]
  assert sorted(tokenizer.decode(s) for s in segments) == sorted(_all_texts('validation'))
  for batch in batches:
    counted = batch['segments'] > 0
    begins = counted & (batch['positions'] == 0)
    assert (batch['inputs'][begins] == tokenizer.eos_id).all()
    inside = counted & (batch['positions'] > 0)
    np.testing.assert_array_equal(batch['inputs'][inside], np.roll(batch['targets'], 1)[inside])
    assert not batch['targets'][~counted].any()


@pytest.fixture
def stateful(tmp_path, monkeypatch):
  """A module that registers tasks with operations whose state cannot be saved."""
  (tmp_path / 'stateful_tasks.py').write_text("""
import functools
import seqio
import tensorflow as tf

def rows(split):
  return tf.data.Dataset.from_tensor_slices({'text': [f'{split} {i}' for i in range(50)]})

def generator(split, shuffle_files=False, seed=None):
  signature = {'text': tf.TensorSpec([], tf.string)}
  return tf.data.Dataset.from_generator(lambda: iter([{'text': f'{split}'}] * 50),
                                        output_signature=signature)

def numpy_function(split, shuffle_files=False, seed=None):
  def upper(x):
    return {'text': tf.ensure_shape(tf.numpy_function(bytes.upper, [x['text']], tf.string), [])}
  return rows(split).map(upper)

def random_filter(split, shuffle_files=False, seed=None):
  return rows(split).filter(lambda x: tf.random.uniform([]) < 0.9)

for read in (generator, numpy_function, random_filter):
  if read.__name__ not in seqio.TaskRegistry.names():
    seqio.TaskRegistry.add(
      read.__name__, source=seqio.FunctionDataSource(read, splits=['train', 'validation']),
      preprocessors=[functools.partial(seqio.preprocessors.rekey, key_map={'targets': 'text'}),
                     seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
      output_features={'targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=True)})
""")
  monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize('name', ['generator', 'numpy_function', 'random_filter'])
def test_a_task_whose_position_cannot_be_saved(make_config, stateful, tmp_path, name):
  config = make_config(source='seqio', task=f'stateful_tasks:{name}', sequence_length=16)
  message = f"data.task: .*'stateful_tasks:{name}'.*python -m moejax.tokenize"
  train = data.make_loader(config, 'train')
  train.batch(0)
  with pytest.raises(ValueError, match=message):
    train.save(tmp_path / 'state')
  data.make_loader(config, 'validation').batch(0)
  assert tokenize.write(config, tmp_path / 'tokens')['splits']['train']['documents']


def test_tokenize_writes_every_document(config, make_config, tmp_path):
  index = tokenize.write(config, tmp_path / 'tokens')
  for split in ('train', 'validation'):
    texts = _all_texts(split)
    assert index['splits'][split]['documents'] == len(texts)
    assert index['splits'][split]['bytes'] == sum(len(t.encode()) for t in texts)
    tokens = np.fromfile(tmp_path / 'tokens' / f'{split}.bin', token_files.dtype_for(256))
    documents = np.split(tokens, np.flatnonzero(tokens == 1) + 1)[:-1]
    decoded = [tokenizer_lib.BytesTokenizer().decode(d) for d in documents]
    assert sorted(decoded) == sorted(texts)
  files = make_config(source='tokens', files=str(tmp_path / 'tokens'), sequence_length=32)
  assert data.make_loader(files, 'train').batch(0)['inputs'].shape == (4, 32)


def test_texts_for_training_a_tokenizer(config, tmp_path):
  assert sorted(t.decode() for t in tokenizer_program._texts(config)) == sorted(_all_texts('train'))
  message = tokenizer_program.train(config, 300, tmp_path / 'tok.model', max_megabytes=1)
  assert '300 ids' in message


@pytest.mark.parametrize('case', ['unknown version', 'known version', 'interrupted copy'])
def test_unprepared_corpus(make_config, tmp_path, monkeypatch, case):
  if case == 'known version':  # tensorflow-datasets could build it: another error
    monkeypatch.setattr(seqio_loader, 'TFDS_TASKS', {'c4_en': ('c4/en:3.1.0',)})
  if case == 'interrupted copy':
    (tmp_path / 'c4' / 'en' / '3.1.0').mkdir(parents=True)
    (tmp_path / 'c4' / 'en' / '3.1.0' / 'features.json').write_text('{}')
  config = make_config(source='seqio', task='c4_en', tfds_data_dir=str(tmp_path))
  message = rf"data\.tfds_data_dir: the corpus of task 'c4_en' is not prepared in {tmp_path};"
  with pytest.raises(ValueError, match=message):
    data.make_loader(config, 'train')
  with pytest.raises(ValueError, match=message):
    next(seqio_loader.examples(config, tokenizer_lib.BytesTokenizer(), ('train',)))


def test_unprepared_corpus_of_a_registered_task(make_config, tmp_path):
  seqio = seqio_loader._modules().seqio
  source = seqio.TfdsDataSource('c4/en:3.1.0', tfds_data_dir=str(tmp_path), splits=('train',))
  feature = seqio.Feature(seqio.ByteVocabulary())
  task = seqio.Task('own_c4', source, output_features={'targets': feature})
  config = make_config(source='seqio', task='own_c4', tfds_data_dir=str(tmp_path))
  with pytest.raises(ValueError, match=r"data\.tfds_data_dir: the corpus of task 'own_c4'"):
    seqio_loader._packed(config, task, 'train', 0, 1)


def test_unknown_task(make_config):
  with pytest.raises(ValueError, match=r"data\.task: .*'c4_eng'; did you mean 'c4_en'\?"):
    data.make_loader(make_config(source='seqio', task='c4_eng'), 'train')
  with pytest.raises(ValueError, match=r"data\.task: cannot import 'no_such_module'"):
    data.make_loader(make_config(source='seqio', task='no_such_module:task'), 'train')


@pytest.fixture
def registered(tmp_path, monkeypatch):
  """A module that registers a task with the splits train and test, and a mixture of it."""
  (tmp_path / 'own_tasks.py').write_text("""
import functools
import seqio
import tensorflow as tf

def read(split, shuffle_files=False, seed=None):
  return tf.data.Dataset.from_tensor_slices({'text': [f'{split} {i}' for i in range(50)]})

if 'own_task' not in seqio.TaskRegistry.names():
  seqio.TaskRegistry.add(
    'own_task', source=seqio.FunctionDataSource(read, splits=['train', 'test']),
    preprocessors=[functools.partial(seqio.preprocessors.rekey, key_map={'targets': 'text'}),
                   seqio.preprocessors.tokenize],
    output_features={'targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=False)})
  seqio.MixtureRegistry.add('own_mixture', ['own_task'], default_rate=1)
""")
  monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize('name', ['own_task', 'own_mixture'])
def test_registered_tasks_by_name(make_config, registered, sentencepiece_file, name):
  fields = {'source': 'seqio', 'task': f'own_tasks:{name}'}
  train = data.make_loader(make_config(**fields, sequence_length=32), 'train')
  assert 'train 1' in tokenizer_lib.BytesTokenizer().decode(train.batch(0)['targets'])
  with pytest.raises(ValueError, match=r"data\.task: .*\['test', 'train'\], but no 'validation'"):
    data.make_loader(make_config(**fields), 'validation')
  other = make_config(**fields, tokenizer=str(sentencepiece_file))
  with pytest.raises(ValueError, match=r'data\.tokenizer: the task .* is tokenised with'):
    data.make_loader(other, 'train')
  assert sum(1 for _ in tokenizer_program._texts(make_config(**fields))) == 50


@pytest.mark.slow
def test_startup_is_quiet(config):
  code = f"""
from absl import logging
from moejax import data
logging.use_absl_handler()
logging.set_verbosity(logging.INFO)  # as under app.run
data.make_loader(data.DataConfig(**{vars(config)!r}), 'train').batch(0)
"""
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout == ''
  assert done.stderr == ''


def test_the_features_of_a_corpus_import_nothing(tmp_path):
  tfds = seqio_loader._modules().tfds
  feature = {'type': 'tensorflow_datasets.core.features.text_feature.Text', 'content': {}}
  content = {'text': feature, 'other': {'type': 'antigravity.Text', 'content': {}}}
  features = {'type': 'tensorflow_datasets.core.features.features_dict.FeaturesDict'}
  (tmp_path / 'features.json').write_text(json.dumps(features | {'content': content}))
  with pytest.raises(ValueError, match=r'tfds_data_dir: .* would import antigravity\.Text\.'):
    tfds.features.FeatureConnector.from_config(str(tmp_path))
  assert 'antigravity' not in sys.modules
  del content['other']
  (tmp_path / 'features.json').write_text(json.dumps(features | {'content': content}))
  assert 'text' in tfds.features.FeatureConnector.from_config(str(tmp_path))
