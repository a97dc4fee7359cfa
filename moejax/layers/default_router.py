"""Default vectors (Default MoE, arXiv:2504.12463): experts that a token did not reach answer, too.

Tokens choose their K best experts. Every other expert, one without a free slot included, gives its
default vector, with the softmax of the token's score as the weight as for all experts, so that the
router learns from all of them. A default vector is a mean of what the expert returned in the past,
which decays by `_DECAY` per step; the decay is ours.

Causal: as token choice. The default vectors are those of past batches, and constant in evaluation
and decoding; the authors' include the current batch, later tokens and all.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moejax import parameters
from moejax.layers.router import Router
from moejax.ops import routing

_DECAY = 0.9

parameters.declare('default_output', decays=False, moved_by='average')


def _plan(logits_GTE, *, config, capacity, valid_GT, bias_E, ragged):
  del bias_E
  return routing.token_choice(logits_GTE, config.top_k, capacity, valid_GT=valid_GT, ragged=ragged)


def _unreached(logits_GTE, weights_GTE, valid_GT, sums_ED, own):
  default_ED = own['default_output']
  reached_GTE = weights_GTE > 0
  scores_GTE = jnp.where(valid_GT[..., None] & ~reached_GTE, jax.nn.softmax(logits_GTE), 0)
  number_E1 = reached_GTE.sum(axis=(0, 1))[:, None]
  mean_ED = jnp.where(number_E1 > 0, sums_ED / jnp.maximum(number_E1, 1), default_ED)
  defaults_ED = jax.lax.stop_gradient(default_ED) + routing.pull(default_ED, default_ED - mean_ED)
  return jnp.einsum('...E,ED->...D', scores_GTE, defaults_ED.astype(scores_GTE.dtype))


def _move(config, schedules):
  """The gradient is, summed over microbatches, how far the default vectors are from the means."""
  del schedules
  return optax.sgd((1 - _DECAY) / config.accumulation)


parameters.UPDATES['average'] = _move

ROUTER = Router(
  _plan,
  scores=('softmax',),
  chooses_best=False,
  parameters=lambda config, d_out: {'default_output': np.zeros((config.num_experts, d_out), 'f')},
  unreached=_unreached,
)
