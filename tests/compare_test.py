"""Comparing runs."""

import json

import pytest

from moejax import compare, metrics


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
  metrics.write_summary(folder, summary)
  return json.loads((folder / 'summary.json').read_text())


def test_runs_are_plotted_and_tabulated(tmp_path):
  _run(tmp_path / 'dense', loss=1.5)
  _run(tmp_path / 'mot', loss=1.25)
  table = compare.compare([tmp_path / 'dense', tmp_path / 'mot'], tmp_path / 'both.png')
  assert table.splitlines()[2].split()[0] == 'mot' and '1.2500' in table
  assert (tmp_path / 'both.png').read_bytes().startswith(b'\x89PNG')


def test_runs_on_different_data_are_refused(tmp_path):
  _run(tmp_path / 'a')
  _run(tmp_path / 'b', corpus='another')
  with pytest.raises(ValueError, match='different corpora'):
    compare.compare([tmp_path / 'a', tmp_path / 'b'], tmp_path / 'both.png')


def test_a_folder_without_a_run_is_named(tmp_path):
  with pytest.raises(ValueError, match='nothing holds no finished run'):
    compare.compare([tmp_path / 'nothing'], tmp_path / 'both.png')
