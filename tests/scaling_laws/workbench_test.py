"""The commands as users run them, the grids, the plans and the figures."""

import csv
import dataclasses
import json
import shlex
import subprocess
import sys
import types

import pytest

from configs import dense
from moejax import cli, config as config_lib, estimate, flops, runner, sharding
from moejax.aot import step, topologies
from moejax.scaling_laws import (
  __main__ as program,
  grid,
  laws,
  machine,
  optimal,
  plan,
  plots,
  report,
)

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
    ((), 'expected one of plan, grid, run, judge, fit, plot'),
    (('plan',), 'give one of --flops'),
    (('plan', '--flops=1e21', '--params=1e9'), 'give one of --flops'),
    (('plan', '--flops=1e21', '--mfu=0.4'), '--mfu is of a chip: give --chip too'),
    (('plan', '--flops=nan'), 'expected a finite number'),
    (('plan', '--flops=1e21', '--memory=16'), 'expected a size, such as 16GiB'),
    (('plot', '--expansion_rate=32'), '--expansion_rate=32: these coefficients are for 1, 16, 64'),
    (('fit',), 'fit needs folders of runs'),
    (('run', '--workdir=x', '--grid=nowhere.json'), 'file not found'),
  ],
  ids=[
    'nothing',
    'no_target',
    'two_targets',
    'no_chip',
    'no_number',
    'no_size',
    'no_law',
    'no_runs',
    'no_grid',
  ],
)
def test_bad_command_lines(arguments, message):
  done = _call(*arguments)
  assert done.returncode == cli.USAGE and message in done.stderr
  assert all(line.startswith('error: ') for line in done.stderr.splitlines())


def test_every_command_has_help():
  assert '--runs: Runs to plot too' in _call('plot', '--help').stdout
  assert set(program.COMMANDS) == {'plan', 'grid', 'run', 'judge', 'fit', 'plot'}


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
  assert len(cells) == 60 and len({(c.d_model, c.blocks) for c in cells}) == 3
  assert {c.granularity for c in cells} == {laws.DENSE, 1, 4, 8}
  assert len({c.steps for c in cells}) == 5
  assert all(c.predicted_loss is None for c in cells)
  first = cells[:45]
  for measure in ('params', 'steps', 'expansion_rate'):
    assert {getattr(c, measure) for c in first} == {getattr(c, measure) for c in cells}
  for larger in grid.make('laptop_larger'):
    kind = [c for c in cells if c.expansion_rate == larger.expansion_rate]
    assert larger.params > max(c.params for c in kind)
    assert larger.steps > max(c.steps for c in kind)
  with pytest.raises(ValueError, match='--preset=desk: expected one of paper, laptop'):
    grid.make('desk')


def test_durations_of_the_laptop_grid_share_their_first_steps():
  cells = grid.make('laptop')
  settings = {cell.name: runner.settings_of(cell) for cell in cells}
  sources = runner._sources(cells, settings)
  assert sorted(map(len, sources.values())) == sorted(12 * [0, 1, 2, 3, 4])
  for cell in cells:
    for other, shared in sources[cell.name]:
      assert shared == 0.8 * other.steps < cell.steps
      assert (other.params, other.granularity) == (cell.params, cell.granularity)
  taken = sum(runner._taken(cell, sources) for cell in cells)
  # 1400 of three durations trained whole
  assert sum(cell.steps for cell in cells) - taken == 12 * 1425


def test_a_grid_with_seeds_contains_the_grid_without():
  cells = grid.make('laptop_larger')
  more = grid.with_seeds(cells, [0, 3])
  assert more[:3] == cells
  for cell, other in zip(cells, more[3:], strict=True):
    assert other.name == f'{cell.name}-s3'
    one, two = runner.settings_of(cell), runner.settings_of(other)
    assert runner.differences(one, two) == ['train.seed'] and two['train.seed'] == 3
  assert not any(runner._sources(more, {c.name: runner.settings_of(c) for c in more}).values())


@pytest.mark.parametrize('preset', ['laptop', 'laptop_larger'])
def test_sizes_of_the_laptop_grid_share_a_base_shape(preset):
  kinds = {(c.d_model, c.granularity): c for c in grid.make(preset)}
  for (d_model, _), cell in kinds.items():
    model = config_lib.resolve(cli.config_of(cell.arguments[2:])).model
    assert model.parameterization == 'mup' and model.d_model == d_model
    base = model.base_model
    assert (base.d_model, base.d_ff, base.head_width) == (64, 256, 32)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda cell: cell.pop('steps'), 'is not valid: .*steps'),
    (lambda cell: cell.update(rate=1), 'is not valid: .*rate'),
    (lambda cell: cell.update(steps='many'), "d48x2-dense-75: steps = 'many': expected a number"),
    (lambda cell: cell.update(flops=float('nan')), 'flops = nan: expected a number from 1'),
    (lambda cell: cell.update(config=None), 'config = None: expected a string'),
    (
      lambda cell: cell.update(fields={'train.steps': 4}),
      'fields: train.steps = 4: expected a field .* its text',
    ),
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
  with pytest.raises(ValueError, match='grid.json is not valid'):
    grid.read(path)


def test_commands_set_fields_that_the_config_has():
  """A dense cell's flags, applied as the command line would."""
  (cell,) = [c for c in grid.make('laptop') if c.name == 'd96x2-dense-600']
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
  assert (model['d_model'], model['blocks'], model['experts']) == (2560, 32, 64 * 16)
  assert model['d_model'] == 64 * model['heads'] and model['expert_width'] == 4 * 2560 // 16
  assert model['params'] == pytest.approx(result['params'], rel=0.02)
  assert model['flops'] == pytest.approx(1e21, rel=1e-4)
  assert model['loss'] == pytest.approx(result['loss'], abs=1e-3)
  text = plan.describe(result)
  assert model['command'] in text.replace(' \\\n ', '') and f'{result["loss"]:.4f}' in text


@pytest.mark.parametrize('wished', [33, 90, 130, 300, 500, 900, 2368, 5000, 100_000])
def test_widths_that_machines_like(wished):
  width = plan.round_width(wished)
  assert 0.79 < width / wished < 1.27 and width % (128 if wished >= 128 else 32) == 0
  odd = width
  while odd % 2 == 0:
    odd //= 2
  assert odd <= 7 or width < 512  # mesh axes that are powers of two divide it


@pytest.mark.filterwarnings('ignore:the load_module')  # ml_collections reads config files so
@pytest.mark.parametrize('chip, budget', [('V5E', 1e21), ('h100', 1e20)])
def test_the_planned_command_runs_on_the_planned_machine(chip, budget):
  """Up to its placement: config, mesh and batch are valid there, and a step fits into memory."""
  result = plan.make(PRINTED, 64, {'flops': budget}, grid.PAPER, chip=chip, compiles=False)
  found = result['chip']['machine']
  assert found['basis'] == machine.ESTIMATED and found['memory'] < 0.9 * found['capacity']
  words = shlex.split(result['model']['command'])
  assert words[:3] == ['python', '-m', 'moejax.main'] and words[-1].startswith('--workdir=')
  config = step.without_data(cli.config_of(words[3:]))
  run_config = config_lib.resolve(config)
  assert run_config.train.steps == result['model']['steps']
  assert run_config.optimizer.peak_lr == pytest.approx(result['peak_lr'], rel=0.05)
  counted = flops.param_counts(run_config.model)['by_kind']['experts']
  assert counted == pytest.approx(result['model']['params'], rel=0.02)
  topology = topologies.parse(found['topology'])
  sizes = run_config.mesh.shape(topology.num_chips)
  assert not estimate.problems(run_config, sizes)
  choice = step.choose_mesh(run_config, topology)
  assert choice.flags == found['mesh'] and choice.fits
  smaller = [t for t in topologies.of_kind(topology.kind) if t.num_chips < topology.num_chips]
  free = dataclasses.replace(run_config, mesh=sharding.MeshConfig())
  assert not smaller or not step.choose_mesh(free, smaller[-1]).fits
  assert ('launch/tpu_run.sh' in plan.describe(result)) == (topology.platform == 'tpu')


@pytest.mark.filterwarnings('ignore:the load_module')
def test_a_machine_that_ends_in_time_and_fits_by_compiling(monkeypatch):
  compiled = []

  def compile_step(config, topology):
    compiled.append((str(topology), config.mesh.expert))
    return types.SimpleNamespace(fits=len(compiled) > 1, step_seconds=2.0, memory={'all': 2**30})

  monkeypatch.setattr(machine.step, 'compile_step', compile_step)
  monkeypatch.setattr(machine.topologies, 'can_compile', lambda topology: True)
  config = cli.config_of(['--config=configs/mot.py:base', '--config.train.steps=43200'])
  found = machine.find(config, 'v5e')
  assert [name for name, _ in compiled] == ['v5e:2x2', 'v5e:2x4'] and compiled[1][1] == 8
  assert found['basis'] == machine.COMPILED and found['memory'] == 2**30
  assert (found['type'], found['hours'], found['chip_hours']) == ('v5litepod-8', 24, 192)
  assert (
    '1d00h, 192 v5e hours: 2 s per step is the compiler' in machine.describe(found, 'v5e')[1][1]
  )
  soon = machine.find(config, 'v5e', days=0.03, compiles=False)
  assert soon['chips'] == 8 and soon['hours'] < 0.03 * 24
  assert machine.find(config, 'v5e', days=1e-6, compiles=False) is None
  assert 'no v5e of any size' in machine.describe(None, 'v5e')[0][1]


def test_the_best_number_of_experts_in_memory():
  coefficients = laws.PUBLISHED['joint']
  result = plan.make(coefficients, 16, {'flops': 1e22}, grid.PAPER, memory=80e9)
  model, memory = result['model'], result['memory']
  assert memory['experts'][16]['loss'] == min(one['loss'] for one in memory['experts'].values())
  assert 0.9 < memory['bytes'] / 80e9 <= 1 and model['experts'] == 16
  assert 'loss 2.1124, 36.3B parameters, 3.3B active' in plan.describe(result)
  tiny = plan.make(coefficients, 8, {'flops': 1e12}, grid.LAPTOP, memory=3 * 2**20)
  assert tiny['memory']['bytes'] <= 3 * 2**20 and tiny['model']['d_model'] == 32
  with pytest.raises(ValueError, match='give it as --flops'):
    plan.in_memory(coefficients, {'loss': 2.5}, 80e9, grid.PAPER)
  with pytest.raises(ValueError, match='no model fits into 977 KiB'):
    plan.in_memory(coefficients, {'flops': 1e22}, 1e6, grid.PAPER)


def test_rates_and_extrapolation():
  result = plan.make(PRINTED, 64, {'flops': 1e21}, grid.PAPER, report.fitted_runs('printed', 64))
  assert result['peak_lr'] == pytest.approx(3.8e-5, rel=0.02)
  assert '29.6 times the parameters of the largest fitted run' in plan.describe(result)
  small = plan.make(PRINTED, 64, {'flops': 1e18}, grid.PAPER, report.fitted_runs('printed', 64))
  assert small['peak_lr'] == 2e-4 and "0.0002, the recipe's" in plan.describe(small)
  assert not any('parameters' in text for text in small['extrapolation'])


def test_a_dense_plan():
  result = plan.make(PRINTED, 1, {'tokens': 1e11}, grid.PAPER)
  assert 'dense' not in result and result['model']['experts'] == 0
  assert result['tokens_per_param'] == result['tokens_per_active_param']
  assert 'granularity' not in plan.describe(result)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'target': {'flops': 1e40}}, 'no budget between 1e6 and 1e36 FLOPs'),
    ({'chip': 'v99'}, '--chip=v99: unknown chip'),
    ({'chip': 't4'}, 'no machines with it are known, only with v4, v5e'),
    ({'chip': 'v5e', 'mfu': 40}, '--mfu=40'),
  ],
)
def test_invalid_plans(changes, message):
  arguments = {'expansion_rate': 64, 'target': {'flops': 1e21}, 'recipe': grid.PAPER} | changes
  with pytest.raises(ValueError, match=message):
    plan.make(PRINTED, **arguments)
