"""Upcycling: the feed-forward layers of a dense model become experts (arXiv:2212.05055).

The hidden units of a layer are cut into slices, one for each of the experts that make up its width,
and every slice is copied. The experts of one copy begin with the same router scores, so that a
token that chooses one of them chooses all (virtual groups of arXiv:2410.07524, section 3.2).

Token choice whose weights sum to 1 computes what the dense layer did, as long as no token is
dropped. Other weights begin nearly equal, and outputs are scaled to match them; tokens that no
expert or several copies choose under expert choice, and mixtures, have other outputs.
"""

import math
import re

import jax
import jax.numpy as jnp

from moejax import config as config_lib, same_experts
from moejax.layers.mlp import hidden_width
from moejax.layers.moe import MoEConfig
from moejax.parameters import name_of

_SLICES = 2  # with one, a token has one expert, and weights that sum to 1 would not train a router
_MIXED = 32  # tokens of a mixture, at most
_FLAT = 0.01  # times the initial router where weights do not sum to 1: they begin nearly equal


def is_dense(model) -> bool:
  """Whether a ModelConfig has feed-forward layers and no experts."""
  return 'mlp' in model.kinds and not {'moe', 'mot'} & set(model.kinds)


def make_experts(config, router) -> None:
  """Turns the ConfigDict of a dense model into that of one with experts of `router`, equal FLOPs.

  Raises:
    ValueError: its feed-forward layers cannot become experts.
  """
  old = config_lib.resolve(config)
  d_ff = old.model.d_ff
  if old.model.biases:
    raise ValueError(
      '--from: experts have no biases, and the feed-forward layers of this run have '
      '(model.biases = True).'
    )
  same_experts.rename(config.model, 'mlp', 'mot' if router in same_experts.MIXING else 'moe')
  if router in same_experts.MIXING:
    group = math.gcd(old.data.batch_size // old.optimizer.accumulation, _MIXED)
    experts = {'num_experts': _SLICES * group, 'expert_width': d_ff // _SLICES}
    fields = {'group_size': group, 'temperature': 1.0} | experts | same_experts.PLAIN_MOT
    config.model.mot.update(routing=same_experts.MIXING[router], **fields)
  else:
    config.model.moe.update(granularity=_SLICES, experts_per_token=0)
    same_experts.sparse_fields(config, router)
    config.model.moe.renormalize = not MoEConfig(router=router).rule.fills_slots


def convert(source, fresh, new):
  """The train state of a dense model as that of one with experts.

  Args:
    source: the state, or a part of it, as a pytree of arrays.
    fresh: a state of the new model; of its layers, only the router stays.
    new: the ModelConfig of the new model.

  Raises:
    ValueError: the hidden units of a layer cannot be cut into those of experts.
  """
  kind = 'mot' if 'mot' in new.kinds else 'moe'
  slices, copies, weight = _mixing(new) if kind == 'mot' else _sparse(new)
  flat = 1.0 if kind == 'mot' or new.moe.renormalize else _FLAT
  width = hidden_width(new.d_ff, new.activation)
  if slices * hidden_width(new.d_ff // slices, new.activation) != width:
    raise ValueError(
      f'--from: {width} hidden units cannot be cut into those of {slices} experts; change '
      f'model.{kind} such that they can.'
    )
  factors = {'w_in': 1.0, 'w_gate': 1.0, 'w_out': 1 / weight}

  def change(name, leaf):
    name = re.sub(r'/(\d+)_mlp/', rf'/\1_{kind}/', name)
    layer, _, last = name.rpartition('/')
    if f'_{kind}/layer/{last}' not in name or last not in factors:
      return name, leaf
    # Every copy sees the gradients of its share of the tokens.
    leaf = leaf * same_experts.scale(name, factors[last], 1 / (factors[last] * copies))
    axis = -2 if last == 'w_out' else -1
    experts = jnp.stack(jnp.split(leaf, slices, axis) * copies, axis=-3)
    return f'{layer}/experts/{last}', experts

  return same_experts.carry_over(source, _tied(fresh, slices, copies, flat), change)


def _sparse(new):
  """Slices, copies of each, and the weights with which a token adds up the copies of one slice."""
  moe = new.moe
  if moe.scores == 'softmax_over_tokens':
    raise ValueError(
      '--from: a dense model starts with scores over experts; got model.moe.scores = '
      'softmax_over_tokens. Leave it out.'
    )
  equal = 1 / 2 if moe.scores == 'sigmoid' else 1 / moe.num_experts
  weight = 1 / moe.top_k if moe.renormalize else equal
  return moe.granularity, moe.expansion_rate, moe.top_k / moe.granularity * weight


def _mixing(new):
  """The same of a Mixture of Tokens: a token is in a mixture of every copy, with weight 1 / M."""
  slices = new.d_ff // new.mot.width(new.d_ff)
  copies = new.mot.num_experts // slices
  return slices, copies, copies / new.mot.group_size


def _tied(fresh, slices, copies, flat):
  """A fresh state in which all slices of a copy have the same scores, times `flat`."""

  def tie(path, leaf):
    if name_of(path).rpartition('/')[2] not in ('router', 'controller'):
      return leaf
    return flat * jnp.repeat(leaf[..., :copies], slices, axis=-1)

  return jax.tree_util.tree_map_with_path(tie, fresh)
