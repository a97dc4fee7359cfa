"""The config of an existing run: to train it further, or with changes.

python -m moejax.main --config=configs/run.py:DIR --workdir=DIR --config.train.steps=6000
"""

import os

from moejax import run_folder


def get_config(arg=None):
  if not arg:
    raise ValueError('--config=configs/run.py: expected a folder, --config=configs/run.py:DIR.')
  return run_folder.read(os.path.expanduser(arg)).lock()
