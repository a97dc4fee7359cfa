"""What the backward pass recomputes instead of saving it (`model.remat`)."""

import functools

import jax

from moejax.layers import experts
from moejax.ops import routing
from moejax.sharding import exchange

_POLICIES = jax.checkpoint_policies
# Chosen experts are always saved: a recomputed route could differ.
_CHOICES = _POLICIES.save_only_these_names(routing.CHOICE)
_REMAT = functools.partial(jax.checkpoint, prevent_cse=False)
_DOTS = _POLICIES.dots_with_no_batch_dims_saveable
# `save_moe` exchanges nothing twice and recomputes only the hidden activations of experts, their
# widest arrays. Tokens of ragged plans are gathered again: those of all devices would be saved.
_EXPERTS = _POLICIES.save_only_these_names(routing.CHOICE, exchange.RECEIVED, experts.OUTPUT)
# Name -> a function that wraps the body of a block.
REMAT = {
  'none': lambda f: f,
  'dots': functools.partial(_REMAT, policy=_POLICIES.save_from_both_policies(_DOTS, _CHOICES)),
  'save_moe': functools.partial(_REMAT, policy=_EXPERTS),
  'full': functools.partial(_REMAT, policy=_CHOICES),
}
