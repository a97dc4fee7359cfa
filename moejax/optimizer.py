"""AdamW with linear warm-up, cosine decay and clipping, all through optax."""

import dataclasses

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Section `optimizer`: what every field means stands in configs/common.py."""

  peak_lr: float
  warmup_steps: int
  final_lr_fraction: float
  schedule_start: int
  b1: float
  b2: float
  eps: float
  moment_dtype: str
  weight_decay: float
  decay: str
  clip_norm: float
  balance_bias_rate: float
  anneal_from: int
  accumulation: int

  def __post_init__(self):
    for name in ('peak_lr', 'eps', 'clip_norm'):
      if getattr(self, name) <= 0:
        raise ValueError(f'optimizer.{name} must be positive, got {getattr(self, name)}.')
    if self.balance_bias_rate < 0:
      raise ValueError(
        f'optimizer.balance_bias_rate must not be negative, got {self.balance_bias_rate}.'
      )
    if self.anneal_from < 0:
      raise ValueError(f'optimizer.anneal_from must be a step, 0 or later, got {self.anneal_from}.')
    if self.accumulation < 1:
      raise ValueError(f'optimizer.accumulation must be at least 1, got {self.accumulation}.')
    for name in ('warmup_steps', 'schedule_start'):
      if getattr(self, name) < 0:
        raise ValueError(f'optimizer.{name} must not be negative, got {getattr(self, name)}.')
    if not 0 <= self.final_lr_fraction <= 1:
      raise ValueError(
        f'optimizer.final_lr_fraction must be in [0, 1], got {self.final_lr_fraction}.'
      )
    if self.moment_dtype not in ('', 'float32', 'bfloat16'):
      raise ValueError(
        "optimizer.moment_dtype must be float32, bfloat16 or '' (that of the parameters), got "
        f'{self.moment_dtype!r}.'
      )
    if self.decay not in ('all', 'matrices'):
      raise ValueError(f'optimizer.decay must be all or matrices, got {self.decay!r}.')


def make_schedule(config, steps):
  """Learning rate by step: linear to the peak, then a cosine to `final_lr_fraction` of it.

  Both begin at `schedule_start`, and the cosine ends at `steps`.
  """
  steps -= config.schedule_start
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0 if config.warmup_steps else config.peak_lr,
    peak_value=config.peak_lr,
    warmup_steps=config.warmup_steps,
    decay_steps=max(steps, config.warmup_steps + 1),
    end_value=config.peak_lr * config.final_lr_fraction,
  )
  return lambda step: schedule(step - config.schedule_start)


def make_optimizer(config, steps):
  """The optax transformation for a run of `steps` steps.

  AdamW, but for two kinds of parameters. The gradient of biases that balance routers is the load of
  an expert above the mean, and they move against its sign by a fixed rate (arXiv:2408.15664,
  algorithm 1). The scales of annealed temperatures follow a schedule, whatever their gradient: as
  parameters they are saved, and a model is evaluated at the temperature it was trained to.
  """
  adamw = optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      make_schedule(config, steps),
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      mu_dtype=config.moment_dtype or None,
      weight_decay=config.weight_decay,
      mask=None if config.decay == 'all' else _is_matrix,
    ),
  )
  balance = optax.sign_sgd(config.balance_bias_rate)
  anneal = _follow(lambda step: 1 - _fraction(step, config.anneal_from, steps))
  return optax.partition({'adamw': adamw, 'balance': balance, 'anneal': anneal}, _labels)


def _fraction(step, start, end):
  return jnp.clip((step - start) / max(end - start, 1), 0, 1)


def _follow(schedule):
  """Sets parameters to what the schedule says for the next step."""

  def update(updates, state, params=None):
    step = state + 1
    return jax.tree.map(lambda _, p: schedule(step).astype(p.dtype) - p, updates, params), step

  return optax.GradientTransformation(lambda params: jnp.int32(0), update)


def fresh_moments(optimizer, params, step):
  """The state of `make_optimizer` after `step` steps that left no trace but in the schedule."""
  return optax.tree.set(optimizer.init(params), _of_the_schedule, count=step)


def _of_the_schedule(path, value):
  del value
  return getattr(path[-1], 'tuple_name', '') == 'ScaleByScheduleState'


def gradient_norm(gradients):
  """Norm of all gradients that AdamW sees, float32 at least."""
  wide = lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32))
  labels = jax.tree.leaves(_labels(gradients))
  leaves = jax.tree.leaves(gradients)
  seen = [wide(g) for g, label in zip(leaves, labels, strict=True) if label == 'adamw']
  return optax.tree.norm(seen)


def _labels(params):
  kinds = {'balance_bias': 'balance', 'anneal': 'anneal'}
  return jax.tree_util.tree_map_with_path(lambda path, _: kinds.get(path[-1].key, 'adamw'), params)


_NO_MATRIX = ('scale', 'bias', 'temperature', 'a_log', 'skip')


def _is_matrix(params):
  """True for all parameters but norms, biases, temperatures, and those of Mamba's recurrence."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: not path[-1].key.endswith(_NO_MATRIX), params
  )
