"""Trains a language model.

python -m moejax.main --config=configs/mot.py
python -m moejax.main --config=configs/mot.py:medium,experts=32 --workdir=runs/mot
python -m moejax.main --config=mine.py --config.optimizer.peak_lr=3e-3 --config.train.steps=500
python -m moejax.main --config=configs/moe_mamba.py:25M --print_config

The same command with the same --workdir resumes an interrupted run; Ctrl-C saves and prints it.
On several hosts: the same command on each of them (docs/launch.md).
"""

import contextlib
import datetime
import itertools
import pathlib
import sys

from absl import flags

import moejax
from moejax import cli, files

cli.define_path('workdir', None, 'Folder of the run; by default a new one in runs/.', bucket=True)
cli.define_process_flags()
_PRINT_CONFIG = flags.DEFINE_bool(
  'print_config', False, 'Print the config as YAML, with what it means and implies, and stop.'
)


def main(config):
  if _PRINT_CONFIG.value:
    return _print_config(config)
  cli.join_processes()
  with cli.waiting_for('importing JAX'):  # after the flags are checked
    from moejax import train

  workdir = flags.FLAGS.workdir
  with contextlib.nullcontext(workdir) if workdir else _new_folder() as folder:
    code = train.train(config, files.absolute(folder), began=moejax.STARTED)
  if code == cli.INTERRUPTED:
    cli.say_how_to_resume(*([] if workdir else [f'--workdir={folder}']))
  return code


def _print_config(config):
  from moejax import config as config_lib, start_page

  print(config_lib.as_yaml(config))
  try:
    derived = start_page.derived(config_lib.resolve(config))
  except ValueError as error:  # a tokenizer of another machine, say
    print(f'note: training would stop here with\n{error}', file=sys.stderr)
  else:
    print('\n'.join(['', '# What follows from it:', *(f'#   {line}' for line in derived)]))
  return cli.OK


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
