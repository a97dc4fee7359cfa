"""The joint law of active parameters, tokens and experts, compared with its paper's tables."""

import dataclasses
import types

import numpy as np
import pytest

from moejax.scaling_laws import collect, fit, laws, optimal, report
from tests.scaling_laws import paper

EXPERTS = (1, 2, 4, 8, 16, 32)
# As fits have it: without embeddings.
TRUTH = laws.JOINT
QUICK = {'starts': 4, 'repeats': 0}


@pytest.mark.parametrize('experts', EXPERTS)
def test_the_laws_for_each_number_of_experts(experts):
  law = laws.JOINT.at(experts)
  a, alpha, b, beta = paper.REDUCED[experts]
  assert (law.a, law.b) == (pytest.approx(a, rel=0.0027), pytest.approx(b, rel=0.0027))
  assert (-law.alpha, -law.beta) == (pytest.approx(alpha, abs=2e-4), pytest.approx(beta, abs=2e-4))


@pytest.mark.parametrize('row', paper.JOINT_OPTIMAL)
def test_its_optima(row):
  """At 6 N D = F, with a alpha N^-alpha = b beta D^-beta."""
  flops, experts, params, tokens = row
  a, alpha, b, beta = laws.JOINT.at(experts)[1:5]
  product = (a * alpha / (b * beta)) ** (1 / (alpha + beta))
  best = product * (flops / 6) ** (beta / (alpha + beta))
  assert best == pytest.approx(params, rel=0.022)  # printed with two digits
  assert flops / 6 / best == pytest.approx(tokens, rel=0.012)


def test_the_best_number_of_experts_in_memory():
  """Nine of the twelve of Table 2; the others are within a factor of two."""
  differ = 0
  for flops, printed in paper.JOINT_MEMORY.items():
    for gigabytes, expected in zip((24, 80, 640), printed, strict=True):
      found = optimal.in_memory(laws.PUBLISHED['joint'], flops, gigabytes * 1e9, 50_257)
      experts = min(found, key=lambda rate: found[rate].loss)
      assert expected / 2 <= experts <= 2 * expected
      differ += experts != expected
  assert differ == 3


def test_what_does_not_fit_is_no_choice():
  coefficients = laws.PUBLISHED['joint']
  everything = optimal.in_memory(coefficients, 1e18, 1e15, 50_257)
  for rate, best in everything.items():
    alone = optimal.best(coefficients[rate], rate, 1e18)
    assert best.d_model == pytest.approx(alone.d_model, rel=1e-5)
  some = optimal.in_memory(coefficients, 1e20, 7.6e6, 50_257)  # 32 wide, of few experts
  assert 0 < len(some) < 6 and 1 in some
  for rate, best in some.items():
    used = laws.serving_bytes(best.d_model, best.blocks, rate, 50_257)
    assert used == pytest.approx(7.6e6, rel=1e-3)  # larger would be better
  assert not optimal.in_memory(coefficients, 1e20, 1e6, 50_257)


def _runs(noise=0.0, seed=0):
  """Sizes as in Appendix E, with losses of the law."""
  rng = np.random.default_rng(seed)
  runs = []
  for experts in EXPERTS:
    for active in (80e6, 170e6, 320e6, 700e6, 1.3e9):
      for tokens in (1e9, 4e9, 16e9):
        ratio = laws.total_params(1, 1, experts) / laws.active_params(1, 1)
        loss = laws.loss(TRUTH.at(experts), active, tokens, 1) + noise * rng.standard_normal()
        runs.append(
          collect.Run(
            name=f'{experts}-{active:g}-{tokens:g}',
            params=active * ratio,
            active_params=active,
            tokens=tokens,
            granularity=laws.DENSE if experts == 1 else 1,
            expansion_rate=experts,
            flops=6 * active * tokens,
            loss=loss,
          )
        )
  return runs


def test_exact_losses_recover_the_joint_law():
  found = fit.fit(_runs(), 'joint', **QUICK)
  for name, value in TRUTH._asdict().items():
    assert getattr(found.coefficients, name) == pytest.approx(value, rel=2e-3), name
  assert found.rmse < 1e-5 and found.held_out_rmse < 1e-5
  assert not [w for w in found.warnings if 'per parameter' not in w]
  assert found.expansion_rates == EXPERTS


def test_a_noisy_fit_has_intervals_and_round_trips(tmp_path):
  found = fit.fit(_runs(0.004), 'joint', starts=4, repeats=10)
  assert found.rmse == pytest.approx(0.004, rel=0.3)
  low, high = found.intervals['alpha']
  assert low < found.coefficients.alpha < high
  report.save({0: found}, tmp_path / 'fit.json')
  loaded = report.load(tmp_path / 'fit.json')
  assert sorted(loaded) == list(EXPERTS) and loaded[8] == found.coefficients.at(8)
  assert loaded[8].vocabulary == 0  # of active parameters
  assert 'joint law of dense models and experts, from 90 runs' in report.describe({0: found}, {})


def test_the_jacobian_of_the_joint_law_matches_finite_differences():
  law = fit.FORMS['joint']
  problem = fit._problem(_runs(0.01), law, law.names, None, 0.0)
  theta = fit._starts(law.names, 1, 3.0, seed=0)[0] + 0.01
  step = 1e-6 * np.eye(len(theta))
  numeric = [
    (fit._residuals(problem, theta + e)[0] - fit._residuals(problem, theta - e)[0]) / 2e-6
    for e in step
  ]
  assert fit._residuals(problem, theta)[1] == pytest.approx(np.array(numeric).T, abs=1e-7)


def test_tables_of_experts(tmp_path):
  table = tmp_path / 'runs.csv'
  table.write_text('active_params,tokens,experts,loss\n12e6,1e9,1,4\n12e6,1e9,8,3.5\n')
  dense, sparse = collect.collect([table])[0]
  assert (dense.granularity, dense.expansion_rate, dense.params) == (laws.DENSE, 1, 12e6)
  assert (sparse.granularity, sparse.expansion_rate) == (1, 8)
  assert sparse.params == pytest.approx(68e6) and sparse.active_params == 12e6
  table.write_text('params,tokens,granularity,experts,loss\n68e6,1e9,4,32,3.5\n')
  (fine,) = collect.collect([table])[0]
  assert fine.expansion_rate == 8 and fine.active_params == pytest.approx(12e6)
  assert collect.unsplit([sparse, fine])[0] == [sparse]


def test_active_parameters_of_a_run_folder():
  summary = {
    'config': {
      'model': {
        'blocks': [[['attention', 'moe'], 2]],
        'd_model': 8,
        'moe': {'granularity': 1, 'expansion_rate': 4},
      }
    },
    'parameters': {'by_kind': {'attention': 100, 'experts': 400, 'embedding': 9}},
    'tokens_seen': 1000,
    'validation': {'loss': 2.0},
  }
  run = collect.from_summary('a', summary)
  assert (run.params, run.active_params) == (500, 200)


@pytest.mark.parametrize(
  ('exponents', 'tokens', 'warning'),
  [
    ({'alpha': -0.1}, 5e6, 'the loss rises with size'),
    ({'beta': -0.1}, 5e6, 'the loss rises with tokens'),
    ({}, 1e6, '3 of 3 runs have fewer than 2 tokens per parameter'),
  ],
)
def test_doubts(exponents, tokens, warning):
  law = laws.Coefficients(c=1, a=1, alpha=0.1, b=1, beta=0.1)._replace(**exponents)
  runs = [types.SimpleNamespace(params=1e6, tokens=tokens)] * 3
  (text,) = fit._doubts('dense', law, runs)
  assert text.startswith(warning)


def test_a_loss_that_rises_for_some_numbers_of_experts():
  law = laws.JOINT._replace(zeta=0.1)
  runs = [dataclasses.replace(run, tokens=1e12) for run in _runs()]
  found = list(fit._doubts('joint', law, runs))
  assert found[0].startswith('the loss rises with tokens for 8 experts')
