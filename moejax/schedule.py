"""Schedules of the learning rate: a linear warm-up, then one of SCHEDULES."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax


class Schedule(NamedTuple):
  """How the learning rate goes on after the warm-up."""

  rate: Callable  # by the number of steps since `schedule_start`
  shared: int = 0  # of these, the first that longer runs have in common with this one


def cosine(config, steps):
  """A cosine from the peak to `final_lr_fraction` of it."""
  warmup = config.warmup_steps
  rate = optax.cosine_decay_schedule(
    config.peak_lr, max(steps - warmup, 1), alpha=config.final_lr_fraction
  )
  return Schedule(lambda step: rate(step - warmup))


def wsd(config, steps):
  """Warm-up, stable, decay (arXiv:2404.06395): the peak, then a decay over the last steps."""
  begin = max(steps - round(config.lr_decay_fraction * steps), config.warmup_steps)
  fallen = DECAYS[config.lr_decay]

  def rate(step):
    progress = jnp.clip((step - begin) / max(steps - begin, 1), 0, 1)
    return config.peak_lr * (1 - (1 - config.final_lr_fraction) * fallen(progress))

  return Schedule(rate, min(begin, steps))


# How far the rate has fallen, from 0 to 1, by the fraction of the decay; `sqrt` ends in lower
# losses than `linear` (arXiv:2405.18392).
DECAYS = {'sqrt': jnp.sqrt, 'linear': lambda progress: progress}

# Name in `optimizer.schedule` -> function of OptimizerConfig and of the number of steps, from
# `schedule_start` on, that returns a Schedule. Its rate is read from `warmup_steps` on.
SCHEDULES = {'cosine': cosine, 'wsd': wsd}


def make_schedule(config, steps):
  """Learning rate by step, for a run of `steps` steps.

  Step s after `schedule_start` has (s + 1) / warmup_steps of the peak, so that the first is not 0,
  then the rate of the schedule, which ends at `steps`.
  """
  start, warmup = config.schedule_start, config.warmup_steps
  after = SCHEDULES[config.schedule](config, steps - start)

  def schedule(step):
    rising = config.peak_lr * (step - start + 1) / max(warmup, 1)
    return jnp.where(step - start < warmup, rising, after.rate(step - start))

  return schedule


def shared_steps(config, steps):
  """The number of first steps whose rate a longer run has too; 0: the schedule shares none."""
  shared = SCHEDULES[config.schedule](config, steps - config.schedule_start).shared
  return config.schedule_start + shared if shared else 0
