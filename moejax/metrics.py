"""What a run reports: metrics.jsonl, TensorBoard, the progress line, the loss plot, summary.json.

metrics.jsonl is the truth: one JSON object per line with its 'step', in order, each step's metric
once. Numbers that are not finite are null there, as JSON has no NaN.
"""

import importlib.metadata
import json
import math
import pathlib
import platform
import re
import subprocess

import jax
import numpy as np
import tensorboardX
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import moejax
from moejax import files, text

_FILE = 'metrics.jsonl'


class MetricsWriter:
  """Appends to metrics.jsonl and to TensorBoard events in a folder; for one process of a run."""

  def __init__(self, workdir, start_step: int):
    """Opens both, without what an earlier, longer attempt wrote.

    Args:
      workdir: the run's folder; created if it does not exist.
      start_step: the step that the run resumes from: later lines are dropped. 0: all are.
    """
    path = pathlib.Path(workdir) / _FILE
    first = start_step + 1 if start_step else 0
    kept = [entry for entry in read_metrics(workdir) if entry['step'] < first]
    files.write(path, ''.join(map(_line, kept)))
    self._lines = path.open('a')
    self._events = tensorboardX.SummaryWriter(  # a file name per second is too few for short runs
      str(workdir), purge_step=first, filename_suffix=f'.{start_step}'
    )

  def write(self, step: int, metrics: dict[str, float], prefix: str = '') -> None:
    """Writes one line. With a prefix, 'loss' becomes 'prefix/loss'."""
    named = {f'{prefix}/{name}' if prefix else name: float(v) for name, v in metrics.items()}
    self._lines.write(_line({'step': step, **named}))
    self._lines.flush()
    for name, value in named.items():
      if math.isfinite(value):
        self._events.add_scalar(name, value, step)
    self._events.flush()

  def close(self) -> None:
    """Closes both files."""
    self._lines.close()
    self._events.close()


class NoWriter:
  """Has the methods of a `MetricsWriter` and writes nothing."""

  def write(self, step: int, metrics: dict[str, float], prefix: str = '') -> None:
    pass

  def close(self) -> None:
    pass


def make_writer(workdir, start_step: int) -> MetricsWriter | NoWriter:
  """A MetricsWriter in process 0 of a run; the others write nothing."""
  return MetricsWriter(workdir, start_step) if jax.process_index() == 0 else NoWriter()


def read_metrics(workdir) -> list[dict]:
  """All lines of metrics.jsonl, but for a last one cut off in writing; [] if there is no file."""
  path = pathlib.Path(workdir) / _FILE
  if not path.exists():
    return []
  *lines, unfinished = path.read_text().split('\n')
  del unfinished
  return [json.loads(line) for line in lines]


def loss_curve(workdir, name: str = 'loss') -> list[tuple[int, float]]:
  """(step, value) of one metric, where it was measured and finite."""
  entries = read_metrics(workdir)
  return [(entry['step'], entry[name]) for entry in entries if entry.get(name) is not None]


def flatten_aux(aux: dict) -> dict[str, float]:
  """Measurements of sublayers by name: 'name/00', 'name/01', ... in their order.

  Those with more than one number per sublayer are for plots and left out.
  """
  rows = {name: np.asarray(values) for name, values in aux.items()}
  return {
    f'{name}/{i:02d}': float(value)
    for name, values in rows.items()
    if values.ndim == 1
    for i, value in enumerate(values)
  }


def progress_line(
  *,
  step: int,
  steps: int,
  loss: float,
  tokens_per_second: float,
  seconds_left: float,
  grad_norm: float | None = None,
  mfu: float | None = None,
  dropped: float | None = None,
) -> str:
  """One line of at most 100 columns; None is left out.

  `mfu` is a fraction of the peak, `dropped` of the choices of experts.
  """
  parts = [
    f'step {step:>{len(str(steps))}}/{steps}',
    f'{100 * step / steps:5.1f}%',
    f'loss {loss:.3f}' if abs(loss) < 1000 else f'loss {loss:.2e}',
    f'grad {grad_norm:.2g}' if grad_norm is not None else '',
    f'dropped {100 * dropped:.1f}%' if dropped is not None else '',
    f'{text.short(tokens_per_second)} tok/s',
    f'MFU {100 * mfu:.1f}%' if mfu is not None else '',
    f'{text.duration(seconds_left)} left',
  ]
  return '  '.join(filter(None, parts))


def plot_losses(curves: dict[str, list[tuple[int, float]]], path) -> None:
  """Draws loss curves into a PNG file.

  Args:
    curves: (step, loss in nats per token) by label. A label that ends in 'validation' is drawn with
      markers; any other is training, drawn thin, with its running mean thick. 'x train' and
      'x validation', or 'x' alone, share a colour.
    path: of the file.
  """
  arrays = {label: np.array(points, float) for label, points in curves.items() if points}
  figure = Figure(figsize=(8, 5), dpi=120, layout='constrained')
  axes = figure.add_subplot(xlabel='step', ylabel='loss (nats per token)', axisbelow=True)
  colours = {}
  for label, points in arrays.items():
    run = re.sub(r'\s*(train|validation)$', '', label)
    colour = colours.setdefault(run, f'C{len(colours)}')
    if label.endswith('validation'):
      style = {'marker': 'o', 'markersize': 6, 'markeredgecolor': 'white', 'linestyle': '--'}
      axes.plot(*points.T, color=colour, linewidth=1, zorder=3, label=label, **style)
    else:
      steps, losses = points.T
      axes.plot(steps, losses, color=colour, linewidth=0.7, alpha=0.35)
      axes.plot(steps, running_mean(losses), color=colour, linewidth=2, label=label)
  if arrays:
    axes.set_ylim(*_limits(arrays.values()))
    axes.legend(frameon=False)
  axes.grid(color='0.9')
  axes.spines[['top', 'right']].set_visible(False)
  with files.atomic_output(path) as temporary:
    figure.savefig(temporary)


def plot_router(load, path) -> None:
  """Draws the load of experts (columns) by sparse layer (rows) into a PNG file.

  Args:
    load: [layers, experts], 1 is a fair share.
    path: of the file.
  """
  load = np.asarray(load)
  figure = Figure(figsize=(8, 1.5 + 0.3 * len(load)), dpi=120, layout='constrained')
  axes = figure.add_subplot(xlabel='expert', ylabel='sparse layer')
  image = axes.imshow(load, aspect='auto', cmap='RdBu_r', vmin=0, vmax=2, interpolation='nearest')
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(MaxNLocator(integer=True))
  label = f'load over fair share (largest {load.max():.2f}, {(load == 0).sum()} dead)'
  figure.colorbar(image, label='load / fair share', extend='max')
  axes.set_title(label, fontsize='medium', loc='left')
  with files.atomic_output(path) as temporary:
    figure.savefig(temporary)


def running_mean(values) -> np.ndarray:
  """The mean of a window around every point, a twentieth of all wide, cut off at both ends."""
  values = np.asarray(values, float)
  index, half = np.arange(len(values)), len(values) // 40
  first, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
  sums = np.concatenate([[0.0], np.cumsum(values)])
  return (sums[end] - sums[first]) / (end - first)


def _limits(curves):
  """Lowest and highest loss to show: the first twentieth of the steps may lie above."""
  last = max(points[-1, 0] for points in curves)
  settled = [points[points[:, 0] >= 0.05 * last, 1] for points in curves]
  losses = np.concatenate(settled)
  low, high = losses.min(), np.percentile(losses, 99.5)
  margin = 0.05 * (high - low) or 0.1
  return low - margin, high + margin


def versions() -> dict:
  """What else decides a run's numbers: versions of programs, and the devices they run on."""
  packages = ('jax', 'jaxlib', 'flax', 'optax')
  device = jax.devices()[0]
  return {
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in packages},
    'orbax': importlib.metadata.version('orbax-checkpoint'),
    'moejax': moejax.__version__,
    'platform': device.platform,
    'device_kind': device.device_kind,
    'device_count': jax.device_count(),
  }


def git_commit() -> str | None:
  """The commit of the source tree, with '-dirty' if files differ from it; None outside of git."""
  root = pathlib.Path(__file__).resolve().parent.parent
  if not (root / '.git').exists():  # an installed copy may lie inside somebody else's repository
    return None
  command = 'git describe --always --dirty --abbrev=40 --exclude=*'.split()
  try:
    result = subprocess.run(
      command, cwd=root, capture_output=True, text=True, timeout=10, check=True
    )
  except (OSError, subprocess.SubprocessError):
    return None
  return result.stdout.strip()


def write_summary(workdir, summary: dict) -> None:
  """Writes summary.json, whole or not at all."""
  content = json.dumps(_plain(summary), indent=2, sort_keys=True, allow_nan=False)
  files.write(pathlib.Path(workdir) / 'summary.json', content + '\n')


def _line(entry):
  return json.dumps(_plain(entry), allow_nan=False) + '\n'


def _plain(value):
  """Arrays and numpy scalars become lists and numbers, NaN and infinities None."""
  if isinstance(value, dict):
    return {str(key): _plain(v) for key, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  if hasattr(value, 'tolist'):
    return _plain(value.tolist())
  return None if isinstance(value, float) and not math.isfinite(value) else value
