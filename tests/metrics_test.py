"""What a run reports is complete, valid and without duplicates."""

import json
import math
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from moejax import metrics, report


def write(workdir, start_step, steps):
  writer = metrics.MetricsWriter(workdir, start_step)
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
  writer = metrics.MetricsWriter(tmp_path / 'run', 0)
  writer.write(10, {'loss': jnp.float32(2.5), 'mfu': 0.25})
  writer.write(10, {'loss': np.float64(3.0)}, prefix='eval')
  assert metrics.read_metrics(tmp_path / 'run') == [  # before closing: lines are flushed
    {'step': 10, 'loss': 2.5, 'mfu': 0.25},
    {'step': 10, 'eval/loss': 3.0},
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


def test_line_cut_off_by_a_kill_is_left_out(tmp_path):
  write(tmp_path, 0, [1, 2])
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text()[:-5])
  assert [entry['step'] for entry in metrics.read_metrics(tmp_path)] == [1]
  write(tmp_path, 2, [3])
  assert [entry['step'] for entry in metrics.read_metrics(tmp_path)] == [1, 3]


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, 0)
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


@pytest.mark.parametrize(
  'curves',
  [
    {},
    {'empty': []},
    {'one point': [(1, 2.0)]},
    {'train': [(1, 5.0), (2, 4.0)], 'validation': [(2, 4.5)]},
  ],
)
def test_plot_is_a_png(tmp_path, curves):
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
