"""Updates that are not finite, spikes of the loss, and going back before them."""

import contextlib
import math

import jax
import numpy as np
import pytest

from configs import dense
from moejax import (
  cli,
  config as config_lib,
  metrics,
  model as model_lib,
  replay,
  report,
  rewind,
  run_folder,
  sharding,
  step as step_lib,
  train,
  watch,
)
from moejax.data import loader

STEPS, WINDOW = 90, 8
SCALED = 99  # a segment that marks a batch


@pytest.fixture(scope='module')
def patched():
  """Batches to spoil, by number; and a loss that is 100 times as large where a batch is marked."""
  spoilt = {}
  batch, loss = loader.TokenLoader.batch, model_lib.LanguageModel.loss

  def spoiling(self, number):
    found = batch(self, number)
    return spoilt.get(number, dict)(found) if self._is_train else found

  def scaling(self, batch, key=None):
    nats, targets, aux = loss(self, batch, key)
    return nats * jax.numpy.where((batch['segments'] == SCALED).any(), 100.0, 1.0), targets, aux

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loader.TokenLoader, 'batch', spoiling)
    patch.setattr(model_lib.LanguageModel, 'loss', scaling)
    patch.setattr(watch, 'WINDOW', WINDOW)
    yield spoilt


@pytest.fixture
def spoil(patched):
  """Spoils batches: `spoil({3: _nan})`."""
  yield patched.update
  patched.clear()


def _nan(batch):
  """Without a target, the mean over targets is 0 / 0."""
  return batch | {'segments': np.zeros_like(batch['segments'])}


def _scaled(batch):
  segments = batch['segments'].copy()
  segments[0, 0] = SCALED
  return batch | {'segments': segments}


def _config(texts, **changes):
  config = dense.get_config('debug')
  config.mesh.update({'data': 1, 'tensor': 1, 'fsdp': 8})
  fields = {
    'model.blocks': ((('mlp',), 2),),
    'model.loss_chunk': 0,
    'data.source': 'text',
    'data.files': texts,
    'optimizer.warmup_steps': 5,
    'optimizer.accumulation': 2,
    'train.steps': STEPS,
    'train.eval_interval': STEPS,
    'train.checkpoint_interval': 10,
    'train.spike_zscore': 20.0,
    'train.keep_checkpoints': 10,
    'train.log_interval': 20,
    'train.sample_length': 0,
    'train.trackers': (),
  }
  with config.unlocked():
    config.update_from_flattened_dict(fields | changes)
  return config


@pytest.fixture(scope='module')
def seen():
  """The numbers of the steps of `undisturbed`."""
  return {}


@pytest.fixture(scope='module')
def undisturbed(patched, texts, seen, tmp_path_factory):
  workdir, see = tmp_path_factory.mktemp('runs') / 'undisturbed', watch.Watch.see
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(watch.Watch, 'see', lambda *args: seen.update([args[2:]]) or see(*args))
    assert train.train(_config(texts), workdir) == cli.OK
  return workdir


def _loss(workdir):
  return report.read_summary(workdir)['validation']['loss']


def _incidents(workdir):
  names = ('step', 'what', 'back_to')
  incidents = report.read_summary(workdir)['incidents']
  return [tuple(incident[name] for name in names if name in incident) for incident in incidents]


def _state(workdir, step):
  run_config = config_lib.resolve(run_folder.read(workdir))
  abstract = sharding.abstract(
    step_lib.fresh_state(run_config), sharding.make_mesh(run_config.mesh)
  )
  with contextlib.closing(run_folder.checkpoints(workdir, run_config)) as checkpoints:
    assert checkpoints.latest_step() >= step
    return jax.device_get(checkpoints.restore(step, abstract))


def _updates(workdir, step):
  """How many updates the optimizer has counted."""
  (count,) = {int(a) for a in jax.tree.leaves(_state(workdir, step)['optimizer']) if a.ndim == 0}
  return count


@pytest.mark.heavy
def test_a_batch_of_nan_is_skipped_and_harmless(undisturbed, texts, spoil, tmp_path, capsys):
  spoil({32: _nan})
  assert train.train(_config(texts), tmp_path) == cli.OK
  assert _incidents(tmp_path) == [(33, 'skipped')] and _incidents(undisturbed) == []
  assert 0 < abs(_loss(tmp_path) - _loss(undisturbed)) < 0.01
  assert [_updates(tmp_path, step) for step in (30, 40, 90)] == [30, 39, 89]
  logged = metrics.loss_curve(tmp_path, 'skipped')
  assert logged == [(20, 0), (40, 1), (60, 1), (80, 1), (90, 1)]
  assert len(metrics.loss_curve(tmp_path)) == len(logged)  # all are finite
  lines = capsys.readouterr().out.splitlines()
  (line,) = [line for line in lines if line.startswith('step 33: ')]
  assert line.startswith('step 33: update skipped (loss nan, grad_norm 0, update_norm ')
  again = replay.replay(tmp_path, 33)
  assert line.endswith(f'; batch {again.batch}') and again.begun == 30
  assert again.numbers['skipped'] and 'the update is skipped; ' in replay.describe(again)


@pytest.mark.heavy
def test_a_batch_of_a_gradient_100_times_as_large_is_harmless(
  undisturbed, texts, spoil, tmp_path, monkeypatch
):
  spoil({45: _scaled})
  assert train.train(_config(texts), tmp_path / 'log') == cli.OK
  assert _incidents(tmp_path / 'log') == [(46, 'spike')]
  rewinding = _config(texts, **{'train.on_spike': 'rewind'})
  assert train.train(rewinding, tmp_path / 'rewind') == cli.OK
  assert _incidents(tmp_path / 'rewind') == [(46, 'spike', 30)]  # 40 is less than 10 steps before
  for name in ('log', 'rewind'):
    assert 0 < abs(_loss(tmp_path / name) - _loss(undisturbed)) < 0.01

  def killed(run):
    assert rewind.rewind(run)
    raise MemoryError

  with monkeypatch.context() as patch, pytest.raises(MemoryError):
    patch.setattr(train, 'rewind', killed)
    train.train(rewinding, tmp_path / 'killed')
  assert train.train(rewinding, tmp_path / 'killed') == cli.OK
  of_both = [tmp_path / name for name in ('rewind', 'killed')]
  jax.tree.map(np.testing.assert_array_equal, *(_state(workdir, STEPS) for workdir in of_both))
  assert _incidents(of_both[0]) == _incidents(of_both[1])
  curves = [metrics.loss_curve(workdir) for workdir in of_both]
  assert curves[0] == curves[1] and [step for step, _ in curves[0]] == [20, 40, 60, 80, 90]


@pytest.mark.heavy
def test_a_spike_that_comes_back_is_passed_after_three_attempts(texts, spoil, tmp_path, capsys):
  spoil(dict.fromkeys(range(45, 120, 15), _scaled))
  config = _config(texts, **{'train.on_spike': 'rewind', 'train.steps': 60})
  assert train.train(config, tmp_path) == cli.OK
  assert [i[2:] for i in _incidents(tmp_path)][:4] == [(30,), (30,), (30,), ()]
  assert 'going on through the spike: back at step 30 3 times already' in capsys.readouterr().out


@pytest.mark.heavy
def test_too_many_skipped_in_a_row_stop_the_run_with_the_last_good_state(texts, spoil, tmp_path):
  spoil(dict.fromkeys(range(26, 60), _nan))
  config = _config(texts, **{'train.max_skipped': 5})
  for at in (32, 33):
    with pytest.raises(
      RuntimeError, match=rf'^training diverged at step {at}: \d updates in a row'
    ):
      train.train(config, tmp_path)
    assert _updates(tmp_path, 32) == 26  # and nothing is saved where nothing was learnt
    assert not (tmp_path / 'checkpoints' / '33').exists()
  spoil({number: dict for number in range(26, 60)})
  assert train.train(config, tmp_path) == cli.OK
  assert _updates(tmp_path, STEPS) == STEPS - 6


def _see(seen, *losses):
  for loss in losses:
    numbers = {'loss': loss, 'grad_norm': 1.0, 'update_norm': 1.0}
    numbers['skipped'] = float(not math.isfinite(loss))
    seen.see({'inputs': jax.numpy.array([loss])}, 7, numbers)


def test_a_watch_counts_what_is_skipped_and_flags_spikes(monkeypatch):
  monkeypatch.setattr(watch, 'WINDOW', 4)
  seen = watch.Watch(config_lib.TrainConfig(on_spike='rewind'))
  _see(seen, 5.0, math.nan, 4.0, 3.0, 90.0)  # early losses may be anything
  assert (seen.skipped, seen.in_row, seen.spike, seen.losses) == (1, 0, None, [5, 4, 3, 90])
  seen = watch.Watch(config_lib.TrainConfig(on_spike='rewind'), [5.0, 4.0, 3.0, 4.0])
  _see(seen, math.nan, math.inf)
  assert seen.in_row == 2 and seen.good_batch is None
  _see(seen, 4.0 + 6 * 0.8, 4.0 + 7 * 0.8)
  assert seen.in_row == 0 and seen.good_batch is not None and seen.spike is None
  seen.losses = [5.0, 4.0, 3.0, 4.0]
  _see(seen, 10.0, 1000.0)
  assert seen.spike is seen.incidents[-2] and seen.spike['zscore'] == pytest.approx(
    6 / 0.8165, 0.01
  )
  batches = [incident['batch'] for incident in seen.incidents]
  assert all(len(batch) == 16 for batch in batches) and len(set(batches)) == len(batches)
  restored = watch.Watch(seen.config, **seen.saved(), incidents=seen.incidents)
  assert restored.losses == seen.losses and restored.skipped == seen.skipped == 2
  with pytest.raises(metrics.Diverged, match='at step 7: the update is not finite, though'):
    numbers = {'loss': 1.0, 'grad_norm': 1.0, 'update_norm': math.inf, 'skipped': 0.0}
    seen.see({'inputs': jax.numpy.zeros(1)}, 7, numbers)
  logging = watch.Watch(config_lib.TrainConfig(), [5.0, 4.0, 3.0, 4.0])
  _see(logging, 1000.0)
  assert logging.spike is None and logging.incidents[0]['what'] == 'spike'


@pytest.mark.heavy
def test_a_step_is_replayed_bit_for_bit(undisturbed, seen):
  for step, begun in ((3, 0), (54, 50)):
    again = replay.replay(undisturbed, step)
    assert again.begun == begun
    assert {name: again.numbers[name] for name in seen[step]} == seen[step]
    for what, name in (('gradient', 'grad_norm'), ('update', 'update_norm')):
      whole = math.hypot(*(row.get(what, 0) for row in again.layers.values()))
      assert whole == pytest.approx(seen[step][name], rel=1e-4)
    assert [*again.layers] == ['embedding', '0 mlp', '1 mlp', 'head']
    assert {'output', 'stream', 'parameters', 'gradient', 'update'} == {*again.layers['1 mlp']}
    assert all(value > 0 for row in again.layers.values() for value in row.values())
  with pytest.raises(ValueError, match=r'--step=91: expected 1 to train.steps = 90'):
    replay.replay(undisturbed, 91)


def test_what_is_not_finite_is_found_where_it_begins():
  good = {'scores': 1.0, 'output': 1.0, 'stream': 1.0, 'gradient': 1.0}
  numbers = dict.fromkeys(('loss', 'grad_norm', 'update_norm', 'learning_rate', 'skipped'), 1.0)
  for changes, place in (
    ([{}, {'stream': math.inf}, {'output': math.nan}], 'stream of 1 moe'),
    ([{}, {'gradient': math.inf}, {'gradient': math.nan}], 'gradient of 2 mlp'),
  ):
    layers = dict(zip(('0 mlp', '1 moe', '2 mlp'), (good | c for c in changes), strict=True))
    text = replay.describe(replay.Replayed(7, 5, 'abc', numbers, layers))
    assert text.splitlines()[0] == 'step 7, from the checkpoint of step 5; batch abc'
    assert text.endswith(f'the first that is not finite is the {place}')
