"""Optimizers, clipping, and what else changes parameters, all through optax."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from moejax import (
  model as model_lib,
  muon as muon_lib,
  parameterization,
  parameters,
  schedule as schedule_lib,
)
from moejax.fields import Section, default
from moejax.schedule import make_schedule


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
  """The optimizer, its schedule, and what else changes parameters from step to step."""

  PATH = 'optimizer'

  name: str = default('adamw', 'what turns gradients into updates', choices=lambda: OPTIMIZERS)
  peak_lr: float = default(1.2e-2, 'learning rate after warm-up', above=0)
  warmup_steps: int = default(50, 'steps in which the rate rises to its peak', minimum=0)
  schedule: str = default(
    'cosine', 'after warm-up; wsd: the peak, then a decay', choices=lambda: schedule_lib.SCHEDULES
  )
  lr_decay_fraction: float = default(
    0.2, 'last fraction of the steps, in which the rate of wsd decays', minimum=0, maximum=1
  )
  lr_decay: str = default(
    'sqrt', 'shape of that decay; sqrt: by 1 - sqrt(t)', choices=lambda: schedule_lib.DECAYS
  )
  final_lr_fraction: float = default(
    0.1, 'the rate ends at this fraction of the peak, at train.steps', minimum=0, maximum=1
  )
  schedule_start: int = default(
    0, 'step at which warm-up begins; above 0 where a run resumes with a fresh schedule', minimum=0
  )
  b1: float = default(0.9, 'decay of the first moment', minimum=0, below=1)
  b2: float = default(0.999, 'decay of the second moment', minimum=0, below=1)
  eps: float = default(1e-8, 'added to the root of the second moment', above=0)
  moment_dtype: str = default(
    '',
    "of the first moment; '': that of the parameters, which the second always has",
    choices=('', 'float32', 'bfloat16'),
  )
  weight_decay: float = default(0.1, 'fraction of the rate by which parameters shrink', minimum=0)
  decay: str = default(
    'all',
    "what shrinks; matrices: no norms, biases, nor Mamba's a and skip",
    choices=('all', 'matrices'),
  )
  clip_norm: float = default(0.5, 'of the gradient of all parameters together', above=0)
  balance_bias_rate: float = default(1e-3, 'step of the biases that balance routers', minimum=0)
  anneal_from: int = default(0, 'step at which temperatures start to anneal to 0', minimum=0)
  accumulation: int = default(
    1, 'microbatches of a batch; MoT groups lie within one', minimum=1, maximum=10**5
  )


class Schedules(NamedTuple):
  """What changes from step to step: functions of the number of steps done."""

  learning_rate: Callable
  anneal: Callable  # the scale of annealed temperatures after the step


def make_schedules(config, steps):
  """The Schedules of a run of `steps` steps."""
  return Schedules(make_schedule(config, steps), _make_annealing(config, steps))


def _make_annealing(config, steps):
  """1 until step `anneal_from`, then linearly to 0 at `steps`."""
  start = config.anneal_from
  return lambda step: 1 - jnp.clip((step + 1 - start) / max(steps - start, 1), 0, 1)


def adamw(config, schedule, decays, rates=None):
  adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.moment_dtype or None)
  return _with_decay(adam, config, schedule, decays, rates)


def muon(config, schedule, decays, rates=None):
  """Muon for hidden matrices, `adamw` for all other parameters, at the same rate and decay."""
  of_matrices = rates and functools.partial(rates, of='orthogonal_rate')
  direction = muon_lib.scale_by_muon(config.moment_dtype or None)
  matrices = _with_decay(direction, config, schedule, decays, of_matrices)
  others = adamw(config, schedule, decays, rates)
  name = lambda path, p: 'matrices' if muon_lib.is_matrix(path, p) else 'others'
  names = functools.partial(jax.tree_util.tree_map_with_path, name)
  return optax.partition({'matrices': matrices, 'others': others}, names)


def _with_decay(direction, config, schedule, decays, rates):
  """The updates of a transformation and weight decay, at the learning rate."""
  return optax.chain(
    direction if rates is None else optax.chain(direction, _scale(rates)),
    optax.add_decayed_weights(config.weight_decay, decays),
    optax.scale_by_learning_rate(schedule),
  )


def _scale(rates):
  """Multiplies every update by its factor."""
  multiply = lambda update, rate: update if rate == 1 else update * rate
  return optax.stateless(lambda updates, _: jax.tree.map(multiply, updates, rates(updates)))


# Name in `optimizer.name` -> function of the config, the learning rate by step, and `decays`: a
# function of parameters that is True for those with weight decay, or None: all have it. It returns
# an optax transformation of clipped gradients (docs/adding_an_optimizer.md). Under a
# `model.parameterization` it is given `rates` as well: a function of parameters that returns
# factors of their learning rates, which weight decay does not have.
OPTIMIZERS = {'adamw': adamw, 'muon': muon}


def _balance(config, schedules):
  """Against the sign of the load, by a fixed rate (arXiv:2408.15664, algorithm 1).

  The gradient of biases that balance routers is the load of an expert above the mean.
  """
  del schedules
  return optax.sign_sgd(config.balance_bias_rate)


def _anneal(config, schedules):
  """Scales of annealed temperatures follow a schedule, whatever their gradient.

  As parameters they are saved, and a model is evaluated at the temperature it was trained to.
  """
  del config

  def update(updates, state, params=None):
    scale = schedules.anneal(state)
    return jax.tree.map(lambda _, p: scale.astype(p.dtype) - p, updates, params), state + 1

  return optax.GradientTransformation(lambda params: jnp.int32(0), update)


parameters.UPDATES.update(balance=_balance, anneal=_anneal)
OTHER_UPDATES = parameters.UPDATES  # its former name


def of_run(run_config, schedules=None):
  """`make_optimizer` for a RunConfig."""
  return make_optimizer(run_config.optimizer, run_config.train.steps, run_config.model, schedules)


def shared_steps(run_config):
  """The number of first steps that a run shares, bit for bit, with the same run of more steps.

  It saves a checkpoint there and keeps it, from which runs of other durations go on.
  """
  shared = schedule_lib.shared_steps(run_config.optimizer, run_config.train.steps)
  anneals = run_config.model.anneals
  return min(shared, run_config.optimizer.anneal_from) if anneals else shared


def make_optimizer(config, steps, model=None, schedules=None):
  """The optax transformation for a run of `steps` steps.

  `model`: the ModelConfig, which scales rates and epsilon if it has a `parameterization`.
  `schedules`: instead of those of `make_schedules`.
  """
  schedules = schedules or make_schedules(config, steps)
  decays = None if config.decay == 'all' else functools.partial(_of_each, fact=lambda p: p.decays)
  rates = {}
  if model and (scales := model_lib.parameter_scales(model)):
    if 'rates' not in inspect.signature(OPTIMIZERS[config.name]).parameters:
      raise ValueError(
        f'optimizer.name = {config.name} takes no argument `rates`, which model.parameterization = '
        f'{model.parameterization} needs (docs/adding_an_optimizer.md).'
      )
    rates['rates'] = functools.partial(_rates, scales)
    config = dataclasses.replace(config, eps=config.eps * parameterization.gradient_scale(model))
  optimizer = OPTIMIZERS[config.name](config, schedules.learning_rate, decays, **rates)
  others = {name: make(config, schedules) for name, make in parameters.UPDATES.items()}
  clipped = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
  moved_by = functools.partial(_of_each, fact=lambda p: p.moved_by or config.name)
  return optax.partition({config.name: clipped, **others}, moved_by)


def gradient_norm(gradients):
  """Norm of all gradients that the optimizer sees, float32 at least."""
  wide = lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32))
  moved_by = jax.tree.leaves(_of_each(gradients, lambda p: p.moved_by))
  leaves = jax.tree.leaves(gradients)
  return optax.tree.norm([wide(g) for g, by in zip(leaves, moved_by, strict=True) if not by])


def _rates(scales, params, of='rate'):
  """The factor of the learning rate of every parameter; `of`: a field of `Scales`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: getattr(scales[parameters.name_of(path)], of), params
  )


def _of_each(params, fact):
  """A fact about every parameter, as layers declare it."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: fact(parameters.of(parameters.name_of(path))), params
  )
