"""Speed-ups: by matched schedules and in mid-schedule, on curves whose answer is known."""

import math

import numpy as np
import pytest

from moejax.compare import speedup

LOSS = lambda tokens: 1 + 3 * tokens**-0.25  # of a baseline trained for so many tokens
PLACES = [100.0, 150.0, 200.0, 300.0]


def _durations(noise=0.0, rng=None, seeds=3):
  """Losses of the baseline by tokens and seed; `noise`: of each run, or [4, seeds]."""
  shifts = rng.normal(0, noise, (4, seeds)) if rng else np.zeros((4, seeds)) + noise
  return {p: _by_seed(LOSS(p) + shift) for p, shift in zip(PLACES, shifts, strict=True)}


def _by_seed(values):
  return dict(enumerate(values))


def _same(loss, seeds=3):
  return _by_seed([loss] * seeds)


@pytest.mark.parametrize(
  ('loss', 'steps'), [(5.0, 10), (4.0, 10), (3.0, 15), (2.0, 20), (1.5, 35), (1.0, 40), (0.9, None)]
)
def test_steps_to_reach_a_loss(loss, steps):
  curve = [(10, 4.0), (20, 2.0), (30, 2.0), (40, 1.0)]
  assert speedup.steps_to_reach(loss, curve) == steps
  assert speedup.steps_to_reach(loss, np.array(curve)) == steps


@pytest.mark.parametrize('times', [1.01, 1.1, 1.25, 1.7, 2.5, 2.99])
def test_the_ratio_of_a_model_that_is_so_many_times_faster(times):
  ratio = speedup.matched_schedule(_same(LOSS(100 * times)), 100, _durations())
  assert ratio.value == pytest.approx(times, rel=0.01)
  assert ratio.low == pytest.approx(ratio.value) == ratio.high  # there is no noise
  slower = speedup.matched_schedule(_same(LOSS(100 * times)), 200, _durations())
  assert slower.value == pytest.approx(times / 2, rel=0.01)


def test_ratios_beyond_the_durations():
  assert speedup.matched_schedule(_same(LOSS(301)), 100, _durations()).low == math.inf
  assert speedup.matched_schedule(_same(LOSS(99)), 100, _durations()).high == 0
  rng = np.random.default_rng(0)
  noisy = speedup.matched_schedule(_by_seed([1.73, 1.71, 1.72]), 100, _durations(0.01, rng))
  assert noisy.excludes(1) and noisy.low < 3 and noisy.high == math.inf


def test_one_seed_has_a_ratio_without_an_interval():
  one = speedup.matched_schedule(_same(LOSS(200), 1), 100, _durations())
  assert one.value == pytest.approx(2) and not one.has_interval
  assert not speedup.matched_schedule(_same(LOSS(200)), 100, _durations(seeds=1)).has_interval
  some = _durations() | {300.0: _same(LOSS(300), 1)}  # one seed, at one duration
  ratio = lambda times: speedup.matched_schedule(_same(LOSS(100 * times)), 100, some)
  assert ratio(1.7).has_interval and not ratio(2.5).has_interval
  assert not ratio(4).has_interval and ratio(0.5).has_interval


def test_what_a_seed_does_to_both_models_cancels_in_pairs():
  shift = np.array([-0.1, 0.0, 0.1])
  losses = _by_seed(LOSS(140.0) + shift + [0.001, 0, -0.001])
  ratio = lambda paired: speedup.matched_schedule(losses, 100, _durations(shift), paired)
  assert ratio(True).value == ratio(False).value == pytest.approx(1.4, rel=0.01)
  assert ratio(True).low > 1.35 and not ratio(False).excludes(1)
  others = {f'other {seed}': loss for seed, loss in losses.items()}
  assert speedup.matched_schedule(others, 100, _durations(shift), True) == ratio(False)


def test_a_longer_duration_that_is_worse_is_averaged_out():
  assert speedup.tokens_to_reach(2.001, [1.0, 2.0, 4.0], [3.0, 1.9, 2.1]) == pytest.approx(2, 0.01)
  assert 1 < speedup.tokens_to_reach(2.5, [1.0, 2.0, 4.0], [3.0, 1.9, 2.1]) < 2
  assert speedup.tokens_to_reach(1.95, [1.0, 2.0, 4.0], [3.0, 1.9, 2.1]) == math.inf


@pytest.mark.parametrize('of_seed', [0.0, 0.02])
@pytest.mark.parametrize('times', [1.25, 1.5])
def test_the_interval_of_a_ratio_covers_it(of_seed, times):
  """With noise of its own in each run, and what a seed does to all its runs."""
  rng, covered = np.random.default_rng(2), []
  for _ in range(300):
    shift = rng.normal(0, of_seed, 3)
    losses = _by_seed(LOSS(100 * times) + shift + rng.normal(0, 0.01, 3))
    noise = shift + rng.normal(0, 0.01, (4, 3))
    ratio = speedup.matched_schedule(losses, 100, _durations(noise), paired=bool(of_seed))
    covered.append(not ratio.excludes(times))
  assert 0.92 < np.mean(covered) < 0.995


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
  some = lambda times, seeds=3: _by_seed([_training(times)] * seeds)
  assert speedup.mid_schedule(some(1), some(1.5)).value == pytest.approx(1.5, rel=0.03)
  assert speedup.mid_schedule(some(1), some(1)).value == pytest.approx(1)
  assert speedup.mid_schedule(some(1), some(0.5)) == (0, 0, 0)
  assert not speedup.mid_schedule(some(1, 1), some(1.5)).has_interval
  rng = np.random.default_rng(0)
  noisy = lambda times: _by_seed([_training(times, 0.02, rng) for _ in range(3)])
  assert speedup.mid_schedule(noisy(1), noisy(3)).excludes(1)
  assert not speedup.mid_schedule(noisy(1), noisy(1.05)).excludes(1)


def test_the_papers_measure_is_nearly_blind_to_what_decay_gives():
  """A model that is 2x faster, of curves that fall by 0.2 in their last quarter."""
  decay = lambda steps: 0.2 * np.clip(steps / 3000 - 0.75, 0, None) / 0.25
  curves = []
  for times in (1, 2):
    steps, losses = np.array(_training(times)).T
    curves.append({0: list(zip(steps, losses - decay(steps), strict=True))})
  assert 1 < speedup.mid_schedule(*curves).value < 1.4
