"""Packed batches from seqio tasks: C4, or any registered task or mixture.

The only module that imports TensorFlow, on first use and without its startup messages.
"""

import contextlib
import difflib
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from absl import logging

from moejax import imports
from moejax.data import batch as batch_lib, tokenizer as tokenizer_lib
from moejax.text import did_you_mean

# Tasks that need no registration: text of a tensorflow-datasets corpus. The first version that is
# prepared is read. Most existing copies of c4/en are 3.0.1 (the library can read it but no longer
# build it); today it builds 3.1.0.
TFDS_TASKS = {
  'c4_en': ('c4/en:3.0.1', 'c4/en:3.1.0'),
  'c4_realnewslike': ('c4/realnewslike:3.0.1', 'c4/realnewslike:3.1.0'),
}
_PIECES_TO_SHUFFLE = 4096  # pieces of one long document would otherwise stay together


class SeqioLoader:
  """Packs the documents of a seqio task into sequences.

  Documents longer than L are cut into pieces of L tokens, never truncated; pieces are packed, each
  its own segment with positions from 0. `inputs` are the targets shifted right by one, with 0 at
  the start of each segment (the end of document, where 0 is a token); `segments` is 0 for unfilled
  positions.

  A batch consists of as many streams as the run began with processes: stream i of n packs the i-th
  part of the task's files. With another number of processes, a process reads those streams that its
  sequences are from; several read the same one if there are more processes than streams.

  A task can only be read in order, so steps must be consecutive, from 0 or from the step after the
  saved one; step 0 always restarts from the beginning. Both splits are shuffled within 4096 pieces.
  Training repeats the data forever; validation reads its split once, and fills up its last batch
  with sequences of the first that are not counted.
  """

  def __init__(self, config, split, part, num_parts):
    self._tf = _modules().tf
    self._sequence_length, self._batch_size = config.sequence_length, config.batch_size
    self._num_sequences = config.batch_size // num_parts
    self._first_sequence = part * self._num_sequences
    self._task, self._is_train, self._first = config.task, split == 'train', {}
    self.tokenizer = tokenizer_lib.make_tokenizer(config)
    task, name = _find_task(config, self.tokenizer)
    # seqio takes id 0 for padding; where it is a token, all ids are one larger inside of it.
    self._offset = 0 if self.tokenizer.pad_id == 0 else 1
    self._make_dataset = functools.partial(_packed, config, task, split, offset=self._offset)
    self.fingerprint = batch_lib.fingerprint('seqio', name, self.tokenizer.fingerprint)
    self._identity = {'fingerprint': self.fingerprint, 'sequence_length': config.sequence_length}
    self._num_streams = num_parts
    self._restart()

  def batch(self, step: int) -> batch_lib.Batch:
    """Returns this process's sequences of a step, which must be the next one, or 0."""
    if step == 0 and self._next_step != 0:
      self._restart()
    if step != self._next_step:
      raise ValueError(
        f'expected step {self._next_step} (a seqio task is read in order), got {step}; '
        'load the saved position first.'
      )
    self._next_step += 1
    parts = [self._read(stream, rows) for stream, (_, rows) in self._streams.items()]
    batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if self._is_train or not batch['segments'].any():
      return batch
    self._first = batch if step == 0 else self._first
    return self._filled(batch)

  def _read(self, stream, rows) -> batch_lib.Batch:
    """Returns some sequences of the next batch of a stream; padding after the end of validation."""
    iterator, _ = self._streams[stream]
    features = next(iterator, None)
    if features is None:
      return batch_lib.padding(self._num_sequences, self._sequence_length)
    return {name: values[rows] for name, values in self._unpacked(features).items()}

  def _unpacked(self, features) -> batch_lib.Batch:
    """Returns a batch of seqio as one of ours."""
    inputs = features['decoder_input_tokens'].numpy()
    targets = features['decoder_target_tokens'].numpy()
    length = self._sequence_length
    place = lambda i: f'data.task: {self._task!r}: token {i % length} of sequence {i // length}'
    batch_lib.check_ids(targets, self.tokenizer.vocab_size + self._offset, place)
    if self._offset:  # 0 begins a segment and fills up a sequence
      inputs = np.where(inputs == 0, np.int32(self.tokenizer.eos_id), inputs - 1)
      targets = np.maximum(targets - 1, 0)
    return {
      'inputs': inputs,
      'targets': targets,
      'segments': features['decoder_segment_ids'].numpy(),
      'positions': features['decoder_positions'].numpy(),
    }

  def _filled(self, batch: batch_lib.Batch) -> batch_lib.Batch:
    """Returns a batch of validation with all its sequences, and which are counted."""
    missing = self._num_sequences - len(batch['inputs'])
    fillers = {name: values[:missing] for name, values in self._first.items()}
    if len(self._first['inputs']) < self._num_sequences:  # there is no full batch
      fillers = batch_lib.padding(missing, self._sequence_length)
    counted = np.arange(self._num_sequences) < len(batch['inputs'])
    filled = {name: np.concatenate([batch[name], fillers[name]]) for name in batch}
    return filled | {'counted': np.repeat(counted[:, None], self._sequence_length, axis=1)}

  def save(self, directory: pathlib.Path) -> None:
    """Writes the iterators of the streams that begin here, with their buffers, and the next step.

    Raises ValueError for a task with an operation whose state TensorFlow cannot save; before the
    first batch, that goes unnoticed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for stream, (iterator, rows) in self._streams.items():
      if rows.start == 0:  # otherwise another process saves it
        self._save(directory / _file(stream, self._num_streams), iterator)

  def _save(self, path, iterator):
    try:
      self._tf.train.Checkpoint(iterator=iterator).write(str(path))
    except self._tf.errors.FailedPreconditionError as error:
      raise ValueError(
        f'data.task: a run with {self._task!r} could not resume, because TensorFlow cannot save '
        'the state of one of its operations (Dataset.from_generator, numpy_function, random '
        'numbers without an op seed). Write the task to files once with python -m moejax.tokenize '
        f"and use data.source='tokens'. ({str(error).splitlines()[0][:200]})"
      ) from error
    state = {'next_step': self._next_step} | self._identity
    path.with_suffix('.json').write_text(json.dumps(state))

  def load(self, directory: pathlib.Path) -> None:
    """Restores the position after the last batch before `save`, by any number of processes.

    Raises ValueError if nothing was saved there, or by a run with other data, another sequence
    length, or streams that do not divide the batch.
    """
    self._num_streams = self._saved_streams(directory)
    self._restart()
    for stream, (iterator, _) in self._streams.items():
      path = directory / _file(stream, self._num_streams)
      state = json.loads(path.with_suffix('.json').read_text())
      for key, value in self._identity.items():
        if state[key] != value:
          raise ValueError(
            f'data: the saved position in {directory} has {key} {state[key]}, this run {value}; '
            'a seqio task cannot resume with a different one.'
          )
      self._tf.train.Checkpoint(iterator=iterator).read(str(path)).assert_consumed()
      self._next_step = state['next_step']

  def _saved_streams(self, directory):
    """The number of streams whose positions were saved."""
    saved = sorted(path.stem for path in directory.glob('seqio-*.json'))
    if not saved or saved != [_file(stream, len(saved)) for stream in range(len(saved))]:
      raise ValueError(
        f'the checkpoint has no data position of every stream in {directory}, only {saved}.'
      )
    if self._batch_size % len(saved):
      raise ValueError(
        f'data.batch_size: expected a multiple of {len(saved)}, the number of processes with which '
        f'this run began to read a seqio task, got {self._batch_size}.'
      )
    return len(saved)

  def _restart(self) -> None:
    # New datasets: a shuffled one has a different order in each iteration.
    size = self._batch_size // self._num_streams
    first, end = self._first_sequence, self._first_sequence + self._num_sequences
    self._streams = {
      stream: (
        iter(self._make_dataset(stream, self._num_streams)),
        slice(max(first - stream * size, 0), min(end - stream * size, size)),
      )
      for stream in range(first // size, -(-end // size))
    }
    self._next_step = 0


def _file(stream, num_streams):
  return f'seqio-{stream:05d}-of-{num_streams:05d}'


@functools.cache
def _modules() -> SimpleNamespace:
  """Imports TensorFlow and seqio quietly, and hides accelerators from TensorFlow."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  try:
    with _quiet_stderr():
      import seqio
      import tensorflow as tf
      import tensorflow_datasets as tfds

      for kind in ('GPU', 'TPU'):
        with contextlib.suppress(RuntimeError):  # they are already initialised
          tf.config.set_visible_devices([], kind)
      _import_no_features(tfds.features.FeatureConnector)
  except ModuleNotFoundError as error:
    raise ValueError(
      f"data.source: 'seqio' needs the package {error.name}: pip install 'moejax[seqio]'; or write "
      'the task to files once with python -m moejax.tokenize on another machine and use '
      "data.source='tokens' here."
    ) from error
  return SimpleNamespace(seqio=seqio, tf=tf, tfds=tfds)


def _import_no_features(connector) -> None:
  """Makes tensorflow-datasets import nothing that the features.json of a corpus names."""
  find = connector.cls_from_name

  def find_imported(name):
    if (
      name.startswith('tensorflow_datasets.core.features.')
      or name in connector._registered_features
    ):
      return find(name)
    raise ValueError(
      f'data.tfds_data_dir: the features.json of the corpus would import {name}. If it is of your '
      'own, import it in the module of data.task (MODULE:TASK).'
    )

  connector.cls_from_name = staticmethod(find_imported)


@contextlib.contextmanager
def _quiet_stderr():
  """Drops what is written to file descriptor 2; C++ libraries log there, past sys.stderr."""
  saved = os.dup(2)
  try:
    with open(os.devnull, 'w') as null:
      os.dup2(null.fileno(), 2)
    yield
  finally:
    os.dup2(saved, 2)
    os.close(saved)


def _find_task(config, tokenizer) -> tuple[Any, str]:
  """Returns a task or mixture whose ids are the tokenizer's, and a name that identifies its text.

  Without a tokenizer, its vocabulary is not checked: only its text is used.
  """
  seqio = _modules().seqio
  module, _, name = config.task.rpartition(':')
  if module:
    try:
      imports.of_task(module)
    except ModuleNotFoundError as error:
      raise ValueError(
        f'data.task: cannot import {module!r} of {config.task!r}: {error}.'
      ) from error
  registered = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  if name in registered:
    if config.tfds_data_dir:
      seqio.set_tfds_data_dir_override(os.path.expanduser(config.tfds_data_dir))
    task = seqio.get_mixture_or_task(name)
    if tokenizer:
      _check_vocabulary(config, task, tokenizer)
    return task, name
  if name in TFDS_TASKS:
    dataset = _prepared_version(config, TFDS_TASKS[name])
    return _text_task(config, name, dataset, tokenizer or tokenizer_lib.BytesTokenizer()), dataset
  known = {*registered, *TFDS_TASKS}
  raise ValueError(
    f'data.task: no task or mixture {name!r}{did_you_mean(name, known)} Known: '
    f'{", ".join(difflib.get_close_matches(name, known, n=10, cutoff=0))}. '
    "Write 'module:task' to import the module that registers it."
  )


def _text_task(config, name, dataset, tokenizer):
  """Returns the language-modelling task of a tensorflow-datasets corpus with a field `text`."""
  seqio = _modules().seqio
  return seqio.Task(
    name,
    source=seqio.TfdsDataSource(dataset, tfds_data_dir=_tfds_directory(config)),
    preprocessors=[
      functools.partial(seqio.preprocessors.rekey, key_map={'targets': 'text'}),
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features={'targets': seqio.Feature(vocabulary(tokenizer), add_eos=True)},
  )


def vocabulary(tokenizer: tokenizer_lib.Tokenizer):
  """Returns a seqio vocabulary with the ids of a tokenizer.

  Uses TensorFlow's own ops if they give the same ids; otherwise calls the tokenizer from the graph,
  which is slower.
  """
  seqio, tf = _modules().seqio, _modules().tf
  if tokenizer.eos_id == tokenizer_lib.EOS_ID:
    if isinstance(tokenizer, tokenizer_lib.BytesTokenizer):
      return seqio.ByteVocabulary()
    if isinstance(tokenizer, tokenizer_lib.SentencePieceTokenizer) and not tokenizer.shift:
      return seqio.SentencePieceVocabulary(tokenizer.path)

  def encode(text):  # bytes in a graph, an array of one object outside
    return tokenizer.encode_bytes(np.asarray(text, object).item())

  class Wrapped(seqio.PassThroughVocabulary):
    """Adapts our tokenizer to seqio."""

    def _encode_tf(self, s):
      # A stateful function could not be saved with the iterator.
      return tf.ensure_shape(tf.numpy_function(encode, [s], tf.int32, stateful=False), [None])

  return Wrapped(tokenizer.vocab_size, eos_id=tokenizer.eos_id)


def _check_vocabulary(config, task, tokenizer) -> None:
  """Raises ValueError unless a registered task has the ids of `data.tokenizer`."""
  seqio = _modules().seqio
  if 'targets' not in task.output_features:
    raise ValueError(f"data.task: {config.task!r} has no feature 'targets'.")
  theirs = task.output_features['targets'].vocabulary
  if isinstance(theirs, seqio.ByteVocabulary):
    same = isinstance(tokenizer, tokenizer_lib.BytesTokenizer)
  elif isinstance(theirs, seqio.SentencePieceVocabulary):
    same = getattr(tokenizer, 'model', None) == theirs.sp_model and not tokenizer.shift
  else:
    unchanged = isinstance(theirs, seqio.PassThroughVocabulary)
    same = unchanged and theirs.vocab_size <= tokenizer.vocab_size
  if not same:
    raise ValueError(
      f'data.tokenizer: the task {config.task!r} is tokenised with {theirs} of '
      f'{theirs.vocab_size} ids, not with {config.tokenizer!r} of {tokenizer.vocab_size}; '
      'set data.tokenizer to the vocabulary of the task.'
    )


def _packed(config, task, split, stream, num_streams, offset=0):
  """Returns the dataset of one stream's part of the packed batches; it repeats forever in training.

  All ids are larger by `offset`.
  """
  seqio, tf = _modules().seqio, _modules().tf
  length, is_train = config.sequence_length, split == 'train'
  seed = config.seed if is_train else 0
  shard, epochs = seqio.ShardInfo(stream, num_streams), None if is_train else 1
  options = {'shuffle': is_train, 'seed': seed, 'shard_info': shard, 'num_epochs': epochs}
  dataset = _dataset(config, task, split, **options)

  def pieces(example):
    """The ids [n] as a ragged [ceil(n / length), up to length]."""
    starts = tf.range(0, tf.size(example['targets']), length)
    return tf.RaggedTensor.from_row_starts(example['targets'], starts)

  dataset = dataset.map(pieces).unbatch().shuffle(_PIECES_TO_SHUFFLE, seed=seed)
  dataset = dataset.map(lambda ids: {'targets': ids + offset if offset else ids})
  dataset = seqio.LMFeatureConverter(pack=True)(dataset, {'targets': length})
  dataset = dataset.batch(config.batch_size // num_streams, drop_remainder=is_train).prefetch(2)
  options = tf.data.Options()
  options.deterministic = True
  return dataset.with_options(options)


def examples(config, tokenizer, splits) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (split, example as numpy) for every document of a task, in order.

  'targets' are ids [n] of the tokenizer (with None: any); 'targets_pretokenized' is the text,
  unless the task drops it.
  """
  seqio = _modules().seqio
  task, _ = _find_task(config, tokenizer)
  options = {'copy_pretokenized': True} if isinstance(task, seqio.Mixture) else {}
  for split in splits:
    dataset = _dataset(config, task, split, shuffle=False, num_epochs=1, **options)
    for example in dataset.as_numpy_iterator():
      yield split, example


def _dataset(config, task, split, **options):
  """Returns the documents of a task or mixture, not truncated."""
  with _quiet_log(), _clear_errors(config):
    if split not in task.splits:
      raise ValueError(
        f'data.task: {config.task!r} has the splits {sorted(task.splits)}, but no {split!r}.'
      )
    # No sequence_length: tasks would truncate their documents to it.
    return task.get_dataset(sequence_length=None, split=split, try_in_mem_cache=False, **options)


def _tfds_directory(config) -> str:
  """Returns where tensorflow-datasets looks for prepared corpora."""
  directory = config.tfds_data_dir or _modules().tfds.core.constants.DATA_DIR
  return os.path.expanduser(str(directory))


def _prepared_version(config, versions: tuple[str, ...]) -> str:
  """Returns the first version with files in the directory, or else the first."""
  exists = _modules().tf.io.gfile.exists
  info = lambda v: os.path.join(_tfds_directory(config), *v.split(':'), 'features.json')
  return next((version for version in versions if exists(info(version))), versions[0])


@contextlib.contextmanager
def _quiet_log():
  """Silences the libraries' messages about paths and file sharding."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.WARNING)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _clear_errors(config):
  """Turns the libraries' errors about a corpus that is not prepared into one message.

  These are an assertion about versions, empty or missing splits, or a missing info file, depending
  on what the libraries know about the corpus.
  """
  known = 'cannot be loaded at version|`splits` is empty|has no splits|Could not read dataset info'
  try:
    yield
  except (AssertionError, KeyError, OSError, ValueError) as error:
    if not re.search(known, str(error)):
      raise
    raise ValueError(
      f'data.tfds_data_dir: the corpus of task {config.task!r} is not prepared in '
      f'{_tfds_directory(config)}; set data.tfds_data_dir to the directory that holds it (as '
      '<name>/<config>/<version>/features.json and the .tfrecord files).'
    ) from error
