"""Efficiency leverage, by a law and by runs."""

import pytest

from moejax.scaling_laws import laws, leverage, optimal

PRINTED = laws.PUBLISHED['printed']


def test_by_a_law():
  sparse = optimal.best(PRINTED[64], 64, 1e20)
  found = leverage.by_law(PRINTED[1], sparse.loss, sparse.flops)
  assert found
  ratio, same = found
  assert ratio == pytest.approx(21.28, rel=1e-3)
  assert same.loss == pytest.approx(sparse.loss) and same.flops == pytest.approx(ratio * 1e20)
  dense = optimal.best(PRINTED[1], 1, 1e20)
  found = leverage.by_law(PRINTED[1], dense.loss, 1e20)
  assert found and found[0] == pytest.approx(1)
  assert leverage.by_law(PRINTED[1], 0.4, 1e20) is None


def test_by_runs():
  dense = [(4e12, 1.0), (1e12, 2.0), (2e12, 2.5)]  # the second budget is worse than the first
  assert leverage.by_runs(dense, 1.5, 1e12) == pytest.approx(2)  # halfway in log FLOPs
  assert leverage.by_runs(dense, 2.0, 1e12) == pytest.approx(1)
  assert leverage.by_runs(dense, 1.0, 1e12) == pytest.approx(4)
  for outside in (0.9, 2.1):
    assert leverage.by_runs(dense, outside, 1e12) is None
  assert leverage.by_runs(dense[:1], 1.0, 1e12) is None and leverage.by_runs([], 1.0, 1e12) is None
