"""What makes a router: a function from scores to a Plan, and its properties."""

import dataclasses
import inspect
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from moejax import parameters
from moejax.ops import routing

parameters.declare('balance_bias', decays=False, moved_by='balance')


def biases(config):
  """Parameters of a router in which tokens choose: a bias per expert, under `balance_bias`."""
  return {'balance_bias': np.zeros(config.num_experts, 'f')} if config.balance_bias else {}


def balance(logits_GTE, counts_GE, valid_GT, *, config, own):
  """The load-balancing loss, and the pull on the biases if there are any."""
  scores_GTE = routing.normalizing_logits(logits_GTE, config.scores)
  value = routing.load_balancing_loss(scores_GTE, counts_GE, valid_GT, k=config.top_k)
  loss = config.balance_loss * value if config.balance_loss else jnp.zeros_like(value)
  if 'balance_bias' in own:
    loss += routing.balance_pull(own['balance_bias'], counts_GE)
  return loss, {'balance': value}


@dataclasses.dataclass(frozen=True)
class Router:
  """A function of scores that returns a Plan, and its properties (docs/adding_a_router.md)."""

  plan: Callable
  scores: tuple[str, ...] = routing.SCORES  # the values of `model.moe.scores` that it reads
  # Every slot of every expert is taken: it needs a capacity, and drops no token.
  fills_slots: bool = False
  # A token's experts depend on all tokens of its group: causal only where a group is one position,
  # as it is in decoding.
  compares_tokens: bool = False
  # Tokens choose their best experts: `model.moe.renormalize` and `balance_bias` mean something.
  chooses_best: bool = True
  # The weights of a token's experts add up to about 1, however many these are.
  normalized: bool = True
  # Initial float32 values, by name, of parameters beside the matrix of scores: function of the
  # config. Their names are declared (`moejax.parameters`), with what moves them.
  parameters: Callable = biases
  # What is added to the objective, and metrics: function of scores, choices before drops, which
  # tokens are not padding, the config, and `own`, the values of these parameters.
  loss: Callable = balance

  def make_plan(self, logits_GTE, **options):
    """Calls `plan`; a router written for version 0.1 knows the option `ragged` as `packed`."""
    if 'packed' in inspect.signature(self.plan).parameters:
      options['packed'] = options.pop('ragged')
    return self.plan(logits_GTE, **options)
