"""What a sweep tells: means and noise over seeds, the best cell, the edge of the range."""

import csv
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from moejax import cli, run_folder
from moejax.sweep import axes as axes_lib, results
from moejax.text import split_values

pytestmark = pytest.mark.filterwarnings('ignore:the load_module')  # ml_collections calls it
ROOT = pathlib.Path(__file__).parent.parent.parent


def _sweep(losses, *grid, zipped=()):
  """The axes and groups of cells with these losses, in order; None: not finished."""
  axes = axes_lib.parse(list(grid), list(zipped))
  cells = axes_lib.make_cells('configs/dense.py:debug', {}, axes)
  found = {
    cell.name: {'validation': {'loss': loss}}
    for cell, loss in zip(cells, losses, strict=True)
    if loss is not None
  }
  return axes, results.groups(cells, found)


RATES, SEEDS = 'optimizer.peak_lr=1e-3,3e-3,1e-2', 'train.seed=0,1'


def test_the_table_of_seeds():
  axes, groups = _sweep([1.50, 1.54, 1.21, 1.23, 1.20, None], RATES, SEEDS)
  table = results.describe(axes, groups).splitlines()
  assert [re.split(r'  +', line) for line in table[:4]] == [
    ['optimizer.peak_lr', 'validation loss', 'seeds', 'behind the best'],
    ['0.001', '1.5200 ± 0.2541', '2', '+0.3200 ± 0.1490'],
    ['0.003', '1.2200 ± 0.1271', '2', 'within noise, +0.0200 ± 0.1178'],
    ['0.01', '1.2000', '1', 'best (1 of 2 without a result)'],
  ]
  assert table[6].startswith('noise of seeds: 0.0224 nats, their standard deviation (2 degrees of')
  assert table[7].startswith('within noise: as good as the best')
  assert table[8].startswith(
    'The best optimizer.peak_lr, 0.01, is the largest of the sweep: add optimizer.peak_lr=0.033 '
  )


def test_values_that_were_added_later_are_in_their_place():
  grid = ('model.activation=relu,gelu', 'optimizer.peak_lr=3e-3,1e-2,1e-3')
  _, groups = _sweep([3, 4, 2, 30, 40, 20], *grid)
  assert [list(group.values.values()) for group in groups] == [
    [activation, rate] for activation in ('relu', 'gelu') for rate in (0.001, 0.003, 0.01)
  ]
  assert [group.losses for group in groups] == [[2], [3], [4], [20], [30], [40]]


RATES_AND_SEEDS = ('optimizer.peak_lr=1e-3,1e-2,1e-1', 'train.seed=0,1,2')


def test_the_best_value_has_an_interval():
  losses = lambda width: [x + width * i for x in (1.6, 1.5, 1.6) for i in (-1, 0, 1)]
  table = results.describe(*_sweep(losses(0.01), *RATES_AND_SEEDS))
  (line,) = re.findall('^best .*', table, re.M)
  number = r'([\d.]+)'
  found = re.match(rf'best optimizer.peak_lr: 0.01 \({number} to {number}\), by a parabola', line)
  low, high = map(float, found.groups())
  assert 0.005 < low < 0.009 and low * high == pytest.approx(1e-4, rel=0.05)
  table = results.describe(*_sweep(losses(0.1), *RATES_AND_SEEDS))
  assert 'best optimizer.peak_lr: 0.01 (0.001 or less to 0.1 or more), by a parabola' in table
  table = results.describe(*_sweep([1.6, 1.5, 1.6], RATES_AND_SEEDS[0]))
  assert 'best optimizer.peak_lr: 0.01, by a parabola' in table
  assert '\nbest ' not in results.describe(*_sweep([1.6, 1.5, 1.4], RATES_AND_SEEDS[0]))


def test_differences_beyond_the_noise():
  axes, groups = _sweep([1.50, 1.51, 1.20, 1.21, 1.40, 1.41], RATES, SEEDS)
  table = results.describe(axes, groups)
  assert 'within noise' not in table and 'better than all others by more than the noise' in table
  assert 'of the sweep: add' not in table


def test_the_noise_is_that_of_the_noisier_cells():
  quiet, noisy = [1.50, 1.50], [1.20, 1.24]
  axes, groups = _sweep([*quiet, *noisy, 1.275, 1.285], RATES, SEEDS)
  assert results.noise(groups).deviation == pytest.approx(np.sqrt((0.0008 + 0.00005) / 3))
  assert [results.is_within_noise(g, groups[1], groups) for g in groups] == [False, True, True]
  axes, groups = _sweep([*quiet, *noisy, 1.34, 1.35], RATES, SEEDS)
  assert not results.is_within_noise(groups[2], groups[1], groups)
  assert not results.is_within_noise(groups[2], groups[1], groups[1:])


def test_one_seed_cannot_tell_noise():
  axes, groups = _sweep([1.5, None, 1.4], RATES)
  table = results.describe(axes, groups)
  assert 'differences may be noise: add --grid train.seed=0,1,2' in table
  assert '0.003              -                0      (1 of 1 without a result)' in table


@pytest.mark.parametrize(
  ('axis', 'losses', 'advice'),
  [
    ('model.d_ff=32,64,96', [3, 2, 1], '96, is the largest of the sweep: add model.d_ff=128 '),
    ('model.d_ff=32,64,128', [3, 2, 1], 'add model.d_ff=256 '),
    ('optimizer.peak_lr=1e-2,1e-3', [2, 1], 'smallest of the sweep: add optimizer.peak_lr=0.0001 '),
    ('optimizer.peak_lr=1e-2,1e-3,1e-1', [1, 2, None], None),
    ('optimizer.accumulation=1,2', [1, 2], None),  # there is nothing below 1
    ('model.activation=gelu,relu', [1, 2], None),
    ('train.seed=0,1', [1, 2], None),
    ('train.steps=10,20', [2, 1], None),
  ],
)  # fmt: skip
def test_the_edge_of_the_range(axis, losses, advice):
  table = results.describe(*_sweep(losses, axis))
  assert advice in table if advice else 'of the sweep: add' not in table


def test_zipped_fields_continue_together():
  zipped = ('model.d_ff=32,64,128', 'optimizer.peak_lr=4e-3,2e-3,1e-3')
  table = results.describe(*_sweep([3, 2, 1], zipped=zipped))
  assert 'add model.d_ff=256, optimizer.peak_lr=0.0005 to the command' in table


def test_zipped_fields_may_repeat_a_value():
  zipped = ('model.moe.router=relu,relu', 'model.d_ff=32,32', 'optimizer.peak_lr=4e-3,2e-3')
  assert 'relu' in results.describe(*_sweep([2, 1], zipped=zipped))


@pytest.mark.parametrize(
  'grid', [(RATES, SEEDS, 'model.d_ff=32,64'), ('model.activation=gelu,relu',), (SEEDS,)]
)
def test_plots(tmp_path, grid):
  cells = np.prod([len(split_values(text)) for text in grid])
  results.plot(*_sweep(list(1 + np.arange(cells) / 10), *grid), tmp_path / 'sweep.png')
  assert (tmp_path / 'sweep.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.heavy
def test_a_finished_sweep_prints_its_table_again(tmp_path):
  words = ['--grid', RATES, f'--zip={SEEDS}', '--config.train.steps=20']
  axes = axes_lib.parse([RATES], [SEEDS])
  cells = axes_lib.make_cells('configs/dense.py:debug', {'train.steps': '20'}, axes)
  for number, cell in enumerate(cells):
    (tmp_path / cell.name).mkdir()
    run_folder.write(cli.config_of(cell.arguments[2:]), tmp_path / cell.name)
    summary = {'validation': {'loss': 1 + number / 10}, 'steps': 20, 'finished': True}
    summary |= {'training': {'loss': 2.0, 'clipped': 0.5}}
    (tmp_path / cell.name / 'summary.json').write_text(json.dumps(summary))
  done = _call(f'--workdir={tmp_path}', *words)
  assert done.returncode == cli.OK, done.stderr
  assert '6 of 6 cells are done' in done.stdout and 'add optimizer.peak_lr=0.00033' in done.stdout
  with (tmp_path / 'sweep.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert [float(row['loss']) for row in rows] == pytest.approx(1 + np.arange(6) / 10)
  assert rows[1]['train_loss'] == '2.0' and rows[1]['clipped'] == '0.5'
  assert rows[1]['name'] == 'peak_lr=0.001_seed=1' and rows[1]['train.seed'] == '1'
  assert (tmp_path / 'sweep.png').exists()


def _call(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'moejax.sweep', '--config=configs/dense.py:debug', *arguments],
    cwd=ROOT, env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True,
  )  # fmt: skip


@pytest.mark.heavy
def test_commands_for_other_machines():
  done = _call('--workdir=gs://bucket/lr', '--grid', RATES, '--launch=ssh {name} {command}')
  lines = done.stdout.splitlines()
  assert len(lines) == 3 and lines[2] == (
    "ssh peak_lr=0.01 'python -m moejax.main --config=configs/dense.py:debug "
    "--config.optimizer.peak_lr=1e-2 --workdir=gs://bucket/lr/peak_lr=0.01'"
  )


@pytest.mark.slow
def test_a_sweep_trains(tmp_path):
  done = _call(f'--workdir={tmp_path}', '--grid', RATES, '--config.train.steps=2')
  assert done.returncode == cli.OK and '3 of 3 cells are done' in done.stdout, done.stderr
  assert 'best' in done.stdout
