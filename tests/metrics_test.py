"""The reports of a run are complete, valid and without duplicates."""

import json
import math
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from moejax import metrics, report


def write(workdir, start_step, steps):
  writer = metrics.MetricsWriter(workdir, start_step, ('tensorboard',))
  for step in steps:
    writer.write(step, {'loss': 1 / step, 'start': start_step})
  writer.close()


def read_events(workdir):
  """All TensorBoard events, older files first. A record is length, crc, data, crc."""
  events = []
  for path in sorted(workdir.glob('events.out.tfevents.*'), key=lambda p: p.stat().st_mtime_ns):
    content = path.read_bytes()
    while content:
      (length,) = struct.unpack('<Q', content[:8])
      events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
      content = content[16 + length :]
  return events


def test_lines_and_events_hold_the_same_numbers(tmp_path):
  writer = metrics.MetricsWriter(tmp_path / 'run', 0, ('tensorboard',))
  writer.write(10, {'loss': jnp.float32(2.5), 'mfu': 0.25})
  details = metrics.by_expert({'loss': np.ones(2), 'load': np.array([[0.5, 1.5]])})
  writer.write(10, {'loss': np.float64(3.0)}, prefix='eval', details=details)
  assert metrics.read_metrics(tmp_path / 'run') == [  # before closing: lines are flushed
    {'step': 10, 'loss': 2.5, 'mfu': 0.25},
    {'step': 10, 'eval/loss': 3.0, 'eval/load/00/000': 0.5, 'eval/load/00/001': 1.5},
  ]
  writer.close()
  scalars = [
    (event.step, value.tag, value.simple_value)
    for event in read_events(tmp_path / 'run')
    for value in event.summary.value
  ]
  assert scalars == [(10, 'loss', 2.5), (10, 'mfu', 0.25), (10, 'eval/loss', 3.0)]


def test_resuming_drops_later_lines(tmp_path):
  write(tmp_path, 0, range(10, 130, 10))
  write(tmp_path, 100, range(110, 160, 10))
  entries = metrics.read_metrics(tmp_path)
  assert [entry['step'] for entry in entries] == list(range(10, 160, 10))
  assert [entry['start'] for entry in entries] == [0] * 10 + [100] * 5
  resumed = [event for event in read_events(tmp_path) if event.HasField('session_log')]
  assert [event.step for event in resumed] == [0, 101]  # TensorBoard drops what lies beyond


def test_starting_at_zero_drops_everything(tmp_path):
  write(tmp_path, 0, [1, 2])
  write(tmp_path, 0, [1])
  assert [entry['step'] for entry in metrics.read_metrics(tmp_path)] == [1]


def test_an_incomplete_last_line_is_left_out(tmp_path):
  write(tmp_path, 0, [1, 2])
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text()[:-5])
  assert [entry['step'] for entry in metrics.read_metrics(tmp_path)] == [1]
  write(tmp_path, 2, [3])
  assert [entry['step'] for entry in metrics.read_metrics(tmp_path)] == [1, 3]


@pytest.mark.parametrize(
  'damage',
  [
    bytes(50),
    b'',
    b'{"step": 5, "lo',
    b'{"loss": 1}',
    b'[1]',
    b'\xff\xfe',
    b'{"step": 1, "loss": "x"}',
    b'{"step": 1, "loss": [2]}',
    b'[' * 100_000,
  ],
)
def test_damaged_lines_are_left_out(tmp_path, damage):
  write(tmp_path, 0, [1, 2])
  path = tmp_path / 'metrics.jsonl'
  first, second = path.read_bytes().splitlines(True)
  path.write_bytes(first + damage + b'\n' + second)
  assert [entry['step'] for entry in metrics.read_metrics(tmp_path)] == [1, 2]


def test_damage_in_the_middle_is_said_and_removed_when_a_run_resumes(tmp_path, capsys):
  write(tmp_path, 0, [1, 2, 3])
  path = tmp_path / 'metrics.jsonl'
  first, *others = path.read_bytes().splitlines(True)
  path.write_bytes(first + b'\n\xff\n{"step": 2, "lo\n' + b''.join(others) + bytes(4096))
  write(tmp_path, 3, [4])
  assert 'metrics.jsonl is damaged; 4 lines that' in capsys.readouterr().out
  assert [json.loads(line)['step'] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
  write(tmp_path, 4, [5])
  assert not capsys.readouterr().out


def test_lines_outlast_a_full_disk_once_and_in_order(tmp_path, capsys):
  writer = metrics.MetricsWriter(tmp_path, 0)
  writer.write(1, {'loss': 1.0})
  good = writer._file
  writer._file = open('/dev/full', 'ab', buffering=0)
  for step in (2, 3):
    writer.write(step, {'loss': 1.0})
    writer.sync()
  writer._file.close()
  writer._file = good
  writer.write(4, {'loss': 1.0})
  writer.close()
  assert [entry['step'] for entry in metrics.read_metrics(tmp_path)] == [1, 2, 3, 4]
  said = 'warning: /dev/full: No space left on device; lines are kept to be written later\n'
  assert capsys.readouterr().out == said


def _measured(loss, others=()):
  numbers = {'loss': loss, 'skipped': 0.0, 'aux': {'a': [loss, 1.0]}}
  return {
    name: jax.tree.map(jnp.float32, value) for name, value in (numbers | dict(others)).items()
  }


def test_an_average_is_restored():
  averager = metrics.MetricAverager()
  averager.add(1, _measured(3.0))
  averager.add(2, _measured(5.0))
  restored = metrics.MetricAverager(**json.loads(json.dumps(averager.totals())))
  restored.add(3, _measured(10.0))
  for name, value in {'loss': 6.0, 'a/00': 6.0, 'a/01': 1.0}.items():
    assert restored.means()[name] == value


def test_an_average_restored_from_before_a_metric_existed_leaves_it_out():
  averager = metrics.MetricAverager({'loss': 4.0}, 1)
  averager.add(2, _measured(6.0))
  assert set(averager.means()) == {'loss', 'seconds_per_step'} and averager.means()['loss'] == 5


def test_an_average_times_the_steps_alone():
  averager = metrics.MetricAverager()
  averager.add(1, _measured(1.0))
  averager.skip(-20)  # as if it had taken 20 seconds
  averager.add(2, _measured(1.0))
  assert averager.means()['seconds_per_step'] == pytest.approx(10, abs=1)


def test_steps_before_the_clock_restarts_are_averaged_but_not_timed():
  averager = metrics.MetricAverager({'loss': 1.0}, 1)  # of an earlier process
  averager.skip(-1000)  # as if the first step had taken long
  averager.add(2, _measured(3.0))
  averager.restart_clock()
  assert averager.means() == {'loss': 2.0}
  averager.skip(-20)
  averager.add(3, _measured(5.0))
  averager.add(4, _measured(7.0))
  assert averager.means() == {'loss': 4.0, 'seconds_per_step': pytest.approx(10, abs=1)}


def test_skipped_steps_are_seen_and_timed_but_not_averaged():
  averager, seen = metrics.MetricAverager(), []
  see = lambda step, numbers: seen.append((step, numbers['loss'], numbers['skipped']))
  averager.skip(-20)
  averager.add(1, _measured(math.nan, {'skipped': 1.0}), see)
  assert set(averager.means()) == {'seconds_per_step'}
  averager.add(2, _measured(4.0), see)
  averager.add(3, _measured(math.nan, {'skipped': 1.0}), see)
  averager.add(4, _measured(6.0), see)
  assert len(seen) == 3 and math.isnan(seen[0][1]) and seen[1] == (2, 4.0, 0.0)
  means = averager.means()
  assert (means['loss'], means['a/00']) == (5, 5) and 'skipped' not in means
  assert means['seconds_per_step'] == pytest.approx(5, abs=0.5)
  assert averager.totals()['count'] == 2


def test_non_finite_numbers_stay_valid_json(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, 0, ('tensorboard',))
  writer.write(1, {'loss': math.nan, 'grad_norm': math.inf, 'mfu': 0.5})
  writer.write(2, {'loss': 1.0})
  writer.close()

  def refuse(constant):
    raise AssertionError(f'{constant} is not JSON')

  first, _ = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert json.loads(first, parse_constant=refuse) == {
    'step': 1,
    'loss': None,
    'grad_norm': None,
    'mfu': 0.5,
  }
  assert metrics.loss_curve(tmp_path) == [(2, 1.0)]


def test_no_metrics_yet(tmp_path):
  assert metrics.read_metrics(tmp_path) == []
  assert metrics.loss_curve(tmp_path, 'eval/loss') == []


def test_the_smoothed_loss_is_the_mean_over_the_steps_of_the_last_quarter():
  curve = [(100, 5.0), (200, 4.0), (300, 3.0), (320, 2.0), (400, 1.0)]
  smoothed = metrics.smoothed_loss(curve, 400)
  assert smoothed['loss'] == pytest.approx((20 * 2.0 + 80 * 1.0) / 100)
  assert (smoothed['first_step'], smoothed['last_step']) == (301, 400)
  assert smoothed['standard_error'] is None  # of two lines
  late = metrics.smoothed_loss([(50, 3.0), (80, 2.0)], 80)  # no line begins in the last quarter
  assert (late['loss'], late['first_step'], late['last_step']) == (2.0, 51, 80)
  assert metrics.smoothed_loss([], 10) == {}


def test_its_standard_error_is_that_of_the_noise_of_batches_and_not_of_the_fall():
  rng, errors, means = np.random.default_rng(0), [], []
  ends = np.cumsum([10] * 30 + [3] * 10)
  for _ in range(300):
    losses = np.linspace(3, 2, 330) + rng.normal(0, 0.5, 330)  # of every step
    curve = [
      (int(end), part.mean()) for end, part in zip(ends, np.split(losses, ends), strict=False)
    ]
    smoothed = metrics.smoothed_loss(curve, 330)
    assert smoothed['first_step'] == 251
    errors.append(smoothed['standard_error'])
    means.append(smoothed['loss'])
  assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
  assert np.mean(means) == pytest.approx(np.linspace(3, 2, 330)[250:].mean(), abs=0.01)


def test_means_over_steps_weigh_lines_by_their_steps():
  assert metrics.mean_over_steps([(30, 1.0), (40, 0.0)], 30) == 0.75
  assert metrics.mean_over_steps([], 30) is None


def test_steps_before_the_first_line_of_another_run_do_not_count():
  tuned = [(2010, 1.0), (2020, 0.0)]  # trained from step 2000 on
  assert metrics.mean_over_steps(tuned, 10) == 0.5


def test_what_a_run_says_of_its_training():
  training = {'loss': 1.23456, 'standard_error': 0.0021, 'first_step': 2251, 'last_step': 3000}
  assert report.describe_training(training | {'epochs': 0.576, 'clipped': 0.464}) == (
    'training loss 1.2346 ± 0.0021, mean of steps 2,251 to 3,000, 0.58 epochs (no text seen '
    'twice), gradient clipped in 46% of the steps'
  )
  training = training | {'standard_error': None, 'epochs': None, 'clipped': None}
  assert report.describe_training(training).endswith('loss 1.2346, mean of steps 2,251 to 3,000')
  assert 'twice' not in report.describe_training(training | {'epochs': 1.2})


def test_progress_line():
  line = report.progress_line(
    step=1200,
    steps=3000,
    loss=1.832,
    grad_norm=0.41,
    tokens_per_second=24_123,
    mfu=0.31,
    seconds_left=192.3,
  )
  assert line == (
    'step 1200/3000   40.0%  loss 1.832  grad 0.41  24.1k tok/s  MFU 31.0%  3m12s left'
  )


def test_a_progress_line_leaves_out_what_is_not_known():
  assert report.progress_line(step=1, steps=20, loss=5.5) == 'step  1/20    5.0%  loss 5.500'


@pytest.mark.parametrize('loss', [0.0, 1e30, -math.inf, math.nan])
@pytest.mark.parametrize('seconds', [0, 59.6, 3600, 86_399.7, 9e8])
def test_progress_line_fits(loss, seconds):
  line = report.progress_line(
    step=1,
    steps=10_000_000,
    loss=loss,
    grad_norm=1e30,
    tokens_per_second=seconds * 1e6,
    mfu=1.0,
    seconds_left=seconds,
  )
  assert len(line) <= 100


@pytest.mark.parametrize(
  'seconds, text',
  [(0.4, '0s'), (59.6, '1m00s'), (192, '3m12s'), (7500, '2h05m'), (356_400, '4d03h')],
)
def test_time_left(seconds, text):
  line = report.progress_line(step=1, steps=2, loss=1.0, tokens_per_second=1, seconds_left=seconds)
  assert line.endswith(f'  {text} left')


def test_running_mean_follows_the_curve_without_the_noise():
  values = np.arange(1000.0)
  np.testing.assert_allclose(report.running_mean(values)[25:-25], values[25:-25])
  noise = np.random.default_rng(0).standard_normal(1000)
  assert np.std(report.running_mean(noise)) < 0.2
  assert report.running_mean([3.0]).tolist() == [3.0]


def _lines(curves):
  """What is drawn: label, or None, -> points."""
  (axes,) = report.loss_figure(curves).axes
  return axes, {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_a_plot_calls_runs_what_they_are_called():
  figure = report.loss_figure({name: [(1, 1.0)] for name in ('_a train', r'$\b$ train')})
  figure.canvas.draw()  # raises for bad formulas
  (axes,) = figure.axes
  assert [t.get_text() for t in axes.get_legend().get_texts()] == [' _a train', r'\$\b\$ train']


def test_a_plot_draws_every_point_and_running_means():
  train = [(step, 10.0 - step % 2) for step in range(1, 101)]
  axes, lines = _lines({'a train': train, 'a validation': [(50, 4.5)], 'none': []})
  assert lines['a validation'] == [[50, 4.5]]
  steps, losses = np.array(train).T
  np.testing.assert_array_equal(lines['a train'], np.stack([steps, report.running_mean(losses)], 1))
  (raw,) = lines.keys() - {'a train', 'a validation'}
  assert lines[raw] == [list(point) for point in train]
  low, high = axes.get_ylim()
  assert low < 4.5 and 10 < high < 11


def test_a_plot_shows_where_the_losses_settle():
  axes, _ = _lines({'train': [(1, 1e6)] + [(step, 3.0 + 1 / step) for step in range(10, 1000)]})
  assert axes.get_ylim()[1] < 4


@pytest.mark.parametrize('curves', [{}, {'empty': []}, {'one point': [(1, 2.0)]}])
def test_plots_of_almost_nothing(tmp_path, curves):
  report.plot_losses(curves, tmp_path / 'loss.png')
  assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')


def test_summary_is_sorted_plain_json(tmp_path):
  report.write_summary(tmp_path, {'b': np.float32(0.5), 'a': [math.nan, (1, 2)], 'c': {'d': None}})
  text = (tmp_path / 'summary.json').read_text()
  assert json.loads(text) == {'a': [None, [1, 2]], 'b': 0.5, 'c': {'d': None}}
  assert text.startswith('{\n  "a": [')
  assert [path.name for path in tmp_path.iterdir()] == ['summary.json']


def test_versions_and_commit_can_be_written(tmp_path):
  versions = report.versions()
  assert versions['platform'] == 'cpu' and versions['device_count'] >= 1
  assert {'python', 'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'moejax'} < set(versions)
  commit = report.git_commit()
  assert commit is None or len(commit.removesuffix('-dirty')) == 40
  report.write_summary(tmp_path, {'versions': versions, 'commit': commit})


def test_no_tensorflow():
  code = 'import sys, moejax.metrics, moejax.checkpoint; assert "tensorflow" not in sys.modules'
  subprocess.run([sys.executable, '-c', code], check=True)
