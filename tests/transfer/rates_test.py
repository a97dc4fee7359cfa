"""The search for the best learning rate, on a law in place of training, and its verdict."""

import functools
import json
import math
import re

import numpy as np
import pytest

from moejax import cli, runner
from moejax.sweep import axes, results
from moejax.transfer import rates, search, sizes

pytestmark = pytest.mark.filterwarnings('ignore:the load_module')  # ml_collections calls it
CONFIG = 'configs/dense.py:debug'
RATES, SEEDS = [1e-3, 2e-3, 4e-3], [0, 1, 2]


@pytest.fixture
def trained(monkeypatch, tmp_path):
  """The cells of every call of the runner, which writes losses that follow a parabola."""
  calls = []

  def run(cells, workdir):
    calls.append([cell for cell in cells if not runner.is_done(workdir, cell)])
    for cell in calls[-1]:
      v = cell.values
      rate, width, seed = v[search.RATE], v['model.d_model'], v[search.SEED]
      best = 8e-3 if v.get('model.parameterization') == 'mup' else 8e-3 * (16 / width)
      loss = 2 + 0.1 * math.log(rate / best) ** 2 + 1e-3 * seed
      if rate > 0.03:
        (workdir / f'{cell.name}.log').write_text('error: training diverged at step 3 (loss nan)')
      else:
        (workdir / cell.name).mkdir()
        summary = {'steps': 1, 'validation': {'loss': loss}}
        (workdir / cell.name / 'summary.json').write_text(json.dumps(summary))
    return cli.OK

  monkeypatch.setattr(runner, 'run', run)
  return calls


def _curves(variants=(), widths=('16', '32'), given=RATES):
  axis = sizes.make_axis(CONFIG, {}, widths)
  return search.make_curves(axis, list(variants), given, SEEDS)


def _search(curves, workdir, most=4):
  return search.search(functools.partial(search.cell, CONFIG, {}), curves, workdir, most)


def test_the_first_seed_finds_the_minimum_and_the_others_see_its_neighbors(trained, tmp_path):
  curves = _curves()
  assert _search(curves, tmp_path) == cli.OK
  assert len(trained[0]) == 6
  wide, wider = curves
  assert wide.rates == [1e-3, 2e-3, 4e-3, 8e-3, 0.016]
  assert [len(wide.at(rate)) for rate in wide.rates] == [1, 1, 3, 3, 3]
  assert wider.rates == [1e-3, 2e-3, 4e-3, 8e-3]
  assert [len(wider.at(rate)) for rate in wider.rates] == [1, 3, 3, 3]


def test_nothing_is_trained_twice(trained, tmp_path):
  assert _search(_curves(), tmp_path) == cli.OK
  again, before = _curves(), sum(map(len, trained))
  assert _search(again, tmp_path) == cli.OK
  assert sum(map(len, trained)) == before
  names = [cell.name for cells in trained for cell in cells]
  assert len({*names}) == len(names)


def test_diverged_runs_count_and_are_not_repeated(trained, tmp_path):
  curves = _curves(given=[4e-3, 8e-3, 0.04])
  assert _search(curves, tmp_path) == cli.OK
  assert curves[0].losses[0.04, 0] == math.inf
  cells = search.cells(CONFIG, {}, curves)
  results.write_csv(cells, {c.name: search.summary(c, tmp_path) for c in cells}, tmp_path / 'x.csv')
  assert re.search('peak_lr=0.04_seed=0.*,inf,', (tmp_path / 'x.csv').read_text())
  assert '0.04 diverges' in rates.describe(curves)
  assert 'as far as these rates tell' in rates.describe(curves).splitlines()[-1]
  diverging = [c for cells in trained for c in cells if c.values[search.RATE] == 0.04]
  assert len({c.name for c in diverging}) == len(diverging)


def test_a_minimum_beyond_what_may_be_added_is_said(trained, tmp_path):
  curves = _curves()
  assert _search(curves, tmp_path, most=0) == cli.OK
  assert curves[0].rates == RATES
  text = rates.describe(curves)
  assert 'the largest of 3 rates: the minimum may be beyond' in text
  assert 'as far as these rates tell' in text.splitlines()[-1]


def test_an_unfinished_cell_ends_the_search(monkeypatch, tmp_path):
  monkeypatch.setattr(runner, 'run', lambda cells, workdir: cli.FAILED)
  assert _search(_curves(), tmp_path) == cli.FAILED
  monkeypatch.setattr(runner, 'run', lambda cells, workdir: cli.INTERRUPTED)
  assert _search(_curves(), tmp_path) == cli.INTERRUPTED


def test_the_verdict(trained, tmp_path):
  variants = axes.parse(['model.parameterization=standard,mup'], [])
  curves = _curves(variants)
  assert _search(curves, tmp_path) == cli.OK
  standard, mup = rates.describe(curves).splitlines()[-2:]
  assert 'standard: best rates differ by a factor of 0.50' in standard and 'beyond 1.4' in standard
  assert 'costs model.d_model=32: 0.048' in standard
  assert 'mup: best rates differ by a factor of 1.00' in mup and 'within 1.4' in mup
  assert 'none beyond noise' in mup and 'as far as' not in standard + mup
  rates.plot(curves, tmp_path / 'sweep.png')
  assert (tmp_path / 'sweep.png').stat().st_size > 10_000


def test_best_rate_ratio_and_cost_of_parabolas():
  def losses(best, noise=0.0):
    curve = search.Curve({}, {'model.d_model': '16'}, RATES + [8e-3, 0.016], SEEDS)
    rng = np.random.default_rng(0)
    for rate in curve.rates:
      for seed in SEEDS:
        parabola = 1 + 0.2 * math.log(rate / best) ** 2
        curve.losses[rate, seed] = parabola + noise * rng.normal()
    return rates.Losses.of(curve)

  small, large = losses(5e-3), losses(2.5e-3)
  assert rates.best_rate(small).value == pytest.approx(5e-3)
  assert rates.best_loss(small).value == pytest.approx(1)
  assert rates.ratio(small, large).value == pytest.approx(0.5)
  assert rates.cost(small, large).value == pytest.approx(0.2 * math.log(2) ** 2)
  noisy = rates.best_rate(losses(5e-3, noise=0.01))
  assert noisy.low < 5e-3 < noisy.high and noisy.high / noisy.low > 1.02


@pytest.mark.parametrize(
  'texts', [['1e-3', '1e-2'], ['1', '2', 'x'], ['0', '1', '2'], ['1', '1', '2']]
)
def test_rates_that_are_none(texts):
  with pytest.raises(ValueError, match='--rates: expected three or more different positive'):
    search.numbers('rates', texts)
