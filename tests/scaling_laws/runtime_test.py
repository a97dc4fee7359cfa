"""Models compared by the clock."""

import csv
import json

import pytest

from moejax import cli, run_folder
from moejax.scaling_laws import grid, laws, optimal, plots, runtime

PRINTED = laws.PUBLISHED['printed']
LAW = PRINTED[64]
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')  # ml_collections reads configs so


def _speeds(flops_per_second, machine='m', shape=(2048, 20), rate=64):
  """Speeds of models, by granularity."""
  d_model, blocks = shape
  return [
    runtime.Speed(machine, runtime.MEASURED, d_model, blocks, rate, g, speed / per_token)
    for g, speed in flops_per_second.items()
    for per_token in [laws.flops_per_token(d_model, blocks, rate, g)]
  ]


def _compare(flops, speeds, coefficients=PRINTED):
  return runtime.compare(coefficients, optimal.best(LAW, 64, flops), speeds)


def _best(found):
  return [
    (found[by]['expansion_rate'], found[by]['granularity']) for by in ('by_flops', 'by_clock')
  ]


def test_equal_speeds_change_nothing():
  (found,) = _compare(2e20, _speeds(dict.fromkeys((4, 8, 16, 32), 1e15)))
  assert _best(found) == [(64, 16), (64, 16)]
  assert found['excess_loss'] == 0 and found['more_time'] == 1
  assert found['seconds'] == pytest.approx(2e5)
  assert found['by_clock']['loss_in_time'] == pytest.approx(optimal.best(LAW, 64, 2e20).loss)


def test_slow_fine_experts_lose_by_the_clock():
  (found,) = _compare(2e20, _speeds({4: 2e15, 8: 1.9e15, 16: 1e15}))
  assert _best(found) == [(64, 16), (64, 8)]
  reached = found['by_clock']['loss_in_time']
  assert reached == pytest.approx(optimal.best_width(LAW, 64, 8, 3.8e20).loss)
  assert found['excess_loss'] == pytest.approx(found['by_flops']['loss_in_time'] - reached)
  same = optimal.best_width(LAW, 64, 16, 2e20 * found['more_time'])
  assert same.loss == pytest.approx(reached)
  rows = [text for _, text in runtime.describe([found])]
  assert 'E 64 G 16 and E 64 G 8 on m' in rows[0] and rows[3].startswith('50 % of the speed')
  assert rows[-2] == runtime.LEFT_OUT


def test_slow_experts_lose_to_fewer_and_to_none():
  slow = _speeds({8: 1e15, 16: 1e15})
  fewer = _speeds({4: 3e15, 8: 2e15}, rate=16)
  (found,) = _compare(2e20, [*slow, *fewer])
  assert _best(found) == [(64, 16), (16, 4)]
  assert found['by_clock']['loss_in_time'] == pytest.approx(
    optimal.best_width(PRINTED[16], 16, 4, 6e20).loss
  )
  dense = _speeds({laws.DENSE: 1e18}, rate=1)
  (found,) = _compare(2e20, [*slow, *dense])
  assert _best(found) == [(64, 16), (1, laws.DENSE)]
  assert 'E 64 G 16 and dense on m' in [*runtime.describe([found])][0][1]
  (found,) = _compare(2e20, [*slow, *fewer], {64: LAW})  # only these are asked for
  assert {model['expansion_rate'] for model in found['models']} == {64}


def test_a_law_of_experts_of_full_width_compares_their_number():
  law = {rate: laws.PUBLISHED['joint'][rate] for rate in (1, 2, 8)}
  speeds = [
    *_speeds({laws.DENSE: 2e15}, rate=1),
    *_speeds({1: 1e15, 4: 1e18}, rate=8),  # G = 4 is not in the law
    *_speeds({1: 1e15}, rate=32),  # nor is this one
  ]
  (found,) = runtime.compare(law, optimal.best(law[8], 8, 1e20), speeds)
  assert len(found['models']) == 2 and _best(found)[0] == (8, 1)
  # FLOPs count embeddings, as in the law.
  speed = {model['granularity']: model['flops_per_second'] for model in found['models']}
  assert speed[1] > 1e15 and speed[1] == pytest.approx(
    1e15 * optimal.flops_per_token(law[8], 2048, 20, 8, 1) / laws.flops_per_token(2048, 20, 8, 1)
  )


def test_the_nearest_size_on_each_machine():
  speeds = [
    *_speeds({8: 1e15, 16: 1e15}),
    *_speeds({8: 9e15, 16: 1e15}, shape=(512, 8)),
    *_speeds({8: 1e15}, shape=(1792, 27)),  # nearer, but of one granularity
    *_speeds({8: 9e15, 16: 1e15}, machine='other', shape=(512, 8)),
    *_speeds({8: 1e15}, machine='useless'),
  ]
  one, other = _compare(2e20, speeds)
  assert (one['machine'], one['d_model'], _best(one)[1]) == ('m', 2048, (64, 16))
  assert (other['machine'], other['d_model'], _best(other)[1]) == ('other', 512, (64, 8))


def test_the_median_of_speeds_of_one_model():
  speeds = [s for speed in (1e15, 3e15, 9e15) for s in _speeds({8: speed, 16: 1e15})]
  (found,) = _compare(2e20, speeds)
  assert found['models'][0]['flops_per_second'] == pytest.approx(3e15)


def test_a_loss_that_more_time_cannot_reach():
  (found,) = _compare(2e20, _speeds({8: 1e30, 16: 1.0}))
  assert _best(found)[1] == (64, 8) and found['more_time'] == float('inf')


def test_nothing_to_compare():
  speeds = _speeds({8: 1e15, 16: 1e15})
  with pytest.raises(ValueError, match='expansion rate 64.*found E 64 G 8.$'):
    _compare(2e20, speeds[:1], {64: LAW})
  with pytest.raises(ValueError, match='expansion rate 16.*found E 64 G 16, E 64 G 8.$'):
    _compare(2e20, speeds, {16: PRINTED[16]})
  with pytest.raises(ValueError, match='found none that fits'):
    _compare(2e20, [])


def test_the_chart_has_all_numbers_beside_it(tmp_path):
  speeds = [*_speeds({8: 1e15, 16: 1e15}), *_speeds({laws.DENSE: 1e15}, rate=1)]
  (found,) = _compare(2e20, speeds)
  plots.by_the_clock([found, found], tmp_path / 'clock.png')
  header, *rows = csv.reader((tmp_path / 'clock.csv').read_text().splitlines())
  assert len(rows) == 6 and rows[:3] == rows[3:] and len({*header}) == len(header) == 10
  assert [row[header.index('granularity')] for row in rows[:3]] == ['0', '8', '16']
  losses = [float(row[header.index('loss_in_time')]) for row in rows[:3]]
  assert min(losses) == pytest.approx(found['by_clock']['loss_in_time'])
  assert (tmp_path / 'clock.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.heavy
def test_speeds_of_a_machine_are_estimated():
  law = {8: laws.PUBLISHED['joint'][8]}
  clock = runtime.clock(['v5e:2x2', 'h100x8'], law)
  assert clock.speeds == [] and [str(machine) for machine in clock.machines] == [
    'v5e:2x2',
    'h100x8',
  ]
  speeds = [*runtime.estimated(clock, (128, 2, 2), grid.LAPTOP, granularity=1)]
  assert [s[:-1] for s in speeds] == [
    (f'{machine}, estimated', runtime.ESTIMATED, 128, 2, 8, 1) for machine in ('v5e:2x2', 'h100x8')
  ]
  assert 0 < speeds[0].tokens_per_second < speeds[1].tokens_per_second


@pytest.mark.parametrize('source', ['none.json', 'v5e:3x3', 'tpu7y-8'])
def test_neither_a_source_nor_a_machine(source):
  with pytest.raises(ValueError, match=f'--runtime={source}: no such file or folder; as a machine'):
    runtime.clock([source], PRINTED)


def test_speeds_of_runs(tmp_path):
  for granularity, speed in ((1, 1000.0), (4, 500.0)):
    config = cli.config_of([f'--config=configs/fine_grained.py:laptop,granularity={granularity}'])
    folder = tmp_path / f'g{granularity}'
    run_folder.write(config, folder)
    rates = [
      {'tokens_per_second': 9.0},
      {},
      *({'tokens_per_second': speed + i} for i in (-1, 0, 1)),
    ]
    lines = (json.dumps({'step': step} | line) + '\n' for step, line in enumerate(rates))
    (folder / 'metrics.jsonl').write_text(''.join(lines))
  (tmp_path / 'empty').mkdir()
  coarse, fine = runtime.read([tmp_path])
  model = config.model
  ((_, blocks),) = model.blocks
  rate = model.moe.expansion_rate
  assert fine[:-1] == ('the runs', runtime.MEASURED, model.d_model, blocks, rate, 4)
  assert fine.tokens_per_second == pytest.approx(500)
  assert coarse.granularity == 1
  with pytest.raises(ValueError, match='no speed of a model'):
    runtime.read([tmp_path / 'empty'])


def test_speeds_of_reports(tmp_path):
  report = {
    'command': 'python -m moejax.aot --topology=v5e:4x4 --config=configs/fine_grained.py:3M',
    'topology': 'v5e:4x4',
    'tokens': 1000,
    'step_seconds': 0.5,
    'fits': True,
  }
  path = tmp_path / 'report.json'
  path.write_text(json.dumps(report))
  (speed,) = runtime.read([path])
  assert speed[:-1] == ('v5e:4x4', runtime.COMPILED, 256, 4, 64, 8)
  assert speed.tokens_per_second == pytest.approx(2000)
  table = {
    'a': report,
    'b': report | {'fits': False},
    'c': report | {'command': 'x --config=mamba'},
  }
  path.write_text(json.dumps(table))
  assert len(runtime.read([path])) == 1


@pytest.mark.parametrize('content', [None, '[]', '{', '{"a": 1}', '{"step_seconds": 1}'])
def test_no_speeds(tmp_path, content):
  path = tmp_path / 'report.json'
  if content:
    path.write_text(content)
  with pytest.raises(ValueError, match='--runtime=.*report.json'):
    runtime.read([path])
