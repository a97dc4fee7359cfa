"""Predictions are files, and their hits and misses a page that only grows."""

import dataclasses
import json
import os
import pathlib
import time

import pytest

from moejax import cli, run_folder
from moejax.scaling_laws import collect, fit, grid, laws, predictions, report
from moejax.text import short, utc

LAW = laws.Coefficients(c=0.5, a=9.0, alpha=0.22, b=37.0, beta=0.27, g=3.0, gamma=0.7)
LAWS = {8: LAW, 1: LAW._replace(g=None, gamma=None)}
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')  # ml_collections reads configs so


@pytest.fixture(scope='module')
def law(tmp_path_factory):
  """A fit.json of the laptop grid with losses of a law and a little noise."""
  runs = []
  for i, cell in enumerate(grid.make('laptop', LAWS)):
    values = {f.name: getattr(cell, f.name, '') for f in dataclasses.fields(collect.Run)}
    runs.append(
      collect.Run(**values | {'loss': cell.predicted_loss + 0.01 * ((i + i // 3) % 3 - 1)})
    )
  fits = fit.fit_moe_and_dense(*collect.by_kind(runs), starts=2, repeats=20)
  folder = tmp_path_factory.mktemp('law')
  report.save(fits, folder / 'fit.json')
  collect.write_table(runs, folder / 'runs.csv')
  return folder / 'fit.json'


def _predict(law, preset, tmp_path):
  cells = grid.make(preset, report.load(law))
  path = tmp_path / 'predictions.json'
  return cells, path, predictions.write(cells, law, path, 'python -m moejax.scaling_laws grid')


def _run(folder, cell, loss, seed=0, seconds=100, **fields):
  """A finished run of a cell, that ended some seconds from now and was copied later."""
  config = cli.config_of([*cell.arguments[2:], f'--config.train.seed={seed}'])
  config.update_from_flattened_dict(fields)
  run_folder.write(config, folder)
  summary = {'finished': True, 'validation': {'loss': loss}, 'date': utc(time.time() + seconds)}
  (folder / 'summary.json').write_text(json.dumps(summary))
  os.utime(folder / 'summary.json', (2**32, 2**32))


def test_what_a_file_of_predictions_holds(law, tmp_path):
  cells, path, entries = _predict(law, 'laptop_larger', tmp_path)
  record = json.loads(path.read_text())
  assert (
    record['predictions'] == json.loads(json.dumps(entries)) and len(record['fit_sha256']) == 64
  )
  assert record['date'].endswith('Z') and record['command'].startswith('python -m moejax')
  for cell, entry in zip(cells, entries, strict=True):
    assert entry['loss'] == cell.predicted_loss
    assert entry['low'] < cell.predicted_loss - 0.01 and cell.predicted_loss + 0.01 < entry['high']
    assert any('times the parameters of the largest fitted run' in text for text in entry['beyond'])
    assert grid.Cell(**entry['cell']) == cell and not entry['fitted']
  with pytest.raises(ValueError, match='predictions are written once'):
    predictions.write(cells, law, path, '')


def test_hits_and_misses(law, tmp_path):
  (dense, coarse, fine), path, entries = _predict(law, 'laptop_larger', tmp_path)
  loss = dense.predicted_loss
  for seed, error in enumerate((0.01, -0.01, 0.003)):
    _run(tmp_path / 'runs' / f'dense-{seed}', dense, loss + error, seed)
  _run(tmp_path / 'runs' / 'coarse', coarse, coarse.predicted_loss + 0.5)
  _run(tmp_path / 'runs' / 'other', fine, 1.0, **{'optimizer.peak_lr': 0.1})  # another run
  page = tmp_path / 'page.md'
  rows, new, missing = predictions.judge(path, [tmp_path / 'runs'], page)
  assert f'| {dense.name} | 393k | {short(dense.tokens)} | dense | 1 |' in rows[0]
  assert new == rows and len(rows) == 2 and missing == [fine.name]
  assert rows[0].endswith('| 0, 1, 2 | +0.001 ± 0.025 | hit |')
  assert rows[1].endswith('| 0 | +0.500 | **miss** |')
  before = page.read_text()
  assert before.startswith('# Predictions') and before.endswith(rows[1] + '\n')
  assert predictions.judge(path, [tmp_path / 'runs'], page)[1] == []  # nothing new
  assert page.read_text() == before
  _run(tmp_path / 'runs' / 'coarse-1', coarse, coarse.predicted_loss + 0.6, seed=1)
  (row,) = predictions.judge(path, [tmp_path / 'runs'], page)[1]
  assert page.read_text() == before + row + '\n' and '| 0, 1 | +0.550' in row


def test_the_page_of_the_documentation_is_of_the_program():
  page = pathlib.Path(__file__).parents[2] / 'docs' / 'predictions.md'
  assert page.read_text().startswith(predictions._PAGE)


@pytest.mark.parametrize(
  ('commit', 'shown'),
  [('a' * 40, 'a' * 10), ('a' * 40 + '-dirty', 'a' * 10 + '-dirty'), ('unknown', 'unknown')],
)
def test_a_changed_tree_is_marked(commit, shown):
  assert predictions._short_commit(commit) == shown


def test_a_prediction_after_the_fact_is_none(law, tmp_path):
  (dense, *_), path, _ = _predict(law, 'laptop_larger', tmp_path)
  _run(tmp_path / 'run', dense, dense.predicted_loss, seconds=-100)
  (row,), *_ = predictions.judge(path, [tmp_path / 'run'], tmp_path / 'page.md')
  assert row.endswith('| none: predicted after a run had ended |')
  _run(tmp_path / 'run' / 'again', dense, dense.predicted_loss)
  (tmp_path / 'run').rename(tmp_path / 'first')
  runs = [tmp_path / 'first', tmp_path / 'first' / 'again']  # the same seed, trained anew
  (row,), *_ = predictions.judge(path, runs, tmp_path / 'page.md')
  assert row.endswith('| none: predicted after a run had ended |')


def test_a_run_of_the_fit_is_no_prediction(law, tmp_path):
  cells, path, entries = _predict(law, 'laptop', tmp_path)
  assert all(entry['fitted'] for entry in entries)
  _run(tmp_path / 'run', cells[0], 2.0)
  (row,), *_ = predictions.judge(path, [tmp_path / 'run'], tmp_path / 'page.md')
  assert row.endswith('| none: the fit was made with this run |')


def test_a_run_that_diverged_is_a_miss(law, tmp_path):
  (dense, *_), path, _ = _predict(law, 'laptop_larger', tmp_path)
  _run(tmp_path / 'run', dense, None)
  (row,), *_ = predictions.judge(path, [tmp_path / 'run'], tmp_path / 'page.md')
  assert row.endswith('| **miss** |') and '| nan |' in row


def test_bad_files(law, tmp_path):
  _, path, _ = _predict(law, 'laptop_larger', tmp_path)
  with pytest.raises(ValueError, match='is not a folder of runs'):
    predictions.judge(path, [tmp_path / 'nowhere'], tmp_path / 'page.md')
  with pytest.raises(ValueError, match='file not found; `grid --coefficients'):
    predictions.judge(tmp_path / 'a.json', [], tmp_path / 'page.md')
  record = json.loads(path.read_text())
  for name in ('date', 'predictions'):
    path.write_text(json.dumps({k: v for k, v in record.items() if k != name}))
    with pytest.raises(ValueError, match=f'is not a file of predictions: .*{name}'):
      predictions.judge(path, [], tmp_path / 'page.md')
  record['predictions'][0]['low'] = 9
  path.write_text(json.dumps(record))
  with pytest.raises(ValueError, match='does not cover'):
    predictions.judge(path, [], tmp_path / 'page.md')
  assert not (tmp_path / 'page.md').exists()
