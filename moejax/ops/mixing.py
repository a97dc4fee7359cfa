"""Mixture of Tokens (arXiv:2310.15961): softmax-weighted mixtures of the tokens of a group.

A group is M consecutive examples, looked at one position at a time. Nothing moves along positions,
so a mixture at position l holds only tokens at position l: causal, but examples of one group see
each other.
"""

import math

import jax
import jax.numpy as jnp


def merge_weights(logits_GMLE, valid_GML, temperature=1.0):
  """Weights with which each expert mixes the tokens of a group.

  Args:
    logits_GMLE: float32 controller scores.
    valid_GML: bool; tokens that are not valid (padding) get weight 0.
    temperature: the softmax's temperature.

  Returns:
    weights_GMLE, float32: a softmax over M for every expert; all 0 in a group without valid tokens.
  """
  valid_GML1 = valid_GML[..., None]
  # A finite stand-in for -inf keeps a group of nothing but padding free of NaN, gradients included.
  masked_GMLE = jnp.where(valid_GML1, logits_GMLE / temperature, jnp.finfo(logits_GMLE.dtype).min)
  return jax.nn.softmax(masked_GMLE, axis=1) * valid_GML1


def one_hot(weights_GMLE, valid_GML, axis):
  """1 where a weight is the largest along the axis, everywhere it is in a tie; 0 elsewhere."""
  largest = weights_GMLE == weights_GMLE.max(axis=axis, keepdims=True)
  return (largest & valid_GML[..., None]).astype(weights_GMLE.dtype)


def merge(x_GMLD, weights_GMLE):
  """One mixture per expert, group and position: mixtures_EGLD = sum over M of weight * token."""
  return jnp.einsum('GMLE,GMLD->EGLD', weights_GMLE.astype(x_GMLD.dtype), x_GMLD)


def emit(out_EGLD, weights_GMLE):
  """Hands every expert's output back to the tokens that it was mixed from."""
  return jnp.einsum('GMLE,EGLD->GMLD', weights_GMLE.astype(out_EGLD.dtype), out_EGLD)


def normalized_entropy(weights_GMLE):
  """Mean entropy of the merge weights divided by log M, per expert: 1 is uniform, 0 is one token.

  Returns entropy_E, float32. With M = 1 there is nothing to mix and the value is 0.
  """
  M = weights_GMLE.shape[1]
  entropy_GLE = jnp.sum(jax.scipy.special.entr(weights_GMLE), axis=1)
  return jnp.mean(entropy_GLE, axis=(0, 1)) / (math.log(M) or 1.0)


def mixture_of_tokens_reference(x_GMLD, controller_DE, w_in_EDF, w_out_EFD, valid_GML):
  """The layer as loops over groups, positions and experts (papers' definition), for tests."""
  G, _, L, _ = x_GMLD.shape
  y_GMLD = jnp.zeros_like(x_GMLD)
  for g in range(G):
    for position in range(L):
      x_MD, valid_M = x_GMLD[g, :, position], valid_GML[g, :, position]
      for e in range(controller_DE.shape[1]):
        scores_M = jnp.where(valid_M, x_MD @ controller_DE[:, e], -jnp.inf)
        weights_M = jnp.where(valid_M.any(), jax.nn.softmax(scores_M), 0)
        out_D = jax.nn.relu(weights_M @ x_MD @ w_in_EDF[e]) @ w_out_EFD[e]
        y_GMLD = y_GMLD.at[g, :, position].add(weights_M[:, None] * out_D[None])
  return y_GMLD
