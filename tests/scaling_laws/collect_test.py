"""Reading runs from summary.json files and tables."""

import dataclasses
import json

import numpy as np
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


def test_the_folder_of_a_grid(tmp_path):
  _summary(tmp_path / 'dense')
  _summary(tmp_path / 'sparse', sublayer='moe', loss=1.5)
  _summary(tmp_path / 'mixed', sublayer='mot')
  _summary(tmp_path / 'exploded', loss=None)
  (tmp_path / 'unfinished').mkdir()
  (tmp_path / 'unfinished' / 'config.json').write_text('{}')
  _summary(tmp_path / 'interrupted')
  path = tmp_path / 'interrupted' / 'summary.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), 'finished': False, 'steps': 7}))
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
    'interrupted': 'unfinished:',
  }


def test_tables_round_trip(tmp_path):
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
  with pytest.raises(ValueError, match='line 2: no expansion_rate'):
    collect.collect([path])


def test_flops_are_floats(tmp_path):
  """numpy cannot compute with integers beyond 2^63."""
  table = tmp_path / 'runs.csv'
  table.write_text(f'params,tokens,granularity,flops,loss\n4e9,9e9,0,{10**20},3\n')
  _summary(tmp_path / 'a')
  path = tmp_path / 'a' / 'summary.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'tokens_seen': 10**17}))
  for source in (table, tmp_path / 'a'):
    (run,), _ = collect.collect([source])
    assert run.flops > 2**63 and np.log10([run.flops]).dtype == np.float64


_HEADER = 'params,tokens,granularity,expansion_rate,loss'


def _with(**changed):
  """A table with a valid row and, in line 3, a row with these values changed."""
  row = {'params': '4e7', 'tokens': '1e9', 'granularity': '2', 'expansion_rate': '8', 'loss': '3'}
  return '\n'.join([_HEADER, ','.join(row.values()), ','.join((row | changed).values())]) + '\n'


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (_with(tokens='0'), "line 3: tokens = '0': expected a finite number above 0"),
    (_with(tokens=''), "line 3: tokens = '': expected"),
    (_with(params='nan'), "line 3: params = 'nan'"),
    (_with(params='inf'), "line 3: params = 'inf'"),
    (_with(params='1e400'), "line 3: params = '1e400'"),
    (_with(tokens='-5'), "line 3: tokens = '-5'"),
    (_with(tokens='"1,5"'), "line 3: tokens = '1,5'"),
    (_with(granularity='1.5'), "line 3: granularity = '1.5': expected an integer, 0 for"),
    (_with(granularity='-1'), "line 3: granularity = '-1'"),
    (_with(granularity='inf'), "line 3: granularity = 'inf'"),
    (_with(granularity='0'), "line 3: expansion_rate = '8', but granularity 0 means dense"),
    (_with(expansion_rate='0.5'), "line 3: expansion_rate = '0.5': expected"),
    (_with(expansion_rate='nan'), "line 3: expansion_rate = 'nan': expected"),
    (_with(loss='0'), "line 3: loss = '0': expected a finite number above 0"),
    (_with(loss='-1'), "line 3: loss = '-1'"),
    (_with(loss='x'), "line 3: loss = 'x'"),
    (_with(loss='3,4'), 'line 3: more or fewer values than columns in the header'),
    (f'{_HEADER}\n4e7,1e9\n', 'line 2: more or fewer values'),
    (f'{_HEADER}\n4e7,1e9,2,8,"3\n', 'unexpected end of data'),
    ('', 'line 1: no column params, tokens, granularity, loss in nothing'),
    (f'{_HEADER}\n', 'has no rows below the header'),
    ('params,tokens,loss\n1,2,3\n', 'line 1: no column granularity in params, tokens, loss'),
    (_HEADER.replace(',', ';'), 'columns are separated by commas'),
    (f'{_HEADER},loss\n4e7,1e9,2,8,3,4\n', 'line 1: two columns are named loss'),
    ('name,params,tokens,granularity,loss\na,1,2,0,3\na,1,2,0,3\n', 'several runs are named a'),
  ],
)
def test_bad_tables(tmp_path, text, message):
  path = tmp_path / 'runs.csv'
  path.write_text(text)
  with pytest.raises(ValueError) as caught:
    collect.collect([path])
  assert message in str(caught.value)
  assert 'runs are named' in message or str(path) in str(caught.value)


@pytest.mark.parametrize('encoding', ['utf-16', 'utf-16-le', 'utf-32-be', 'latin-1'])
def test_tables_in_other_encodings(tmp_path, encoding):
  path = tmp_path / 'runs.csv'
  path.write_bytes(f'name,{_HEADER}\nd\xe9j\xe0,4e7,1e9,2,8,3\n'.encode(encoding))
  with pytest.raises(ValueError, match=r'runs.csv, line [12]: not UTF-8 text'):
    collect.collect([path])


def test_tables_of_other_programs(tmp_path):
  """Excel: byte order mark, empty lines of commas; pandas: index, decimals; old Macs: CR."""
  path = tmp_path / 'RUNS.CSV'
  text = 'params, tokens,granularity,expansion_rate,loss\r4e7,1000.0,2.0,8.0,3\r,,,,\r\r'
  path.write_bytes(b'\xef\xbb\xbf' + text.encode())
  (run,), _ = collect.collect([path])
  assert (run.params, run.tokens, run.granularity, run.expansion_rate) == (4e7, 1000, 2, 8)
  assert isinstance(run.granularity, int)
  pandas = tmp_path / 'pandas.csv'
  pandas.write_text(f',{_HEADER}\n0,4e7,1e9,2.0,8.0,3.0\n1,12e6,1e9,0.0,,\n')
  runs, excluded = collect.collect([pandas])
  assert [run.granularity for run in runs] == [2] and list(excluded) == ['pandas.csv:3']


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda s: s.pop('tokens_seen'), "has no field 'tokens_seen'"),
    (lambda s: s['parameters'].pop('by_kind'), "has no field 'by_kind'"),
    (lambda s: s.update(tokens_seen=0), 'tokens_seen = 0: expected a finite number above 0'),
    (lambda s: s.update(tokens_seen='many'), "tokens_seen = 'many'"),
    (lambda s: s['validation'].update(loss=0.0), 'validation.loss = 0.0'),
    (lambda s: s.update(validation=[]), 'is not a valid run summary'),
    (lambda s: s['config']['model'].update(blocks=3), 'is not a valid run summary'),
  ],
)
def test_bad_summaries(tmp_path, change, message):
  _summary(tmp_path / 'a')
  path = tmp_path / 'a' / 'summary.json'
  summary = json.loads(path.read_text())
  change(summary)
  path.write_text(json.dumps(summary))
  with pytest.raises(ValueError) as caught:
    collect.collect([tmp_path])
  assert str(caught.value).startswith(str(path)) and message in str(caught.value)


@pytest.mark.parametrize('content', [b'', b'{"config": {"mo', b'[]', b'\xff\xfe{\0}\0'])
def test_damaged_summaries(tmp_path, content):
  _summary(tmp_path / 'a')
  (tmp_path / 'a' / 'summary.json').write_bytes(content)
  with pytest.raises(ValueError, match='summary.json'):
    collect.collect([tmp_path])


def test_a_summary_without_optional_fields(tmp_path):
  _summary(tmp_path / 'a')
  path = tmp_path / 'a' / 'summary.json'
  summary = json.loads(path.read_text())
  for field in ('corpus', 'tokenizer'):
    del summary[field]
  del summary['config']['model']['moe']
  path.write_text(json.dumps(summary))
  (run,), _ = collect.collect([tmp_path])
  assert (run.loss, run.data) == (2.0, '')


@pytest.mark.parametrize(
  ('name', 'message'),
  [('nowhere', 'does not exist'), ('nowhere.csv', 'does not exist'), ('runs.txt', 'nor a .csv')],
)
def test_unreadable_paths(tmp_path, name, message):
  (tmp_path / 'runs.txt').write_text(_with())
  with pytest.raises(ValueError, match=message):
    collect.collect([tmp_path / name])


def test_runs_on_different_data_are_rejected(tmp_path):
  _summary(tmp_path / 'a')
  _summary(tmp_path / 'b', corpus='another')
  with pytest.raises(ValueError, match='(?s)c/t: a.*another/t: b'):
    collect.collect([tmp_path])


def test_duplicate_runs_are_rejected(tmp_path):
  _summary(tmp_path / 'a')
  _summary(tmp_path / 'copy_of_a')
  with pytest.raises(ValueError, match='a and copy_of_a have the same configuration'):
    collect.collect([tmp_path])


def test_a_folder_without_runs(tmp_path):
  with pytest.raises(ValueError, match='holds no run'):
    collect.collect([tmp_path])


def test_mixed_expansion_rates_are_rejected(tmp_path):
  _summary(tmp_path / 'a', sublayer='moe')
  runs, _ = collect.collect([tmp_path])
  other = dataclasses.replace(runs[0], name='b', expansion_rate=16)
  with pytest.raises(ValueError, match='(?s)8: a.*16: b'):
    collect.by_kind([*runs, other])
