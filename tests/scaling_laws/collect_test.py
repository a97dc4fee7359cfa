"""Runs as they come from summary.json files and tables."""

import dataclasses
import json

import pytest

from moejax.scaling_laws import collect, laws


def _summary(folder, *, sublayer='mlp', loss=2.0, corpus='c', granularity=4, expansion_rate=8):
  d_model, d_ff, blocks = 16, 64, 3
  experts = 2 * d_model * d_ff * blocks * expansion_rate
  by_kind = {'attention': 4 * d_model**2 * blocks, 'norm': 99, 'head': 999}
  by_kind |= {'mlp': 2 * d_model * d_ff * blocks} if sublayer == 'mlp' else {'experts': experts}
  by_kind |= {'router': d_model * granularity * expansion_rate} if sublayer == 'moe' else {}
  moe = {'granularity': granularity, 'expansion_rate': expansion_rate}
  blocks = [[['attention', sublayer], blocks]]
  summary = {
    'config': {'model': {'d_model': d_model, 'd_ff': d_ff, 'blocks': blocks, 'moe': moe}},
    'parameters': {'by_kind': by_kind},
    'tokens_seen': 1000,
    'validation': {'loss': loss},
    'corpus': corpus,
    'tokenizer': 't',
  }
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text('{}')
  (folder / 'summary.json').write_text(json.dumps(summary))


def test_a_grid_s_folder(tmp_path):
  _summary(tmp_path / 'dense')
  _summary(tmp_path / 'sparse', sublayer='moe', loss=1.5)
  _summary(tmp_path / 'mixed', sublayer='mot')
  _summary(tmp_path / 'exploded', loss=None)
  (tmp_path / 'unfinished').mkdir()
  (tmp_path / 'unfinished' / 'config.json').write_text('{}')
  (tmp_path / 'sparse.log').write_text('')
  runs, excluded = collect.collect([tmp_path])
  (sparse,), (dense,) = collect.by_kind(runs)
  assert (dense.name, dense.params, dense.granularity) == ('dense', 12 * 16**2 * 3, laws.DENSE)
  assert dense.flops == 1000 * 6 * dense.params
  assert (sparse.params, sparse.granularity) == (laws.total_params(16, 3, 8), 4)
  assert (sparse.expansion_rate, sparse.tokens, sparse.loss) == (8, 1000, 1.5)
  assert sparse.flops == 1000 * laws.flops_per_token(16, 3, 8, 4)
  assert len(sparse.config_hash) == 12 and sparse.config_hash != dense.config_hash
  assert {name: why.split()[0] for name, why in excluded.items()} == {
    'exploded': 'diverged:',
    'mixed': 'its',
    'unfinished': 'unfinished',
  }


def test_tables_come_back_as_they_were(tmp_path):
  _summary(tmp_path / 'dense')
  _summary(tmp_path / 'sparse', sublayer='moe', loss=1.5)
  runs, _ = collect.collect([tmp_path / 'dense', tmp_path / 'sparse'])
  collect.write_table(runs, tmp_path / 'runs.csv')
  assert collect.collect([tmp_path / 'runs.csv']) == (runs, {})


def test_four_columns_are_enough(tmp_path):
  path = tmp_path / 'runs.csv'
  path.write_text('params,tokens,granularity,loss\n43e6,1e9,2,3.5\n12e6,1e9,0,nan\n')
  runs, excluded = collect.collect([path], expansion_rate=64)
  (run,) = runs
  assert (run.name, run.expansion_rate, run.loss) == ('runs.csv:2', 64, 3.5)
  d_model = (run.params * 64 / 516) ** (1 / 3)
  assert run.flops == pytest.approx(1e9 * laws.flops_per_token(d_model, d_model / 64, 64, 2))
  assert list(excluded) == ['runs.csv:3']
  with pytest.raises(ValueError, match='line 2: there is no expansion_rate'):
    collect.collect([path])


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('params,tokens,loss\n1,2,3\n', 'no column granularity'),
    ('params,tokens,granularity,loss\n1,2,0,x\n', 'line 2: could not convert'),
    ('name,params,tokens,granularity,loss\na,1,2,0,3\na,1,2,0,3\n', 'several runs are called a'),
  ],
)
def test_bad_tables(tmp_path, text, message):
  path = tmp_path / 'runs.csv'
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    collect.collect([path])


def test_runs_on_different_data_are_refused_and_listed(tmp_path):
  _summary(tmp_path / 'a')
  _summary(tmp_path / 'b', corpus='another')
  with pytest.raises(ValueError, match='(?s)c/t: a.*another/t: b'):
    collect.collect([tmp_path])


def test_a_folder_without_runs_is_named(tmp_path):
  with pytest.raises(ValueError, match='holds no run'):
    collect.collect([tmp_path])


def test_one_law_is_for_one_expansion_rate(tmp_path):
  _summary(tmp_path / 'a', sublayer='moe')
  runs, _ = collect.collect([tmp_path])
  other = dataclasses.replace(runs[0], name='b', expansion_rate=16)
  with pytest.raises(ValueError, match='(?s)8: a.*16: b'):
    collect.by_kind([*runs, other])
