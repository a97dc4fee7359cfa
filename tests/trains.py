"""Trains tiny models until it is killed, for tests/determinism_test.py.

trains.py train FOLDER FAMILY:DEVICES...    takes steps and saves, of one model after the other
trains.py resume FOLDER FAMILY:DEVICES...   goes on, and prints which arrays are not the same bits
                                            as without the interruption
"""

import importlib
import json
import pathlib
import sys

import jax
import numpy as np

from moejax import config as config_lib, sharding
from moejax.checkpoint import Checkpoints
from moejax.differences import by_name
from moejax.step import fresh_state, lower_train_step, make_clock, make_state

STEPS = 1000


class Run:
  """A model of a family of configs/ in training, on some of the devices."""

  def __init__(self, folder, name):
    family, devices = name.split(':')
    config = importlib.import_module(f'configs.{family}').get_config('debug')
    changes = {'mesh.data': 1, 'mesh.fsdp': 1, 'mesh.tensor': -1, 'model.num_heads': 8}
    changes |= {'optimizer.accumulation': 1, 'data.sequence_length': 8, 'train.steps': STEPS}
    config.update_from_flattened_dict(changes)
    self.config = config_lib.resolve(config)
    self.mesh = sharding.make_mesh(self.config.mesh, jax.devices()[: int(devices)])
    self.checkpoints = Checkpoints(pathlib.Path(folder, name), keep=1)
    self.init, self.now = fresh_state(self.config), make_clock(self.config)
    with jax.set_mesh(self.mesh):
      self.abstract = sharding.abstract(self.init, self.mesh)
      self.compiled = lower_train_step(self.config, self.abstract, self.mesh).compile()
      self.state = make_state(self.init, self.abstract)

  def step(self):
    data, step = self.config.data, int(self.state['step'])
    ids = np.random.default_rng(step).integers(
      0, 256, (data.batch_size, data.sequence_length + 1), dtype=np.int32
    )
    inputs = ids[:, :-1]
    ones = np.ones_like(inputs)
    batch = {'inputs': inputs, 'targets': ids[:, 1:], 'segments': ones}
    batch['positions'] = ones.cumsum(1, dtype=np.int32) - 1
    with jax.set_mesh(self.mesh):
      batch = sharding.place_batch(batch, self.mesh)
      self.state, _ = self.compiled(self.state, batch, self.now(step))

  def save(self):
    self.checkpoints.save(int(self.state['step']), self.state, None, {'config': {}})

  def differences(self):
    """How many steps were saved, and the arrays that differ two steps later."""
    saved = self.checkpoints.latest_step()
    for _ in range(saved + 2):
      self.step()
    whole = jax.device_get(by_name(self.state))
    with jax.set_mesh(self.mesh):
      self.state = self.checkpoints.restore(saved, self.abstract)
    self.step()
    self.step()
    resumed = jax.device_get(by_name(self.state))
    return saved, [name for name in whole if not np.array_equal(whole[name], resumed[name])]


def main(action, folder, *names):
  runs = {name: Run(folder, name) for name in names}
  if action == 'resume':
    print(json.dumps({name: run.differences() for name, run in runs.items()}))
    return
  for step in range(STEPS):
    for run in runs.values():
      run.step()
      run.save()
    print(step, flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
