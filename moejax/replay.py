"""Runs one training step of a run again, and prints the loss and the norms inside it by layer.

  python -m moejax.replay --workdir=runs/mot --step=1234
  python -m moejax.replay --workdir=runs/mot --step=1234 --config.model.dtype=float32

It goes on from the newest checkpoint before the step, or from the start, with the batches and the
noise of the run, and writes nothing. Where the run went back to that checkpoint later, this is its
first attempt.
"""

import contextlib
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from moejax import cli, config as config_lib, data, estimate, run_folder, sharding, text
from moejax.differences import by_name
from moejax.distributed import is_process_0
from moejax.step import (
  fresh_state,
  gradients_of,
  jit_train_step,
  make_clock,
  make_state,
  noise_key,
  optimizer_at,
  split_batch,
)
from moejax.transfer import observe
from moejax.watch import fingerprint

_COLUMNS = ('output', 'stream', 'parameters', 'gradient', 'update')  # after scores of routers


class Replayed(NamedTuple):
  """A step that was run again."""

  step: int
  begun: int  # step of the checkpoint that it went on from
  batch: str  # its fingerprint
  numbers: dict[str, float]  # what the step measures, such as 'loss'
  layers: dict[str, dict[str, float]]  # norms by layer, from below, and by what they are of


def replay(workdir, step: int, overrides=None) -> Replayed:
  """Runs step `step` of the run in a folder again.

  Args:
    workdir: the folder; the run may be in training.
    step: which step, from 1.
    overrides: of the run's config, as `config.override` takes them.

  Raises:
    ValueError: no checkpoint leads to the step, or the corpus is no longer that of the run.
  """
  config = run_folder.read(workdir)
  config_lib.override(config, overrides or {})
  run_config = estimate.placed(config_lib.resolve(config), jax.devices())
  if not 1 <= step <= run_config.train.steps:
    raise ValueError(f'--step={step}: expected 1 to train.steps = {run_config.train.steps}.')
  mesh = sharding.make_mesh(run_config.mesh)
  config_lib.check_mesh(run_config, mesh)
  part = sharding.process_part(mesh, run_config.data.batch_size)
  with cli.waiting_for('reading the corpus'):
    loader = data.make_loader(run_config.data, 'train', **part)
  with (
    contextlib.closing(run_folder.checkpoints(workdir, run_config)) as checkpoints,
    jax.set_mesh(mesh),
  ):
    init = fresh_state(run_config)
    abstract = sharding.abstract(init, mesh)
    begun, passed = _find_start(checkpoints, step, loader)
    if begun:
      state = checkpoints.restore(begun, abstract, loader, config.to_dict())
    else:
      state = make_state(init, abstract)
    place = lambda number: sharding.place_batch(loader.batch(number + passed), mesh)
    train_step, now = jit_train_step(run_config, abstract, mesh), make_clock(run_config)
    with cli.waiting_for(f'{step - begun} steps from step {begun}'):
      for done in range(begun, step - 1):
        state, _ = train_step(state, place(done), now(done))
      last = place(step - 1), now(step - 1)
      inside = jax.device_get(_look(run_config)(state, *last))
      _, measured = jax.device_get(train_step(state, *last))
  numbers = {name: float(value) for name, value in measured.items() if name != 'aux'}
  return Replayed(step, begun, fingerprint(last[0]), numbers, by_layer(run_config.model, *inside))


def _find_start(checkpoints, step, loader):
  """The step of the checkpoint to go on from, 0: the seed; and the batches passed over until it."""
  newest = checkpoints.latest_step()
  if newest is None:
    return 0, 0
  begun = checkpoints.latest_step(at_most=step - 1)
  metadata = checkpoints.metadata(newest if begun is None else begun)
  if metadata['corpus'] not in (None, loader.fingerprint):
    raise ValueError(
      f'--workdir: the run was trained on corpus {metadata["corpus"]}, but its config now gives '
      f'{loader.fingerprint}, in which its batches are not. Restore the corpus.'
    )
  if begun is not None:
    return begun, metadata.get('watch', {}).get('passed', 0)
  if metadata.get('origin') or metadata['corpus'] is None:
    raise ValueError(
      f'--step={step}: the run began with the parameters of another one, and has no checkpoint '
      f'before this step. Its newest one is of step {newest}.'
    )
  return 0, 0


def _look(run_config):
  """The jitted function of a state, a batch and a `Now` that looks inside a step.

  It returns mean squares of activations by place, as `observe` names them, [repeats] each; and
  squared norms of parameters, gradients and updates by path, [repeats] in the stacks.
  """
  model, accumulation = run_config.model, run_config.optimizer.accumulation

  def look(state, batch, now):
    key, params = noise_key(now.seed), state['params']
    _, gradients, _ = gradients_of(
      state, batch, model_config=model, accumulation=accumulation, key=key
    )
    updates, _ = optimizer_at(run_config, now).update(gradients, state['optimizer'], params)

    def inside(_, microbatch_and_key):  # one at a time, as in training
      seen = observe.observe(model, params, *microbatch_and_key)
      return None, {place: observe.mean_square(values) for place, values in seen.items()}

    _, squares = jax.lax.scan(inside, None, split_batch(batch, state['step'], accumulation, key))
    squares = {place: values.mean(0) for place, values in squares.items()}
    trees = {'parameters': params, 'gradient': gradients, 'update': updates}
    return squares, {what: _squared_norms(tree) for what, tree in trees.items()}

  return jax.jit(look)


def _squared_norms(tree):
  def square(name, a):
    wide = a.astype(jnp.promote_types(a.dtype, jnp.float32))
    return jnp.square(wide).sum(range(name.startswith('stack_'), a.ndim))

  return {name: square(name, a) for name, a in by_name(tree).items()}


def by_layer(model, activations, norms) -> dict[str, dict[str, float]]:
  """What `_look` returns as `Replayed.layers`: square roots, of all parameters of a layer."""
  rows = {('embedding', 0): 'embedding'}  # by stack/sublayer, or parameter outside, and repeat
  squares = {'embedding': {'stream': activations['embedding'][0]}}
  for number, kind, i, part, repeat in observe.layers(model.blocks):
    row = rows[f'stack_{i}/{part}', repeat] = f'{number} {kind}'
    of_layer = {
      place: values for place, values in activations.items() if place.startswith(f'{i}/{part}/')
    }
    squares[row] = {place.split('/')[-1]: values[repeat] for place, values in of_layer.items()}
  squares['head'] = {'output': activations['logits'][0]}
  for what, of_parameters in norms.items():
    for path, values in of_parameters.items():
      parts = path.split('/')
      name = '/'.join(parts[:2]) if values.ndim else parts[0]
      for repeat, value in enumerate(values.reshape(-1)):
        row = squares.setdefault(rows.get((name, repeat), name), {})
        row[what] = row.get(what, 0.0) + value
  return {
    row: {what: float(value) ** 0.5 for what, value in of_row.items()}
    for row, of_row in squares.items()
  }


def describe(replayed: Replayed) -> str:
  """The numbers of a step, a table of its layers, and where it is not finite."""
  numbers, layers = replayed.numbers, replayed.layers
  begun = f'the checkpoint of step {replayed.begun}' if replayed.begun else 'the seed'
  names = ('loss', 'grad_norm', 'update_norm', 'learning_rate')
  scores = {what for of_row in layers.values() for what in of_row} - {*_COLUMNS}
  columns = [*sorted(scores), *_COLUMNS]
  cell = lambda of_row, what: f'{of_row[what]:.4g}' if what in of_row else '-'
  rows = [[row, *(cell(of_row, what) for what in columns)] for row, of_row in layers.items()]
  lines = [
    f'step {replayed.step}, from {begun}; batch {replayed.batch}',
    ', '.join(f'{name} {numbers[name]:.6g}' for name in names),
    '',
    text.table([['', *columns], *rows]),
  ]
  if numbers['skipped']:
    lines += ['', f'the update is skipped; {_first_not_finite(layers, columns)}']
  return '\n'.join(lines)


def _first_not_finite(layers, columns):
  for what in ('activations', 'gradient', 'update'):
    order = reversed(layers.items()) if what == 'gradient' else layers.items()
    of = [what] if what in columns else [name for name in columns if name not in _COLUMNS[2:]]
    for row, of_row in order:
      for name in of:
        if not math.isfinite(of_row.get(name, 0.0)):
          return f'the first that is not finite is the {name} of {row}'
  return 'all norms by layer are finite'


def main(overrides):
  cli.join_processes()
  replayed = replay(flags.FLAGS.workdir, flags.FLAGS.step, overrides)
  if is_process_0():
    print(
      describe(replayed),
      '',
      'Root mean squares of activations (scores, output of a layer, stream after it); norms of',
      'parameters, gradient and update.',
      sep='\n',
    )
  return cli.OK


if __name__ == '__main__':
  cli.define_process_flags()
  cli.define_path('workdir', None, 'Folder of the run.', required=True, bucket=True)
  flags.DEFINE_integer('step', None, 'The step to run again, from 1.', lower_bound=1)
  flags.mark_flag_as_required('step')
  cli.run(main, needs_config=False, takes_overrides=True)
