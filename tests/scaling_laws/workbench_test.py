"""The commands as users run them, the grids, the plans and the figures."""

import csv
import json
import shlex
import subprocess
import sys

import pytest

from configs import dense
from moejax import cli
from moejax.scaling_laws import __main__ as program, grid, laws, optimal, plan, plots

pytestmark = pytest.mark.heavy

PRINTED = laws.PUBLISHED['printed']


def _call(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'moejax.scaling_laws', *map(str, arguments)],
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_a_plan_as_json():
  done = _call('plan', '--flops=1e21', '--json', '--chip=v5e', '--mfu=0.5')
  assert done.returncode == cli.OK, done.stderr
  result = json.loads(done.stdout)
  best = optimal.best(PRINTED[64], 64, 1e21)
  for name in ('flops', 'params', 'active_params', 'tokens', 'granularity', 'loss'):
    assert result[name] == pytest.approx(getattr(best, name))
  assert result['chip']['hours'] == pytest.approx(1e21 / (197e12 * 0.5) / 3600)
  assert 20 < result['dense']['flops_ratio'] < 26


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((), 'expected one of plan, grid, run, fit, plot'),
    (('plan',), 'give one of --flops'),
    (('plan', '--flops=1e21', '--params=1e9'), 'give one of --flops'),
    (('plan', '--flops=nan'), 'expected a finite number'),
    (('plot', '--expansion_rate=32'), '--expansion_rate=32: these coefficients are for 1, 16, 64'),
    (('fit',), 'fit needs folders of runs'),
    (('run', '--workdir=x', '--grid=nowhere.json'), 'file not found'),
  ],
  ids=['nothing', 'no_target', 'two_targets', 'no_number', 'no_law', 'no_runs', 'no_grid'],
)
def test_bad_command_lines(arguments, message):
  done = _call(*arguments)
  assert done.returncode == cli.USAGE and message in done.stderr
  assert all(line.startswith('error: ') for line in done.stderr.splitlines())


def test_every_command_has_help():
  assert '--runs: Runs to plot too' in _call('plot', '--help').stdout
  assert set(program.COMMANDS) == {'plan', 'grid', 'run', 'fit', 'plot'}


@pytest.mark.slow
def test_from_a_grid_to_figures(tmp_path):
  assert _call(
    'grid', '--preset=paper', '--coefficients=printed', f'--output={tmp_path / "grid.json"}'
  ).stdout.startswith('100 cells')
  table = tmp_path / 'runs.csv'
  with table.open('w', newline='') as file:
    columns = ('name', 'params', 'tokens', 'granularity', 'expansion_rate', 'loss')
    rows = csv.writer(file)
    rows.writerow(columns)
    for cell in grid.read(tmp_path / 'grid.json'):
      rows.writerow([*(getattr(cell, name) for name in columns[:-1]), f'{cell.predicted_loss:.3f}'])
  law = tmp_path / 'law'
  done = _call('fit', table, '--c=0.472', '--starts=8', '--repeats=10', f'--output={law}')
  assert done.returncode == cli.OK, done.stderr
  assert 'moe law of expansion rate 64, from 78 runs' in done.stdout
  files = (f'--coefficients={law / "fit.json"}', f'--runs={law / "runs.csv"}')
  done = _call('plot', *files, f'--output={law}')
  assert done.returncode == cli.OK, done.stderr
  figures = sorted(path.stem for path in law.glob('*.png'))
  names = ['loss_by_flops', 'loss_by_granularity', 'optimal_granularity', 'residuals']
  assert figures == names
  with (law / 'residuals.csv').open(newline='') as file:
    residuals = [float(row['residual']) for row in csv.DictReader(file)]
  assert len(residuals) == 100 and max(map(abs, residuals)) < 0.002  # losses have three digits
  done = _call('plan', '--target_loss=2.5', files[0])
  assert done.returncode == cli.OK and 'granularity G     16' in done.stdout


def test_figures_without_runs_and_of_a_dense_law(tmp_path):
  assert len(plots.plot(PRINTED, 64, [], tmp_path / 'both')) == 3
  with (tmp_path / 'both' / 'optimal_granularity.csv').open(newline='') as file:
    for row in csv.DictReader(file):
      best = optimal.best(PRINTED[64], 64, float(row['flops']))
      assert int(row['granularity']) == best.granularity
  only_dense = {1: PRINTED[1]}
  assert [p.stem for p in plots.plot(only_dense, 1, [], tmp_path / 'dense')] == ['loss_by_flops']


def test_the_paper_grid():
  cells = grid.make('paper', PRINTED)
  sparse = [cell for cell in cells if cell.granularity]
  assert (len(sparse), len(cells)) == (78, 100)
  assert len({cell.name for cell in cells}) == 100
  assert max(cell.params for cell in cells) == pytest.approx(3.652e9, rel=1e-3)  # the text: 3.7B
  assert {cell.tokens for cell in sparse} == {31_250 * k * 2048 * 256 for k in (1, 2, 4, 8)}
  words = cells[0].command.split()
  assert words[3] == '--config=configs/fine_grained.py:3M,granularity=1,expansion_rate=64'


def test_the_laptop_grid():
  cells = grid.make('laptop')
  assert len(cells) == 45 and len({(c.d_model, c.blocks) for c in cells}) == 3
  assert {c.granularity for c in cells} == {laws.DENSE, 1, 2, 4, 8}
  assert len({c.steps for c in cells}) == 3
  assert all(c.predicted_loss is None for c in cells)
  first = cells[:24]
  for measure in ('params', 'steps', 'granularity'):
    assert {getattr(c, measure) for c in first} == {getattr(c, measure) for c in cells}
  for larger in grid.make('laptop_larger'):
    kind = [c for c in cells if c.expansion_rate == larger.expansion_rate]
    assert larger.params > max(c.params for c in kind)
    assert larger.steps > max(c.steps for c in kind)
  with pytest.raises(ValueError, match='--preset=desk: expected one of paper, laptop'):
    grid.make('desk')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda cell: cell.pop('steps'), 'is not a valid grid file: .*steps'),
    (lambda cell: cell.update(rate=1), 'is not a valid grid file: .*rate'),
    (lambda cell: cell.update(steps='many'), "d32x2-dense-200: steps = 'many': expected a number"),
    (lambda cell: cell.update(flops=float('nan')), 'flops = nan: expected a number above 0'),
    (lambda cell: cell.update(config=None), 'config = None: expected a string'),
    (lambda cell: cell.update(fields={'train.steps': 4}), 'fields = .*: expected texts by field'),
    (lambda cell: cell.update(command='true'), 'expected a command python -m moejax.main'),
    (lambda cell: cell.update(name='../a'), "name = '../a': expected a folder name"),
  ],
)
def test_invalid_grids(tmp_path, change, message):
  path = tmp_path / 'grid.json'
  grid.write(grid.make('laptop'), path)
  cells = json.loads(path.read_text())
  change(cells[0])
  path.write_text(json.dumps(cells))
  with pytest.raises(ValueError, match=message):
    grid.read(path)


def test_grids_of_older_versions_have_commands(tmp_path):
  path = tmp_path / 'grid.json'
  cells = [*grid.make('laptop'), *grid.make('paper', PRINTED)]
  grid.write(cells, path)
  entries = json.loads(path.read_text())
  for entry, cell in zip(entries, cells, strict=True):
    del entry['config'], entry['fields']
    entry['command'] = cell.command
  path.write_text(json.dumps(entries))
  assert grid.read(path) == cells


@pytest.mark.parametrize('content', [b'', b'[1]', b'{"name": 1}', b'[{"name"', b'\xff\xfe[\0'])
def test_files_that_are_not_grids(tmp_path, content):
  path = tmp_path / 'grid.json'
  path.write_bytes(content)
  with pytest.raises(ValueError, match='grid.json is not a valid grid file'):
    grid.read(path)


def test_commands_set_fields_that_the_config_has():
  """A dense cell's flags, applied as the command line would."""
  (cell,) = [c for c in grid.make('laptop') if c.name == 'd96x2-dense-800']
  config = dense.get_config('laptop').unlock()
  for flag in shlex.split(cell.command)[4:]:
    name, _, value = flag.removeprefix('--config.').partition('=')
    section, field = name.split('.')
    kind = type(config[section][field])  # KeyError for a field that does not exist
    config[section][field] = eval(value) if kind is tuple else kind(value)
  assert config.model.blocks == ((('attention', 'mlp'), 2),)
  assert (config.model.d_model, config.model.d_ff, config.model.num_heads) == (96, 384, 3)
  assert config.data.batch_size * config.data.sequence_length * config.train.steps == cell.tokens


def test_the_planned_model_has_integer_blocks_and_the_budget():
  result = plan.make(PRINTED, 64, {'flops': 1e21}, grid.PAPER)
  model = result['model']
  assert model['d_model'] == 64 * model['blocks'] and model['experts'] == 64 * 16
  assert model['expert_width'] * 16 == 4 * model['d_model']
  assert model['flops'] == pytest.approx(1e21, rel=1e-4)
  assert model['loss'] == pytest.approx(result['loss'], abs=1e-3)
  text = plan.describe(result)
  assert model['command'] in text and f'{result["loss"]:.4f}' in text


def test_a_dense_plan():
  result = plan.make(PRINTED, 1, {'tokens': 1e11}, grid.PAPER)
  assert 'dense' not in result and result['model']['experts'] == 0
  assert result['tokens_per_param'] == result['tokens_per_active_param']
  assert 'granularity' not in plan.describe(result)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'target': {'flops': 1e40}}, 'no budget between 1e6 and 1e36 FLOPs'),
    ({'chip': 'v99'}, '--chip=v99'),
    ({'chip': 'v5e', 'mfu': 40}, '--mfu=40'),
  ],
)
def test_invalid_plans(changes, message):
  arguments = {'expansion_rate': 64, 'target': {'flops': 1e21}, 'recipe': grid.PAPER} | changes
  with pytest.raises(ValueError, match=message):
    plan.make(PRINTED, **arguments)
