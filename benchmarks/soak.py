"""Trains for hours, and looks at memory, open files, threads and the time of a step: do they grow?

  python benchmarks/soak.py --minutes=120 --output=build/soak --config=configs/mot.py

With frequent evaluations and checkpoints, which leak sooner than steps. The training program is
looked at from outside (Linux); the time of a step is that of CPUs, evaluations and checkpoints
included, because other programs disturb it less than the clock. Written are samples to soak.csv and
soak.png, and the run itself. The first quarter is left out: buffers fill, and programs are
compiled. Of the rest, medians of 20 parts give the slope (Theil and Sen's) and its 95% interval,
stated as the growth over that time.
"""

import csv
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
from absl import app, flags
from matplotlib.figure import Figure
from scipy import stats

from moejax import exit_codes, metrics, report

_FLAGS = flags.FLAGS
FIELDS = {
  'train.steps': 10**6,
  'train.log_interval': 10,
  'train.eval_interval': 50,
  'train.eval_batches': 2,
  'train.checkpoint_interval': 25,
}
COLUMNS = {
  'memory_mb': 'resident memory (MB)',
  'open_files': 'open files',
  'threads': 'threads',
  'step_seconds': 'CPU time of a step (s)',
}
_PARTS = 20
_FLAT = 0.02  # growth that is none


def look(process: int) -> dict[str, float]:
  """What a process holds now."""
  folder = pathlib.Path('/proc', str(process))
  pages = int((folder / 'statm').read_text().split()[1])
  return {
    'memory_mb': pages * os.sysconf('SC_PAGE_SIZE') / 1e6,
    'open_files': len(os.listdir(folder / 'fd')),
    'threads': len(os.listdir(folder / 'task')),
  }


def _last_step(workdir: pathlib.Path) -> int:
  return max([line['step'] for line in metrics.read_metrics(workdir)], default=0)


def _spent(process: int) -> float:
  """CPU seconds of a process so far."""
  fields = pathlib.Path('/proc', str(process), 'stat').read_text().rpartition(')')[2].split()
  return sum(map(int, fields[11:13])) / os.sysconf('SC_CLK_TCK')


def record(process: subprocess.Popen, workdir: pathlib.Path, seconds: float, interval: float):
  """Samples of a program that trains in a folder, for so long from its first log line on."""
  samples, began = [], None
  seen, spent = _last_step(workdir), 0.0
  while began is None or time.monotonic() - began < seconds:
    if process.poll() is not None:
      raise RuntimeError(f'training ended with exit code {process.returncode}: {workdir}.log')
    time.sleep(interval)
    step, now = _last_step(workdir), _spent(process.pid)
    if step == seen:
      continue
    if began is None:  # before the first line it compiled
      began = time.monotonic()
    else:
      passed = {'seconds': time.monotonic() - began, 'step': step}
      samples.append(passed | look(process.pid) | {'step_seconds': (now - spent) / (step - seen)})
    seen, spent = step, now
  return samples


def write(samples, output: pathlib.Path) -> None:
  """Writes soak.csv and soak.png."""
  with open(output / 'soak.csv', 'w', newline='') as file:
    rows = csv.DictWriter(file, samples[0].keys(), lineterminator='\n')
    rows.writeheader()
    rows.writerows(samples)
  figure = Figure(figsize=(8, 8), dpi=120, layout='constrained')
  minutes = [sample['seconds'] / 60 for sample in samples]
  rows = figure.subplots(len(COLUMNS), sharex=True)
  for axes, (name, label) in zip(rows, COLUMNS.items(), strict=True):
    axes.plot(minutes, [sample[name] for sample in samples], linewidth=1)
    axes.set(ylabel=label, ylim=(0, None))
    axes.grid(color='0.9')
  rows[-1].set_xlabel('minutes')
  report.save_figure(figure, output / 'soak.png')


def growth(seconds, values) -> tuple[float, float, float]:
  """By how much values grow over the last three quarters of the time, relative to their median.

  Returns the growth and the ends of its interval.
  """
  settled = np.array(seconds) >= 0.25 * seconds[-1]
  parts = [np.array_split(np.array(a)[settled], _PARTS) for a in (seconds, values)]
  times, medians = ([np.median(part) for part in of if len(part)] for of in parts)
  slope, _, low, high = stats.theilslopes(medians, times, 0.95)
  scale = (times[-1] - times[0]) / np.median(medians)
  return slope * scale, low * scale, high * scale


def verdict(low: float, high: float) -> str:
  """Whether something grows, by the interval of its growth."""
  if high < _FLAT:
    return 'flat'
  return 'grows' if low > 0 else 'cannot be told'


def main(_):
  output = pathlib.Path(_FLAGS.output)
  output.mkdir(parents=True, exist_ok=True)
  workdir = output / 'run'
  fields = [f'--config.{name}={value}' for name, value in FIELDS.items()]
  command = [sys.executable, '-m', 'moejax.main', f'--config={_FLAGS.config}', *fields]
  with open(output / 'run.log', 'w') as log:
    process = subprocess.Popen([*command, f'--workdir={workdir}'], stdout=log, stderr=log)
  try:
    samples = record(process, workdir, 60 * _FLAGS.minutes, _FLAGS.interval)
    write(samples, output)
    process.send_signal(signal.SIGTERM)
    code = process.wait(300)
  finally:
    process.kill()
  seconds, grows = [sample['seconds'] for sample in samples], code != exit_codes.RESUMABLE
  print(f'{samples[-1]["step"]} steps in {seconds[-1] / 60:.1f} minutes; exit code {code}')
  for name, label in COLUMNS.items():
    values = [sample[name] for sample in samples]
    value, low, high = growth(seconds, values)
    found = verdict(low, high)
    grows |= found == 'grows'
    interval = f'{value:+.1%} ({low:+.1%} to {high:+.1%})'
    print(f'{label:24}{np.median(values):9.4g}  growth {interval}: {found}')
  return int(grows)


if __name__ == '__main__':
  flags.DEFINE_float('minutes', 120, 'From the first step on.', lower_bound=1)
  flags.DEFINE_float('interval', 5, 'Seconds between samples.', lower_bound=0.1)
  flags.DEFINE_string('output', 'build/soak', 'A folder, which is made.')
  flags.DEFINE_string('config', 'configs/mot.py', 'FILE or FILE:VARIANTS.')
  app.run(main)
