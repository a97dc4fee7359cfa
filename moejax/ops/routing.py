"""Routers and plans: which token goes to which expert, with what weight, as data.

A router is a function of scores that returns a `Plan`; it has no parameters and moves no tokens
(`moejax.ops.dispatch` does). Scores have the dtype of the logits; losses and metrics are float32.

G groups of T tokens each are routed independently. After the plan, all G*T tokens are one axis.

Ties go to the expert, or token, of the lowest index. Padding (`valid_GT` False) is never routed and
takes no slot.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Name of the chosen indices for `jax.checkpoint_policies.save_only_these_names`: a backward pass
# that recomputes scores must not choose other experts.
CHOICE = 'routing_choice'

SCORES = ('softmax', 'sigmoid')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
  """Which token is in which row of which expert.

  Two layouts of rows. *Capacity*: `token` is [E, G*C], C slots per expert and group, those of group
  g from g*C on; experts are one batched product. *Ragged*: `token` is [rows], sorted by expert;
  `sizes_E` are their numbers of rows, and rows beyond their sum are empty. Experts are a grouped
  product, and nothing is computed for empty slots.

  Only `weight` has a gradient. No expert holds a token twice.
  """

  token: jax.Array  # int32: index among the G*T tokens; arbitrary but valid in an empty row
  weight: jax.Array  # like token: what the expert's output is multiplied by; 0 in an empty row
  used: jax.Array  # bool, like token: False in an empty row
  sizes_E: jax.Array  # int32: rows in use by each expert
  rows_by_token: jax.Array  # int32: rows (of the flattened layout), token by token; an index
  #   beyond the layout is a row on another device (`own_experts`)
  row_start_T: jax.Array  # int32 [G*T]: where the rows of a token start in `rows_by_token`
  rows_per_token_T: jax.Array  # int32 [G*T]; 0 for padding and dropped tokens
  counts_GE: jax.Array  # int32: tokens that chose an expert, or were chosen by it, before drops
  max_per_token: int = dataclasses.field(metadata={'static': True})  # bound of rows_per_token_T

  @property
  def ragged(self):
    return self.token.ndim == 1

  packed = ragged  # its name in version 0.1, for code that reads plans

  def weights_TE(self):
    """What every expert's output is multiplied by for every token; 0 where it has no row of it."""
    T, E = len(self.rows_per_token_T), len(self.sizes_E)
    expert = jnp.arange(E)[:, None]
    if self.ragged:
      ends, rows = jnp.cumsum(self.sizes_E), jnp.arange(len(self.token))
      expert = jnp.minimum(jnp.searchsorted(ends, rows, side='right'), E - 1)
    zeros = jnp.zeros((T, E), self.weight.dtype)
    return zeros.at[self.token, expert].add(jnp.where(self.used, self.weight, 0))


def router_logits(x, w_DE):
  """Scores of every expert for x [..., D]: logits [..., E], as wide as x or w, at full precision.

  A bfloat16 router sends several per cent of the tokens to other experts, and the default precision
  of TPUs is bfloat16 whatever the dtype.
  """
  dtype = jnp.promote_types(x.dtype, w_DE.dtype)
  return jnp.einsum(
    '...D,DE->...E', x.astype(dtype), w_DE.astype(dtype), precision=jax.lax.Precision.HIGHEST
  )


def expert_capacity(num_tokens, k, num_experts, factor):
  """Slots per expert and group of `num_tokens`: ceil(factor * k * num_tokens / num_experts).

  At least 1, and at most num_tokens, as no expert takes a token twice.
  """
  # An exact quotient must not be rounded up: 1.1 * 10 is 11.000000000000002.
  exact = factor * k * num_tokens / num_experts
  return min(num_tokens, max(1, math.ceil(exact - 1e-9 * exact)))


def token_choice(
  logits_GTE,
  k,
  capacity,
  *,
  valid_GT,
  bias_E=None,
  scores='softmax',
  renormalize=False,
  ragged=False,
):
  """Every token takes its k best experts.

  Switch (arXiv:2101.03961): k=1. llm-random and OLMoE: the defaults. Mixtral: `renormalize`, which
  is a softmax of the k chosen logits. Balancing without a loss (arXiv:2408.15664): `bias_E`, with
  `scores='sigmoid'` and `renormalize` in DeepSeek-V3.

  If more than `capacity` tokens of a group choose an expert, the later ones are dropped, whether it
  is their first choice or their last (a later token that displaced an earlier one would leak the
  future). The weights of a token's other experts do not change.

  Args:
    logits_GTE: router scores.
    k: experts per token, at most E.
    capacity: slots per expert and group, or None: no limit.
    valid_GT: bool; False is padding.
    bias_E: added to the scores for choosing; weights come from the scores without it.
    scores: 'softmax' over the experts, or 'sigmoid' of each logit.
    renormalize: weights of a token are divided by their sum.
    ragged: layout of the plan; without a capacity it is always ragged.

  Returns:
    A Plan.
  """
  G, T, E = logits_GTE.shape
  _check(scores in SCORES, f'scores must be one of {", ".join(SCORES)}; got {scores!r}.')
  _check(1 <= k <= E, f'a token can choose between 1 and {E} experts, got k = {k}.')
  _check(capacity is None or capacity >= 1, f'capacity must be at least 1 slot, got {capacity}.')
  scores_GTE = jax.nn.softmax(logits_GTE) if scores == 'softmax' else jax.nn.sigmoid(logits_GTE)
  # Logits order as their scores do, but scores can underflow to a tie.
  ranking_GTE = logits_GTE if bias_E is None else scores_GTE + bias_E[None, None]
  _, choice_GTK = jax.lax.top_k(jax.lax.stop_gradient(ranking_GTE), k)
  choice_GTK = checkpoint_name(choice_GTK, CHOICE)
  if renormalize:  # by a softmax, not a division: the k scores can all underflow
    weighed_GTE = normalizing_logits(logits_GTE, scores)
    weight_GTK = jax.nn.softmax(jnp.take_along_axis(weighed_GTE, choice_GTK, axis=-1))
  else:
    weight_GTK = jnp.take_along_axis(scores_GTE, choice_GTK, axis=-1)
  return plan_of_choices(
    choice_GTK,
    weight_GTK,
    valid_GT=valid_GT,
    num_experts=E,
    capacity=capacity,
    ragged=ragged or capacity is None,
  )


def normalizing_logits(logits, scores):
  """Logits whose softmax, over any of the experts, is the scores divided by their sum."""
  return jax.nn.log_sigmoid(logits) if scores == 'sigmoid' else logits


def plan_of_choices(
  choice_GTK,
  weight_GTK,
  *,
  valid_GT,
  num_experts,
  capacity,
  chosen_GTK=None,
  ragged=False,
  packed=False,
):
  """The plan in which every token goes to the experts it chose, while they have slots.

  Args:
    choice_GTK: int32, the experts of each token, all different.
    weight_GTK: what their outputs are multiplied by; has a gradient.
    valid_GT: bool; False is padding, which is not routed.
    num_experts: E.
    capacity: slots per expert and group, for tokens in the order of the group; None: no limit.
    chosen_GTK: bool; False where a token makes no use of a choice. None: it uses all K.
    ragged: layout of the plan.
    packed: the name of `ragged` in version 0.1, for routers written for it.
  """
  ragged = ragged or packed
  G, T, K = choice_GTK.shape
  E, n = num_experts, choice_GTK.size
  C = T if capacity is None else min(capacity, T)
  # Choices in the order of tokens form a queue per expert and group, and one for padding.
  queue_GTK = choice_GTK * G + jnp.arange(G, dtype=jnp.int32)[:, None, None]
  used_GTK = jnp.broadcast_to(valid_GT[..., None], choice_GTK.shape)
  if chosen_GTK is not None:
    used_GTK &= chosen_GTK
  queue = jnp.where(used_GTK, queue_GTK, E * G).reshape(n)
  order = _argsort(queue, E * G + 1)  # choices, queue after queue
  place = _argsort(order, n)  # of each choice in `order`
  ends = _ends(queue[order], E * G)
  length = jnp.diff(ends, prepend=0)
  start = ends - length
  is_valid, queue = queue < E * G, jnp.minimum(queue, E * G - 1)
  rank = place - start[queue]  # of each choice in its queue
  kept = is_valid & (rank < C)
  length_EG = length.reshape(E, G)
  sizes_E = jnp.minimum(length_EG, C).sum(axis=1)
  if ragged:
    experts = jnp.where(kept, queue // G, E) if C < T else None
    choice_of_row, row_of_choice, used = _ragged_layout(order, place, experts, sizes_E)
  else:
    row_of_choice = queue * C + jnp.clip(rank, 0, C - 1)
    choice_of_row, used = _capacity_layout(order, start, length_EG, C)
  # Per token: rows of the kept choices first.
  per_token = lambda a: a.astype(jnp.int32).reshape(G * T, K)
  lost, rows_by_token = jax.lax.sort(
    (per_token(~kept), per_token(row_of_choice)), num_keys=1, is_stable=True
  )
  return Plan(
    token=choice_of_row // K,
    weight=_weight_of_row(weight_GTK.reshape(n), choice_of_row, used, row_of_choice, kept),
    used=used,
    sizes_E=sizes_E,
    rows_by_token=rows_by_token.reshape(n),
    row_start_T=jnp.arange(G * T, dtype=jnp.int32) * K,
    rows_per_token_T=K - lost.sum(axis=1),
    counts_GE=length_EG.T,
    max_per_token=K,
  )


def _capacity_layout(order, start, length_EG, C):
  """C rows for every queue, [E, G*C]: the choice of each, and whether there is one."""
  E, G = length_EG.shape
  slot_C = jnp.arange(C, dtype=jnp.int32)
  place = jnp.minimum(start[:, None] + slot_C[None], order.size - 1)
  used = slot_C[None] < length_EG.reshape(-1, 1)
  return order[place].reshape(E, G * C), used.reshape(E, G * C)


def _ragged_layout(order, place, experts, sizes_E):
  """A row for every choice, [n]: the choice of each, the row of each, and whether it is used.

  `order` sorts them by expert. Dropped choices, for which `experts` is E, come last.
  """
  if experts is not None:
    order = _argsort(experts, sizes_E.size + 1)
    place = _argsort(order, order.size)
  return order, place, jnp.arange(order.size) < sizes_E.sum()


def own_experts(plan, first, number):
  """The plan of `number` experts from `first` on, an int32 scalar, for the same tokens.

  It has the rows and sizes of these experts alone. In a ragged plan any number of rows has room.
  """
  own = lambda a: jax.lax.dynamic_slice_in_dim(a, first, number)
  sizes_E = own(plan.sizes_E)
  if plan.ragged:
    length = plan.token.shape[0]
    offset = jnp.where(jnp.arange(plan.sizes_E.shape[0]) < first, plan.sizes_E, 0).sum()
    end = sizes_E.sum()
    used = jnp.arange(length) < end
    own = lambda a: jax.lax.dynamic_slice_in_dim(jnp.pad(a, (0, length)), offset, length)
    weight = jnp.where(used, own(plan.weight), 0)
  else:
    offset, end = first * plan.token.shape[1], number * plan.token.shape[1]
    used, weight = own(plan.used), own(plan.weight)
  token = own(plan.token)
  row = plan.rows_by_token - offset
  return dataclasses.replace(
    plan,
    token=token,
    weight=weight,
    used=used,
    sizes_E=sizes_E,
    rows_by_token=jnp.where((0 <= row) & (row < end), row, token.size),
  )


def expert_choice(logits_GTE, capacity, *, valid_GT, softmax_over='experts'):
  """Every expert takes the `capacity` best tokens of each group (arXiv:2202.09368).

  Loads are equal by construction; a token gets between none and all of the experts. Causal only if
  no group holds two positions of one sequence.

  Args:
    logits_GTE: router scores.
    capacity: tokens per expert and group, at most T. With fewer valid tokens, slots stay empty.
    valid_GT: bool; False is padding.
    softmax_over: 'experts' (arXiv:2402.07871) or 'tokens' of the group; weights are these scores.

  Returns:
    A Plan with capacity layout.
  """
  G, T, E = logits_GTE.shape
  _check(
    softmax_over in ('experts', 'tokens'),
    f'softmax_over must be experts or tokens; got {softmax_over!r}.',
  )
  _check(
    1 <= capacity <= T,
    f'an expert can choose between 1 and all {T} tokens of a group, got capacity = {capacity}.',
  )
  C = capacity
  if softmax_over == 'experts':
    scores_GTE = jax.nn.softmax(logits_GTE, axis=2)
  else:
    lowest = jnp.finfo(logits_GTE.dtype).min  # finite: no NaN in a group of padding alone
    scores_GTE = jax.nn.softmax(jnp.where(valid_GT[..., None], logits_GTE, lowest), axis=1)
  scores_GET = jnp.swapaxes(scores_GTE, 1, 2)
  ranking_GET = jnp.where(valid_GT[:, None], jax.lax.stop_gradient(scores_GET), -1.0)
  _, token_GEC = jax.lax.top_k(ranking_GET, C)
  token_GEC = checkpoint_name(token_GEC, CHOICE)
  weight_GEC = jnp.take_along_axis(scores_GET, token_GEC, axis=-1)
  used_GEC = jnp.take_along_axis(valid_GT[:, None], token_GEC, axis=-1)
  token_GEC = token_GEC + T * jnp.arange(G, dtype=jnp.int32)[:, None, None]
  by_expert = lambda a_GEC: jnp.swapaxes(a_GEC, 0, 1).reshape(E, G * C)
  token, used = by_expert(token_GEC), by_expert(used_GEC)
  owner = jnp.where(used, token, G * T).reshape(-1)  # empty rows sort to the end
  rows_by_token = _argsort(owner, G * T + 1)
  ends = _ends(owner[rows_by_token], G * T)
  rows_per_token = jnp.diff(ends, prepend=0)
  return Plan(
    token=token,
    weight=jnp.where(used, by_expert(weight_GEC), 0),
    used=used,
    sizes_E=used.sum(axis=1, dtype=jnp.int32),
    rows_by_token=rows_by_token,
    row_start_T=ends - rows_per_token,
    rows_per_token_T=rows_per_token,
    counts_GE=used_GEC.sum(axis=2, dtype=jnp.int32),
    max_per_token=E,
  )


@jax.custom_vjp
def _weight_of_row(weight, choice_of_row, used, row, kept):
  """Weights in the order of rows; forward and backward are gathers."""
  del row, kept
  return jnp.where(used, weight[choice_of_row], 0)


def _weight_of_row_forward(weight, choice_of_row, used, row, kept):
  return _weight_of_row(weight, choice_of_row, used, row, kept), (row, kept)


def _weight_of_row_backward(saved, d_weight):
  row, kept = saved
  return jnp.where(kept, d_weight.reshape(-1)[row], 0), None, None, None, None


_weight_of_row.defvjp(_weight_of_row_forward, _weight_of_row_backward)


def _ends(sorted_keys, bound):
  """For every key in [0, bound), the number of sorted keys up to and including it."""
  keys = jnp.arange(bound, dtype=sorted_keys.dtype)
  return jnp.searchsorted(sorted_keys, keys, side='right').astype(jnp.int32)


def _argsort(keys, bound):
  """Stable argsort of int32 keys in [0, bound)."""
  n = keys.shape[0]
  index = jnp.arange(n, dtype=jnp.int32)
  if bound * n < 2**31:  # key and index in one number: several times faster than a sort of pairs
    return jax.lax.sort(keys * n + index) % n
  return jax.lax.sort((keys, index), num_keys=1, is_stable=True)[1]


def _check(condition, message):
  if not condition:
    raise ValueError(message)


def load_balancing_loss(logits_GTE, counts_GE, valid_GT, *, k):
  """Load-balancing loss E * sum(f * P) over the valid tokens of all groups together.

  f_e is the fraction of all choices, before drops, that went to expert e, and P_e its mean score:
  the value is 1 under uniform routing for every k. Only P has a gradient. In llm-random, Mixtral
  and OLMoE f counts choices per token, and the loss is k times this one.

  Args:
    logits_GTE: their softmax is the scores; `normalizing_logits` of sigmoids, which are divided by
      their sum over all experts (DeepSeek-V3, arXiv:2412.19437, equations 17 to 20).
    counts_GE: choices per expert, `Plan.counts_GE`.
    valid_GT: bool; False is padding.
    k: experts per token.

  Returns:
    A scalar, float32 at least.
  """
  return loaded_mean(jax.nn.softmax(_wide(logits_GTE)), counts_GE, valid_GT, k=k)


def loaded_mean(scores_GTE, counts_GE, valid_GT, *, k):
  """The sum of a token's scores, where experts count by their load over k / E; mean over tokens."""
  E = scores_GTE.shape[-1]
  num_valid = jnp.maximum(valid_GT.sum(), 1)
  mean_E = _valid_sum(scores_GTE, valid_GT[..., None]) / num_valid
  fraction_E = counts_GE.sum(axis=0) / (k * num_valid)
  return E * jnp.sum(fraction_E.astype(scores_GTE.dtype) * mean_E)


def z_loss(logits_GTE, valid_GT):
  """Mean over valid tokens of logsumexp(logits)^2 (arXiv:2202.08906, equation 5)."""
  squared_GT = jax.nn.logsumexp(_wide(logits_GTE), axis=-1) ** 2
  return _valid_sum(squared_GT, valid_GT) / jnp.maximum(valid_GT.sum(), 1)


@jax.custom_vjp
def pull(parameter, gradient):
  """A loss of value 0 that gives a parameter this gradient, whatever the loss is multiplied by.

  For parameters that something else than the optimizer moves (`moejax.parameters.UPDATES`).
  """
  del gradient
  return jnp.zeros_like(parameter, shape=())


pull.defvjp(
  lambda parameter, gradient: (pull(parameter, gradient), gradient.astype(parameter.dtype)),
  lambda gradient, d_loss: (gradient, None),
)


def balance_pull(bias_E, counts_GE):
  """A loss of value 0 whose gradient gives biases the load (arXiv:2408.15664).

  The gradient of `bias_E` is the load of each expert above the mean, times E: integers, so that
  sums over microbatches are exact, and the sign is 0 for a load that is exactly the mean.
  """
  load_E = counts_GE.sum(axis=0)
  mean, rest = jnp.divmod(load_E.sum(), load_E.size)
  return pull(bias_E, (load_E - mean).astype(bias_E.dtype) * load_E.size - rest)


def _wide(a):
  return a.astype(jnp.promote_types(a.dtype, jnp.float32))


def _valid_sum(a, valid):
  return jnp.where(valid, a, 0).sum(axis=(0, 1))


def router_metrics(counts_GE, number_GT, logits_GTE, valid_GT):
  """Metrics of a router, over the valid tokens of all groups; no gradient.

  Args:
    counts_GE: choices per expert, before drops.
    number_GT: experts that a token reached.
    logits_GTE: their softmax is the scores.
    valid_GT: bool; False is padding.

  Returns:
    A dict of float32: of the load before drops, `load_max` (largest over mean), `load_cv` (standard
    deviation over mean) and `dead` (fraction of experts without a token); `dropped` (fraction of
    choices without a slot), `unrouted` (fraction of tokens without an expert), `entropy` (of the
    scores, mean over tokens, divided by log E: 1 is uniform, 0 is one-hot).
  """
  logits_GTE = jax.lax.stop_gradient(_wide(logits_GTE))
  E = logits_GTE.shape[-1]
  load_E = counts_GE.sum(axis=0).astype(jnp.float32)
  mean = jnp.maximum(load_E.mean(), 1 / E)  # nothing routed at all: all loads 0
  num_valid = jnp.maximum(valid_GT.sum(), 1).astype(jnp.float32)
  entropy_GT = jax.scipy.special.entr(jax.nn.softmax(logits_GTE)).sum(axis=-1)
  metrics = {
    'load_max': load_E.max() / mean,
    'load_cv': load_E.std() / mean,
    'dead': (load_E == 0).mean(),
    'dropped': 1 - number_GT.sum() / jnp.maximum(load_E.sum(), 1),
    'unrouted': jnp.sum(valid_GT & (number_GT == 0)) / num_valid,
    'entropy': _valid_sum(entropy_GT, valid_GT) / num_valid / (math.log(E) or 1.0),
  }
  return {name: value.astype(jnp.float32) for name, value in metrics.items()}
