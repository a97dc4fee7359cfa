"""Granularities compared by the clock."""

import json

import pytest

from moejax import cli, run_folder
from moejax.scaling_laws import laws, optimal, runtime

LAW = laws.PUBLISHED['printed'][64]
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')  # ml_collections reads configs so


def _speeds(by_granularity, machine='m', shape=(2048, 20)):
  return [
    runtime.Speed(machine, *shape, 64, granularity, speed)
    for granularity, speed in by_granularity.items()
  ]


def _compare(flops, speeds):
  return runtime.compare(LAW, optimal.best(LAW, 64, flops), 64, speeds)


def test_equal_speeds_change_nothing():
  (found,) = _compare(2e20, _speeds(dict.fromkeys((4, 8, 16, 32), 1e15)))
  assert found['by_flops'] == found['by_clock'] == 16
  assert found['excess_loss'] == 0 and found['more_time'] == 1
  assert found['seconds'] == pytest.approx(2e5)
  assert found['losses'][16] == pytest.approx(optimal.best(LAW, 64, 2e20).loss)


def test_slow_fine_experts_lose_by_the_clock():
  (found,) = _compare(2e20, _speeds({4: 2e15, 8: 1.9e15, 16: 1e15}))
  assert (found['by_flops'], found['by_clock']) == (16, 8)
  assert found['losses'][8] == pytest.approx(optimal.best_width(LAW, 64, 8, 3.8e20).loss)
  assert found['excess_loss'] == pytest.approx(found['losses'][16] - found['losses'][8])
  same = optimal.best_width(LAW, 64, 16, 2e20 * found['more_time'])
  assert same.loss == pytest.approx(found['losses'][8])
  rows = [text for _, text in runtime.describe([found])]
  assert 'G 16 and G 8 on m' in rows[0] and rows[3].startswith('50 % of the speed')


def test_the_nearest_size_on_each_machine():
  speeds = [
    *_speeds({8: 1e15, 16: 1e15}),
    *_speeds({8: 9e15, 16: 1e15}, shape=(512, 8)),
    *_speeds({8: 1e15}, shape=(1792, 27)),  # nearer, but of one granularity
    *_speeds({8: 9e15, 16: 1e15}, machine='other', shape=(512, 8)),
    *_speeds({8: 1e15}, machine='useless'),
  ]
  one, other = _compare(2e20, speeds)
  assert (one['machine'], one['shape'], one['by_clock']) == ('m', (2048, 20), 16)
  assert (other['machine'], other['shape'], other['by_clock']) == ('other', (512, 8), 8)


def test_a_loss_that_more_time_cannot_reach():
  (found,) = _compare(2e20, _speeds({8: 1e30, 16: 1.0}))
  assert found['by_clock'] == 8 and found['more_time'] == float('inf')


def test_nothing_to_compare():
  speeds = _speeds({8: 1e15, 16: 1e15})
  with pytest.raises(ValueError, match='which this law does not have'):
    runtime.compare(LAW._replace(g=None), optimal.best(LAW, 64, 2e20), 64, speeds)
  with pytest.raises(ValueError, match='two granularities of expansion rate 64, .*E 64 G 8.$'):
    _compare(2e20, speeds[:1])


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
  per_token = laws.flops_per_token(model.d_model, blocks, rate, 4)
  assert fine == runtime.Speed(
    'the runs', model.d_model, blocks, rate, 4, pytest.approx(500 * per_token)
  )
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
  per_token = laws.flops_per_token(256, 4, 64, 8)
  assert speed == runtime.Speed('v5e:4x4', 256, 4, 64, 8, pytest.approx(2000 * per_token))
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
