"""The sparse mixture-of-experts layer: router, plan, dispatch and combine, experts.

A router is a function from scores to a `Plan` (moejax.ops.routing); ROUTERS names them, and
docs/adding_a_router.md adds one. Everything else is the same for all of them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from moejax import fields, parameters
from moejax.fields import Section, default
from moejax.layers import common, experts, mlp, relu_router
from moejax.layers.router import Router
from moejax.layers.sublayer import Cost, Sublayer, sees_the_future
from moejax.ops import dispatch, expert_loop, routing
from moejax.parameterization import Terms
from moejax.sharding import exchange, groups, mesh

parameters.declare('router', kind='readout')


@dataclasses.dataclass(frozen=True)
class MoEConfig(Section):
  """The sparse mixture-of-experts sublayer.

  Sizes follow arXiv:2402.07871, sections 4 and 6.1: with expansion rate E and granularity G there
  are G * E experts of width d_ff / G, and a token uses G of them (on average, under expert choice).
  For every G, experts have E times the parameters of a dense layer of width d_ff, and its FLOPs.
  """

  PATH = 'model.moe'

  router: str = default(
    'token_choice',
    'how experts and tokens find each other (docs/concepts/routers.md)',
    choices=lambda: ROUTERS,
  )
  expansion_rate: int = default(8, 'parameters of experts over those of a dense layer', minimum=1)
  granularity: int = default(1, 'divides the width of experts, multiplies their number', minimum=1)
  experts_per_token: int = default(0, '0: granularity, for the FLOPs of a dense layer', minimum=0)
  capacity_factor: float = default(
    1.25, 'slots over mean load; 0: no token is dropped', minimum=0, maximum=10**6
  )
  group_size: int = default(8, 'sequences that are routed together', minimum=1)
  group_by: str = default(
    'auto',
    'what a routing group holds: whole sequences, or one position of each; auto: what is causal',
    choices=('auto', 'sequence', 'position'),
  )
  scores: str = default(
    'softmax',
    'of the router; sigmoid is for token choice, softmax_over_tokens for expert choice',
    choices=('softmax', 'sigmoid', 'softmax_over_tokens'),
  )
  renormalize: bool = default(False, 'weights of a token sum to 1: the softmax after the choice')
  balance_loss: float = default(0.01, 'weight of the load-balancing loss', minimum=0)
  balance_bias: bool = default(False, 'balance by a bias instead (optimizer.balance_bias_rate)')
  z_loss: float = default(0.0, 'weight of the mean squared logsumexp of router scores', minimum=0)
  jitter: float = default(0.0, "training noise: router's input times 1 +- jitter", minimum=0)
  shared_width: int = default(0, 'hidden width of an expert for all tokens; 0: none', minimum=0)
  output_norm: bool = default(False, 'layer norm of the output')
  impl: str = default(
    'auto',
    'loop over experts, or all rows at once; auto: by device',
    choices=('auto', 'loop', 'rows'),
  )

  def problems(self, d_ff):
    """Yields one sentence per combination of values, in a model of this `d_ff`, that is invalid."""
    if d_ff % self.granularity:
      yield (
        f'model.moe.granularity = {self.granularity} must divide model.d_ff = {d_ff}: experts are '
        'd_ff / granularity wide. Change one of the two.'
      )
    if self.top_k > self.num_experts:
      yield (
        f'model.moe: a token cannot choose {self.top_k} of {self.num_experts} experts. Lower '
        'experts_per_token, or raise expansion_rate (experts = expansion_rate * granularity).'
      )
    if self.scores not in self.rule.scores:
      yield (
        f'model.moe.scores must be one of {", ".join(self.rule.scores)} with model.moe.router = '
        f'{self.router}; got {self.scores!r}.'
      )
    if self.rule.fills_slots and not self.capacity_factor:
      yield (
        f'model.moe.capacity_factor must be positive for {self.router}: it sets how many tokens '
        'an expert takes; 1 gives every token granularity experts on average.'
      )
    weighs = self.rule.chooses_best and not self.rule.fills_slots
    if not weighs and (self.renormalize or self.balance_bias):
      yield (
        'model.moe.renormalize and balance_bias are for routers in which tokens choose their best '
        f'experts; {self.router} has no use for them. Set both to False.'
      )

  @property
  def num_experts(self):
    return self.expansion_rate * self.granularity

  @property
  def top_k(self):
    """Experts per token; under expert choice their mean, if capacity_factor is 1."""
    return self.experts_per_token or self.granularity

  @property
  def rule(self):
    """The Router."""
    router = ROUTERS[self.router]
    return router if isinstance(router, Router) else Router(router)

  @property
  def by_position(self):
    """Whether a routing group holds tokens of one position only."""
    if self.group_by == 'auto':
      return self.rule.compares_tokens
    return self.group_by == 'position'

  def group_tokens(self, length):
    """Tokens of a routing group of sequences of `length` positions."""
    return self.group_size * (1 if self.by_position else length)

  def expert_width(self, d_ff):
    """Hidden width of one expert."""
    return d_ff // self.granularity

  def fan_in_out(self, d_ff):
    """Fan-in that initialises the experts' output matrices, as in the papers' code.

    Expert choice counts the experts of a token (so d_ff); token choice counts all experts.
    """
    experts = self.top_k if self.rule.fills_slots else self.num_experts
    return experts * self.expert_width(d_ff)

  def capacity(self, num_tokens):
    """Slots of an expert in a routing group of `num_tokens`, or None: no limit."""
    if not self.capacity_factor:
      return None
    return routing.expert_capacity(num_tokens, self.top_k, self.num_experts, self.capacity_factor)

  def decoding(self):
    """The same layer in decoding.

    Token choice drops no token, so that groups do not matter. Expert choice routes one position at
    a time, in groups of as many sequences as in training.
    """
    changes = {} if self.rule.fills_slots else {'capacity_factor': 0.0}
    changes |= {'group_by': 'position'} if self.rule.compares_tokens else {'group_size': 1}
    return dataclasses.replace(self, **changes)

  def leaks(self):
    """Whether a token can see later positions."""
    return self.rule.compares_tokens and not self.by_position


def token_choice(logits_GTE, *, config, capacity, valid_GT, bias_E, ragged):
  """Every token takes its best experts (Switch, GShard, Mixtral, OLMoE, DeepSeek)."""
  return routing.token_choice(
    logits_GTE,
    config.top_k,
    capacity,
    valid_GT=valid_GT,
    bias_E=bias_E,
    scores=config.scores,
    renormalize=config.renormalize,
    ragged=ragged,
  )


def expert_choice(logits_GTE, *, config, capacity, valid_GT, bias_E, ragged):
  """Every expert takes its best tokens of the group."""
  del bias_E, ragged
  over = 'tokens' if config.scores == 'softmax_over_tokens' else 'experts'
  return routing.expert_choice(logits_GTE, capacity, valid_GT=valid_GT, softmax_over=over)


# Name in `model.moe.router` -> Router, or the function of one in which tokens choose.
ROUTERS = {
  'token_choice': Router(token_choice),
  'expert_choice': Router(
    expert_choice, scores=('softmax', 'softmax_over_tokens'), fills_slots=True, compares_tokens=True
  ),
  'relu': relu_router.ROUTER,
}


class MixtureOfExperts(common.Stateless):
  """Sparse mixture of experts.

  Input and output x_BLD, any float dtype, or output of another width `d_out`; scores, weights and
  losses in float32 at least. A routing group is `group_size` consecutive sequences, tokens ordered
  by position, or, with `group_by = 'position'`, the tokens of these sequences at one position.
  Padding (segment 0) is never routed. Without `routes` there is no router: `tokens.scores` are its
  scores.

  Leaks: token choice is causal: earlier tokens of the group, and those at the same position, decide
  which token is dropped. Expert choice by position is causal, but sequences of a group see each
  other's tokens at the same position. Expert choice by sequence sees the future.

  `aux['auxiliary_loss']`: the weighted balance and z losses, to be averaged over layers and added
  to the objective. All other entries are metrics; `aux['moe/load']` [E] is each expert's share of
  all choices times E, so that 1 is uniform.
  """

  def __init__(
    self,
    config=None,
    *,
    d_model,
    d_ff=None,
    activation='relu',
    init='truncated_normal',
    rngs,
    d_out=None,
    routes=True,
    **fields_of_config,
  ):
    d_ff = d_ff or 4 * d_model
    init = common.initializer(init)
    config = fields.of_layer(MixtureOfExperts, MoEConfig, config, fields_of_config)
    fields.check(config.problems(d_ff))
    self.config = config
    self.d_model = d_model
    if routes:
      self.router = init(rngs, d_model, config.num_experts, fan_in=d_model)
    self.experts = experts.Experts(
      config.num_experts,
      d_model=d_model,
      d_ff=config.expert_width(d_ff),
      activation=activation,
      d_out=d_out,
      fan_in_out=config.fan_in_out(d_ff),
      init=init,
      rngs=rngs,
    )
    for name, value in config.rule.parameters(config).items():
      setattr(self, name, nnx.Param(jnp.asarray(value)))
    if config.shared_width:
      self.shared = mlp.MLP(
        d_model=d_model, d_ff=config.shared_width, activation=activation, init=init, rngs=rngs
      )
    if config.output_norm:
      self.output_norm = common.LayerNorm(d_out or d_model, init.dtype)

  def __call__(self, x_BLD, tokens=None):
    tokens = tokens or common.unpadded(x_BLD, self.d_model)
    return self._forward(x_BLD, tokens, self.config)

  def prefill(self, x_BLD, tokens):
    """The forward pass as in decoding: no token is dropped, no position depends on a later one."""
    return self._forward(x_BLD, tokens, self.config.decoding())[0], {}

  def _forward(self, x_BLD, tokens, config):
    B, L, _ = x_BLD.shape
    M = config.group_size
    groups.check('model.moe.group_size', M, B)
    grouped = groups.Groups(B, L, M) if config.by_position else groups.WholeSequences(M)
    x_GTD, valid_GT = grouped.split(x_BLD), grouped.split(tokens.segments > 0)
    scores_GTE = None if tokens.scores is None else grouped.split(tokens.scores)
    y, aux, seen = self._route(x_GTD, valid_GT, scores_GTE, tokens, config)
    y = checkpoint_name(grouped.join(y), experts.OUTPUT)
    if tokens.observed:
      inputs_ND, valid_N = x_GTD.reshape(-1, x_GTD.shape[-1]), valid_GT.reshape(-1)
      logits_BLE, weights_BLE = map(grouped.join, seen)
      seen = experts.observation(self.experts, logits_BLE, weights_BLE, inputs_ND, valid_N)
      aux |= {f'moe/{name}': values for name, values in seen.items()}
    if self.config.shared_width:
      y += self.shared(x_BLD, tokens)[0]
    return (self.output_norm(y) if self.config.output_norm else y), aux

  def _route(self, x_GTD, valid_GT, scores_GTE, tokens, config):
    """Routes groups through the experts: y_GTD, aux, and logits and weights if observed."""
    if scores_GTE is None:
      x_scored = _jitter(x_GTD, config.jitter, tokens.key)
      logits_GTE = routing.router_logits(x_scored, self.router[...])
    else:
      logits_GTE = scores_GTE
    own = {name: getattr(self, name)[...] for name in config.rule.parameters(config)}
    bias_E = jax.lax.stop_gradient(own.get('balance_bias'))
    weights = self.experts.weights(x_GTD.dtype)
    specs = experts.specs(weights)
    body = functools.partial(
      _on_device,
      config=config,
      activation=self.experts.activation,
      devices=mesh.num_shards(specs['w_in'], 'expert'),
      fsdp_dims={name: mesh.sharded_dim(spec, ('fsdp',)) for name, spec in specs.items()},
      observed=tokens.observed,
    )
    if mesh.size(*mesh.AXES) > 1:
      axes = mesh.batch_axes(len(x_GTD))
      by_group = P(axes)
      width = 'tensor' if mesh.num_shards(specs['w_in'], 'tensor') > 1 else None
      body = jax.shard_map(
        body,
        in_specs=(by_group, by_group, by_group, P(), specs),
        out_specs=(P(width, axes), by_group, by_group, by_group),
        check_vma=False,  # loops start from zeros that each device makes
      )
    y, counts_GE, reached_GT, weights_GTE = body(x_GTD, logits_GTE, valid_GT, bias_E, weights)
    aux = self._aux(counts_GE, reached_GT, logits_GTE, valid_GT, own)
    # Shards of hidden widths are summed here, where the gradient of the sum needs no collective.
    return y.sum(axis=0), aux, (routing.normalizing_logits(logits_GTE, config.scores), weights_GTE)

  def _aux(self, counts_GE, reached_GT, logits_GTE, valid_GT, own):
    config = self.config
    scores_GTE = routing.normalizing_logits(logits_GTE, config.scores)
    aux = routing.router_metrics(counts_GE, reached_GT, scores_GTE, valid_GT)
    loss, measured = config.rule.loss(logits_GTE, counts_GE, valid_GT, config=config, own=own)
    aux |= measured | {'z': routing.z_loss(logits_GTE, valid_GT)}
    if config.z_loss:  # 0 * inf is NaN
      loss += config.z_loss * aux['z']
    load_E = counts_GE.sum(axis=0).astype(jnp.float32)
    aux['load'] = load_E * (len(load_E) / jnp.maximum(load_E.sum(), 1))
    return {f'moe/{name}': value for name, value in aux.items()} | {'auxiliary_loss': loss}


def _on_device(
  x_GTD, logits_GTE, valid_GT, bias_E, weights, *, config, activation, devices, fsdp_dims, observed
):
  """One device's tokens: plan, exchange or gather, experts, back, combine.

  The partitioner would gather the whole batch on every device for the sorts and gathers of a plan.
  Groups are routed independently, so that results and drops do not depend on the mesh. Where
  experts are sharded, what is exchanged is either

    slots   to the devices of their experts and back: two all-to-alls of static size, for plans
            with fewer slots than all these devices have tokens;
    tokens  of all devices along the axis; each device plans for its own experts, and outputs are
            summed on the devices of the tokens: all-gather and reduce-scatter.

  Args:
    x_GTD, logits_GTE, valid_GT: tokens, router scores, and which tokens are not padding.
    bias_E: added to the scores for choosing, or None.
    weights: {name: [E / devices, ...]}, this device's experts; sharded along `fsdp` in
      `fsdp_dims`, {name: dimension or None}.
    observed: whether to return weights_GTE.

  Returns:
    y [1, G, T, d_out], of this device's hidden widths; counts_GE, choices per expert before drops;
    reached_GT, how many experts each token reached; weights_GTE, `Plan.weights_TE`, or None.
  """
  loop = experts.in_a_loop(config.impl)
  weights = exchange.gather_weights(weights, fsdp_dims)
  plan = _plan(config, logits_GTE, valid_GT, bias_E, loop and devices == 1)
  counts_GE, reached_GT = plan.counts_GE, plan.rows_per_token_T.reshape(valid_GT.shape)
  weights_GTE = plan.weights_TE().reshape(logits_GTE.shape) if observed else None

  x = x_GTD.reshape(-1, x_GTD.shape[-1])
  send_slots = devices > 1 and not plan.ragged and plan.token.size <= devices * len(x)
  send_tokens = devices > 1 and not send_slots
  if send_tokens:
    x, *gathered = (exchange.all_gather(a) for a in (x, logits_GTE, valid_GT))
    number = len(weights['w_in'])
    first = number * jax.lax.axis_index('expert')
    plan = routing.own_experts(_plan(config, *gathered, bias_E, loop), first, number)
  if loop and not send_slots:
    y = expert_loop.map_experts(experts.ONE[activation], x, plan, weights)
  else:
    rows, weight = dispatch.dispatch(x, plan), plan.weight
    if send_slots:
      rows, weight = exchange.to_experts(rows), exchange.to_experts(weight)
    rows = experts.feed_forward(activation, rows, weight, weights, plan.sizes_E)
    if send_slots:
      rows = exchange.from_experts(rows)
    y = dispatch.combine(rows, plan)
  if send_tokens:
    y = exchange.reduce_scatter(y)
  return y.reshape(1, *valid_GT.shape, -1), counts_GE, reached_GT, weights_GTE


# Slots of an expert from which the ragged loop beats the one over several experts at once
# (benchmarks/moe_layer.py: 320 and 80 slots are faster in the capacity layout, 640 ragged).
_WORTH_RAGGED = 512


def _plan(config, logits_GTE, valid_GT, bias_E, prefers_ragged):
  G, T, _ = logits_GTE.shape
  capacity = config.capacity(T)
  return config.rule.make_plan(
    logits_GTE,
    config=config,
    capacity=capacity,
    valid_GT=valid_GT,
    bias_E=bias_E,
    ragged=capacity is None or (prefers_ragged and G * capacity >= _WORTH_RAGGED),
  )


def _jitter(x, amount, key):
  """Multiplies by noise in 1 +- amount in training (arXiv:2101.03961, section 2.4)."""
  if not amount or key is None:
    return x
  noise = jax.random.uniform(key, x.shape, jnp.float32, 1 - amount, 1 + amount)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32)) * noise


class MoESublayer(Sublayer):
  """`moe` in `model.blocks`."""

  def __init__(self, config):
    super().__init__(config)
    moe = self.moe = config.moe
    self.groups = {'model.moe.group_size': moe.group_size}
    self.whole_groups = {} if moe.by_position else self.groups
    self.experts = {'model.moe.expansion_rate * granularity': moe.num_experts}
    widths = {'an expert (model.d_ff / model.moe.granularity)': moe.expert_width(config.d_ff)}
    if moe.shared_width:
      widths['the shared expert (model.moe.shared_width)'] = moe.shared_width
    self.widths = {
      f'hidden units of {name}': mlp.hidden_width(width, config.activation)
      for name, width in widths.items()
    }
    self.mixes = moe.rule.compares_tokens
    self.mixed_sequences = moe.group_size if self.mixes else 1

  def make(self, init, rngs, d_in=None, d_out=None, routes=True):
    """The layer; of other widths than the model's if they are given."""
    c = self.config
    sizes = dict(d_model=d_in or c.d_model, d_ff=c.d_ff, activation=c.activation)
    return MixtureOfExperts(c.moe, **sizes, d_out=d_out, routes=routes, init=init, rngs=rngs)

  def terms(self):
    # A token adds up the outputs of top_k experts, whose weights add up to `total`.
    moe, d_ff = self.moe, self.config.d_ff
    width, total = moe.expert_width(d_ff), 1 if moe.rule.normalized else moe.top_k
    random = width * total**2 / moe.top_k
    return {'experts/w_out': Terms(width * total, random, init=moe.fan_in_out(d_ff))}

  def problems(self):
    moe = self.moe
    yield from moe.problems(self.config.d_ff)
    group = moe.group_tokens(self.config.max_length)
    mean_load = moe.capacity_factor * moe.top_k * group / moe.num_experts
    if moe.capacity_factor and mean_load < 1:
      yield (
        f'model.moe: an expert would have {mean_load:.3g} slots for a routing group of {group} '
        f'tokens, fewer than 1. Raise group_size (now {moe.group_size} sequences) or '
        'capacity_factor.'
      )

  def leaks(self):
    if not self.moe.leaks():
      return ''
    what = f'model.moe.group_by = sequence with {self.moe.router}'
    return sees_the_future(what, 'model.moe.group_by = position')

  def dropless(self):
    drops = self.moe.capacity_factor and not self.moe.rule.fills_slots
    return {'moe': dataclasses.replace(self.moe, capacity_factor=0.0)} if drops else {}

  def remixed(self, mode, group_size):
    if mode in ('unmixed', 'discrete'):
      raise ValueError(
        f'mode {mode} is for Mixture of Tokens; experts that choose their tokens (model.moe.router '
        f'= {self.moe.router}) need a group to choose from. Use mixed, or mixed_with_corpus to '
        'evaluate.'
      )
    return {'moe': dataclasses.replace(self.moe, group_size=group_size or self.moe.group_size)}

  def cost(self, length, d_in=None, d_out=None, routes=True):
    """For a layer of other widths than the model's if they are given."""
    moe, D = self.moe, d_in or self.config.d_model
    d_ff, activation = self.config.d_ff, self.config.activation
    E, K = moe.num_experts, moe.top_k
    if moe.rule.fills_slots:
      group = moe.group_tokens(length)
      K = E * moe.capacity(group) / group
    expert = mlp.num_weights(D, moe.expert_width(d_ff), activation, d_out)
    shared = mlp.num_weights(D, moe.shared_width, activation) if moe.shared_width else 0
    router = D * E * routes
    own = sum(value.size for value in moe.rule.parameters(moe).values())
    norm = 2 * (d_out or D) * moe.output_norm
    return Cost(
      params={'experts': E * expert, 'mlp': shared, 'router': router + own, 'norm': norm},
      active=K * expert + shared + router + own + norm,
      model_flops={'experts': 2 * K * expert, 'mlp': 2 * shared},
      routing_flops={'router': 2 * router},
    )
