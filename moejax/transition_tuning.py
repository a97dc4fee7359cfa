"""Transition tuning: trains a Mixture-of-Tokens model further as a sparse one (arXiv:2310.15961).

  python -m moejax.transition_tuning --from=runs/mot --workdir=runs/tuned --router=token_choice

The same experts, with the controller as their router, are trained for a tenth more steps. Steps,
batches and, optionally, moments and learning rate continue from the Mixture-of-Tokens run; no
parameter is initialised again. The result is an ordinary run, whose model decodes single requests
at the cost of a sparse model. `--router=mot` keeps mixing, in groups of another size:
--config.model.mot.group_size=16.
"""

import contextlib
import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags

from moejax import (
  cli,
  config as config_lib,
  files,
  metrics,
  optimizer as optimizer_lib,
  run_folder,
  sharding,
  step as step_lib,
  train,
)
from moejax.differences import by_name
from moejax.distributed import is_process_0
from moejax.evaluate import evaluate
from moejax.layers import moe

ROUTERS = (*moe.ROUTERS, 'mot')
# What sparse layers lack, so that only these values of `model.mot` can become sparse: further
# parameters and changing temperatures.
_PLAIN = {
  'emit': 'same',
  'separate_controllers': False,
  'temperature_mode': 'fixed',
  'expert_norm': False,
}


def make_sparse(config, router):
  """Turns the ConfigDict of a Mixture-of-Tokens model into that of a sparse one, same experts.

  A token gets m of k * m experts of width d_ff / m (on average with expert choice): the FLOPs of a
  dense layer, as before.

  Raises:
    ValueError: no sparse layer has such experts.
  """
  model, mot = config.model, config_lib.resolve(config).model.mot
  kinds = {kind for pattern, _ in model.blocks for kind in pattern}
  if 'mot' not in kinds or 'moe' in kinds:
    raise ValueError(
      '--from: transition tuning needs a model with mot layers and without moe layers; '
      f'model.blocks of this run has {", ".join(sorted(kinds))}.'
    )
  for name, plain in _PLAIN.items():
    if getattr(mot, name) != plain:
      raise ValueError(
        f'--from: a sparse layer has no model.mot.{name} = {getattr(mot, name)}; only models with '
        f'{plain} can become sparse.'
      )
  width = mot.width(model.d_ff)
  if model.d_ff % width or mot.num_experts * width % model.d_ff:
    raise ValueError(
      f'--from: {mot.num_experts} experts of width {width} are not granularity * expansion_rate '
      f'experts of width d_ff / granularity (model.d_ff = {model.d_ff}).'
    )
  model.blocks = tuple(
    (tuple('moe' if kind == 'mot' else kind for kind in pattern), repeats)
    for pattern, repeats in model.blocks
  )
  fills_slots = moe.MoEConfig(router=router).rule.fills_slots
  model.moe.update(
    router=router,
    granularity=model.d_ff // width,
    expansion_rate=mot.num_experts * width // model.d_ff,
    experts_per_token=0,  # granularity
    capacity_factor=1.0 if fills_slots else 1.25,
    balance_loss=0.0 if fills_slots else 0.01,
    group_size=mot.group_size,
  )


def convert(source, fresh, temperature=1.0):
  """The train state of a Mixture-of-Tokens model as that of a sparse one.

  Args:
    source: the state, or a part of it, as a pytree of arrays.
    fresh: a state of the sparse model; arrays that `source` lacks (an output norm, say) stay.
    temperature: of the softmax of `source`, for the scale of the router and its moments.

  Raises:
    ValueError: an array of `source` is missing in `fresh`, or has another shape there.
  """
  wanted = by_name(fresh)
  # Optimizers keep a mean of the gradients of a parameter, and one of their squares.
  scale = {'params': 1 / temperature, 'mu': temperature, 'trace': temperature, 'nu': temperature**2}
  taken = {}
  for name, leaf in by_name(source).items():
    if name not in wanted:
      name = _sparse_name(name)
      if name.endswith('/router'):
        leaf = leaf * next((scale[part] for part in name.split('/') if part in scale), 1)
    if name not in wanted or wanted[name].shape != leaf.shape:
      place = f'is {wanted[name].shape}' if name in wanted else 'does not exist'
      raise ValueError(f'--from: {name} is {leaf.shape} there and {place} in the new model.')
    taken[name] = leaf.astype(wanted[name].dtype)
  leaves = [taken.get(name, leaf) for name, leaf in wanted.items()]
  return jax.tree.unflatten(jax.tree.structure(fresh), leaves)


def _sparse_name(name):
  return re.sub(r'(/\d+)_mot/', r'\1_moe/', name).replace('/controller', '/router')


def fresh_moments(optimizer, params, step):
  """State of `make_optimizer` without moments, its schedules at `step`."""
  counts = lambda path, _: getattr(path[-1], 'tuple_name', '') == 'ScaleByScheduleState'
  state = optax.tree.set(optimizer.init(params), counts, count=step)
  anneal = state.inner_states['anneal']._replace(inner_state=jnp.asarray(step, jnp.int32))
  return state._replace(inner_states=state.inner_states | {'anneal': anneal})


def start(run, abstract_state, *, source, moments):
  """The first state of a run: that of `source`, a run_folder.SavedRun, converted.

  Writes the loss before the switch to the metrics of the new run. `moments` as of `tune`.
  """
  old, new = source.run_config, run.run_config
  abstract = sharding.abstract(step_lib.fresh_state(old), run.mesh)
  state = source.checkpoints.restore(source.step, abstract, run.loader, source.config.to_dict())
  how = (run.eval_loader, new.train.eval_batches, run.mesh, new.optimizer.accumulation)
  before, _ = evaluate(old.model, state['params'], *how)
  with contextlib.closing(metrics.make_writer(run.workdir, 0)) as writer:
    writer.write(source.step, before, prefix='before')
  print(f'step {source.step}: before the switch {before["loss"]:.4f} nats per token', flush=True)
  if moments == 'restart':
    del state['optimizer']

  def switch(state):
    optimizer = optimizer_lib.of_run(new)
    fresh = step_lib.fresh_state(new)()
    fresh['optimizer'] = fresh_moments(optimizer, fresh['params'], state['step'])
    return convert(state, fresh, old.model.mot.temperature)

  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
  return jax.jit(switch, out_shardings=shardings)(state)


def report(workdir):
  """Losses (nats per token, validation) before, at and after the switch, where they are known."""
  before = metrics.loss_curve(workdir, 'before/loss')
  validation = metrics.loss_curve(workdir, 'validation/loss')
  losses = {'before': before[:1], 'at_the_switch': validation[:1], 'after': validation[-1:]}
  return {
    name: {'step': step, 'loss': loss} for name, curve in losses.items() for step, loss in curve
  }


def tune(folder, workdir, router, *, steps=0, moments='continue', schedule='continue', fields=None):
  """Trains the model of the run in `folder` further, in `workdir`.

  Args:
    folder: of the run to start from.
    workdir: of the new run; resumes from its last checkpoint if there is one.
    router: one of ROUTERS.
    steps: further steps; 0: a tenth of those done.
    moments: of the optimizer: 'continue' with them, or 'restart' without.
    schedule: 'continue' as in one run of all steps, or 'restart' with a warm-up.
    fields: of the new config, as `config.override` takes them.

  Returns:
    An exit code, as `train.train`.
  """
  folder, workdir = files.absolute(folder), files.absolute(workdir)
  source = run_folder.open_run(folder, flag='--from')
  with contextlib.closing(source.checkpoints):
    config: Any = source.config.copy_and_resolve_references()
    if router != 'mot':
      make_sparse(config, router)
    last = source.step + (steps or max(1, source.step // 10))
    begin = source.step if schedule == 'restart' else 0
    config.update_from_flattened_dict({'train.steps': last, 'optimizer.schedule_start': begin})
    config_lib.override(config, fields or {})
    last = config.train.steps
    if last <= source.step:
      raise ValueError(
        f'train.steps = {last}: the run to start from is at step {source.step} '
        'already, and its steps count. Leave it out: --steps=N trains N steps further.'
      )
    first = functools.partial(start, source=source, moments=moments)
    result = lambda: (
      {'transition': {'from': str(folder), **report(workdir)}} if is_process_0() else {}
    )
    return train.train(config, workdir, first, result, origin={'optimizer': moments})


def main(overrides):
  args = flags.FLAGS
  folder = args['from'].value
  cli.join_processes()
  options = {'steps': args.steps, 'moments': args.optimizer, 'schedule': args.schedule}
  code = tune(folder, args.workdir, args.router, fields=overrides, **options)
  if code == cli.OK:
    print(json.dumps(report(args.workdir)))
  elif code == cli.INTERRUPTED:
    cli.say_how_to_resume()
  return code


if __name__ == '__main__':
  cli.define_process_flags()
  cli.define_path(
    'from', None, 'Folder of the Mixture-of-Tokens run to start from.', required=True, bucket=True
  )
  cli.define_path('workdir', None, 'Folder of the new run.', required=True, bucket=True)
  flags.DEFINE_enum('router', 'token_choice', ROUTERS, 'The router that the controller becomes.')
  flags.DEFINE_integer('steps', 0, 'Further steps; 0: a tenth of those done.', lower_bound=0)
  for name, meaning in (
    ('optimizer', "Keep the optimizer's moments, or start with zeros."),
    ('schedule', 'The learning rate of one run of all steps, or a new warm-up and decay.'),
  ):
    flags.DEFINE_enum(name, 'continue', ['continue', 'restart'], meaning)
  cli.run(main, needs_config=False, takes_overrides=True)
