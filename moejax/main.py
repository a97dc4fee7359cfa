"""Trains a language model.

python -m moejax.main --config=configs/mot.py
python -m moejax.main --config=configs/mot.py:medium,experts=32 --workdir=runs/mot

On several hosts: the same command on each of them (docs/launch.md).
"""

import datetime
import pathlib

from absl import flags

from moejax import cli

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; default: a dated one in runs/.')
cli.define_process_flags()
_PRINT_CONFIG = flags.DEFINE_bool('print_config', False, 'Print the resolved config and stop.')


def main(config):
  if _PRINT_CONFIG.value:
    print(config)
    return cli.OK
  workdir = _WORKDIR.value or f'runs/{datetime.datetime.now():%Y-%m-%d_%H%M%S}'
  if '://' in workdir:
    raise ValueError(
      f'--workdir={workdir}: expected a folder. Mount the bucket, as launch/tpu_run.sh does '
      '(docs/launch.md says how).'
    )
  cli.join_processes()
  from moejax import train  # after the flags are known to be good: importing JAX takes seconds

  return train.train(config, pathlib.Path(workdir).absolute())


def run():
  cli.run(main)


if __name__ == '__main__':
  run()
