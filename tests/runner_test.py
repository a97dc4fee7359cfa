"""Training the cells of a grid: concurrently, and resumed after a kill."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from moejax import cli, exit_codes, metrics, run_folder, runner
from moejax.scaling_laws import grid

pytestmark = pytest.mark.filterwarnings('ignore:the load_module')  # ml_collections calls it
ROOT = pathlib.Path(__file__).parent.parent


def _cell(name, steps, **changed):
  fields = {'steps': steps, 'eval_interval': 1000, 'checkpoint_interval': 20, **changed}
  size = {'d_model': 16, 'blocks': 2, 'heads': 2, 'expansion_rate': 1, 'granularity': 0}
  return grid.Cell(
    name=name, config='configs/dense.py:debug',
    fields={f'train.{field}': str(value) for field, value in fields.items()},
    steps=steps, tokens=512 * steps, params=6144, active_params=6144, flops=1e6 * steps, **size,
  )  # fmt: skip


def _start(cells, folder):
  grid.write(cells, folder / 'grid.json')
  files = [f'--grid={folder / "grid.json"}', f'--workdir={folder / "runs"}']
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  return subprocess.Popen(
    [sys.executable, '-m', 'moejax.scaling_laws', 'run', *files],
    cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


def _wait_for_step(folder, step):
  end = time.monotonic() + 120
  while time.monotonic() < end:
    lines = metrics.read_metrics(folder)
    if lines and lines[-1]['step'] >= step:
      return
    time.sleep(0.1)
  raise AssertionError(f'{folder} did not reach step {step}')


@pytest.mark.slow
def test_a_grid_is_trained_and_resumes_after_a_kill(tmp_path):
  cells = [_cell('short', 4), _cell('long', 1000)]
  first = _start(cells, tmp_path)
  _wait_for_step(tmp_path / 'runs' / 'long', 50)
  first.send_signal(signal.SIGTERM)
  out, _ = first.communicate(timeout=120)
  assert first.returncode == cli.INTERRUPTED and 'resume with\n' in out
  assert f'--workdir={tmp_path / "runs"}' in out
  reached = metrics.read_metrics(tmp_path / 'runs' / 'long')[-1]['step']
  assert 50 <= reached < 1000

  second = _start(cells, tmp_path)
  out, err = second.communicate(timeout=120)
  assert second.returncode == cli.OK, err
  assert '2 of 2 cells are done' in out
  summary = json.loads((tmp_path / 'runs' / 'long' / 'summary.json').read_text())
  assert summary['resumed_from'] == reached and summary['steps'] == 1000


def test_two_programs_do_not_train_the_same_cells(tmp_path):
  with runner._lock(tmp_path):
    with pytest.raises(ValueError, match='another program is training'):
      runner.run([_cell('short', 4)], tmp_path)


def _folder_of(cell, workdir, **changed):
  """A finished run of the cell, with fields of its config changed."""
  config = cli.config_of(cell.arguments[2:])
  config.update_from_flattened_dict(changed)
  (workdir / cell.name).mkdir(exist_ok=True)
  run_folder.write(config, workdir / cell.name)
  (workdir / cell.name / 'summary.json').write_text('{}')


@pytest.mark.heavy
def test_a_cell_that_fails_does_not_stop_the_others(tmp_path, capsys):
  cells = [_cell('bad', 4, sample_prompt='', sample_length=9), _cell('good', 4)]
  _folder_of(cells[1], tmp_path)
  assert runner.run(cells, tmp_path) == exit_codes.FAILS_AGAIN
  printed = capsys.readouterr()
  assert 'bad failed' in printed.err and '1 of 2 cells are done' in printed.out
  assert 'train.sample_prompt must not be empty' in (tmp_path / 'bad.log').read_text()
  assert runner.run(cells[1:], tmp_path) == cli.OK


@pytest.mark.parametrize(
  ('codes', 'code', 'starts'),
  [
    ([1, 75, 0], cli.OK, 3),
    ([-9, -9, -9, 0], cli.FAILED, 3),  # killed, for want of memory say
    ([1, exit_codes.FAILS_AGAIN, 0], exit_codes.FAILS_AGAIN, 2),
  ],
)
def test_a_cell_is_started_again_if_that_may_help(
  tmp_path, monkeypatch, capsys, codes, code, starts
):
  """Of a process that ends with one code after the other."""
  left = list(codes)

  class _Process:
    def __init__(self, *_, **options):
      self.returncode = left.pop(0)

    def poll(self):
      return self.returncode

  monkeypatch.setattr(runner.subprocess, 'Popen', _Process)
  monkeypatch.setattr(runner, '_backend', lambda: 'cpu')
  monkeypatch.setattr(runner, '_POLL_SECONDS', 0)
  assert runner.run([_cell('a', 4)], tmp_path) == code
  assert len(codes) - len(left) == starts
  assert capsys.readouterr().err.count('is started again') == starts - 1


@pytest.mark.parametrize(
  'changed', [{'train.steps': 8}, {'train.seed': 5}, {'optimizer.peak_lr': 0.5}, {'model.d_ff': 8}]
)
@pytest.mark.parametrize('finished', [True, False])
def test_runs_of_an_edited_grid_are_rejected(tmp_path, changed, finished):
  cell = _cell('a', 4)
  _folder_of(cell, tmp_path, **changed)
  if not finished:
    (tmp_path / 'a' / 'summary.json').unlink()
  ((field, value),) = changed.items()
  with pytest.raises(ValueError, match=f'a: {field} = {value} in the folder, .* in the grid'):
    runner.run([cell], tmp_path)


def test_the_summary_of_a_checkpoint_is_not_that_of_a_run(tmp_path):
  cell = _cell('a', 4)
  _folder_of(cell, tmp_path)
  assert runner.is_done(tmp_path, cell)
  (tmp_path / 'a' / 'summary.json').write_text('{"finished": false, "steps": 2}')
  assert not runner.is_done(tmp_path, cell)
  (tmp_path / 'a' / 'summary.json').write_text('{"finished": true, "steps"')  # cut off
  assert not runner.is_done(tmp_path, cell)


def test_how_a_run_computes_may_change(tmp_path):
  cell = _cell('a', 4)
  _folder_of(cell, tmp_path, **{'mesh.fsdp': 4, 'model.loss_chunk': 7, 'train.trackers': ()})
  assert runner.run([cell], tmp_path) == cli.OK


def test_a_summary_without_a_config_is_rejected(tmp_path):
  cell = _cell('a', 4)
  _folder_of(cell, tmp_path)
  (tmp_path / 'a' / 'config.json').unlink()
  with pytest.raises(ValueError, match='a: it has a summary.json but no config.json'):
    runner.run([cell], tmp_path)


@pytest.mark.parametrize(
  ('cells', 'message'),
  [
    ([_cell('a', 4), _cell('a', 8)], 'two cells are named a'),
    ([_cell('a', 4), _cell('b', 8), _cell('c', 4)], 'a and c have the same configuration'),
    (
      [_cell('a', 4, seeds=3)],
      "a: --config.train.seeds: the config has no such field; did you mean 'train.seed'",
    ),
    ([_cell('a', 4, seed='many')], 'a: .*seed.*many'),
  ],
)
def test_invalid_cells(tmp_path, cells, message):
  with pytest.raises(ValueError, match=message):
    runner.run(cells, tmp_path / 'runs')
  assert not (tmp_path / 'runs').exists()


def test_launch_commands_are_quoted_and_complete():
  cells = grid.make('laptop')[:2]
  template = 'gcloud ssh {name} --command={command}'
  first, _ = runner.launch_commands(cells, 'gs://bucket/grid/', template)
  words = first.split(maxsplit=3)
  assert words[:3] == ['gcloud', 'ssh', cells[0].name]
  assert words[3].startswith("--command='python -m moejax.main --config=configs/dense.py")
  assert words[3].endswith(f"--workdir=gs://bucket/grid/{cells[0].name}'")


def test_cells_import_what_their_program_does(monkeypatch):
  monkeypatch.setattr(runner.imports, '_named', ['/my code/a.py', 'b'])
  (line,) = runner.launch_commands(grid.make('laptop')[:1], 'runs', 'sh -c {command}')
  assert shlex.split(shlex.split(line)[2])[-2] == '--imports=/my code/a.py,b'


def test_launch_commands_survive_two_shells():
  (cell,) = grid.make('laptop')[:1]
  (line,) = runner.launch_commands([cell], "/my runs/it's", 'sh -c {command}')
  *_, folder = shlex.split(shlex.split(line)[2])
  assert folder == f"--workdir=/my runs/it's/{cell.name}"


@pytest.mark.parametrize('template', ['ssh {name}', 'ssh {host} {command}', 'ssh {} {command}'])
def test_invalid_launch_templates(template):
  with pytest.raises(ValueError, match='--launch'):
    list(runner.launch_commands(grid.make('laptop')[:1], 'runs', template))
