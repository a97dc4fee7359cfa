"""Comparing runs."""

import json
import pathlib

import pytest

from moejax import compare, metrics, report


def _run(folder, corpus='c', loss=1.5):
  writer = metrics.MetricsWriter(folder, 0)
  for step in (10, 20):
    writer.write(step, {'loss': loss + 1 / step})
  writer.write(20, {'loss': loss}, prefix='validation')
  writer.close()
  summary = {
    'corpus': corpus,
    'tokenizer': 't',
    'parameters': {'total': 2e6, 'active': 1e6},
    'flops_per_token': {'model': 6e6},
    'tokens_seen': 1e6,
    'validation': {'loss': loss},
    'seconds': 60,
  }
  report.write_summary(folder, summary)
  return json.loads((folder / 'summary.json').read_text())


def test_runs_are_plotted_and_tabulated(tmp_path):
  _run(tmp_path / 'dense', loss=1.5)
  _run(tmp_path / 'mot', loss=1.25)
  table = compare.compare([tmp_path / 'dense', tmp_path / 'mot'], tmp_path / 'both.png')
  assert table.splitlines()[2].split()[0] == 'mot' and '1.2500' in table
  assert (tmp_path / 'both.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('name', ['folder', 'a.foo', 'png'])
def test_a_plot_of_no_known_format_is_refused(tmp_path, name):
  _run(tmp_path / 'dense')
  (tmp_path / 'folder').mkdir()
  with pytest.raises(ValueError, match=f'--output=.*/{name}: expected a name that ends in .png'):
    compare.compare([tmp_path / 'dense'], tmp_path / name)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['dense', 'folder']


def test_speed_up_to_the_loss_of_the_first_run(tmp_path):
  for name, losses in {'slow': (3.0, 2.5), 'fast': (2.75, 2.25), 'never': (4.0, 3.5)}.items():
    _run(tmp_path / name)
    writer = metrics.MetricsWriter(tmp_path / name, 0)
    for step, loss in zip((10, 20), losses, strict=True):
      writer.write(step, {'loss': loss}, prefix='validation')
    writer.close()
  runs = [tmp_path / name for name in ('slow', 'fast', 'never')]
  table = compare.compare(runs, tmp_path / 'a.png')
  assert _column(table, -2) == ['1.00x', '1.33x', 'never']  # half way between 10 and 20
  notes = compare.notes(compare.read(runs))
  assert notes.endswith('fewer steps than slow to its last loss, 2.5000')


def test_unfinished_runs_are_compared_and_marked(tmp_path):
  _run(tmp_path / 'dense', loss=1.5)
  summary = _run(tmp_path / 'mot', loss=1.25) | {'finished': False, 'validation': {}}
  report.write_summary(tmp_path / 'mot', summary | {'config': {'train': {'steps': 3000}}})
  runs = [tmp_path / 'dense', tmp_path / 'mot']
  table = compare.compare(runs, tmp_path / 'both.png')
  assert _column(table, -3) == ['1.5000', '1.2500']
  notes = compare.notes(compare.read(runs))
  assert notes.endswith('\nunfinished: mot, evaluated at step 20 of 3000')


@pytest.mark.parametrize(
  ('loss', 'steps'), [(5.0, 10), (4.0, 10), (3.0, 15), (2.0, 20), (1.5, 35), (1.0, 40), (0.9, None)]
)
def test_steps_to_reach_a_loss(loss, steps):
  assert compare.steps_to_reach(loss, [(10, 4.0), (20, 2.0), (30, 2.0), (40, 1.0)]) == steps


def test_runs_on_different_data_are_rejected(tmp_path):
  _run(tmp_path / 'a')
  _run(tmp_path / 'b', corpus='another')
  with pytest.raises(ValueError, match='different corpora'):
    compare.compare([tmp_path / 'a', tmp_path / 'b'], tmp_path / 'both.png')


def test_a_folder_without_a_run_is_named(tmp_path):
  with pytest.raises(ValueError, match='nothing holds no run with a checkpoint'):
    compare.compare([tmp_path / 'nothing'], tmp_path / 'both.png')


def _column(table, index):
  return [line.split()[index] for line in table.partition('\n\n')[0].splitlines()[1:]]


def test_runs_in_folders_of_the_same_name_are_distinguished(tmp_path):
  for name, loss in {'a/dense': 1.5, 'b/dense': 1.25, 'b/mot': 1.0, 'c/x/mot': 1.0}.items():
    _run(tmp_path / name, loss=loss)
  folders = [tmp_path / name for name in ('a/dense', 'b/dense', 'b/mot', 'c/x/mot')]
  table = compare.compare(folders, tmp_path / 'all.png')
  assert _column(table, 0) == ['a/dense', 'b/dense', 'b/mot', 'x/mot']
  assert _column(table, -3) == ['1.5000', '1.2500', '1.0000', '1.0000']
  assert table == compare.compare(folders, tmp_path / 'new' / 'folder' / 'all.png')


def test_a_path_that_ends_like_another_is_distinguished():
  paths = [pathlib.Path(p) for p in ('/runs/dense', '/old/runs/dense', '/old')]
  assert [compare._name(p, paths) for p in paths] == ['/runs/dense', 'old/runs/dense', 'old']


def test_a_run_given_twice_counts_once_by_its_first_name(tmp_path, monkeypatch):
  _run(tmp_path / 'dense')
  (tmp_path / 'latest').symlink_to('dense')
  monkeypatch.chdir(tmp_path)
  runs = ['latest', './dense/', tmp_path / 'dense', 'nothing/../dense']
  assert _column(compare.compare(runs, 'both.png'), 0) == ['latest']
  monkeypatch.chdir(tmp_path / 'dense')
  assert _column(compare.compare(['.'], 'both.png'), 0) == ['dense']


@pytest.mark.parametrize(
  'text',
  [
    '',
    '{"corpus": "c"',
    '[]',
    '{"corpus": "c", "tokenizer": "t", "parameters": 3}',
    '\xff',
    '[' * 100_000,
  ],
)
def test_an_incomplete_or_older_summary_is_named(tmp_path, text):
  _run(tmp_path / 'a')
  (tmp_path / 'a' / 'summary.json').write_text(text)
  with pytest.raises(ValueError, match='a/summary.json is incomplete or from another version'):
    compare.compare([tmp_path / 'a'], tmp_path / 'both.png')


def test_a_corpus_that_is_no_text_is_an_incomplete_summary(tmp_path):
  summary = _run(tmp_path / 'a') | {'corpus': {'name': 'c'}}
  report.write_summary(tmp_path / 'a', summary)
  with pytest.raises(ValueError, match='a/summary.json is incomplete or from another version'):
    compare.compare([tmp_path / 'a'], tmp_path / 'both.png')


def test_a_run_without_its_metrics_is_named(tmp_path):
  _run(tmp_path / 'a')
  (tmp_path / 'a' / 'metrics.jsonl').unlink()
  with pytest.raises(ValueError, match='a has no validation loss in its metrics.jsonl'):
    compare.compare([tmp_path / 'a'], tmp_path / 'both.png')
