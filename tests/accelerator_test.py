"""benchmarks/accelerator: what it measures at tiny sizes, and that nothing stops it."""

import json
import math
import time
import types

import jax
import numpy as np
import pytest

from benchmarks.accelerator import (
  __main__ as program,
  checks,
  forms,
  limits,
  models,
  ops,
  parts,
  plan as plan_lib,
  profile,
  steps,
  supervisor,
  timing,
  values,
  worker,
)
from moejax import flops, hardware
from tests import accelerator_workers

# Far beyond any CPU, so that what must stay below it does on a busy machine too.
FAST = hardware.Chip(flops=1e14, memory_bandwidth=1e12)
CASES = [
  *('selective scan', 'feed-forward', 'plan of expert choice', 'grouped matmul, tiled'),
  *('grouped matmul: equal groups, forward', 'dispatch: ours, with gradients'),
  *('dense 1024 25M', 'dense 1024 25M, batch 1'),
  *('copy', 'matmul bfloat16'),
]


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
  """Content and page of a run of all parts."""
  folder = tmp_path_factory.mktemp('accelerator')
  only = '|'.join(f'^{case}$' for case in CASES)
  # The chip last: its limits are then specified ones in all other parts.
  order = (*(part for part in plan_lib.SHARES if part != 'chip'), 'chip')
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(hardware.CHIPS, 'cpu', FAST)
    plan = plan_lib.Plan(folder, 600.0, order, only, tiny=True, command='the command')
    results = worker.work(plan)
  assert {path.name for path in folder.iterdir()} == {
    f'{results.path.stem}.{s}' for s in ('json', 'md')
  }
  return json.loads(results.path.read_text()), results.path.with_suffix('.md').read_text()


def _rows(measured, part):
  content, _ = measured
  assert content['cases'][part]
  rows = {row['case']: row for row in content['rows'] if row['part'] == part}
  assert list(rows) == content['cases'][part]
  assert not any('error' in row for row in rows.values()), rows
  return rows


@pytest.mark.heavy
def test_chip(measured):
  rows = _rows(measured, 'chip')
  assert rows.keys() == {'copy', 'matmul bfloat16'}
  for row in rows.values():
    assert 0 < row['of_specification'] < 1
    assert row['time'][1] <= row['time'][0] <= row['time'][2]


@pytest.mark.heavy
def test_values(measured):
  rows = _rows(measured, 'values')
  assert len(rows) == 4
  assert all(row['good'] for row in rows.values())
  assert rows['feed-forward']['errors']['bfloat16']['gradients'] > 1e-4  # something was rounded


@pytest.mark.heavy
def test_steps(measured):
  (row,) = _rows(measured, 'steps').values()
  config = models.families()['dense 1024 25M'].run_config(tiny=True)
  expected = flops.training_flops_per_token(config.model, config.data.sequence_length)['model']
  assert row['flops_per_token'] == expected
  assert row['tokens_per_second'] == pytest.approx(row['tokens'] / row['time'][0])
  assert row['mfu'] == pytest.approx(expected * row['tokens_per_second'] / FAST.flops)
  assert 0 < row['mfu'] < 1 and row['of_matmul'] == row['mfu']
  assert math.isfinite(row['loss']) and not row['skipped']
  assert row['peak_bytes'] > 3 * 4 * row['params']  # parameters and two moments


class _Instant(models.Training):
  """A step that is not compiled."""

  def __init__(self, run_config):
    self.run_config = run_config
    self.program = types.SimpleNamespace(costs=dict)

  def __call__(self):
    return {'loss': 1.0, 'skipped': 0.0}


def test_models_are_compared_with_the_dense_one_of_their_context(monkeypatch):
  monkeypatch.setattr(models, 'Training', _Instant)
  rows = []
  content = {'rows': rows, 'tiny': True, 'chip': 'NVIDIA H100'}
  found = limits.Limits(types.SimpleNamespace(content=content, rows=rows))
  for name in ('dense 1024 25M', 'Switch 32E 25M', 'MoE-Mamba 25M', 'MoT 32E/1 25M'):
    rows.append({'part': 'steps', 'case': name} | steps.cases(tiny=True)[name](found))
  dense, sparse, mamba, mixing = rows
  assert sparse['flops_ratio'] == 1 < mamba['flops_ratio']
  assert mamba['time_ratio'] == dense['tokens_per_second'] / mamba['tokens_per_second']
  assert mamba['flops_ratio'] == mamba['flops_per_token'] / dense['flops_per_token']
  assert mixing['baseline'] == 'dense 256 25M' and mixing['time_ratio'] is None
  assert sparse['active_params'] < sparse['params']


@pytest.mark.heavy
def test_ops(measured):
  for row in _rows(measured, 'ops').values():
    assert 0 < row['floor_seconds'] < row['time'][0]
    assert row['over_floor'] == row['time'][0] / row['floor_seconds']


@pytest.mark.heavy
def test_profile(measured):
  for row in _rows(measured, 'profile').values():
    shares = [kernel['share'] for kernel in row['kernels']]
    assert len(shares) == 10 and sorted(shares, reverse=True) == shares
    assert 0 < sum(shares) <= 1 and 0 <= row['gap'] < 1
    assert sum(kernel['seconds'] for kernel in row['kernels']) <= row['seconds']


@pytest.mark.heavy
def test_decoding(measured):
  (row,) = _rows(measured, 'decoding').values()
  assert row['tokens_per_second'] == 1 / row['time'][0]
  assert 0 < row['floor_seconds'] < row['time'][0]


@pytest.mark.heavy
def test_page(measured):
  content, page = measured
  assert 'the command' in page and 'failed: 0' in page and 'Not reached' not in page
  for part, cases in content['cases'].items():
    assert parts.PARTS[part].TITLE in page
    assert all(case in page for case in cases)


def _plan(tmp_path, seconds=1e6, **fields):
  return plan_lib.Plan(tmp_path, seconds, **fields)


def _raise(error):
  def case(limits):
    raise error

  return case


def test_a_case_that_fails_is_a_row(tmp_path, monkeypatch):
  def no_cases(tiny):
    raise ImportError('no such package')

  monkeypatch.setattr(parts.PARTS['steps'], 'cases', no_cases)
  found = {
    'fails': _raise(ValueError('no such\nkernel | here')),
    'too large': _raise(MemoryError('out of memory')),
    'works': lambda limits: {'seconds': np.float32(1), 'time': (1.0, 1.0, 2.0)},
    'has no columns': lambda limits: {},
  }
  monkeypatch.setattr(parts.PARTS['chip'], 'cases', lambda tiny: found)
  results = worker.work(_plan(tmp_path, parts=('chip', 'steps')))
  assert [row.get('error') for row in results.rows] == [
    *('ValueError: no such kernel | here', 'MemoryError: out of memory', None, None),
    'ImportError: no such package',
  ]
  page = results.path.with_suffix('.md').read_text()
  assert '| fails |' in page and 'kernel \\| here' in page
  assert "No table: KeyError: 'seconds'." in page
  results.rows.pop(3)
  results.write()
  assert '±50%' in results.path.with_suffix('.md').read_text()


def test_after_its_time_a_part_begins_no_case(tmp_path, monkeypatch):
  def first(limits):
    monkeypatch.setattr(plan_lib.Plan, 'deadline', lambda plan, part: 0.0)
    return {'seconds': 1.0, 'time': (1.0, 1.0, 1.0)}

  found = {'first': first, 'second': _raise(AssertionError)}
  monkeypatch.setattr(parts.PARTS['chip'], 'cases', lambda tiny: found)
  results = worker.work(_plan(tmp_path, parts=('chip',)))
  assert [row['case'] for row in results.rows] == ['first']
  assert 'Not reached: second.' in results.path.with_suffix('.md').read_text()


def test_a_crash_a_hang_and_a_cut_end_one_case(tmp_path, monkeypatch):
  plan = _plan(tmp_path, parts=('steps',))

  def begun():
    """Cases that have begun, the last of which may be in progress."""
    contents = [json.loads(path.read_text()) for path in plan.files()]
    running = [content['running'] for content in contents if 'running' in content]
    return [row['case'] for content in contents for row in content['rows'] + running]

  def limit(plan, part):
    return 0.1 if begun()[-1] == 'hangs' else math.inf

  def end(plan):
    return 0.0 if 'is cut' in begun() else math.inf

  monkeypatch.setattr(plan_lib.Plan, 'limit', limit)
  monkeypatch.setattr(plan_lib.Plan, 'end', property(end))
  results = supervisor.run(plan, accelerator_workers.misbehave)
  assert [(row['case'], row['error']) for row in results.rows] == [
    ('crashes', 'the process ended with code -6'),
    ('hangs', 'stopped: took longer than 0 s'),
    ('is cut', 'stopped: the time was up'),
  ]
  assert 'Not reached: late.' in plan.path('a chip').with_suffix('.md').read_text()


def test_without_a_device_there_are_no_results(tmp_path, monkeypatch, capsys):
  run = supervisor.run
  monkeypatch.setattr(supervisor, 'run', lambda plan: run(plan, accelerator_workers.die))
  assert program.main([f'--output={tmp_path}']) == 1
  assert 'no results' in capsys.readouterr().err


def test_a_wrong_value_or_gradient_is_noticed(monkeypatch):
  double = lambda x: (2 * x, 2 * x)

  @jax.custom_vjp
  def wrong(x):
    return 2 * x

  wrong.defvjp(lambda x: (2 * x, None), lambda _, dy: (dy,))
  x = np.ones((3, 4), np.float32)
  found = {
    'right': checks.Check(double, double, (x,)),
    'value': checks.Check(lambda x: (2 * x, 2.1 * x), double, (x,)),
    'gradient': checks.Check(lambda x: (2 * x, wrong(x)), double, (x,)),
    'integer': checks.Check(lambda x: (x > 1).sum(), lambda x: (x > 0).sum(), (x,)),
    'infinite': checks.Check(lambda x: (2 * x, x / 0), double, (x,)),
  }
  made = {name: lambda rng, sizes, check=check: check for name, check in found.items()}
  monkeypatch.setattr(checks, 'by_name', lambda: made)
  rows = {name: case(None) | {'case': name} for name, case in values.cases(tiny=True).items()}
  assert [name for name, row in rows.items() if row['good']] == ['right']
  assert values.table(rows.values()).count('too large') == 8
  assert rows['gradient']['errors']['float32'] == {
    'outputs': 0,
    'gradients': pytest.approx(0.3, abs=0.1),
  }


@pytest.mark.parametrize('name', forms.OPS)
def test_floors_are_floors(name):
  """No less than arguments and results is moved, and no fewer FLOPs than XLA counts are done."""
  op = forms.OPS[name](forms.TINY)
  args = jax.eval_shape(op.args)
  size = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
  for form in op.forms.values():
    moved = size(args) + size(jax.eval_shape(form, *args))
    assert moved / 4 < op.forward.bytes <= moved
    both = timing.with_gradients(form, op.differentiated)
    assert op.gradients.bytes <= 2 * moved + size(jax.eval_shape(both, *args))
  plain = list(op.forms)[-1]
  if op.forward.flops:
    for passes, function in (('forward', op.forms[plain]), ('with gradients', both)):
      counted = jax.jit(function).lower(*args).cost_analysis()['flops']
      assert counted / 4 < op.work(passes).flops <= counted


def test_the_floor_is_the_largest_of_its_times():
  content = {'rows': [{'limit': 'bytes', 'rate': 100.0}], 'tiny': True, 'chip': 'NVIDIA H100'}
  found = limits.Limits(types.SimpleNamespace(content=content, rows=content['rows']))
  assert found.floor(limits.Work(flops=989e12, bytes=200)) == (2.0, 'bytes')
  assert found.floor(limits.Work(flops=3 * 989e12, bytes=200)) == (3.0, 'flops')
  assert found.floor(limits.Work(exps=1)) == (None, '')


def test_kernels_of_a_gpu_are_those_of_its_streams():
  def event(name, start, end):
    return types.SimpleNamespace(name=name, start_ns=start, end_ns=end, stats=[])

  def line(name, *events):
    return types.SimpleNamespace(name=name, events=events)

  loop, inside, later = event('while', 0, 100), event('dot', 10, 40), event('dot', 140, 200)
  lines = [line('Stream #7', later, loop, inside), line('XLA Modules', event('step', 0, 300))]
  planes = [types.SimpleNamespace(name='/device:GPU:0', lines=lines)]
  (found,) = profile.kernels(types.SimpleNamespace(planes=planes))
  row = profile.summarize(found)
  seconds = {kernel['name']: kernel['seconds'] for kernel in row['kernels']}
  assert seconds == {'dot': pytest.approx(45e-9), 'while': pytest.approx(35e-9)}  # of 2 steps
  assert row['seconds'] == pytest.approx(80e-9) and row['gap'] == pytest.approx(0.2)


def test_time_is_the_median_without_the_first_call(monkeypatch):
  clock, taken = [0.0], iter([50.0, 1.0, *[1.0, 3.0, 2.0] * 10])
  monkeypatch.setattr(time, 'perf_counter', lambda: clock[0])

  def wait(result):
    clock[0] += next(taken)

  assert timing.measure(lambda: None, wait, 3.0) == (2.0, 1.5, 2.5)


def test_parts_pass_on_the_time_they_do_not_need(tmp_path):
  plan = _plan(tmp_path, 120.0, parts=('chip', 'steps', 'profile'), start=1000.0)
  assert [plan.deadline(part) for part in plan.parts] == [1010.0, 1100.0, 1120.0]
  assert plan.limit('chip') == 60.0 and plan.end == 1120.0


def test_every_family_resolves_at_the_sizes_of_the_papers():
  found = models.families()
  assert {family.baseline for family in found.values()} <= found.keys()
  for name in (
    'MoT 32E/1 100M',
    'token choice 64E k=8 dropless 25M',
    'expert choice 16x G=16 100M',
  ):
    config = found[name].run_config(tiny=False)
    assert config.optimizer.accumulation == 1 and config.model.dtype == 'bfloat16'
    assert config.data.tokens_per_step == 65_536
  assert found['MoE-Mamba 100M'].run_config(tiny=False).data.tokens_per_step == 262_144


def test_cases_have_names_of_their_own():
  names = list(ops.cases(tiny=True))
  assert len(names) == len(set(names)) > 40
  assert all(': ours' in name for name in names[: len(forms.OPS)])


def test_arguments(tmp_path, capsys):
  for argument, message in (
    ('--parts=chip,step', "no part 'step'; there are chip,"),
    ('--minutes=0', 'expected minutes'),
    ('--only=(', 'no regular expression'),
  ):
    with pytest.raises(SystemExit):
      program.main([f'--output={tmp_path}', argument])
    assert message in capsys.readouterr().err
