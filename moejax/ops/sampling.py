"""The next token from logits: the usual transformations, then sampling.

`next_token` applies them in the order of transformers' `generate`: repetition penalty, temperature,
top-k, top-p, min-p. Each sees what the ones before it left; removed tokens have logit -inf. All
settings are traced, so one compiled program serves any of them. At its neutral value (1 for the
penalty and top-p, 0 for top-k and min-p) a transformation changes nothing, and sorts nothing. The
likeliest token is never removed; of equal ones, the lowest id is the likeliest.
"""

import jax
import jax.numpy as jnp


def penalize_repetition(logits_BV, seen_BV, penalty):
  """Divides positive logits of tokens that were seen, and multiplies negative ones.

  Keskar et al., "CTRL" (arXiv:1909.05858), section 4.1.
  """
  penalized_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
  return jnp.where(seen_BV, penalized_BV, logits_BV)


def divide_by_temperature(logits_BV, temperature):
  """Logits over a positive temperature, their largest moved to 0: finite however cold it is."""
  return (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature


def keep_top_k(logits_BV, k):
  """Keeps the k likeliest tokens; all if k is 0."""

  def keep(logits_BV):
    return jnp.where(_rank(logits_BV) < k, logits_BV, -jnp.inf)

  return jax.lax.cond(k > 0, keep, lambda unchanged: unchanged, logits_BV)


def keep_top_p(logits_BV, p):
  """Keeps the fewest likeliest tokens whose probabilities add up to at least p.

  Holtzman et al., "The Curious Case of Neural Text Degeneration" (arXiv:1904.09751).
  """

  def keep(logits_BV):
    rank_BV = _rank(logits_BV)
    falling_BV = -jnp.sort(-jax.nn.softmax(logits_BV), axis=-1)
    likelier_BV = jnp.cumsum(falling_BV, axis=-1) - falling_BV  # mass before each rank
    likelier_BV = jnp.take_along_axis(likelier_BV, rank_BV, axis=-1)
    return jnp.where((likelier_BV < p) | (rank_BV == 0), logits_BV, -jnp.inf)

  return jax.lax.cond(p < 1, keep, lambda unchanged: unchanged, logits_BV)


def keep_min_p(logits_BV, p):
  """Keeps tokens at least p times as likely as the likeliest (arXiv:2407.01082)."""
  least_B1 = logits_BV.max(axis=-1, keepdims=True) + jnp.log(p)
  return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def _rank(logits_BV):
  """0 for the likeliest token of a row, 1 for the next, ..."""
  return jnp.argsort(jnp.argsort(-logits_BV, axis=-1, stable=True), axis=-1)


def noise(seed_B, index_B, size):
  """Gumbel noise_BV, V = size, for token number `index` of a request with a seed."""

  def of_one(seed, index):
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), index), (size,))

  return jax.vmap(of_one)(seed_B, index_B)


def next_token(
  logits_BV, seen_BV, noise_BV, *, repetition_penalty, temperature, top_k, top_p, min_p
):
  """The next token of every sequence, int32 [B].

  Args:
    logits_BV: of the model.
    seen_BV: bool, the tokens that the repetition penalty is for.
    noise_BV: of `noise`.
    repetition_penalty, temperature, top_k, top_p, min_p: scalars; temperature 0 is greedy.
  """
  logits_BV = penalize_repetition(logits_BV, seen_BV, repetition_penalty)
  sampled = temperature > 0
  logits_BV = divide_by_temperature(logits_BV, jnp.where(sampled, temperature, 1))
  logits_BV = keep_top_k(logits_BV, top_k)
  logits_BV = keep_top_p(logits_BV, top_p)
  logits_BV = keep_min_p(logits_BV, min_p)
  return jnp.argmax(logits_BV + jnp.where(sampled, noise_BV, 0), axis=-1).astype(jnp.int32)
