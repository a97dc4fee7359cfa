"""Validation loss, as a function and as a program.

python -m moejax.evaluate --workdir=DIR
"""

import functools
import json
import math

import jax
import numpy as np
from absl import flags

from moejax import cli, config as config_lib, data, metrics, model as model_lib, sharding
from moejax.checkpoint import Checkpoints


@functools.partial(jax.jit, static_argnums=0)
def eval_step(model_config, params, batch):
  """Summed nats, number of targets and aux of one batch."""
  return model_lib.bind(model_config, params).loss(batch)


def evaluate(model_config, params, loader, num_batches, mesh):
  """Mean loss over the first `num_batches` batches of a loader.

  Returns:
    A dict of numbers: 'loss' in nats per token, 'bits_per_byte' where the loader knows the bytes,
    'tokens', and for models that drop tokens 'loss_dropless'; and aux, the measurements of the
    sublayers, as numpy arrays [sublayers that measure it, ...].
  """
  dropless = model_config.dropless()
  total = {'nats': 0.0, 'tokens': 0.0, 'nats_dropless': 0.0}
  all_aux = []
  for step in range(num_batches):
    batch = sharding.place_batch(loader.batch(step), mesh)
    nats, tokens, aux = eval_step(model_config, params, batch)
    all_aux.append(sharding.fetch(aux))
    total['nats'] += float(nats)
    total['tokens'] += float(tokens)
    if dropless:
      total['nats_dropless'] += float(eval_step(dropless, params, batch)[0])
  result = {'loss': total['nats'] / total['tokens'], 'tokens': int(total['tokens'])}
  if loader.bytes_per_token:
    result['bits_per_byte'] = result['loss'] / math.log(2) / loader.bytes_per_token
  if dropless:
    result['loss_dropless'] = total['nats_dropless'] / total['tokens']
  return result, jax.tree.map(lambda *values: np.mean(values, axis=0), *all_aux)


def load_run(workdir):
  """What evaluation and generation need of a finished or interrupted run.

  Returns:
    (stages, step, params, mesh); the mesh has all devices here along `fsdp`.

  Raises:
    ValueError: no run, no checkpoint, or a tokenizer that is not the one of the run.
  """
  config = config_lib.read(workdir)
  stages = config_lib.resolve(config)
  checkpoints = Checkpoints(config_lib.checkpoint_dir(workdir), stages.train.keep_checkpoints)
  step = checkpoints.latest_step()
  if step is None:
    raise ValueError(f'--workdir={workdir}: the run has not written a checkpoint yet.')
  config_lib.check_tokenizer(checkpoints.metadata(step), stages.tokenizer)
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=-1, expert=1, tensor=1))
  init = functools.partial(model_lib.init_params, stages.model, jax.random.key(0))
  params = checkpoints.restore_params(step, sharding.abstract(init, mesh), config.to_dict())
  checkpoints.close()
  return stages, step, params, mesh


def main():
  if not flags.FLAGS.workdir:
    raise ValueError('--workdir is required: the folder of a run.')
  cli.join_processes()
  stages, step, params, mesh = load_run(flags.FLAGS.workdir)
  config_lib.check_mesh(stages, mesh)
  part = sharding.process_part(mesh, stages.data.batch_size)
  loader = data.make_loader(stages.data, 'validation', **part)
  num_batches = flags.FLAGS.batches or stages.train.eval_batches
  with jax.set_mesh(mesh):
    result, aux = evaluate(stages.model, params, loader, num_batches, mesh)
  print(json.dumps({'step': step, **result, **metrics.flatten_aux(aux)}))
  return cli.OK


if __name__ == '__main__':
  cli.define_process_flags()
  flags.DEFINE_string('workdir', None, 'Folder of the run to evaluate.')
  flags.DEFINE_integer('batches', 0, 'Validation batches; 0: train.eval_batches.')
  cli.run(main, needs_config=False)
