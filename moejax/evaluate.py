"""Validation loss, as a function and as a program.

  python -m moejax.evaluate --workdir=DIR
  python -m moejax.evaluate --workdir=DIR --files='books/*.txt' --by_position=positions.csv
  python -m moejax.evaluate --workdir=DIR --modes=mixed,unmixed,discrete,mixed_with_corpus

A terminal gets a table, a file or a pipe one JSON object per mode and group size. The loss is the
mean over tokens, +- its standard error over sequences, as if these were independent. Validation
visits its split in a fixed pseudo-random order, so that sequences are grouped as in training.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags

from moejax import (
  cli,
  config as config_lib,
  data,
  eval_report,
  metrics,
  model as model_lib,
  report,
  sharding,
  step as step_lib,
)
from moejax.distributed import is_process_0
from moejax.run_folder import load_run

# In a model that mixes sequences: how those that are evaluated or decoded together influence each
# other.
MODES = {
  'mixed': 'groups as in training, one sequence influences another',
  'unmixed': 'groups of one, every expert sees every token and the outputs add up',
  'discrete': 'an expert takes a single token of a group, which one depends on the others',
  'mixed_with_corpus': 'every sequence in a group of its own, filled with training text, as the '
  'paper scores single prompts; as slow as a full group',
}


def describe_modes():
  """MODES as text, for the help of flags."""
  return ' '.join(f'{mode}: {meaning}.' for mode, meaning in MODES.items())


def decoding(model_config, mode, group_size=0):
  """The model config for a mode; same parameters.

  Args:
    model_config: the model as it was trained.
    mode: one of MODES; for 'mixed_with_corpus', `evaluate` fills the groups.
    group_size: sequences mixed with each other; 0: as in training.

  Raises:
    ValueError: the model does not support the mode or the group size.
  """
  if mode not in MODES:
    raise ValueError(f'mode: expected one of {", ".join(MODES)}, got {mode!r}.')
  if mode == 'mixed' and not group_size:
    return model_config
  mixing = [sublayer for sublayer in model_config.used if sublayer.mixes]
  if not mixing:
    raise ValueError(
      f'mode {mode}: no layer of this model mixes sequences. Leave out the mode and the group size.'
    )
  changes = {}
  for sublayer in mixing:
    changes |= sublayer.remixed(mode, group_size)
  return dataclasses.replace(model_config, **changes)


@jax.jit
def _counted_sums(counted, *arrays):
  """Sums over the targets of a batch that count."""
  return [jnp.sum(array * counted) for array in arrays]


def standard_error(sums_B, weights_B, ratio):
  """Of `ratio`, the sum of `sums_B` over that of `weights_B`, as if sequences were independent.

  Sequences without weight do not count; 0 of a single one.
  """
  number = np.sum(weights_B > 0)
  squares = np.sum(np.square(sums_B - ratio * weights_B))
  return float(np.sqrt(squares * number / max(number - 1, 1)) / weights_B.sum())


class Evaluation:
  """The losses of batches, added up.

  Attributes:
    batches, tokens, bytes: how much was evaluated.
    documents: whose end was evaluated.
    is_whole: whether that was all of the split.
    nats_L, tokens_L: sums at every position of a sequence, float64.
  """

  def __init__(self):
    self.batches = self.tokens = self.bytes = self.documents = 0
    self.is_whole = False
    self.nats_L = self.tokens_L = np.zeros(0)
    self._nats, self._nats_dropless = 0.0, None
    self._nats_B, self._tokens_B = [], []
    self._auxes = []

  def add(self, nats, tokens, num_bytes, sums, aux, documents=0):
    """Adds what `step.eval_step` returns for a batch, and the bytes and ends of its targets."""
    self.batches += 1
    self._nats += float(nats)
    self.tokens += int(tokens)
    self.bytes += int(num_bytes)
    self.documents += int(documents)
    nats_B, tokens_B, nats_L, tokens_L = (np.asarray(a, np.float64) for a in sharding.fetch(sums))
    self._nats_B.append(nats_B)
    self._tokens_B.append(tokens_B)
    self.nats_L = nats_L + (self.nats_L if self.batches > 1 else 0)
    self.tokens_L = tokens_L + (self.tokens_L if self.batches > 1 else 0)
    self._auxes.append(sharding.fetch(aux))

  def add_dropless(self, nats):
    """Adds the loss of the same batch without dropped tokens."""
    self._nats_dropless = float(nats) + (self._nats_dropless or 0.0)

  @property
  def result(self):
    """A dict of numbers, see `evaluate`."""
    result = {'loss': self._nats / self.tokens, 'tokens': self.tokens}
    if self.bytes:
      result['bits_per_byte'] = self._nats / math.log(2) / self.bytes
    if self._nats_dropless is not None:
      result['loss_dropless'] = self._nats_dropless / self.tokens
    nats_B, tokens_B = np.concatenate(self._nats_B), np.concatenate(self._tokens_B)
    if np.sum(tokens_B > 0) > 1:
      result['standard_error'] = standard_error(nats_B, tokens_B, result['loss'])
    return result

  @property
  def extent(self):
    """What was averaged: a dict of numbers, and whether that is the whole split."""
    extent = {'whole_split': self.is_whole, 'batches': self.batches, 'bytes': self.bytes}
    extent['sequences'] = int(np.sum(np.concatenate(self._tokens_B) > 0))
    return extent | ({'documents': self.documents} if self.is_whole else {})

  @property
  def perplexity(self):
    return float(np.exp(self._nats / self.tokens))

  @property
  def aux(self):
    """The mean over batches."""
    return jax.tree.map(lambda *values: np.mean(values, axis=0), *self._auxes)


def host_batches(run_config, mesh, num_batches=None):
  """Yields at most so many batches of a run's validation split, None: all of it.

  They have 'counted', which targets count; of each, the sequences of this process.
  """
  part = sharding.process_part(mesh, run_config.data.batch_size)
  loader = data.make_loader(run_config.data, 'validation', **part)
  of_split = getattr(loader, 'num_batches', None)  # a stream does not know
  limits = [number for number in (num_batches, of_split) if number is not None]
  for batch in itertools.islice(map(loader.batch, itertools.count()), min(limits, default=None)):
    yield batch | {'counted': model_lib.counted(batch)}


def validation_batches(run_config, mesh, num_batches=None):
  """Yields `host_batches` as global arrays, until the split is exhausted."""
  for batch in host_batches(run_config, mesh, num_batches):
    batch = sharding.place_batch(batch, mesh)
    if not batch['counted'].any():  # of any process
      return
    yield batch


def evaluate(model_config, params, loader, num_batches, mesh, accumulation=1, corpus=None):
  """Mean loss over the first `num_batches` batches of a loader, None: all; see `evaluation`.

  Returns:
    A dict of numbers: 'loss' in nats per token, its 'standard_error' over sequences (if there are
    several), 'bits_per_byte' (of the evaluated targets), 'tokens', and for models that drop tokens
    'loss_dropless'; and aux, the measurements of the sublayers, as numpy arrays [sublayers that
    measure it, ...].
  """
  done = evaluation(model_config, params, loader, num_batches, mesh, accumulation, corpus)
  return done.result, done.aux


def evaluation(
  model_config,
  params,
  loader,
  num_batches,
  mesh,
  accumulation=1,
  corpus=None,
  progress=False,
  before_batch=lambda: None,
):
  """The `Evaluation` of a loader's first `num_batches` batches, at most of one pass.

  Args:
    model_config, params: the model.
    loader: of the validation split.
    num_batches: the most batches; None: all of the split.
    mesh: of the parameters.
    accumulation: microbatches that a batch is split into, as in training.
    corpus: another loader; every sequence is mixed only with sequences of this one.
    progress: whether to show it, once five seconds have passed.
    before_batch: called before every batch; what it raises ends the evaluation.

  Raises:
    ValueError: there is nothing to evaluate.
  """
  hidden = None if progress else True  # None: unless it is a terminal
  dropless = model_config.dropless()
  total = Evaluation()
  of_split = getattr(loader, 'num_batches', None)  # a stream does not know
  if of_split is not None and (num_batches is None or num_batches >= of_split):
    num_batches, total.is_whole = of_split, True
  batches = itertools.islice(map(loader.batch, itertools.count()), num_batches)
  if corpus:
    batches = _among_others(batches, corpus, model_config.mixed_sequences)
  for batch in tqdm.tqdm(batches, unit=' batches', delay=5, leave=False, disable=hidden):
    before_batch()
    sizes = loader.tokenizer.num_bytes(batch['inputs'], batch['targets'])
    ends = batch['targets'] == loader.tokenizer.eos_id
    batch = batch | {'counted': model_lib.counted(batch)}
    *of_targets, batch = sharding.place_batch([sizes, ends, batch], mesh)
    num_bytes, documents = _counted_sums(batch['counted'], *of_targets)
    number = step_lib.microbatches(model_config, len(batch['inputs']), accumulation)
    nats, tokens, aux, sums = step_lib.eval_step(model_config, number, params, batch)
    if not tokens:  # of any process: the split is exhausted
      total.is_whole = True
      break
    total.add(nats, tokens, num_bytes, sums, aux, documents)
    if dropless:
      total.add_dropless(step_lib.eval_step(dropless, number, params, batch)[0])
  if corpus:  # the sequences of one batch took a batch per place in a group
    total.batches = -(-total.batches // model_config.mixed_sequences)
  if not total.batches:
    raise ValueError('data.batch_size: the validation split is smaller than one batch; lower it.')
  return total


def _among_others(batches, corpus, group_size):
  """The sequences of `batches`, one at a random place of every group of others from `corpus`."""
  rng = np.random.default_rng(0)
  others = map(corpus.batch, itertools.count())
  for batch in batches:
    batch_size = len(batch['inputs'])
    groups = batch_size // group_size
    for first in range(0, batch_size, groups):
      places = np.arange(0, batch_size, group_size)
      places += rng.integers(group_size, size=groups)
      mixed = {name: values.copy() for name, values in next(others).items()}
      for name, values in mixed.items():
        values[places] = batch[name][first : first + groups]
      counted = np.zeros(mixed['segments'].shape, bool)
      counted[places] = model_lib.counted(batch)[first : first + groups]
      yield mixed | {'counted': counted}


def training_text(data_config, number):
  """The inputs of training's first `number` sequences, int32 [L] each: others to mix with."""
  loader = data.make_loader(data_config, 'train')
  steps = range(-(-number // data_config.batch_size))
  return [row for step in steps for row in loader.batch(step)['inputs']][:number]


def compare_modes(run_config, params, mesh, modes, group_sizes, num_batches):
  """Evaluates every mode at every group size; 0: as in training. 'unmixed' has only one.

  Returns:
    One dict per combination: 'mode', 'group_size', 'leaks' (whether one request influences another
    in generation), and what `evaluate` measures.

  Raises:
    ValueError: there is no mode, the model does not support one, or a group size does not divide
      the batch.
  """
  return [
    {**what, **done.result, **metrics.flatten_aux(done.aux)}
    for what, done in evaluations(run_config, params, mesh, modes, group_sizes, num_batches)
  ]


def evaluations(
  run_config, params, mesh, modes, group_sizes, num_batches, text=None, progress=False
):
  """Yields (mode, group size and leaks as a dict, `Evaluation`) for `compare_modes`.

  `text`: the data config of what to evaluate; None: the run's. `mixed_with_corpus` mixes with
  training text of the run in any case.
  """
  if not modes:
    raise ValueError(f'--modes: expected at least one of {", ".join(MODES)}.')
  sizes = {mode: [0] if mode == 'unmixed' else group_sizes for mode in modes}
  models = [
    (mode, decoding(run_config.model, mode, size)) for mode in modes for size in sizes[mode]
  ]
  batch_size = run_config.data.batch_size
  for _, model in models:
    if batch_size % model.mixed_sequences:
      raise ValueError(
        f'--group_size={model.mixed_sequences} must divide the {batch_size} sequences that are '
        'evaluated together; change it, or set --config.data.batch_size.'
      )
  if 'mixed_with_corpus' in modes and jax.process_count() > 1:
    raise ValueError('--modes: mixed_with_corpus fills groups on one host; evaluate it on one.')
  part = sharding.process_part(mesh, batch_size)
  for mode, model in models:
    alone = mode == 'mixed_with_corpus'
    validation = data.make_loader(text or run_config.data, 'validation', **part)
    corpus = data.make_loader(run_config.data, 'train') if alone else None
    accumulation = run_config.optimizer.accumulation
    how = num_batches, mesh, accumulation, corpus, progress
    group = model.mixed_sequences
    what = {'mode': mode, 'group_size': group, 'leaks': group > 1 and not alone}
    yield what, evaluation(model, params, validation, *how)


def _text_of(data_config, files):
  """The data config of `--files`, all of which is evaluated."""
  suffixes = set(pathlib.Path(files).suffixes)
  source = 'text'
  if pathlib.Path(files).is_dir():
    source = 'tokens'
  elif suffixes & {'.jsonl', '.json'}:
    source = 'jsonl'
  elif '.parquet' in suffixes:
    source = 'parquet'
  return dataclasses.replace(data_config, source=source, files=files, validation_files=files)


def main(overrides):
  args = flags.FLAGS
  if args.by_position and not args.by_position.endswith('.csv'):
    raise ValueError(f'--by_position: expected a .csv file, got {args.by_position}.')
  cli.join_processes()
  run_config, step, params, mesh = load_run(args.workdir, overrides)
  config_lib.check_batch(run_config, mesh)
  text = _text_of(run_config.data, args.files) if args.files else None
  num_batches = args.batches or (0 if args.files else run_config.train.final_eval_batches)
  num_batches = num_batches if num_batches > 0 else None
  is_json, curves, rows = args.json or not sys.stdout.isatty(), {}, []
  how = run_config, params, mesh, args.modes, args.group_size, num_batches
  with jax.set_mesh(mesh):
    for what, done in evaluations(*how, text, progress=is_process_0()):
      rows.append(what | done.result | done.extent | {'perplexity': done.perplexity})
      curve = done.nats_L, done.tokens_L
      curves[f'{what["mode"]}, group {what["group_size"]}'] = curve
      if is_json and is_process_0():
        positions = {'by_position': eval_report.buckets(*curve)} if args.by_position else {}
        measured = metrics.flatten_aux(done.aux)
        print(json.dumps({'step': step, **rows[-1], **measured, **positions}), flush=True)
  if not is_process_0():
    return cli.OK
  if not is_json:
    of = f'text of {args.files}' if args.files else 'validation split'
    print(f'{args.workdir}, step {step}, {report.extent(rows[0], of)}\n{eval_report.table(rows)}')
  if args.by_position:
    eval_report.write_positions(curves, pathlib.Path(args.by_position))
    if not is_json:
      print(f'\n{eval_report.position_table(curves)}')
  return cli.OK


if __name__ == '__main__':
  cli.define_process_flags()
  cli.define_path('workdir', None, 'Folder of the run to evaluate.', required=True, bucket=True)
  cli.define_path(
    'files',
    None,
    'Text to evaluate, all of it, in place of the validation split of the run: a glob of text, '
    '.jsonl or .parquet files (--config.data.field names the field), or a folder of token files.',
  )
  flags.DEFINE_integer(
    'batches',
    0,
    'Batches to evaluate; -1: all; 0: train.final_eval_batches, by default all.',
    lower_bound=-1,
  )
  flags.DEFINE_list('modes', ['mixed'], f'How sequences are mixed. {describe_modes()}')
  flags.DEFINE_multi_integer(
    'group_size', [0], 'Sequences mixed with each other; may be repeated. 0: as in training.'
  )
  cli.define_path(
    'by_position', None, 'Shows the loss by position; writes it to this .csv file and a .png.'
  )
  flags.DEFINE_bool('json', False, 'Prints JSON lines to a terminal, too.')
  cli.run(main, needs_config=False, takes_overrides=True)
