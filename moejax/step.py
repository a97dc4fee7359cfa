"""The train state and what is computed from it: a training step, an evaluation step.

Both are pure functions of arrays and a config; `train_step` is the whole of what a run computes.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from moejax import model as model_lib, sharding
from moejax.optimizer import gradient_norm, make_optimizer, make_schedule


def init_state(model_config, optimizer, key):
  """A fresh train state: a pure dict of arrays."""
  return new_state(model_lib.init_params(model_config, key), optimizer)


def fresh_state(stages):
  """A function that makes the state a run begins with."""
  optimizer = make_optimizer(stages.optimizer, stages.train.steps)
  return lambda: init_state(stages.model, optimizer, jax.random.key(stages.train.seed))


def new_state(params, optimizer):
  """The train state of step 0 with these parameters."""
  return {'params': params, 'optimizer': optimizer.init(params), 'step': jnp.int32(0)}


def train_step(state, batch, *, model_config, optimizer, schedule, accumulation, key):
  """One optimizer step.

  Args:
    state: `init_state`'s dict; donate it.
    batch: int32 arrays [B, L]: inputs, targets, segments, positions.
    model_config, optimizer, schedule: static; what to train and how.
    accumulation: passes the batch is split into, as consecutive blocks of sequences.
    key: of the noise in training; that of a step is folded in from it.

  Returns:
    The next state, and metrics: 'loss' (nats per token), 'grad_norm' (before clipping),
    'learning_rate', and under 'aux' float32 arrays with one row per sublayer that measures it.
  """
  num_targets = jnp.sum(batch['segments'] > 0)
  keys = jax.random.split(jax.random.fold_in(key, state['step']), accumulation)

  def objective(params, part, key):
    nats, _, aux = model_lib.bind(model_config, params).loss(part, key)
    mean_nats = nats / num_targets
    auxiliary = aux['auxiliary_loss'].mean() / accumulation if 'auxiliary_loss' in aux else 0.0
    return mean_nats + auxiliary, (mean_nats, aux)

  def add_part(total, part_and_key):
    gradients, (nats, aux) = jax.grad(objective, has_aux=True)(state['params'], *part_and_key)
    return jax.tree.map(jnp.add, total, (nats, gradients)), aux

  parts = jax.tree.map(lambda a: a.reshape(accumulation, -1, *a.shape[1:]), batch)
  nats = jnp.zeros((), jnp.promote_types(model_config.dtype, jnp.float32))
  zeros = (nats, jax.tree.map(jnp.zeros_like, state['params']))
  (mean_nats, gradients), aux = jax.lax.scan(add_part, zeros, (parts, keys))
  updates, optimizer_state = optimizer.update(gradients, state['optimizer'], state['params'])
  new_state = {
    'params': optax.apply_updates(state['params'], updates),
    'optimizer': optimizer_state,
    'step': state['step'] + 1,
  }
  measured = {
    'loss': mean_nats,
    'grad_norm': gradient_norm(gradients),
    'learning_rate': schedule(state['step']),
    'aux': jax.tree.map(lambda a: a.mean(0), aux),
  }
  return new_state, measured


def lower_train_step(stages, abstract_state, mesh, platforms=None):
  """`train_step` of a run, `step(state, batch)` donating the state, ready to be compiled.

  Args:
    stages: the run's.
    abstract_state: its state, as `sharding.abstract` describes it.
    mesh: where it lies; set it (`jax.set_mesh`) around this call.
    platforms: what to lower for, as JAX names them, where the devices of the mesh are not there.
  """

  def step(state, batch):
    return train_step(
      state,
      batch,
      model_config=stages.model,
      optimizer=make_optimizer(stages.optimizer, stages.train.steps),
      schedule=make_schedule(stages.optimizer, stages.train.steps),
      accumulation=stages.optimizer.accumulation,
      key=jax.random.key(stages.train.seed),
    )

  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
  everywhere = sharding.replicated(mesh)  # every process reads the metrics
  jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere))
  traced = jitted.trace(abstract_state, sharding.abstract_batch(stages.data, mesh))
  return traced.lower(lowering_platforms=platforms)


@functools.partial(jax.jit, static_argnums=0)
def eval_step(model_config, params, batch):
  """Summed nats, number of targets and aux of one batch."""
  return model_lib.bind(model_config, params).loss(batch)
