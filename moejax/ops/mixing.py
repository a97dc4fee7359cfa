"""Mixture of Tokens (arXiv:2310.15961): weighted mixtures of the tokens of a group.

A group is M tokens at one position of M sequences; there are C of them (moejax/sharding/groups.py),
and each of E experts sees one mixture of every group. This is causal, but sequences of one group
see each other.

The axis of groups is first in all arrays but those of experts: products are batched without a
transpose, and groups stay on their devices.
"""

import math

import jax
import jax.numpy as jnp

TOKENS, EXPERTS = 1, 2  # axes of weights_CME


def softmax(logits_CME, valid_CM, temperature: jax.typing.ArrayLike = 1.0, over=TOKENS):
  """A softmax over the tokens of a group for every expert, or over the experts for every token.

  Args:
    logits_CME: scores, in the dtype to compute in.
    valid_CM: bool; tokens that are not valid (padding) get weight 0.
    temperature: what the scores are divided by: a number, or an array that broadcasts.
    over: TOKENS or EXPERTS, the axis along which weights sum to 1.

  Returns:
    weights_CME in the dtype of the scores; all 0 in a group without valid tokens.
  """
  valid_CM1 = valid_CM[..., None]
  # Finite, not -inf: no NaN in a group of padding alone, gradients included.
  masked_CME = jnp.where(valid_CM1, logits_CME / temperature, jnp.finfo(logits_CME.dtype).min)
  return jax.nn.softmax(masked_CME, axis=over) * valid_CM1


def one_hot(weights_CME, valid_CM, over=TOKENS):
  """1 where a weight is the largest along the axis, everywhere it is in a tie; 0 elsewhere."""
  largest = weights_CME == weights_CME.max(axis=over, keepdims=True)
  return (largest & valid_CM[..., None]).astype(weights_CME.dtype)


def merge(x_CMD, weights_CME):
  """One mixture per expert and group: mixtures_ECD = sum over M of weight * token."""
  return jnp.einsum('CME,CMD->ECD', weights_CME.astype(x_CMD.dtype), x_CMD)


def emit(out_ECD, weights_CME):
  """Hands every expert's output to the tokens of the group: y_CMD = sum over E."""
  return jnp.einsum('CME,ECD->CMD', weights_CME.astype(out_ECD.dtype), out_ECD)


def statistics(weights_CME, valid_CM, over=TOKENS):
  """How evenly weights are spread, over the distributions that have a valid token; no gradient.

  Returns:
    A dict of float32 scalars: `entropy` (mean, divided by that of a uniform distribution; 0 where
    it has one entry), `max_weight` (mean of the largest of a distribution), `std` (of the weights
    of valid tokens).
  """
  dtype = jnp.promote_types(weights_CME.dtype, jnp.float32)
  weights_CME = jax.lax.stop_gradient(weights_CME).astype(dtype)
  valid_CM1 = valid_CM[..., None]
  n, E = weights_CME.shape[over], weights_CME.shape[EXPERTS]
  # One distribution per expert and group, or per token.
  count = jnp.maximum(E * valid_CM.any(axis=1).sum() if over == TOKENS else valid_CM.sum(), 1)
  num_weights = jnp.maximum(E * valid_CM.sum(), 1)
  mean = weights_CME.sum() / num_weights
  variance = jnp.where(valid_CM1, jnp.square(weights_CME - mean), 0).sum() / num_weights
  measured = {
    'entropy': jax.scipy.special.entr(weights_CME).sum() / count / (math.log(n) or 1.0),
    'max_weight': weights_CME.max(axis=over).sum() / count,
    'std': jnp.sqrt(variance),
  }
  return {name: value.astype(jnp.float32) for name, value in measured.items()}
