"""Trains a language model.

python -m moejax.main --config=configs/mot.py
python -m moejax.main --config=configs/mot.py:medium,experts=32 --workdir=runs/mot

On several hosts: the same command on each of them (docs/launch.md).
"""

import contextlib
import datetime
import itertools
import pathlib

from absl import flags

import moejax
from moejax import cli

cli.define_path('workdir', None, 'Folder of the run; by default a new one in runs/.')
cli.define_process_flags()
_PRINT_CONFIG = flags.DEFINE_bool('print_config', False, 'Print the resolved config and stop.')


def main(config):
  if _PRINT_CONFIG.value:
    print(config)
    return cli.OK
  cli.join_processes()
  with cli.waiting_for('importing JAX'):  # after the flags are checked
    from moejax import train

  workdir = flags.FLAGS.workdir
  with contextlib.nullcontext(workdir) if workdir else _new_folder() as folder:
    code = train.train(config, pathlib.Path(folder).absolute(), began=moejax.STARTED)
  if code == cli.INTERRUPTED:
    cli.say_how_to_resume(*([] if workdir else [f'--workdir={folder}']))
  return code


@contextlib.contextmanager
def _new_folder():
  """A new folder in runs/, named after the current time; removed again if it stays empty."""
  import jax

  if jax.process_count() > 1:
    raise ValueError('--workdir is required for a multi-process run: the same for all.')
  started = f'{datetime.datetime.now():%Y-%m-%d_%H%M%S}'
  for name in itertools.chain([started], (f'{started}-{i}' for i in itertools.count(2))):
    folder = pathlib.Path('runs', name)
    try:
      folder.mkdir(parents=True)
      break
    except FileExistsError:
      continue
  try:
    yield folder
  finally:
    with contextlib.suppress(OSError):  # not empty
      folder.rmdir()
      folder.parent.rmdir()


def run():
  cli.run(main)


if __name__ == '__main__':
  run()
