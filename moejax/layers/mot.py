"""The Mixture-of-Tokens layer and its variants (docs/concepts/mixture_of_tokens.md)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moejax import fields, parameters
from moejax.fields import Section, default
from moejax.layers import common, experts
from moejax.layers.mlp import hidden_width, num_weights
from moejax.layers.sublayer import Cost, Sublayer, sees_the_future
from moejax.ops import mixing, routing
from moejax.parameterization import Terms
from moejax.sharding import groups

_COLDEST = 1e-6  # temperature at which the softmax is a one-hot arg-max, and still finite

parameters.declare('controller emit_controller', kind='readout')
parameters.declare('temperature emit_temperature', decays=False)
parameters.declare('anneal', moved_by='anneal')


@dataclasses.dataclass(frozen=True)
class MoTConfig(Section):
  """The Mixture-of-Tokens sublayer.

  The paper's MoT-Size/kE/m has k = group_size and k * m experts. Where `expert_width` is set,
  parameters do not depend on `group_size` and `routing`.
  """

  PATH = 'model.mot'

  num_experts: int = default(64, 'experts of a layer', minimum=1)
  group_size: int = default(8, 'sequences that are mixed with each other', minimum=1)
  expert_width: int = default(0, '0: d_ff * group_size / num_experts, as a dense layer', minimum=0)
  routing: str = default(
    'softmax',
    'weights of tokens; discrete: one token per expert, uniform: all equal',
    choices=('softmax', 'discrete', 'uniform'),
  )
  emit: str = default(
    'same',
    'weights of the outputs of experts; same: as merged, raw: 1',
    choices=('same', 'softmax_over_experts', 'raw', 'top_1'),
  )
  separate_controllers: bool = default(False, 'emit has scores of its own')
  temperature: float = default(1.0, 'of the softmax; where it changes, the initial one', above=0)
  temperature_mode: str = default(
    'fixed',
    'how it changes; learned: one for a layer',
    choices=('fixed', 'annealed', 'learned', 'learned_per_expert'),
  )
  separate_temperatures: bool = default(False, 'emit learns a temperature of its own')
  expert_norm: bool = default(False, 'layer norm before and after the experts')
  grouping: str = default(
    'batch',
    'who is mixed; batch: consecutive sequences, random: shuffled in every layer and step, '
    'all_positions: consecutive sequences, all positions of them together: not causal',
    choices=('batch', 'random', 'all_positions'),
  )

  def width(self, d_ff):
    """Hidden width of one expert; E * width / group_size = d_ff matches a dense layer's FLOPs."""
    if self.expert_width:
      return self.expert_width
    return d_ff * self.group_size // self.num_experts

  def problems(self, d_ff):
    """Yields one sentence per combination of values, in a model of this `d_ff`, that is invalid."""
    slots = d_ff * self.group_size
    if self.separate_temperatures and not self.learns_temperature:
      yield (
        'model.mot.separate_temperatures needs temperature_mode = learned or learned_per_expert, '
        f'got {self.temperature_mode!r}.'
      )
    if self.emit in ('raw', 'top_1'):
      for name in ('separate_controllers', 'separate_temperatures'):
        if getattr(self, name):
          yield f'model.mot.{name} has nothing to act on with emit = {self.emit}; set it to False.'
    if not self.causal and not self.expert_width:
      yield (
        'model.mot.grouping = all_positions needs model.mot.expert_width: d_ff * group_size * '
        'positions / num_experts gives the FLOPs of a dense layer.'
      )
    elif not self.expert_width and slots % self.num_experts:
      yield (
        f'model.mot.num_experts = {self.num_experts} must divide d_ff * group_size = {slots} for '
        'experts of equal FLOPs; change it or set expert_width.'
      )

  @property
  def causal(self):
    return self.grouping != 'all_positions'

  def group_tokens(self, length):
    """Tokens that are mixed with each other, of sequences of `length` positions."""
    return self.group_size * (1 if self.causal else length)

  @property
  def learns_temperature(self):
    return self.temperature_mode.startswith('learned')

  @property
  def emits_as_it_merges(self):
    """Whether the weights of outputs are those of the tokens."""
    return self.emit == 'same' and not (self.separate_controllers or self.separate_temperatures)


class MixtureOfTokens(common.Stateless):
  """Continuous mixture of experts over sequences (arXiv:2310.15961).

  Input and output x_BLD, any float dtype; scores and weights in float32, or in bfloat16 if x and
  the parameters are. M = group_size sequences of the batch form a group. At every position each of
  the E experts sees one mixture of the group's M tokens, and its output is added to them: with the
  same weights by default, a softmax over these tokens. Padding (segment 0) never enters a mixture.

  Leaks: causal, but the sequences of a group see each other's tokens at the same position. With
  `grouping = 'all_positions'` they see all tokens of the group, later ones too: with `emit =
  'softmax_over_experts'` that is Soft MoE (arXiv:2308.00951) with a slot for each expert.

  `aux`: 'mot/entropy', 'mot/max_weight', 'mot/std' of the merge weights (`mixing.statistics`), the
  same under 'mot/emit_...' if emit has weights of its own, and 'mot/temperature' (and
  'mot/emit_temperature') if it changes, mean over experts.

  Per token, experts cost as much as a dense layer of width E * expert_width / M; controller, merge
  and emit add 6 * D * E forward FLOPs.
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
    **fields_of_config,
  ):
    d_ff = d_ff or 4 * d_model
    init = common.initializer(init)
    config = fields.of_layer(MixtureOfTokens, MoTConfig, config, fields_of_config)
    fields.check(config.problems(d_ff))
    self.config = config
    E = config.num_experts
    self.controller = init(rngs, d_model, E, fan_in=d_model)
    sizes = dict(d_model=d_model, d_ff=config.width(d_ff), activation=activation)
    self.experts = experts.Experts(E, **sizes, init=init, rngs=rngs)
    if config.separate_controllers:
      self.emit_controller = init(rngs, d_model, E, fan_in=d_model)
    if config.temperature_mode == 'annealed':
      self.anneal = nnx.Param(jnp.ones((), jnp.float32))  # set by the optimizer
    if config.learns_temperature:
      shape = (E,) if config.temperature_mode == 'learned_per_expert' else ()
      start = jnp.full(shape, 1 + math.log(config.temperature), init.dtype)
      self.temperature = nnx.Param(start)
      if config.separate_temperatures:
        self.emit_temperature = nnx.Param(start)
    if config.expert_norm:
      self.norm_in = common.LayerNorm(d_model, init.dtype)
      self.norm_out = common.LayerNorm(d_model, init.dtype)

  def __call__(self, x_BLD, tokens=None):
    tokens = tokens or common.unpadded(x_BLD, self.controller.shape[0])
    B, L, _ = x_BLD.shape
    M = self.config.group_size
    groups.check('model.mot.group_size', M, B)
    order_B = None
    if self.config.grouping == 'random' and tokens.key is not None:
      order_B = jax.random.permutation(tokens.key, B)
    grouped = groups.Groups(B, L, M, order_B) if self.config.causal else groups.WholeSequences(M)
    x_CMD, valid_CM = grouped.split(x_BLD), grouped.split(tokens.segments > 0)
    logits_CME = self._logits(x_CMD, self.controller)
    merge_CME, emit_CME, aux = self._weights(x_CMD, valid_CM, logits_CME)
    rows_ECD = groups.to_experts(mixing.merge(x_CMD, merge_CME))
    if self.config.expert_norm:
      rows_ECD = self.norm_in(rows_ECD)
    if tokens.observed:
      inputs_ND = rows_ECD.reshape(-1, x_BLD.shape[-1])
      valid_N = jnp.tile(valid_CM.any(axis=1), len(rows_ECD))
      logits_BLE, weights_BLE = map(grouped.join, (logits_CME, merge_CME))
      seen = experts.observation(self.experts, logits_BLE, weights_BLE, inputs_ND, valid_N)
      aux |= {f'mot/{name}': values for name, values in seen.items()}
    rows_ECD = self.experts(rows_ECD)
    if self.config.expert_norm:
      rows_ECD = self.norm_out(rows_ECD)
    rows_ECD = checkpoint_name(groups.from_experts(rows_ECD), experts.OUTPUT)
    y_CMD = mixing.emit(rows_ECD, emit_CME)
    return checkpoint_name(grouped.join(y_CMD), experts.OUTPUT), aux

  def _weights(self, x_CMD, valid_CM, logits_CME):
    """Weights of tokens in the mixtures and of outputs, and aux."""
    config = self.config
    merge_CME = self._distribution(logits_CME, valid_CM, 'temperature', mixing.TOKENS)
    measured = {'mot/': mixing.statistics(merge_CME, valid_CM)}
    if config.emits_as_it_merges:
      emit_CME = merge_CME
    elif config.emit == 'raw':
      emit_CME = jnp.broadcast_to(valid_CM[..., None], merge_CME.shape)
    elif config.emit == 'top_1':
      emit_CME = mixing.one_hot(merge_CME, valid_CM)
    else:
      over = mixing.EXPERTS if config.emit == 'softmax_over_experts' else mixing.TOKENS
      if config.separate_controllers:
        logits_CME = self._logits(x_CMD, self.emit_controller)
      name = 'emit_temperature' if config.separate_temperatures else 'temperature'
      emit_CME = self._distribution(logits_CME, valid_CM, name, over)
      measured['mot/emit_'] = mixing.statistics(emit_CME, valid_CM, over)
    return merge_CME, emit_CME, self._aux(measured)

  def _logits(self, x_CMD, controller):
    if self.config.routing == 'uniform':
      dtype = jnp.promote_types(x_CMD.dtype, controller.dtype)
      return jnp.zeros((*x_CMD.shape[:2], self.config.num_experts), dtype)
    return routing.router_logits(x_CMD, controller[...])

  def _distribution(self, logits_CME, valid_CM, name, over):
    temperature = self._temperature(name).astype(logits_CME.dtype)
    if (self.config.temperature_mode, self.config.temperature) != ('fixed', 1.0):
      # A cold one multiplies the rounding of large logits: exp would overflow.
      logits_CME -= jax.lax.stop_gradient(logits_CME.max(axis=over, keepdims=True))
    weights_CME = mixing.softmax(logits_CME, valid_CM, temperature, over)
    if self.config.routing == 'discrete':
      return mixing.one_hot(weights_CME, valid_CM, over)
    return weights_CME

  def _temperature(self, name):
    """[1, 1, E or 1]. If learned, it is exp(t - 1), as in the papers' code: never negative."""
    if self.config.learns_temperature:
      log = jnp.clip(getattr(self, name)[...] - 1, math.log(_COLDEST), -math.log(_COLDEST))
      return jnp.exp(log).reshape(1, 1, -1)
    scale = self.anneal[...] if self.config.temperature_mode == 'annealed' else jnp.ones(())
    return jnp.maximum(self.config.temperature * scale, _COLDEST).reshape(1, 1, 1)

  def _aux(self, measured):
    aux = {prefix + name: v for prefix, values in measured.items() for name, v in values.items()}
    if self.config.temperature_mode != 'fixed':
      aux['mot/temperature'] = self._temperature('temperature').mean().astype(jnp.float32)
    if self.config.separate_temperatures:
      aux['mot/emit_temperature'] = self._temperature('emit_temperature').mean().astype(jnp.float32)
    return aux


class MoTSublayer(Sublayer):
  """`mot` in `model.blocks`."""

  mixes = True

  def __init__(self, config):
    super().__init__(config)
    self.mot = config.mot
    self.groups = {'model.mot.group_size': config.mot.group_size}
    self.whole_groups = {} if config.mot.causal else self.groups
    self.experts = {'model.mot.num_experts': config.mot.num_experts}
    fields = 'model.mot.expert_width; 0: model.d_ff * model.mot.group_size / num_experts'
    width = hidden_width(config.mot.width(config.d_ff), config.activation)
    self.widths = {f'hidden units of an expert ({fields})': width}
    self.mixed_sequences = config.mot.group_size
    self.anneals = config.mot.temperature_mode == 'annealed'

  def make(self, init, rngs):
    c = self.config
    sizes = dict(d_model=c.d_model, d_ff=c.d_ff, activation=c.activation)
    return MixtureOfTokens(c.mot, **sizes, init=init, rngs=rngs)

  def terms(self):
    # A mixture averages M tokens, so that it shrinks with M; then a token adds up the outputs of so
    # many experts, with a weight each.
    mot, D, width = self.mot, self.config.d_model, self.mot.width(self.config.d_ff)
    E, M = mot.num_experts, mot.group_tokens(self.config.max_length)
    mixed = 1 if mot.expert_norm else M
    into = Terms(D * mixed**-0.5, D / mixed, init=D)
    summed = {'raw': (E, 1), 'top_1': (E / M, 1), 'softmax_over_experts': (E, 1 / E)}
    number, weight = summed.get(mot.emit, (E, 1 / M))
    out = Terms(width * number * weight, width * number * weight**2, init=width)
    return {'experts/w_in': into, 'experts/w_gate': into, 'experts/w_out': out}

  def problems(self):
    return self.mot.problems(self.config.d_ff)

  def leaks(self):
    if self.mot.causal:
      return ''
    return sees_the_future('model.mot.grouping = all_positions', 'model.mot.grouping = batch')

  def remixed(self, mode, group_size):
    """`unmixed`: groups of one; `discrete`: one token per expert. Experts keep their width."""
    if mode == 'unmixed' and group_size > 1:
      raise ValueError(f'mode unmixed has groups of 1; leave out the group size {group_size}.')
    size = 1 if mode == 'unmixed' else group_size or None
    routing = 'discrete' if mode == 'discrete' else None
    return {'mot': self.config.with_mot(size, routing).mot}

  def cost(self, length):
    mot, D = self.mot, self.config.d_model
    E, M = mot.num_experts, mot.group_tokens(length)
    experts = E * num_weights(D, mot.width(self.config.d_ff), self.config.activation)
    controllers = D * E * (1 + mot.separate_controllers)
    temperatures = {'fixed': 0, 'learned_per_expert': E}.get(mot.temperature_mode, 1)
    scores = controllers + temperatures * (1 + mot.separate_temperatures)
    norm = 4 * D * mot.expert_norm
    # Constant weights have no gradient.
    gradients = {} if mot.routing == 'softmax' else {'merge': 1, 'emit': 1}
    if mot.routing == 'discrete':
      gradients['controller'] = 0
    if mot.emit in ('raw', 'top_1'):
      gradients['emit'] = 1
    return Cost(
      params={'experts': experts, 'controller': scores, 'norm': norm},
      active=experts / M + scores + norm,
      model_flops={'experts': 2 * experts / M},
      routing_flops={
        'controller': 0 if mot.routing == 'uniform' else 2 * controllers,
        'merge': 2 * D * E,
        'emit': 2 * D * E,
      },
      routing_gradients=gradients,
    )
