"""Speed-ups: by matched schedules and in mid-schedule, on curves whose answer is known."""

import math

import numpy as np
import pytest

from moejax.compare import speedup

LOSS = lambda tokens: 1 + 3 * tokens**-0.25  # of a baseline trained for so many tokens
PLACES = [100.0, 150.0, 200.0, 300.0]


def _durations(noise=0.0, rng=None, seeds=3):
  shifts = rng.normal(0, noise, (4, seeds)) if rng else np.zeros((4, seeds))
  return {p: list(LOSS(p) + shift) for p, shift in zip(PLACES, shifts, strict=True)}


@pytest.mark.parametrize(
  ('loss', 'steps'), [(5.0, 10), (4.0, 10), (3.0, 15), (2.0, 20), (1.5, 35), (1.0, 40), (0.9, None)]
)
def test_steps_to_reach_a_loss(loss, steps):
  curve = [(10, 4.0), (20, 2.0), (30, 2.0), (40, 1.0)]
  assert speedup.steps_to_reach(loss, curve) == steps
  assert speedup.steps_to_reach(loss, np.array(curve)) == steps


@pytest.mark.parametrize('times', [1.0, 1.1, 1.25, 1.7, 2.5, 3.0])
def test_the_ratio_of_a_model_that_is_so_many_times_faster(times):
  ratio = speedup.matched_schedule([LOSS(100 * times)] * 2, 100, _durations())
  assert ratio.value == pytest.approx(times, rel=0.01)
  assert ratio.low == pytest.approx(ratio.value) == ratio.high  # there is no noise
  slower = speedup.matched_schedule([LOSS(100 * times)] * 2, 200, _durations())
  assert slower.value == pytest.approx(times / 2, rel=0.01)


def test_ratios_beyond_the_durations():
  assert speedup.matched_schedule([LOSS(301), LOSS(301)], 100, _durations()).low == math.inf
  assert speedup.matched_schedule([LOSS(99), LOSS(99)], 100, _durations()).high == 0
  rng = np.random.default_rng(0)
  noisy = speedup.matched_schedule([1.73, 1.70], 100, _durations(0.01, rng))
  assert noisy.excludes(1) and noisy.low < 3 and noisy.high == math.inf


def test_one_seed_has_a_ratio_without_an_interval():
  one = speedup.matched_schedule([LOSS(200)], 100, _durations())
  assert one.value == pytest.approx(2) and not one.has_interval
  assert not speedup.matched_schedule([LOSS(200)] * 2, 100, _durations(seeds=1)).has_interval


def test_a_longer_duration_that_is_worse_is_averaged_out():
  assert speedup.tokens_to_reach(2.001, [1.0, 2.0, 4.0], [3.0, 1.9, 2.1]) == pytest.approx(2, 0.01)
  assert 1 < speedup.tokens_to_reach(2.5, [1.0, 2.0, 4.0], [3.0, 1.9, 2.1]) < 2
  assert speedup.tokens_to_reach(1.95, [1.0, 2.0, 4.0], [3.0, 1.9, 2.1]) == math.inf


def test_the_interval_of_a_ratio_covers_it():
  rng = np.random.default_rng(2)
  covered = []
  for _ in range(60):
    losses = list(LOSS(140.0) + rng.normal(0, 0.01, 3))
    ratio = speedup.matched_schedule(losses, 100, _durations(0.01, rng))
    covered.append(not ratio.excludes(1.4))
  assert np.mean(covered) > 0.9


def test_smoothing_is_the_exponential_average_of_the_paper():
  losses = np.random.default_rng(0).normal(3, 1, 40_000)
  average, expected = 0.0, []
  for step, loss in enumerate(losses, 1):
    average += (1 - math.exp(-0.001)) * (loss - average)
    expected.append(average / (1 - math.exp(-0.001 * step)))
  curve = list(enumerate(losses, 1))
  np.testing.assert_allclose(speedup.smoothed(curve)[:, 1], expected, rtol=1e-9)
  by_hundreds = [(100 * (i + 1), m) for i, m in enumerate(losses.reshape(-1, 100).mean(1))]
  np.testing.assert_allclose(speedup.smoothed(by_hundreds)[-1, 1], expected[-1], atol=0.01)
  short = speedup.smoothed([(10, 4.0), (1000, 2.0)])  # a twentieth of the run: 50 steps
  assert short[:, 1] == pytest.approx([4.0, 2.0], abs=1e-6)


def _training(times, noise=0.0, rng=None):
  """A curve that falls as if the run was so many times longer."""
  steps = np.arange(10, 3010, 10)
  shift = rng.normal(0, noise) if rng else 0.0
  return list(zip(steps, 1 + 3 * (times * steps) ** -0.25 + shift, strict=True))


def test_the_papers_measure():
  ratio = speedup.mid_schedule([_training(1)] * 2, [_training(1.5)] * 2)
  assert ratio.value == pytest.approx(1.5, rel=0.03)
  assert speedup.mid_schedule([_training(1)] * 2, [_training(1)] * 2).value == pytest.approx(1)
  assert speedup.mid_schedule([_training(1)] * 2, [_training(0.5)] * 2) == (0, 0, 0)
  assert not speedup.mid_schedule([_training(1)], [_training(1.5)]).has_interval
  rng = np.random.default_rng(0)
  some = lambda times: [_training(times, 0.02, rng) for _ in range(3)]
  assert speedup.mid_schedule(some(1), some(3)).excludes(1)
  assert not speedup.mid_schedule(some(1), some(1.05)).excludes(1)


def test_the_papers_measure_is_nearly_blind_to_what_decay_gives():
  """A model that is 2x faster, of curves that fall by 0.2 in their last quarter."""
  decay = lambda steps: 0.2 * np.clip(steps / 3000 - 0.75, 0, None) / 0.25
  curves = []
  for times in (1, 2):
    steps, losses = np.array(_training(times)).T
    curves.append(list(zip(steps, losses - decay(steps), strict=True)))
  assert 1 < speedup.mid_schedule([curves[0]], [curves[1]]).value < 1.4
