"""ReLU routing (ReMoE, arXiv:2412.14711): a token takes every expert whose score is positive.

The score is the weight, so that the layer is continuous where experts come and go. Tokens may take
any number of experts; an L1 penalty on the weights keeps the mean at `config.top_k`. Its
coefficient, one for all layers, is multiplied by 1.2 after a step in which tokens took more, and
divided by it if they took fewer.

Causal: a token looks at no other, and with a capacity only earlier ones of its group, and those at
its position, take its slots. The coefficient knows past batches, and acts on gradients alone.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.ad_checkpoint import checkpoint_name

from moejax import parameters
from moejax.layers.router import Router
from moejax.ops import routing

# Of the coefficient: the initial value, and its factor per step.
_FIRST, _FACTOR = 1e-8, 1.2

parameters.declare('log_penalty', decays=False, moved_by='penalty')


def _plan(logits_GTE, *, config, capacity, valid_GT, bias_E, ragged):
  del config, bias_E
  E = logits_GTE.shape[-1]
  return routing.plan_of_choices(
    jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32), logits_GTE.shape),
    jax.nn.relu(logits_GTE),
    chosen_GTK=checkpoint_name(logits_GTE > 0, routing.CHOICE),
    valid_GT=valid_GT,
    num_experts=E,
    capacity=capacity,
    ragged=ragged,
  )


def _loss(logits_GTE, counts_GE, valid_GT, *, config, own):
  """The penalty: experts count by their load, so that it balances, too."""
  log_penalty = own['log_penalty']
  weights_GTE = jax.nn.relu(logits_GTE)
  norm = routing.loaded_mean(weights_GTE, counts_GE, valid_GT, k=config.top_k)
  penalty = jnp.exp(jax.lax.stop_gradient(log_penalty))
  missing = config.top_k * valid_GT.sum() - counts_GE.sum()  # whole numbers: any order of sums
  loss = penalty * norm + routing.pull(log_penalty, missing)
  active = counts_GE.sum() / jnp.maximum(valid_GT.sum(), 1)
  return loss, {'l1': norm, 'penalty': penalty, 'active': active.astype(jnp.float32)}


def _move(config, schedules):
  """The gradient of each layer's coefficient is its number of choices below the target."""
  del config, schedules

  def update(missing, params):
    del params
    sign = jnp.sign(sum(layers.sum() for layers in jax.tree.leaves(missing)))
    return jax.tree.map(lambda layers: jnp.full_like(layers, -math.log(_FACTOR)) * sign, missing)

  return optax.stateless(update)


parameters.UPDATES['penalty'] = _move

ROUTER = Router(
  _plan,
  scores=('softmax',),
  chooses_best=False,
  normalized=False,
  parameters=lambda config: {'log_penalty': np.float32(math.log(_FIRST))},
  loss=_loss,
)
