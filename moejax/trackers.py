"""Where else the metrics of a run go: TensorBoard, Weights & Biases, or your own.

A tracker is made by `(workdir, config, start_step)`: the run's folder, its config as nested dicts,
and the step it starts from. It has two methods, `write(step, metrics)` and `close()`. A new one is
a class with these, and an entry of TRACKERS. metrics.jsonl is authoritative: a tracker that fails
is left out from then on, with a warning.
"""

import contextlib
import importlib.util
import math
import os
import secrets
import sys
import time
from typing import Any

from moejax import buckets, files


@contextlib.contextmanager
def _hidden(*packages):
  """A context in which packages that are not imported yet seem not to be installed."""
  modules: dict[str, Any] = sys.modules
  hidden = dict.fromkeys(name for name in packages if name not in modules)
  modules.update(hidden)
  try:
    yield
  finally:
    for name in hidden:
      del modules[name]


class TensorBoard:
  """Events in the run's folder; `tensorboard --logdir FOLDER` shows them.

  They are written at once: tensorboardX's SummaryWriter hands them to a thread, and blocks for ever
  once that has died, of a full disk or a clock that was set back.
  """

  def __init__(self, workdir, config, start_step):
    # It would import them, which takes seconds, for tensors and events in buckets.
    with _hidden('torch', 'boto3', 'google.cloud.storage'):
      from tensorboardX import event_file_writer, summary
      from tensorboardX.proto import event_pb2

    del config
    proto: Any = event_pb2
    self._scalar, self._event = summary.scalar, proto.Event
    self._workdir, self._writing = files.path(workdir), contextlib.ExitStack()
    self._folder = self._writing.enter_context(files.to_fill(self._workdir))
    prefix = str(self._folder / 'events')  # short runs would share a file name
    self._events = event_file_writer.EventsWriter(prefix, f'.{start_step}')
    first = start_step + 1 if start_step else 0  # TensorBoard drops what an earlier process wrote
    self._write(first, session_log=proto.SessionLog(status=proto.SessionLog.START))
    self._events.flush()

  def write(self, step, metrics):
    for name, value in metrics.items():
      if math.isfinite(value):
        self._write(step, summary=self._scalar(name, value))
    self._events.flush()

  def _write(self, step, **content):
    self._events.write_event(self._event(step=step, wall_time=time.time(), **content))

  def sync(self):
    if buckets.is_bucket(self._workdir):
      files.upload(self._folder, self._workdir)

  def close(self):
    self._events.close()
    self._writing.close()


class WandB:
  """A run of Weights & Biases, which continues when this run resumes.

  Its id is in the file `wandb_id` of the run's folder. The environment variables of wandb apply:
  WANDB_PROJECT (default: moejax), WANDB_NAME (default: the folder's name), WANDB_MODE=offline, ...
  """

  PACKAGE = 'wandb'

  def __init__(self, workdir, config, start_step):
    del start_step
    import wandb

    workdir = files.path(workdir)
    path = workdir / 'wandb_id'
    if not files.exists(path):
      files.write(path, secrets.token_hex(4))
    offline = os.environ.get('WANDB_MODE') == 'offline'  # uploads of one id become one run there
    self._run = wandb.init(
      id=files.read(path).decode(),
      resume=None if offline else 'allow',
      dir=None if buckets.is_bucket(workdir) else workdir,
      project=os.environ.get('WANDB_PROJECT', 'moejax'),
      name=os.environ.get('WANDB_NAME', workdir.name),
      config=config,
    )

  def write(self, step, metrics):
    self._run.log(metrics, step=step)

  def close(self):
    self._run.finish()


TRACKERS = {'tensorboard': TensorBoard, 'wandb': WandB}


def check_installed(names) -> None:
  """Raises ValueError if a tracker needs a package that is not installed."""
  for name in names:
    package = getattr(TRACKERS[name], 'PACKAGE', None)
    if package and not importlib.util.find_spec(package):
      raise ValueError(
        f"train.trackers: {name} is not installed: pip install 'moejax[{name}]', or leave it out."
      )


class Trackers:
  """The trackers of a run as one, which never fails."""

  def __init__(self, names, workdir, config, start_step: int):
    """Opens the trackers `names`; the rest is as a tracker takes it."""
    self._trackers = {}
    for name in dict.fromkeys(names):
      with self._guarded(name):
        self._trackers[name] = TRACKERS[name](workdir, config, start_step)

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Passes on the metrics of a step; numbers may be NaN or infinite."""
    for name, tracker in list(self._trackers.items()):
      with self._guarded(name):
        tracker.write(step, metrics)

  def sync(self) -> None:
    """Writes what they keep only in memory or on this disk."""
    for name, tracker in list(self._trackers.items()):
      with self._guarded(name):
        getattr(tracker, 'sync', lambda: None)()

  def close(self) -> None:
    """Closes them, once."""
    for name, tracker in list(self._trackers.items()):
      with self._guarded(name):
        tracker.close()
    self._trackers.clear()

  @contextlib.contextmanager
  def _guarded(self, name):
    """If what is done within fails, drops the tracker and prints one warning."""
    try:
      yield
    except Exception as error:
      self._trackers.pop(name, None)
      what = ' '.join(f'{type(error).__name__}: {error}'.split())
      print(f'warning: train.trackers: {name} failed and is left out from now on: {what}')
