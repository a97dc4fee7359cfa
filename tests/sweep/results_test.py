"""What a sweep tells: means and noise over seeds, the best cell, the edge of the range."""

import csv
import json
import os
import pathlib
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
  assert [line.split() for line in table[:4]] == [
    ['optimizer.peak_lr', 'validation', 'loss', 'seeds'],
    ['0.001', '1.5200', '±', '0.0283', '2'],
    ['0.003', '1.2200', '±', '0.0141', '2', 'within', 'noise'],
    ['0.01', '1.2000', '1', 'best', '(1', 'of', '2', 'without', 'a', 'result)'],
  ]
  assert table[6].startswith('within noise: as good as the best')
  assert table[7].startswith(
    'The best optimizer.peak_lr, 0.01, is the largest of the sweep: add optimizer.peak_lr=0.033 '
  )


def test_differences_beyond_the_noise():
  axes, groups = _sweep([1.50, 1.51, 1.20, 1.21, 1.40, 1.41], RATES, SEEDS)
  table = results.describe(axes, groups)
  assert 'within noise' not in table and 'better than all others by more than the noise' in table
  assert 'of the sweep: add' not in table


def test_the_noise_is_that_of_the_noisier_cells():
  quiet, noisy = [1.50, 1.50], [1.20, 1.24]
  axes, groups = _sweep([*quiet, *noisy, 1.275, 1.285], RATES, SEEDS)
  assert results.noise(groups) == pytest.approx(np.sqrt((0.0008 + 0.00005) / 3))
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
  ],
)  # fmt: skip
def test_the_edge_of_the_range(axis, losses, advice):
  table = results.describe(*_sweep(losses, axis))
  assert advice in table if advice else 'of the sweep: add' not in table


def test_zipped_fields_continue_together():
  zipped = ('model.d_ff=32,64,128', 'optimizer.peak_lr=4e-3,2e-3,1e-3')
  table = results.describe(*_sweep([3, 2, 1], zipped=zipped))
  assert 'add model.d_ff=256, optimizer.peak_lr=0.0005 to the command' in table


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
    (tmp_path / cell.name / 'summary.json').write_text(json.dumps(summary))
  done = _call(f'--workdir={tmp_path}', *words)
  assert done.returncode == cli.OK, done.stderr
  assert '6 of 6 cells are done' in done.stdout and 'add optimizer.peak_lr=0.00033' in done.stdout
  with (tmp_path / 'sweep.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert [float(row['loss']) for row in rows] == pytest.approx(1 + np.arange(6) / 10)
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
