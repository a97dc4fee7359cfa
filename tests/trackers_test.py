"""Trackers get what metrics.jsonl gets, and never end a run."""

import errno
import importlib.util
import json
import math
import pathlib
import re
import struct
import time

import pytest

from moejax import config as config_lib, metrics, trackers


class Recorder:
  """A tracker that keeps what it gets."""

  made = None

  def __init__(self, workdir, config, start_step):
    self.opened, self.written, self.closed = (workdir, config, start_step), [], 0
    Recorder.made = self

  def write(self, step, metrics):
    self.written.append((step, metrics))

  def close(self):
    self.closed += 1


@pytest.fixture
def registry(monkeypatch):
  monkeypatch.setattr(trackers, 'TRACKERS', dict(trackers.TRACKERS))
  return trackers.TRACKERS


def test_a_new_tracker_is_one_entry(registry, tmp_path):
  registry['recorder'] = Recorder
  writer = metrics.MetricsWriter(tmp_path, 5, ('recorder',), {'train': {'steps': 9}})
  writer.write(6, {'loss': 2.0})
  writer.write(6, {'loss': math.inf}, prefix='validation')
  writer.close()
  writer.close()
  assert Recorder.made.opened == (tmp_path, {'train': {'steps': 9}}, 5)
  assert Recorder.made.written == [(6, {'loss': 2.0}), (6, {'validation/loss': math.inf})]
  assert Recorder.made.closed == 1
  assert not [*tmp_path.glob('events*')]


@pytest.mark.parametrize('method', ['__init__', 'write', 'close'])
def test_a_failing_tracker_is_left_out_with_one_warning(registry, tmp_path, capsys, method):
  def fail(*_):
    raise OSError('no\nnetwork')

  registry['broken'] = type('Broken', (Recorder,), {method: fail})
  registry['recorder'] = Recorder
  writer = metrics.MetricsWriter(tmp_path, 0, ('broken', 'recorder'))
  for step in range(1, 4):
    writer.write(step, {'loss': 1 / step})
  writer.close()
  assert capsys.readouterr().out == (
    'warning: train.trackers: broken failed and is left out from now on: OSError: no network\n'
  )
  assert len(Recorder.made.written) == len(metrics.read_metrics(tmp_path)) == 3


def test_a_clock_that_is_set_back_holds_up_nothing(tmp_path, monkeypatch):
  writer = metrics.MetricsWriter(tmp_path, 0, ('tensorboard',))
  writer.write(1, {'loss': 1.0})
  now = time.time()
  monkeypatch.setattr(time, 'time', lambda: now - 100 * 86400)
  for step in range(2, 50):
    writer.write(step, {'loss': 1.0})
  writer.close()
  (path,) = tmp_path.glob('events.out.tfevents.*')
  assert path.read_bytes().count(b'loss') == 49


def test_a_full_disk_under_tensorboard_holds_up_nothing(tmp_path, monkeypatch, capsys):
  from tensorboardX.record_writer import RecordWriter

  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  writer = metrics.MetricsWriter(tmp_path, 0, ('tensorboard',))
  events = writer._trackers._trackers['tensorboard']._events
  monkeypatch.setattr(RecordWriter, 'write', full)
  for step in range(1, 50):
    writer.write(step, {'loss': 1.0})
  writer.close()
  events.close()
  assert capsys.readouterr().out.count('tensorboard failed and is left out from now on') == 1
  assert len(metrics.read_metrics(tmp_path)) == 49


def test_the_field_takes_names_with_commas_and_tuples():
  config = config_lib.baseline()
  assert config.train.trackers == ('tensorboard',)
  texts = {'tensorboard,wandb': ('tensorboard', 'wandb'), 'wandb': ('wandb',), '': (), '()': ()}
  for text, names in (texts | {"('wandb',)": ('wandb',)}).items():
    config_lib.set_fields(config, {'train.trackers': text})
    assert config.train.trackers == names == config_lib.resolve(config).train.trackers
  with pytest.raises(
    ValueError, match="names of tensorboard, wandb; got 'wand'; did you mean 'wan"
  ):
    config_lib.set_fields(config, {'train.trackers': 'wand,tensorboard'})


def test_a_package_that_is_missing_is_named_before_training(monkeypatch):
  trackers.check_installed(('tensorboard',))
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r"wandb is not installed: pip install 'moejax\[wandb\]'"):
    trackers.check_installed(('tensorboard', 'wandb'))


def _records(path):
  """The records of an offline run of W&B. Each is: crc, length, type, data."""
  from wandb.proto.wandb_internal_pb2 import Record

  content = path.read_bytes()[7:]
  while content:
    _, length, _ = struct.unpack('<IHB', content[:7])
    yield Record.FromString(content[7 : 7 + length])
    content = content[7 + length :]


@pytest.mark.skipif(not importlib.util.find_spec('wandb'), reason='wandb is not installed')
def test_wandb_resumes_the_same_run_offline(tmp_path, monkeypatch):
  monkeypatch.setenv('WANDB_MODE', 'offline')
  folder = tmp_path / 'my_run'
  for start_step in (0, 10):
    writer = metrics.MetricsWriter(folder, start_step, ('wandb',), {'train': {'steps': 20}})
    writer.write(start_step + 10, {'loss': 2.5, 'mfu': math.nan})
    writer.close()
    time.sleep(1)  # its folders are named by the second
  identity = (folder / 'wandb_id').read_text()
  paths = sorted(folder.glob(f'wandb/offline-run-*/run-{identity}.wandb'))
  assert paths
  logged = []
  for record in (record for path in paths for record in _records(path)):
    if record.HasField('run'):
      assert (record.run.project, record.run.display_name) == ('moejax', 'my_run')
      config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
      assert config['train'] == {'steps': 20}
    for item in record.history.item:
      if (item.key or item.nested_key[0]) == 'loss':
        logged.append((record.history.step.num, json.loads(item.value_json)))
  assert logged == [(10, 2.5), (20, 2.5)]


def test_the_tracker_of_the_page(registry, tmp_path, capsys):
  page = pathlib.Path(__file__).parent.parent / 'docs' / 'tracking.md'
  (code,) = re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL)
  exec(code, {})
  writer = metrics.MetricsWriter(tmp_path / 'mot', 0, ('printed',))
  writer.write(10, {'loss': 2.5})
  writer.close()
  assert capsys.readouterr().out == 'mot, step 10: loss 2.5\n'
