"""Fits recover the laws that generated the losses, and warn of undetermined coefficients."""

import dataclasses
import math

import numpy as np
import pytest

from moejax.scaling_laws import collect, fit, grid, laws, report

TRUTH = laws.PUBLISHED['four_digits']
NOISE = 0.015  # the paper's fitting error
QUICK = {'starts': 8, 'repeats': 0}


def _runs(noise=0.0, seed=0):
  """The paper's 78 sparse and 22 dense runs, with losses predicted by the law."""
  rng = np.random.default_rng(seed)
  cells = grid.make('paper', TRUTH)
  assert [cell.granularity > 0 for cell in cells] == [True] * 78 + [False] * 22
  return collect.by_kind([_run(cell, noise * rng.standard_normal()) for cell in cells])


def _run(cell, error):
  values = {field.name: getattr(cell, field.name, '') for field in dataclasses.fields(collect.Run)}
  return collect.Run(**values | {'loss': cell.predicted_loss + error})


def _assert_recovered(found, truth):
  for name, value in truth._asdict().items():
    if value is not None:
      assert getattr(found.coefficients, name) == pytest.approx(value, rel=1e-3), name
  assert found.rmse < 1e-5 and found.held_out_rmse < 1e-5
  assert not found.excluded and not found.warnings


@pytest.mark.parametrize('c', [None, 0.472], ids=['c_free', 'c_fixed'])
def test_exact_losses_recover_the_coefficients(c):
  sparse, dense = _runs()
  fits = fit.fit_moe_and_dense(sparse, dense, c=c, **QUICK)
  _assert_recovered(fits[64], TRUTH[64])
  _assert_recovered(fits[1], TRUTH[1])


def test_the_chinchilla_form():
  _, dense = _runs()
  _assert_recovered(fit.fit(dense, 'chinchilla', **QUICK), TRUTH[1])


def test_many_starts_reach_the_same_optimum():
  sparse, _ = _runs(NOISE)
  best = [fit.fit(sparse, 'moe', c=0.472, starts=12, repeats=0, seed=s).rmse for s in range(3)]
  assert best == pytest.approx([best[0]] * 3, rel=1e-4)


def test_the_penalty_of_the_paper_exceeds_its_fitting_error():
  sparse, _ = _runs()
  assert fit.fit(sparse, 'moe', c=0.472, penalty=5e-4, **QUICK).rmse > NOISE


@pytest.mark.parametrize(
  ('offset', 'reason'), [(0.5, 'diverged'), (1e30, 'diverged'), (-0.5, 'too good')]
)
def test_outliers_are_excluded_and_named(offset, reason):
  sparse, _ = _runs(NOISE)
  clean = fit.fit(sparse[1:], 'moe', c=0.472, **QUICK)
  sparse[0] = dataclasses.replace(sparse[0], loss=sparse[0].loss + offset)
  found = fit.fit(sparse, 'moe', c=0.472, **QUICK)
  assert list(found.excluded) == [sparse[0].name]
  assert found.excluded[sparse[0].name].startswith(reason)
  assert found.coefficients == pytest.approx(clean.coefficients, rel=1e-4)


@pytest.mark.parametrize('c', [-1, math.nan, 9])
def test_an_invalid_c(c):
  _, dense = _runs()
  with pytest.raises(ValueError, match='--c=.*below the lowest loss, '):
    fit.fit(dense, 'dense', c=c)


def test_an_undetermined_c_is_zero_with_a_warning():
  """Losses of two power laws without c: log c has no optimum."""
  _, dense = _runs()
  law = TRUTH[1]._replace(c=0)
  runs = [dataclasses.replace(r, loss=laws.loss(law, r.params, r.tokens, 0) - 0.1) for r in dense]
  found = fit.fit(runs, 'dense', **QUICK)
  assert found.coefficients.c == 0
  assert any(w.startswith('c = 0 is known only to +-') for w in found.warnings)


def test_the_jacobian_matches_finite_differences():
  sparse, dense = _runs(NOISE)
  for runs, form in ((sparse, 'moe'), (dense, 'chinchilla')):
    law = fit.FORMS[form]
    problem = fit._problem(runs, law, law.names, None, 0.0)
    theta = fit._starts(law.names, 1, 3.0, seed=0)[0]
    step = 1e-6 * np.eye(len(theta))
    numeric = [
      (fit._residuals(problem, theta + e)[0] - fit._residuals(problem, theta - e)[0]) / 2e-6
      for e in step
    ]
    assert fit._residuals(problem, theta)[1] == pytest.approx(np.array(numeric).T, abs=1e-7)


@pytest.mark.parametrize(
  ('column', 'value', 'named'),
  [('granularity', 4, {'g', 'gamma'}), ('tokens', 1e10, {'b', 'beta'})],
)
def test_coefficients_of_constant_quantities_are_not_identified(column, value, named):
  sparse, _ = _runs()
  sizes = ((run, dataclasses.replace(run, **{column: value})) for run in sparse)
  law = TRUTH[64]
  same = [
    dataclasses.replace(r, loss=laws.loss(law, r.params, r.tokens, r.granularity)) for _, r in sizes
  ]
  found = fit.fit(same, 'moe', c=0.472, **QUICK)
  assert named <= {warning.split()[0] for warning in found.warnings}


def test_too_few_runs():
  sparse, _ = _runs()
  with pytest.raises(ValueError, match='7 runs are too few for the 7 coefficients c, a, alpha'):
    fit.fit(sparse[:7], 'moe')
  with pytest.raises(ValueError, match='0 runs are too few'):
    fit.fit([], 'dense')


def test_fits_round_trip_through_files(tmp_path):
  sparse, dense = _runs(NOISE)
  fits = fit.fit_moe_and_dense(sparse, dense, c=0.472, starts=8, repeats=5)
  report.save(fits, tmp_path / 'fit.json')
  assert report.load(tmp_path / 'fit.json') == {64: fits[64].coefficients, 1: fits[1].coefficients}
  text = report.describe(fits, {'lost': 'unfinished'})
  assert 'from 78 runs' in text and 'from 22 runs' in text and 'not used: lost' in text


@pytest.mark.parametrize(
  'content',
  [
    None,
    b'[]',
    b'\xff\xfe{\0}\0',
    b'{"64": {"coefficients": {"c": "1", "a": 1, "alpha": 1, "b": 1, "beta": 1}}}',
    b'{"64": {"coefficients": {"c": NaN, "a": 1, "alpha": 1, "b": 1, "beta": 1}}}',
    b'{"64": {"coefficients": {"c": 1}}}',
  ],
)
def test_invalid_fit_files(tmp_path, content):
  if content:
    (tmp_path / 'law.json').write_bytes(content)
  with pytest.raises(ValueError, match='--coefficients=.*law.json'):
    report.load(tmp_path / 'law.json')


@pytest.mark.slow
def test_intervals_have_their_nominal_coverage():
  """100 noisy copies of the paper's runs: intervals from 10 to 90 % cover the truth in 80."""
  covered = {name: 0 for name in fit.FORMS['moe'].names if name != 'c'}
  for seed in range(100):
    sparse, _ = _runs(NOISE, seed)
    found = fit.fit(sparse, 'moe', c=0.472, starts=2, repeats=100, held_out=0, seed=seed)
    for name in covered:
      low, high = found.intervals[name]
      covered[name] += low <= getattr(TRUTH[64], name) <= high
  print(covered)
  # A count has a standard deviation of 4, their mean a little less: the counts are correlated.
  assert all(68 <= count <= 92 for count in covered.values()), covered
  assert math.isclose(np.mean(list(covered.values())), 80, abs_tol=8), covered
