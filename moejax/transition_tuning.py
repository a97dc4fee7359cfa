"""Transition tuning: trains a model with experts further under another router (arXiv:2310.15961).

  python -m moejax.transition_tuning --from=runs/mot --workdir=runs/tuned --router=token_choice

The same experts, with the controller as their router, are trained for a tenth more steps. Steps,
batches and, optionally, moments and learning rate continue from the run; no parameter is
initialised again. The result is an ordinary run: a Mixture-of-Tokens model that has become sparse
decodes single requests at the cost of a sparse model. A sparse model can become a mixing one, or
get another router; `--router=mot` of a mixing one keeps mixing, in groups of another size:
--config.model.mot.group_size=16.
"""

import contextlib
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags

from moejax import (
  another_router,
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
from moejax.distributed import is_process_0
from moejax.evaluate import evaluate
from moejax.same_experts import (  # their place in earlier versions
  convert as convert,
  make_sparse as make_sparse,
)


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
    return another_router.convert(state, fresh, old.model, new.model)

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
    router: of the new run, one of another_router.ROUTERS or DENSE.
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
    another_router.with_router(config, router)
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
    'from', None, 'Folder of the run with experts to start from.', required=True, bucket=True
  )
  cli.define_path('workdir', None, 'Folder of the new run.', required=True, bucket=True)
  routers = [*another_router.ROUTERS, another_router.DENSE]
  flags.DEFINE_enum('router', 'token_choice', routers, 'The router of the new run.')
  flags.DEFINE_integer('steps', 0, 'Further steps; 0: a tenth of those done.', lower_bound=0)
  for name, meaning in (
    ('optimizer', "Keep the optimizer's moments, or start with zeros."),
    ('schedule', 'The learning rate of one run of all steps, or a new warm-up and decay.'),
  ):
    flags.DEFINE_enum(name, 'continue', ['continue', 'restart'], meaning)
  cli.run(main, needs_config=False, takes_overrides=True)
