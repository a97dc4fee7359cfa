"""Reports of a run: the progress line, plots, and summary.json."""

import functools
import importlib.metadata
import json
import pathlib
import platform
import re
import subprocess
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import moejax
from moejax import files, metrics, text


def progress_line(
  *,
  step: int,
  steps: int,
  loss: float,
  tokens_per_second: float | None = None,
  seconds_left: float | None = None,
  grad_norm: float | None = None,
  mfu: float | None = None,
  dropped: float | None = None,
) -> str:
  """One line of at most 100 columns; None is left out.

  `mfu` is a fraction of peak FLOP/s, `dropped` of the expert assignments.
  """
  parts = [
    f'step {step:>{len(str(steps))}}/{steps}',
    f'{100 * step / steps:5.1f}%',
    f'loss {loss:.3f}' if abs(loss) < 1000 else f'loss {loss:.2e}',
    f'grad {grad_norm:.2g}' if grad_norm is not None else '',
    f'dropped {100 * dropped:.1f}%' if dropped is not None else '',
    f'{text.short(tokens_per_second)} tok/s' if tokens_per_second is not None else '',
    f'MFU {100 * mfu:.1f}%' if mfu is not None else '',
    f'{text.duration(seconds_left)} left' if seconds_left is not None else '',
  ]
  return '  '.join(filter(None, parts))


def describe(result: dict) -> str:
  """The results of an evaluation as text."""
  parts = [f'loss {loss_of(result)} nats per token']
  if 'bits_per_byte' in result:
    parts.append(f'{result["bits_per_byte"]:.4f} bits per byte')
  if 'loss_dropless' in result:
    parts.append(f'{result["loss_dropless"]:.4f} nats without drops')
  return ', '.join(parts)


def describe_training(training: dict) -> str:
  """The smoothed training loss of a run and what else its summary says of training, as text."""
  parts = []
  if 'loss' in training:
    steps = f'steps {training["first_step"]:,} to {training["last_step"]:,}'
    parts.append(f'training loss {loss_of(training)}, mean of {steps}')
  if (epochs := training['epochs']) is not None:
    parts.append(f'{epochs:.2g} epochs' + (' (no text seen twice)' if epochs <= 1 else ''))
  if training['clipped'] is not None:
    parts.append(f'gradient clipped in {training["clipped"]:.0%} of the steps')
  return ', '.join(parts)


def loss_of(result: dict) -> str:
  """The loss of a result, and its standard error if there is one."""
  error = result.get('standard_error')
  return f'{result["loss"]:.4f}' + (f' ± {error:.4f}' if error is not None else '')


def part(result: dict) -> str:
  """How much of its split an evaluation covers, as text."""
  return 'whole split' if result['whole_split'] else f'first {result["batches"]} batches'


def extent(result: dict, of: str = 'validation split') -> str:
  """What an evaluation averaged over, as text."""
  names = ('documents', 'sequences', 'tokens', 'bytes')
  numbers = [f'{text.short(result[name])} {name}' for name in names if result.get(name)]
  part = 'the whole' if result['whole_split'] else f'the first {result["batches"]} batches of the'
  return f'{part} {of}: {", ".join(numbers)}'


def plot_losses(curves: dict[str, list[tuple[int, float]]], path) -> None:
  """Writes `loss_figure` to a file; its suffix says in which format."""
  save_figure(loss_figure(curves), path)


def new_figure(**properties) -> tuple[Figure, Any]:
  """A figure in the style of all plots of runs, and its axes with these properties."""
  figure, (axes,) = new_figures(1, (8, 5))
  axes.set(**properties)
  return figure, axes


def new_figures(columns: int, size: tuple[float, float]) -> tuple[Figure, list]:
  """Figures beside each other that share their y-axis, and their axes; `size` is in inches."""
  figure = Figure(figsize=size, dpi=120, layout='constrained')
  (row,) = figure.subplots(1, columns, sharey=True, squeeze=False)
  for axes in row:
    axes.set_axisbelow(True)
    axes.grid(color='0.9')
    axes.spines[['top', 'right']].set_visible(False)
  return figure, list(row)


def save_figure(figure: Figure, path) -> None:
  """Writes a figure to a file, in the format of its suffix."""
  with files.atomic_output(path) as temporary:
    figure.savefig(temporary)


def loss_figure(curves: dict[str, list[tuple[int, float]]]) -> Figure:
  """A figure of loss curves.

  Args:
    curves: (step, loss in nats per token) by label. A label that ends in 'validation' is drawn with
      markers; any other is training, drawn thin, with its running mean thick. 'x train' and
      'x validation', or 'x' alone, share a colour.
  """
  arrays = {label: np.array(points, float) for label, points in curves.items() if points}
  figure, axes = new_figure(xlabel='step', ylabel='loss (nats per token)')
  colours = {}
  for label, points in arrays.items():
    run = re.sub(r'\s*(train|validation)$', '', label)
    colour = colours.setdefault(run, f'C{len(colours)}')
    shown = plain_label(label)
    if label.endswith('validation'):
      style = {'marker': 'o', 'markersize': 6, 'markeredgecolor': 'white', 'linestyle': '--'}
      axes.plot(*points.T, color=colour, linewidth=1, zorder=3, label=shown, **style)
    else:
      steps, losses = points.T
      axes.plot(steps, losses, color=colour, linewidth=0.7, alpha=0.35)
      axes.plot(steps, running_mean(losses), color=colour, linewidth=2, label=shown)
  if arrays:
    axes.set_ylim(*loss_limits(arrays.values()))
    axes.legend(frameon=False)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  return figure


def plain_label(name: str) -> str:
  """A name as matplotlib shows it: it hides _x and sets $x$ as mathematics."""
  return re.sub('^_', ' _', name).replace('$', r'\$')


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
  save_figure(figure, path)


def running_mean(values) -> np.ndarray:
  """The mean of a centred window, a twentieth of the curve wide and cut off at both ends."""
  values = np.asarray(values, float)
  index, half = np.arange(len(values)), len(values) // 40
  first, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
  sums = np.concatenate([[0.0], np.cumsum(values)])
  return (sums[end] - sums[first]) / (end - first)


def loss_limits(curves):
  """Lowest and highest loss to show; the first twentieth of the steps may exceed them."""
  last = max(points[-1, 0] for points in curves)
  settled = [points[points[:, 0] >= 0.05 * last, 1] for points in curves]
  losses = np.concatenate(settled)
  low, high = losses.min(), np.percentile(losses, 99.5)
  margin = 0.05 * (high - low) or 0.1
  return low - margin, high + margin


@functools.cache
def versions() -> dict:
  """What else determines a run's numbers: versions of packages, and the devices."""
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


@functools.cache
def git_commit() -> str | None:
  """The commit of the source tree, with '-dirty' if files differ from it; None outside git."""
  root = pathlib.Path(__file__).resolve().parent.parent
  if not (root / '.git').exists():  # an installed copy may be inside another repository
    return None
  command = 'git describe --always --dirty --abbrev=40 --exclude=*'.split()
  try:
    result = subprocess.run(
      command, cwd=root, capture_output=True, text=True, timeout=10, check=True
    )
  except (OSError, subprocess.SubprocessError):
    return None
  return result.stdout.strip()


def read_summary(workdir) -> dict:
  """The content of summary.json; {} if it is missing or unreadable."""
  return _summary(workdir) or {}


def _summary(workdir) -> dict | None:
  try:
    summary = json.loads(files.read(files.path(workdir) / 'summary.json'))
  except (OSError, RecursionError, ValueError):
    return None
  return summary if isinstance(summary, dict) else None


def is_finished(summary: dict) -> bool:
  """Whether a summary is that of a finished run; every checkpoint before writes one too."""
  return summary.get('finished', True)  # older versions wrote it at the end only


def has_finished(workdir) -> bool:
  """Whether the run in a folder is finished."""
  summary = _summary(workdir)
  return summary is not None and is_finished(summary)


def write_summary(workdir, summary: dict) -> None:
  """Writes summary.json atomically."""
  content = json.dumps(metrics.plain(summary), indent=2, sort_keys=True, allow_nan=False)
  files.write(files.path(workdir) / 'summary.json', content + '\n')
