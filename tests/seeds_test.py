"""Statistics over seeds: against scipy, and whether intervals cover the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from moejax import seeds

A, B = [1.50, 1.54, 1.49], [1.21, 1.23, 1.30, 1.18]


def test_a_mean_has_students_interval():
  estimate = seeds.mean(A)
  interval = stats.t.interval(0.95, 2, np.mean(A), stats.sem(A))
  assert estimate == pytest.approx((np.mean(A), *interval))
  assert stats.ttest_1samp(A, estimate.low).pvalue == pytest.approx(0.05)


def test_unpaired_differences_are_welchs():
  expected = stats.ttest_ind(A, B, equal_var=False).confidence_interval(0.95)
  estimate = seeds.difference(A, B)
  assert estimate == pytest.approx((np.mean(A) - np.mean(B), *expected))
  assert estimate.excludes(0) and not estimate.excludes(0.3)


def test_pairs_cancel_what_a_seed_does_to_both():
  shift, b = np.array([0.0, 0.5, -0.4]), [1.21, 1.23, 1.30]
  a, b = list(np.array(A) + shift), list(np.array(b) + shift)
  expected = stats.ttest_rel(a, b).confidence_interval(0.95)
  assert seeds.difference(a, b, paired=True)[1:] == pytest.approx(expected)
  assert seeds.difference(a, b, paired=True).excludes(0)
  assert not seeds.difference(a, b).excludes(0)
  with pytest.raises(ValueError, match='as many numbers on both sides, got 3 and 4'):
    seeds.difference(A, B, paired=True)


def test_pooled_noise_gives_the_classical_two_sample_interval():
  pooled = seeds.noise(A, B, [9.0], [])
  expected = stats.ttest_ind(A, B).confidence_interval(0.95)
  assert pooled.freedom == 5
  assert seeds.difference(A, B, known=pooled)[1:] == pytest.approx(expected)
  assert seeds.difference([1.5], B, known=pooled).has_interval


def test_one_seed_claims_nothing():
  assert seeds.noise([1.5], [1.4]) is None
  for estimate in (
    seeds.mean([1.5]),
    seeds.difference([1.5], [1.4]),
    seeds.difference([1.5], B),
    seeds.difference([1.5], [1.4], paired=True),
    seeds.of_means(np.sum, [[1.5], B]),
  ):
    assert not estimate.has_interval and not estimate.excludes(0) and not estimate.excludes(99)
    assert ' ' not in f'{estimate:.4f}'


def test_equal_numbers_have_no_width():
  assert seeds.mean([2.0, 2.0]) == (2, 2, 2)
  assert seeds.difference([2.0, 2.0], [1.0, 1.0]) == (1, 1, 1)


@pytest.mark.parametrize('function', [seeds.mean, lambda a: seeds.difference(a, A)])
def test_no_seed_is_an_error(function):
  with pytest.raises(ValueError, match='at least one seed'):
    function([])


def test_how_estimates_are_written():
  assert f'{seeds.Estimate(1.193, 1.18, 1.206):.4f}' == '1.1930 ± 0.0130'
  assert f'{seeds.Estimate(0.015, 0.005, 0.025):+.3f}' == '+0.015 ± 0.010'
  assert f'{seeds.Estimate(1.2, 1.1, 1.5):.2f}' == '1.20 (1.10 to 1.50)'
  assert f'{seeds.Estimate(1.2, 1.1, math.inf):.2f}' == '1.20 (1.10 to inf)'


def test_a_function_of_means_is_the_formula_where_there_is_one():
  formula = seeds.mean(B)
  assert seeds.of_means(lambda m: m[0], [B]) == pytest.approx(formula, abs=0.1 * 0.05)
  known = seeds.Noise(0.01, 100)
  drawn = seeds.of_means(lambda m: m[0] - m[1], [A, B], [known, known])
  assert drawn == pytest.approx(seeds.difference(A, B, known=known), abs=0.001)
  assert seeds.of_means(lambda m: math.inf if m[0] > 1.4 else 1, [A]) == (math.inf,) * 3


def test_intervals_cover_the_truth():
  """95% intervals of 3 seeds, of noises that differ: of 4000 trials, 95% ± 1% cover the truth."""
  rng = np.random.default_rng(1)
  trials = 4000
  seed, a, b = (rng.normal(0, s, (trials, 3)) for s in (0.1, 0.02, 0.02))
  covered = lambda estimates: np.mean([not e.excludes(0) for e in estimates])
  assert covered(map(seeds.mean, a)) == pytest.approx(0.95, abs=0.01)
  pairs = zip(a + seed, b + seed, strict=True)
  assert covered(seeds.difference(*p, paired=True) for p in pairs) == pytest.approx(0.95, abs=0.01)
  welch = covered(seeds.difference(*pair) for pair in zip(a, 2 * b, strict=True))
  assert 0.94 < welch < 0.98  # conservative with so few
  pooled = covered(
    seeds.difference(x, y, known=seeds.noise(x, y, z))
    for x, y, z in zip(a, b, b[::-1], strict=True)
  )
  assert pooled == pytest.approx(0.95, abs=0.01)


def test_the_interval_of_a_minimum_covers_it():
  rng = np.random.default_rng(1)
  places, truth, covered = np.arange(5.0), 2.2, []
  curve = lambda x: 1.5 + 0.05 * (x - truth) ** 2
  for _ in range(200):
    samples = curve(places)[:, None] + rng.normal(0, 0.01, (5, 3))
    known = [seeds.noise(*samples)] * 5
    estimate = seeds.of_means(lambda means: seeds.lowest(places, means), samples, known)
    covered.append(not estimate.excludes(truth))
  assert 0.92 < np.mean(covered) <= 0.99


@pytest.mark.parametrize(
  ('places', 'losses', 'expected'),
  [
    ([0, 1, 2, 3], [4, 1, 0, 1], 2),
    ([0.5, 1, 2, 4], [1, 0.25, 0.25, 6.25], 1.5),  # (x - 1.5)²
    ([0, 1, 3], [1, 2, 3], 0),  # it may be below 0
    ([0, 1, 3], [3, 2, 1], 3),
    ([0, 1, 2], [1, 1, 1], 0),
    ([5], [1], 5),
  ],
)
def test_where_a_curve_is_lowest(places, losses, expected):
  assert seeds.lowest(places, losses) == pytest.approx(expected)
