"""Schedules of the learning rate against plain formulas."""

import dataclasses
import math

import numpy as np
import pytest

from moejax import config as config_lib, optimizer, schedule
from moejax.optimizer import OptimizerConfig

FALLEN = {'sqrt': math.sqrt, 'linear': float}


def _rates(steps, **fields):
  rate = schedule.make_schedule(OptimizerConfig(**fields), steps)
  return np.array([float(rate(step)) for step in range(steps)])


def _wsd(step, steps, shape, peak=2.0, warmup=10, fraction=0.2, final=0.1):
  begin = steps - round(fraction * steps)
  if step < warmup:
    return peak * (step + 1) / warmup
  if step < begin:
    return peak
  return peak * (1 - (1 - final) * FALLEN[shape]((step - begin) / (steps - begin)))


@pytest.mark.parametrize('shape', FALLEN)
def test_warm_up_stable_decay(shape):
  rates = _rates(100, schedule='wsd', lr_decay=shape, peak_lr=2.0, warmup_steps=10)
  np.testing.assert_allclose(rates, [_wsd(step, 100, shape) for step in range(100)], rtol=1e-6)
  assert set(rates[10:81]) == {2.0} and rates[81] < 2.0
  rate = schedule.make_schedule(OptimizerConfig(schedule='wsd', lr_decay=shape, peak_lr=2.0), 100)
  np.testing.assert_allclose(rate(100), 0.2, rtol=1e-6)


@pytest.mark.parametrize('fraction', [0.0, 0.01, 1.0])
def test_a_decay_of_no_one_or_all_steps(fraction):
  fields = {'schedule': 'wsd', 'peak_lr': 2.0, 'warmup_steps': 0, 'final_lr_fraction': 0.0}
  rates = _rates(100, lr_decay='linear', lr_decay_fraction=fraction, **fields)
  expected = {0.0: [2.0] * 100, 0.01: [2.0] * 100, 1.0: 2.0 * (1 - np.arange(100) / 100)}
  np.testing.assert_allclose(rates, expected[fraction], rtol=1e-6)


def test_a_warm_up_that_is_longer_than_the_stable_phase_shortens_the_decay():
  rates = _rates(20, schedule='wsd', peak_lr=2.0, warmup_steps=18)
  assert rates[17] == rates[18] == 2.0 > rates[19]
  assert (_rates(20, schedule='wsd', warmup_steps=30) > 0).all()


def _run_config(steps, **fields):
  config = config_lib.baseline()
  config.train.steps = steps
  config.update_from_flattened_dict(fields)
  return config_lib.resolve(config)


def test_runs_share_the_steps_before_the_decay():
  wsd = {'optimizer.schedule': 'wsd', 'optimizer.peak_lr': 0.1}
  assert optimizer.shared_steps(_run_config(1000, **wsd)) == 800
  assert optimizer.shared_steps(_run_config(1000)) == 0
  short, long = (_rates(steps, schedule='wsd', peak_lr=0.1) for steps in (1000, 4000))
  assert (short[:800] == long[:800]).all() and (short[801:] != long[801:1000]).all()
  assert optimizer.shared_steps(_run_config(1000, **wsd, **{'optimizer.warmup_steps': 900})) == 900
  assert optimizer.shared_steps(_run_config(100, **wsd, **{'optimizer.warmup_steps': 900})) == 100


def test_temperatures_that_fall_until_the_last_step_are_not_shared():
  fields = {'model.blocks': ((('attention', 'mot'), 1),), 'optimizer.schedule': 'wsd'}
  fields |= {'model.mot.temperature_mode': 'annealed'}
  assert optimizer.shared_steps(_run_config(1000, **fields)) == 0
  assert optimizer.shared_steps(_run_config(1000, **fields, **{'optimizer.anneal_from': 50})) == 50
  del fields['model.mot.temperature_mode']
  assert optimizer.shared_steps(_run_config(1000, **fields)) == 800


def test_a_schedule_of_ones_own_is_one_entry(monkeypatch):
  constant = lambda config, steps: schedule.Schedule(lambda step: config.peak_lr, steps)
  monkeypatch.setitem(schedule.SCHEDULES, 'constant', constant)
  run_config = _run_config(100, **{'optimizer.schedule': 'constant', 'optimizer.warmup_steps': 0})
  assert optimizer.shared_steps(run_config) == 100
  peak = run_config.optimizer.peak_lr
  config = dataclasses.replace(run_config.optimizer)
  assert float(optimizer.make_schedule(config, 100)(60)) == pytest.approx(peak)
