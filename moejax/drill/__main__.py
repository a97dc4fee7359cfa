"""Ten minutes of faults on your own configuration and disk: which guarantees hold there?

  python -m moejax.drill --config=configs/mot.py --workdir=runs
  python -m moejax.drill --workdir=runs/mot --minutes=30

Copies of the run, 8 steps long, are killed at every phase, their checkpoints damaged, their disk
filled; when they are resumed, they must end with the same bits as one that nothing happened to. All
of it is in WORKDIR/drill, and nothing else is touched. Without --config, the config is that of the
run in WORKDIR.

WORKDIR/drill/drill.md and drill.csv have the table that is printed. The exit code is 0 if all that
was tried held, else 1, and then the folders of what did not hold are kept.
"""

import pathlib
import shutil

from absl import flags

from moejax import cli

_FLAGS = flags.FLAGS


def main(overrides):
  import jax  # which takes seconds

  from moejax import config as config_lib, run_folder
  from moejax.drill import verdicts
  from moejax.drill.faults import FAULTS
  from moejax.drill.runs import Runs

  jax.config.update('jax_platforms', 'cpu')  # accelerators are for the programs that it starts
  config = f'--config={_FLAGS.config or f"configs/run.py:{_FLAGS.workdir}"}'
  arguments = [config, *(f'--config.{name}={value}' for name, value in overrides.items())]
  config_lib.resolve(cli.config_of(arguments))
  folder = pathlib.Path(_FLAGS.workdir, 'drill').absolute()
  if _is_of_others(folder):
    raise ValueError(f'--workdir: {folder} is there, but of no drill. Move it away.')
  with run_folder.lock(folder):
    for path in folder.iterdir():
      if path.name != 'lease':
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / 'drill.csv').touch()  # whose folder it is
    print(f'training without a fault, in {folder}', flush=True)
    runs = Runs(folder, arguments, _FLAGS.minutes)
    runs.train_undisturbed()
    has_held = verdicts.drill(FAULTS, runs)
  return cli.OK if has_held else cli.FAILED


def _is_of_others(folder):
  """Whether there is a folder with files that no drill has made."""
  names = {path.name for path in folder.glob('*')}
  return bool(names - {'lease'}) and 'drill.csv' not in names


if __name__ == '__main__':
  cli.define_path(
    'workdir', None, 'Folder of a run, or for runs, on the disk to try.', required=True
  )
  flags.DEFINE_string('config', None, 'FILE or FILE:VARIANTS; default: that of the run in WORKDIR.')
  flags.DEFINE_float('minutes', 10, 'What does not fit is not tried.', lower_bound=0)
  cli.run(main, needs_config=False, takes_overrides=True)
