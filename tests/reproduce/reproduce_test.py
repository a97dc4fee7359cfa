"""Reproductions: verdicts on made-up losses, reports, and tiny runs from end to end."""

import csv
import dataclasses
import functools
import json
import math
import re
import types
from typing import Any

import pytest

from moejax import (
  cli,
  config as config_lib,
  flops,
  metrics,
  report as report_lib,
  run_folder,
  runner,
  seeds,
  train,
  transition_tuning,
)
from moejax.compare import table
from moejax.reproduce import (
  __main__ as program,
  criteria,
  design as design_lib,
  figure,
  fine_grained,
  moe_mamba,
  mot,
  paper,
  report,
  stages,
)
from moejax.reproduce.criteria import FAILS, HOLDS, UNSETTLED
from moejax.scaling_laws import fit

pytestmark = pytest.mark.filterwarnings('ignore:the load_module')  # ml_collections calls it
CLAIMS = {'moe_mamba': moe_mamba, 'mot': mot, 'fine_grained': fine_grained}


def _seeds(*losses):
  return dict(enumerate(losses))


@pytest.mark.parametrize(
  'better, worse, verdict',
  [
    ((1.0, 1.01, 1.02), (1.1, 1.11, 1.12), HOLDS),
    ((1.0, 1.01, 1.02), (1.02, 1.03, 1.04), UNSETTLED),  # two spreads
    ((1.0, 1.01, 1.02), (1.0, 1.01, 1.02), FAILS),
    ((1.1, 1.11, 1.12), (1.0, 1.01, 1.02), FAILS),
    ((1.0,), (1.1,), UNSETTLED),
    ((1.0, 1.01), (1.027, 1.037), UNSETTLED),  # the interval of two seeds holds 0
  ],
)
def test_a_lead_is_judged_by_the_spread_of_seeds(better, worse, verdict):
  assert criteria.lead(_seeds(*better), _seeds(*worse)).verdict == verdict


@pytest.mark.parametrize(
  'gains, verdict',
  [((0.02, 0.021, 0.022), HOLDS), ((-0.02, -0.021, -0.022), FAILS), ((-0.02, 0.03), UNSETTLED)],
)
def test_the_growth_of_a_lead_is_that_of_pairs(gains, verdict):
  worse = _seeds(1.3, 1.1, 1.2)  # seeds differ by more than leads do
  before = {s: loss - 0.05 for s, loss in worse.items()}
  after = {s: worse[s] - 0.05 - gain for s, gain in enumerate(gains)}
  assert criteria.growth((before, worse), (after, worse)).verdict == verdict


def test_a_tuned_model_may_be_worse_by_the_spread_of_seeds():
  before = _seeds(1.0, 1.01, 1.02)

  def verdict(*after):
    losses = {'mot': before, 'tuned': _seeds(*after)}
    known = types.SimpleNamespace(losses=lambda name, _: losses[name])
    return criteria.judge(criteria.recovers('tuned', 'mot', 1, ''), known).verdict

  assert verdict(0.9, 0.91, 0.92) == verdict(1.001, 1.011, 1.021) == HOLDS
  assert verdict(1.02, 1.03, 1.04) == UNSETTLED
  assert verdict(1.1, 1.11, 1.12) == FAILS


BEYOND = seeds.Estimate(*[math.inf] * 3)  # the longest run of the baseline


@pytest.mark.parametrize(
  'after, longest, verdict',
  [
    (seeds.Estimate(2.5, 2.3, 2.7), 3.0, HOLDS),
    (seeds.Estimate(2.1, 1.9, 2.3), 3.0, UNSETTLED),
    (seeds.Estimate(1.2, 1.1, 1.3), 3.0, FAILS),
    (BEYOND, 3.0, HOLDS),
    (BEYOND, 2.0, UNSETTLED),
  ],
)
def test_a_ratio_beyond_what_was_measured_is_at_least_that(after, longest, verdict):
  model: Any = types.SimpleNamespace(is_finished=True)
  row = table.Row(model, after, matched=seeds.Estimate(2.0, 1.8, 2.2))
  rows = {1: row, 2: row._replace(matched=after, span=(0.5, longest))}
  known = types.SimpleNamespace(row=lambda baseline, name, steps: rows[steps])
  assert criteria.judge(criteria.ratio_grows('a', 'b', 1, 2, ''), known).verdict == verdict


def test_all_of_several_findings_must_hold():
  finding = lambda verdict: criteria.Finding(verdict, verdict)
  every = lambda *verdicts: criteria.every(map(finding, verdicts)).verdict
  assert every(HOLDS, HOLDS) == HOLDS
  assert every(HOLDS, UNSETTLED) == UNSETTLED
  assert every(HOLDS, UNSETTLED, FAILS) == FAILS


def _write_run(cell, workdir, loss):
  """A finished run with this final loss."""
  config = cli.config_of(cell.arguments[2:])
  run_config = config_lib.resolve(config)
  folder = workdir / cell.name
  run_folder.write(config, folder)
  writer = metrics.MetricsWriter(folder, 0)
  steps = run_config.train.steps
  for part in range(1, 11):
    writer.write(max(part, steps * part // 10), {'loss': loss + 1 / part})
  writer.write(steps, {'loss': loss}, prefix='validation')
  writer.close()
  per_token = flops.training_flops_per_token(run_config.model, run_config.data.sequence_length)
  summary = {
    'config': config.to_dict(),
    'corpus': 'c',
    'tokenizer': 't',
    'parameters': flops.param_counts(run_config.model),
    'flops_per_token': per_token,
    'tokens_seen': run_config.data.tokens_per_step * steps,
    'validation': {'loss': loss},
    'training': {'epochs': 0.5, 'clipped': 0.1, 'loss': loss},
    'seconds': 60,
    'steps': steps,
  }
  report_lib.write_summary(folder, summary)


# How fast models learn in a made-up world in which the claims hold; others: 0.
_GAINS = {'mamba-mlp': -1, 'moe-mamba-8': 1, 'moe-mamba-32': 2}
_GAINS |= {'transformer': -4, 'transformer-moe-32': -2}
_GAINS |= {'mot-8e-1': 1, 'mot-8e-4-half': 1, 'mot-8e-2': 2, 'mot-8e-4': 3, 'mot-32e-1': 2}
_GAINS |= {'mot-32e-2': 3, 'd32-mot-32e-2': 1, 'mot-8e-1-bf16': 1}
_BEST = {'d16': 2.4e-2, 'd24': 2.4e-2}  # rates; others: 1.2e-2


def _loss(cell):
  config = config_lib.resolve(cli.config_of(cell.arguments[2:]))
  name, steps, model = cell.name.rsplit('-', 3)[0], config.train.steps, config.model
  off = math.log(config.optimizer.peak_lr / _BEST.get(name.split('-')[0], 1.2e-2))
  noise = 1e-2 * off**2 + 2e-4 * config.train.seed
  if not re.fullmatch(r'd\d+-(dense|g\d)', name):
    return 3 - 0.1 * math.log(steps) * (1 + 0.05 * _GAINS.get(name, 0)) + noise
  experts = 8 if 'moe' in model.kinds else 0
  params = (8 * experts + 4 if experts else 12) * model.d_model**2 * 2
  finer = 8 * model.moe.granularity**-0.58 if experts else 12
  return (
    0.5 + (finer + 10) * params**-0.2 + 30 * config.data.tokens_per_step**-0.3 * steps**-0.3 + noise
  )


@pytest.fixture
def trained(monkeypatch):
  """The names of the cells of every call of the runner, which writes made-up runs."""
  calls = []

  def run(cells, workdir):
    new = [cell for cell in cells if not runner.is_done(workdir, cell)]
    calls.append([cell.name for cell in new])
    for cell in new:
      _write_run(cell, workdir, _loss(cell))
    return cli.OK

  monkeypatch.setattr(runner, 'run', run)
  return calls


def _reproduce(name, workdir, scale='laptop', quick=False, unit=20):
  design = CLAIMS[name].design(scale, quick, unit)
  assert stages.train(design, workdir) == cli.OK
  return design, report.write(CLAIMS[name].CLAIM, design, workdir)


def _verdicts(workdir):
  with (workdir / 'verdicts.csv').open() as file:
    return [row['verdict'] for row in csv.DictReader(file)]


@pytest.mark.parametrize('name', CLAIMS)
def test_the_quick_form_finds_rates_compares_and_reports(name, trained, tmp_path):
  design, text = _reproduce(name, tmp_path, quick=True)
  assert _verdicts(tmp_path) == [HOLDS] * len(design.criteria), text
  page = (tmp_path / 'report.md').read_text()
  title, names = next(iter(design.comparisons.items()))
  assert 'partial' not in page and 'tokens/active' in page
  for wanted in (CLAIMS[name].CLAIM.says, '## Learning rates', '| commit |', *names):
    assert wanted in page
  for path in (f'{title}.png', f'{title}-lead.png', f'{title}.csv'):
    assert (tmp_path / path).stat().st_size > 100
  assert re.findall(r'\]\((.*?)\)', page) == [f'{title}.png', f'{title}-lead.png']
  before = len(trained)
  _reproduce(name, tmp_path, quick=True)
  assert not any(trained[before:])  # nothing is trained twice


def test_a_report_is_partial_until_all_runs_are_there(trained, monkeypatch, tmp_path):
  whole = runner.run

  def some(cells, workdir):
    whole([cell for cell in cells if 'mlp' not in cell.name], workdir)
    return cli.INTERRUPTED

  design = moe_mamba.design('laptop', True, 20)
  none = report.write(moe_mamba.CLAIM, design, tmp_path)
  assert 'partial: 12 of 12 runs are missing' in none
  monkeypatch.setattr(runner, 'run', some)
  assert stages.train(design, tmp_path) == cli.INTERRUPTED
  text = report.write(moe_mamba.CLAIM, design, tmp_path)
  assert 'partial: 3 of 12 runs are missing' in text
  assert _verdicts(tmp_path) == [UNSETTLED, HOLDS, HOLDS]
  page = (tmp_path / 'report.md').read_text()
  assert 'missing: 3 of 3 runs of mamba-mlp, 60 steps' in page and '3 of 12' in page


@pytest.mark.parametrize('name', CLAIMS)
def test_a_report_of_no_runs_says_so(name, tmp_path):
  design = CLAIMS[name].design('laptop', False, design_lib.UNIT)
  text = report.write(CLAIMS[name].CLAIM, design, tmp_path)
  number = sum(len(design.seeds_of(model)) * len(model.steps) for model in design.models)
  number += sum(len(design.seeds_of(design.source_of(tuned))) for tuned in design.tuned)
  assert f'partial: {number} of {number} runs are missing' in text
  assert set(_verdicts(tmp_path)) == {UNSETTLED}
  assert 'No finished run of' in (tmp_path / 'report.md').read_text()


def test_models_may_have_seeds_of_their_own(trained, tmp_path):
  design = mot.design('laptop', True, 20)
  more = tuple(m._replace(seeds=(0, 1, 2, 3) if m.name == 'dense' else ()) for m in design.models)
  design = dataclasses.replace(design, models=more)
  assert stages.train(design, tmp_path) == cli.OK
  assert len(trained[-1]) == 4 * 3 + 3 * 2 == design_lib.cost(design)[0]
  report.write(mot.CLAIM, design, tmp_path)
  page = (tmp_path / 'report.md').read_text()
  assert 'Seeds: 0, 1, 2; dense 0, 1, 2, 3.' in page and 'runs are missing' not in page


def test_rates_are_found_once_and_recorded(trained, tmp_path):
  design = fine_grained.design('laptop', True, 20)
  assert stages.train(design, tmp_path) == cli.OK
  found = json.loads((tmp_path / 'rates.json').read_text())
  assert found['d16-g8']['rate'] == 0.024 and len(found['d16-g8']['tried']) == 3
  (tmp_path / 'rates.json').write_text(json.dumps(found | {'d16-g8': {'rate': 0.05, 'tried': {}}}))
  assert stages.train(design, tmp_path) == cli.OK
  assert trained[-1] == [f'd16-g8-60-0.05-s{seed}' for seed in range(3)]


@pytest.mark.parametrize('content', ['{', '{"d16-g8": 0.05}', '{"d16-g8": {"rate": 0.05}}'])
def test_a_damaged_record_of_rates_is_named(content, tmp_path):
  (tmp_path / 'rates.json').write_text(content)
  with pytest.raises(ValueError, match='rates.json'):
    stages.train(fine_grained.design('laptop', True, 20), tmp_path)


def test_no_stage_begins_before_the_one_before_is_whole(trained, monkeypatch, tmp_path):
  whole = runner.run

  def failing(cells, workdir):
    whole([cell for cell in cells if cell.name != 'd16-g4-160-0.024-s0'], workdir)
    return cli.FAILED if len(trained) > 1 else cli.OK

  monkeypatch.setattr(runner, 'run', failing)
  design = dataclasses.replace(fine_grained.design('laptop', False, 20), seeds=(0,))
  assert stages.train(design, tmp_path) == cli.FAILED
  assert not (tmp_path / 'predictions.json').exists()
  assert 'no predictions yet' in report.write(fine_grained.CLAIM, design, tmp_path)


def test_a_best_rate_at_the_end_of_those_tried_is_searched_beyond(trained, tmp_path, monkeypatch):
  design = fine_grained.design('laptop', True, 20)
  models = tuple(model._replace(rates=(3e-3, 6e-3, 1.2e-2)) for model in design.models[:1])
  design = dataclasses.replace(design, models=models, comparisons={}, criteria=())
  assert stages.train(design, tmp_path) == cli.OK
  found = json.loads((tmp_path / 'rates.json').read_text())['d16-dense']
  assert found['rate'] == 0.024
  assert [*found['tried']] == ['0.003', '0.006', '0.012', '0.024', '0.048']
  report.write(fine_grained.CLAIM, design, tmp_path)
  assert 'may be beyond' not in (tmp_path / 'report.md').read_text()
  monkeypatch.setattr(stages, '_MOST_ADDED', 1)
  (tmp_path / 'rates.json').unlink()
  assert stages.train(design, tmp_path) == cli.OK
  report.write(fine_grained.CLAIM, design, tmp_path)
  assert (
    '; the best is at the end of these, and may be beyond' in (tmp_path / 'report.md').read_text()
  )


@pytest.mark.heavy
def test_the_law_is_judged_on_larger_runs_that_it_predicted(trained, monkeypatch, tmp_path):
  few = functools.partial(fit.fit_moe_and_dense, repeats=3, starts=2)
  monkeypatch.setattr(fit, 'fit_moe_and_dense', few)
  design = dataclasses.replace(fine_grained.design('laptop', False, 20), seeds=(0, 1))
  assert stages.train(design, tmp_path) == cli.OK
  assert all(name.startswith('d64') for name in trained[-1])  # after the predictions
  text = report.write(fine_grained.CLAIM, design, tmp_path)
  assert _verdicts(tmp_path) == [HOLDS] * len(design.criteria), text
  page = (tmp_path / 'report.md').read_text()
  assert len(re.findall(r'^\|.*\| d64-\S+-240-', page, re.M)) == 3
  written = (tmp_path / 'predictions.json').read_bytes()
  for folder in tmp_path.glob('d64-g*-240-*'):
    summary = report_lib.read_summary(folder)
    summary['validation']['loss'] += 0.1
    report_lib.write_summary(folder, summary)
  assert stages.train(design, tmp_path) == cli.OK
  assert (tmp_path / 'predictions.json').read_bytes() == written
  report.write(fine_grained.CLAIM, design, tmp_path)
  assert _verdicts(tmp_path)[-1] == FAILS


class _Known:
  """Results that know which runs a design has."""

  def __init__(self, design, workdir):
    self.lengths = {model.name: model.steps for model in design.models}
    self.lengths |= {one.name: (one.steps,) for one in design.tuned}
    self.workdir = workdir

  def losses(self, name, steps):
    assert steps in self.lengths[name]
    return _seeds(1.0, 1.1)

  def row(self, baseline, name, steps):
    assert len(self.lengths[baseline]) > 1 and steps in self.lengths[baseline]
    model: Any = self.losses(name, steps)
    return table.Row(model, seeds.Estimate(1.0), matched=seeds.Estimate(1.2))


FORMS = [
  (name, *form) for name in CLAIMS for form in (('laptop', False), ('laptop', True), ('gpu', False))
]


@pytest.mark.parametrize('name, scale, quick', FORMS)
def test_designs_are_valid_and_their_criteria_speak_of_their_runs(
  name, scale, quick, tmp_path, monkeypatch
):
  design = CLAIMS[name].design(scale, quick, design_lib.UNIT)
  monkeypatch.setattr(criteria, '_ratio', lambda row: '')
  for criterion in design.criteria:
    criteria.judge(criterion, _Known(design, tmp_path))
  names = {model.name for model in design.models} | {one.name for one in design.tuned}
  assert {name for of in design.comparisons.values() for name in of} <= names
  assert len(design.seeds) > 2 or scale == 'gpu'
  cells = [design_lib.cell(design, m, m.rates[0], 0, m.steps[0]) for m in design.models]
  tokens = [cell.flops / cell.steps for cell in cells]
  assert len({cell.name for cell in cells}) == len(cells) and min(tokens) > 0
  _, _, seconds = design_lib.cost(design)
  limit = 240 if scale == 'gpu' else 2 * (15 * 60 if quick else 3 * 3600)
  assert limit / 4 < seconds < limit


def test_models_that_are_compared_have_equal_flops(tmp_path):
  design = moe_mamba.design('laptop', False, design_lib.UNIT)
  by_name = {m.name: design_lib.cell(design, m, 1e-2, 0, 4000) for m in design.models}
  flops_of = {name: cell.flops for name, cell in by_name.items()}
  for name in design.comparisons['mamba']:
    assert 0.86 < flops_of[name] / flops_of['mamba'] <= 1
  assert 0.9 < flops_of['transformer-moe-32'] / flops_of['transformer'] < 1.1


@pytest.mark.heavy
@pytest.mark.parametrize(
  'name, models',
  [
    ('moe_mamba', ('mamba', 'moe-mamba-32')),
    ('mot', ('dense', 'mot-8e-1')),
    ('fine_grained', ('d16-dense', 'd16-g4')),
  ],
)
def test_tiny_runs_from_end_to_end(name, models, monkeypatch, tmp_path):
  def run(cells, workdir):
    for cell in cells:
      train.train(cli.config_of(cell.arguments[2:]), workdir / cell.name)
    return cli.OK

  def tune(command, **_):
    source, folder = (argument.partition('=')[2] for argument in command[3:5])
    return types.SimpleNamespace(returncode=transition_tuning.tune(source, folder, 'token_choice'))

  monkeypatch.setattr(runner, 'run', run)
  monkeypatch.setattr(stages, 'subprocess', types.SimpleNamespace(run=tune, DEVNULL=None))
  design = CLAIMS[name].design('laptop', False, 2)
  small = {'data.source': 'stdlib', 'train.log_interval': '1'}
  small |= {'train.eval_batches': '1', 'train.final_eval_batches': '1'}
  small |= {'optimizer.warmup_steps': '1', 'data.batch_size': '128', 'data.sequence_length': '8'}
  steps = max(one.steps for one in design.tuned) if design.tuned else design.rate_steps
  design = dataclasses.replace(
    design,
    models=tuple(
      m._replace(rates=m.rates[:1], steps=(steps,), seeds=())
      for m in design.models
      if m.name in models
    ),
    fields=design.fields | small,
    seeds=(0,),
    comparisons={'all': (*models, *(one.name for one in design.tuned))},
    criteria=(criteria.leads(models[1], models[0], (steps,), ''),),
  )
  assert stages.train(design, tmp_path) == cli.OK
  text = report.write(CLAIMS[name].CLAIM, design, tmp_path)
  assert 'partial' not in text
  assert (tmp_path / 'all.png').stat().st_size > 1000
  page = (tmp_path / 'report.md').read_text()
  assert all(f'\n{one.name}-{one.steps} ' in page for one in design.tuned)
  assert set(_verdicts(tmp_path)) == {UNSETTLED}  # of one seed


@pytest.fixture
def run_program(monkeypatch, tmp_path):
  """Runs a claim with flags, in an empty folder."""
  monkeypatch.chdir(tmp_path)

  def run(name, **flags):
    defaults = {'scale': 'laptop', 'quick': False, 'report': False, 'chip': 'H100', 'workdir': None}
    monkeypatch.setattr(program, '_FLAGS', types.SimpleNamespace(**defaults | flags))
    return program.COMMANDS[name].main()

  return run


@pytest.mark.parametrize(
  'flags, message',
  [
    ({'quick': True, 'scale': 'gpu'}, '--quick is a form of --scale=laptop, got --scale=gpu'),
    ({'report': True, 'workdir': 'none'}, 'none does not exist; leave out --report to train'),
    ({'scale': 'paper', 'chip': 'H9'}, '--chip=H9: unknown chip'),
  ],
)
def test_bad_input_is_named(flags, message, run_program, tmp_path):
  with pytest.raises(ValueError, match=message):
    run_program('mot', **flags)
  assert not list(tmp_path.iterdir())


def test_the_program_says_the_cost_trains_and_reports(trained, run_program, monkeypatch, capsys):
  monkeypatch.setattr(design_lib, 'UNIT', 20)
  assert run_program('mot', quick=True) == cli.OK
  output = capsys.readouterr().out
  assert re.search(r'15 runs, 1.16M tokens: about \d+m\d+s on \d+ cores? like ours', output)
  assert 'holds: mot-8e-4 is better than dense' in output
  number = len(trained)
  assert run_program('mot', quick=True, report=True) == cli.OK
  assert len(trained) == number
  assert capsys.readouterr().out.startswith('holds: ')


def test_the_papers_own_runs_are_described():
  lines = '\n'.join(paper.describe(('configs/mot.py:mini',), 'H100'))
  assert '250,000 steps of 256 x 256, 16.4B tokens, peak rate 0.002' in lines
  assert re.search(r'time .* h100 hours', lines)
  assert 'python -m moejax.main --config=configs/mot.py:mini --workdir=runs/mot-mini' in lines


def test_one_figure_shows_the_leads_of_all_claims(run_program, tmp_path):
  heading = 'model,lead,lead_low,lead_high,tokens_active'
  for name, module in CLAIMS.items():
    folder = tmp_path / 'reproduce' / name
    with pytest.raises(ValueError, match='does not exist; python -m moejax.reproduce'):
      run_program('figure', folder='reproduce')
    folder.mkdir(parents=True)
    _, comparison = module.CLAIM.panel
    assert comparison in module.design('laptop', False, design_lib.UNIT).comparisons
    lines = [heading, 'base-20,,,,300', 'a-b-20,0.1,0.05,0.15,300', 'a-b-40,0.2,,,600']
    (folder / f'{comparison}.csv').write_text('\n'.join(lines))
    leads = figure.read(folder / f'{comparison}.csv')
    assert list(leads) == ['a-b'] and leads['a-b'][0] == (300, (0.1, 0.05, 0.15))
  assert run_program('figure', folder='reproduce') == cli.OK
  assert (tmp_path / 'reproduce' / 'claims.png').stat().st_size > 10_000
