"""Validation loss, as a function and as a program.

  python -m moejax.evaluate --workdir=DIR
  python -m moejax.evaluate --workdir=DIR --modes=mixed,unmixed,discrete,mixed_with_corpus

In a model that mixes sequences, a mode says how those that are evaluated or decoded together
influence each other:

  mixed              groups as in training: one request influences another
  unmixed            groups of one: every expert sees every token, and the outputs add up
  discrete           an expert of Mixture of Tokens takes a single token of a group; which one
                     depends on the others
  mixed_with_corpus  every sequence in a group of its own, filled with training text: how the paper
                     scores single prompts (evaluation only; costs as much as a full group)
"""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from moejax import (
  cli,
  config as config_lib,
  data,
  metrics,
  model as model_lib,
  sharding,
  step as step_lib,
)
from moejax.run_folder import load_run

MODES = ('mixed', 'unmixed', 'discrete', 'mixed_with_corpus')


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
def _num_bytes(batch):
  """The bytes of text of the targets of a batch that count."""
  return jnp.sum(batch['bytes'] * model_lib.counted(batch))


def evaluate(model_config, params, loader, num_batches, mesh, accumulation=1, corpus=None):
  """Mean loss over the first `num_batches` batches of a loader, at most over one pass.

  Args:
    model_config, params: the model.
    loader: of the validation split.
    num_batches: the most batches; None: all.
    mesh: of the parameters.
    accumulation: microbatches that a batch is split into, as in training.
    corpus: another loader; every sequence is mixed only with sequences of this one.

  Returns:
    A dict of numbers: 'loss' in nats per token, 'bits_per_byte' (of the evaluated targets),
    'tokens', and for models that drop tokens 'loss_dropless'; and aux, the measurements of the
    sublayers, as numpy arrays [sublayers that measure it, ...].

  Raises:
    ValueError: the split is smaller than one batch.
  """
  dropless = model_config.dropless()
  total = {'nats': 0.0, 'tokens': 0.0, 'bytes': 0, 'nats_dropless': 0.0}
  all_aux = []
  batches = itertools.islice(map(loader.batch, itertools.count()), num_batches)
  if corpus:
    batches = _among_others(batches, corpus, model_config.mixed_sequences)
  for batch in batches:
    sizes = loader.tokenizer.num_bytes(batch['inputs'], batch['targets'])
    batch = sharding.place_batch(batch | {'bytes': sizes}, mesh)
    num_bytes = _num_bytes(batch)
    del batch['bytes']
    number = step_lib.microbatches(model_config, len(batch['inputs']), accumulation)
    nats, tokens, aux = step_lib.eval_step(model_config, number, params, batch)
    if not tokens:  # of any process: the split is exhausted
      break
    all_aux.append(sharding.fetch(aux))
    total['nats'] += float(nats)
    total['tokens'] += float(tokens)
    total['bytes'] += int(num_bytes)
    if dropless:
      total['nats_dropless'] += float(step_lib.eval_step(dropless, number, params, batch)[0])
  if not all_aux:
    raise ValueError('data.batch_size: the validation split is smaller than one batch; lower it.')
  result = {'loss': total['nats'] / total['tokens'], 'tokens': int(total['tokens'])}
  if total['bytes']:
    result['bits_per_byte'] = total['nats'] / math.log(2) / total['bytes']
  if dropless:
    result['loss_dropless'] = total['nats_dropless'] / total['tokens']
  return result, jax.tree.map(lambda *values: np.mean(values, axis=0), *all_aux)


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
      for name, values in batch.items():
        mixed[name][places] = values[first : first + groups]
      counted = np.zeros(mixed['segments'].shape, bool)
      counted[places] = True
      yield mixed | {'counted': counted}


def compare_modes(run_config, params, mesh, modes, group_sizes, num_batches):
  """Evaluates every mode at every group size; 0: as in training. 'unmixed' has only one.

  Returns:
    One dict per combination: 'mode', 'group_size', 'leaks' (whether one request influences another
    in generation), and what `evaluate` measures.

  Raises:
    ValueError: there is no mode, the model does not support one, or a group size does not divide
      the batch.
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
  results = []
  part = sharding.process_part(mesh, batch_size)
  for mode, model in models:
    alone = mode == 'mixed_with_corpus'
    validation = data.make_loader(run_config.data, 'validation', **part)
    corpus = data.make_loader(run_config.data, 'train') if alone else None
    accumulation = run_config.optimizer.accumulation
    result, aux = evaluate(model, params, validation, num_batches, mesh, accumulation, corpus)
    group = model.mixed_sequences
    what = {'mode': mode, 'group_size': group, 'leaks': group > 1 and not alone}
    results.append({**what, **result, **metrics.flatten_aux(aux)})
  return results


def main(overrides):
  args = flags.FLAGS
  cli.join_processes()
  run_config, step, params, mesh = load_run(args.workdir, overrides)
  config_lib.check_batch(run_config, mesh)
  num_batches = None if args.batches < 0 else args.batches or run_config.train.eval_batches
  with jax.set_mesh(mesh):
    results = compare_modes(run_config, params, mesh, args.modes, args.group_size, num_batches)
  for result in results:
    print(json.dumps({'step': step, **result}))
  return cli.OK


if __name__ == '__main__':
  cli.define_process_flags()
  cli.define_path('workdir', None, 'Folder of the run to evaluate.', required=True)
  flags.DEFINE_integer(
    'batches', 0, 'Validation batches; 0: train.eval_batches; -1: all.', lower_bound=-1
  )
  flags.DEFINE_list('modes', ['mixed'], f'How sequences are mixed: {", ".join(MODES)}.')
  flags.DEFINE_multi_integer(
    'group_size', [0], 'Sequences mixed with each other; may be repeated. 0: as in training.'
  )
  cli.run(main, needs_config=False, takes_overrides=True)
