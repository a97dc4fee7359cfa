"""The train state and what is computed from it: a training step, an evaluation step.

Both are pure functions of arrays and a config.
"""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moejax import model as model_lib, optimizer as optimizer_lib, sharding
from moejax.optimizer import Schedules, gradient_norm, make_schedules

_NOISE = 0x6E6F6973  # keeps the noise apart from the keys of parameters, which count up


def init_state(model_config, optimizer, key):
  """A fresh train state: a pure dict of arrays."""
  return new_state(model_lib.init_params(model_config, key), optimizer)


def fresh_state(run_config):
  """A function that makes the state a run begins with; a pytree, whose leaf is the seed."""
  optimizer = optimizer_lib.of_run(run_config)
  init = lambda seed: init_state(run_config.model, optimizer, jax.random.key(seed))
  return jax.tree_util.Partial(init, np.uint32(run_config.train.seed))


def new_state(params, optimizer):
  """The train state of step 0 with these parameters."""
  return {'params': params, 'optimizer': optimizer.init(params), 'step': jnp.int32(0)}


def noise_key(seed):
  """The key of the noise in training; parameters use the seed's own key."""
  return jax.random.fold_in(jax.random.key(seed), _NOISE)


def make_state(init, abstract_state):
  """Calls `init`, of `fresh_state`, into the shardings of `abstract_state`.

  The program is the same for every seed. As it runs once, CPUs compile it at a lower optimization
  level, unless XLA_FLAGS sets one: the same bits, in a third of the time.
  """
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
  level = 'xla_backend_optimization_level'
  less = jax.default_backend() == 'cpu' and level not in os.environ.get('XLA_FLAGS', '')
  options = {level: 1} if less else None
  jitted = jax.jit(lambda init: init(), out_shardings=shardings, compiler_options=options)
  return jitted(init)


def train_step(state, batch, *, model_config, optimizer, schedule, accumulation, key):
  """One optimizer step.

  An update whose loss or gradient is not finite is skipped: parameters and the optimizer's state
  stay as they are, and only the step counts.

  Args:
    state: `init_state`'s dict; donate it.
    batch: int32 arrays [B, L]: inputs, targets, segments, positions.
    model_config, optimizer, schedule: static; what to train and how.
    accumulation: microbatches the batch is split into, as consecutive blocks of sequences.
    key: of the noise in training; the step is folded in.

  Returns:
    The next state, and metrics: 'loss' (nats per token), 'grad_norm' (before clipping),
    'update_norm' (of the change of all parameters), 'skipped' (1 or 0), 'learning_rate', and under
    'aux' float32 arrays with one entry per sublayer that measures it.
  """
  mean_nats, gradients, aux = gradients_of(
    state, batch, model_config=model_config, accumulation=accumulation, key=key
  )
  updates, optimizer_state = optimizer.update(gradients, state['optimizer'], state['params'])
  updated = {
    'params': optax.apply_updates(state['params'], updates),
    'optimizer': optimizer_state,
  }
  grad_norm = gradient_norm(gradients)
  # Selected elementwise, as part of the update: for a cond, GPUs would wait for the host. With the
  # norm of the update in the condition, old and new state would both have to be kept.
  is_good = jnp.isfinite(mean_nats) & jnp.isfinite(grad_norm)
  select = functools.partial(jnp.where, is_good)
  kept = jax.tree.map(select, updated, {name: state[name] for name in updated})
  measured = {
    'loss': mean_nats,
    'grad_norm': grad_norm,
    'update_norm': optax.tree.norm(jax.tree.map(_wide, updates)),
    'skipped': 1 - is_good.astype(jnp.float32),
    'learning_rate': schedule(state['step']),
    'aux': jax.tree.map(lambda a: a.mean(0), aux),
  }
  return kept | {'step': state['step'] + 1}, measured


def gradients_of(state, batch, *, model_config, accumulation, key):
  """The loss of a batch and its gradients; arguments as of `train_step`.

  Returns:
    The mean nats per target, the gradients of the parameters, and aux by microbatch.
  """
  num_targets = jnp.sum(batch['segments'] > 0)
  microbatches_and_keys = split_batch(batch, state['step'], accumulation, key)

  def objective(params, microbatch, key):
    nats, _, aux = model_lib.bind(model_config, params).loss(microbatch, key)
    mean_nats = nats / num_targets
    auxiliary = aux['auxiliary_loss'].mean() / accumulation if 'auxiliary_loss' in aux else 0.0
    return mean_nats + auxiliary, (mean_nats, aux)

  def add(total, microbatch_and_key):
    gradients, (nats, aux) = jax.grad(objective, has_aux=True)(state['params'], *microbatch_and_key)
    return jax.tree.map(jnp.add, total, (nats, gradients)), aux

  nats = jnp.zeros((), jnp.promote_types(model_config.dtype, jnp.float32))
  zeros = (nats, jax.tree.map(jnp.zeros_like, state['params']))
  (mean_nats, gradients), aux = jax.lax.scan(add, zeros, microbatches_and_keys)
  return mean_nats, gradients, aux


def split_batch(batch, step, accumulation, key):
  """The microbatches of a step, [accumulation, B / accumulation, L], and the key of each."""
  keys = jax.random.split(jax.random.fold_in(key, step), accumulation)
  return _split(batch, accumulation), keys


def _split(batch, number):
  """A batch as microbatches: [number, B / number, L]."""
  return jax.tree.map(lambda a: a.reshape(number, -1, *a.shape[1:]), batch)


def _wide(array):
  return array.astype(jnp.promote_types(array.dtype, jnp.float32))


class Now(NamedTuple):
  """What a step is given beside the state and the batch, all scalars.

  They are no constants of the compiled program, which therefore serves every learning rate,
  schedule, duration and seed.
  """

  learning_rate: Any
  anneal: Any  # of `optimizer.Schedules`
  seed: Any  # of the run, uint32


def make_clock(run_config):
  """The function from the number of steps that a run has done to the `Now` of its next one."""
  schedules = make_schedules(run_config.optimizer, run_config.train.steps)
  of_all = jax.jit(lambda steps: [jax.vmap(schedule)(steps) for schedule in schedules])
  values = of_all(np.arange(run_config.train.steps, dtype=np.int32))
  rates, scales = (np.asarray(of_steps, jnp.result_type(float)) for of_steps in values)
  seed = np.uint32(run_config.train.seed)
  return lambda step: Now(rates[step], scales[step], seed)


def optimizer_at(run_config, now):
  """The optimizer of a run at the learning rate and annealing of a `Now`."""
  schedules = Schedules(lambda _: now.learning_rate, lambda _: now.anneal)
  return optimizer_lib.of_run(run_config, schedules)


def jit_train_step(run_config, abstract_state, mesh):
  """`train_step` of a run, jitted: `step(state, batch, now)`, which donates the state.

  Its metrics also have 'clipped', 1 if the norm of the gradient reached `optimizer.clip_norm`.
  `abstract_state` is from `sharding.abstract`, on the same mesh; `now` is a `Now`.
  """

  def step(state, batch, now):
    new_state, measured = train_step(
      state,
      batch,
      model_config=run_config.model,
      optimizer=optimizer_at(run_config, now),
      schedule=lambda _: now.learning_rate,
      accumulation=run_config.optimizer.accumulation,
      key=noise_key(now.seed),
    )
    clipped = measured['grad_norm'] >= run_config.optimizer.clip_norm
    return new_state, measured | {'clipped': clipped.astype(jnp.float32)}

  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
  replicated = sharding.replicated(mesh)  # every process reads the metrics
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated))


def lower_train_step(run_config, abstract_state, mesh, platforms=None):
  """`jit_train_step`, lowered; set the mesh (`jax.set_mesh`) around this call.

  `platforms`, as JAX names them, is for a mesh of devices that this machine does not have.
  """
  jitted = jit_train_step(run_config, abstract_state, mesh)
  number = jax.ShapeDtypeStruct((), jnp.result_type(float))
  now = Now(number, number, jax.ShapeDtypeStruct((), np.uint32))
  traced = jitted.trace(abstract_state, sharding.abstract_batch(run_config.data, mesh), now)
  return traced.lower(lowering_platforms=platforms)


class Sums(NamedTuple):
  """Nats and targets of every sequence of a batch, and of every position."""

  nats_B: jax.Array
  targets_B: jax.Array
  nats_L: jax.Array
  targets_L: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def eval_step(model_config, microbatches, params, batch):
  """The loss of one batch, in microbatches, so that it needs no more memory than a training step.

  Args:
    model_config, params: the model.
    microbatches: how many the batch is split into, as consecutive blocks of sequences.
    batch: as for `train_step`; may have 'counted', which targets count.

  Returns:
    Summed nats, number of targets, aux averaged over microbatches, and `Sums` of the batch.
  """

  def loss(_, microbatch):
    model = model_lib.bind(model_config, params)
    counted_BL = model_lib.counted(microbatch)
    weights_BL = counted_BL.astype(jnp.float32)
    of_weights = functools.partial(model.weighted_loss, microbatch)
    (nats, aux), nats_BL = jax.value_and_grad(of_weights, has_aux=True)(weights_BL)
    nats_BL = jnp.where(counted_BL, nats_BL, 0)
    sums = Sums(nats_BL.sum(1), weights_BL.sum(1), nats_BL.sum(0), weights_BL.sum(0))
    return None, (nats, weights_BL.sum(), aux, sums)

  _, (nats, targets, aux, sums) = jax.lax.scan(loss, None, _split(batch, microbatches))
  sums = Sums(
    sums.nats_B.reshape(-1), sums.targets_B.reshape(-1), sums.nats_L.sum(0), sums.targets_L.sum(0)
  )
  return nats.sum(), targets.sum(), jax.tree.map(lambda a: a.mean(0), aux), sums


def microbatches(model_config, batch_size, accumulation):
  """The number of microbatches of an evaluation: as in training, or fewer for larger groups."""
  M = model_config.mixed_sequences
  fits = lambda number: accumulation % number == 0 and batch_size // number % M == 0
  return next(filter(fits, range(accumulation, 0, -1)), 1)


def lower_eval_step(run_config, abstract_params, mesh, platforms=None):
  """`eval_step` of a run, lowered; arguments as of `lower_train_step`."""
  batch = sharding.abstract_batch(run_config.data, mesh)
  batch |= {'counted': batch['segments'].update(dtype=jnp.bool_)}
  traced = eval_step.trace(
    run_config.model, run_config.optimizer.accumulation, abstract_params, batch
  )
  return traced.lower(lowering_platforms=platforms)


@jax.jit
def is_finite(tree):
  """Whether all numbers of a pytree of arrays are finite."""
  return jnp.stack([jnp.isfinite(a).all() for a in jax.tree.leaves(tree)]).all()
