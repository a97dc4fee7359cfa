"""The language model: the sublayers that exist, and how they are stacked.

`blocks = ((('attention', 'mlp'), 6), (('attention', 'mot'), 6))` is six blocks of attention and a
dense feed-forward, then six of attention and Mixture of Tokens. Every repeated pattern is one scan,
so compile time does not grow with depth. Around each sublayer is a pre-norm residual.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moejax import fields, parameterization, parameters
from moejax.fields import Section, default, section
from moejax.layers import common, experts, loss
from moejax.layers.attention import AttentionSublayer
from moejax.layers.block import Block
from moejax.layers.mamba import MambaConfig, MambaSublayer
from moejax.layers.mlp import MLPSublayer
from moejax.layers.moe import MoEConfig, MoESublayer
from moejax.layers.moe_in_mamba import MoEInMambaSublayer
from moejax.layers.mot import MoTConfig, MoTSublayer
from moejax.layers.parallel import Parallel
from moejax.layers.sublayer import Sublayer
from moejax.ops import cross_entropy, routing
from moejax.sharding import exchange, rules
from moejax.sharding.mesh import SHARD_AXES
from moejax.text import did_you_mean, split_values

parameters.declare('embedding', P('tensor', SHARD_AXES), kind='embedding')
parameters.declare('position_embedding', P(None, SHARD_AXES), kind='embedding')
parameters.declare('head', P(SHARD_AXES, 'tensor'), kind='head')

# Name in `model.blocks` -> `layers.sublayer.Sublayer`, which makes the module and describes it. The
# module has `__call__(x_BLD, tokens) -> (y_BLD, aux)`, and for decoding `init_state(batch_size,
# max_length, dtype)`, `step(x_BD, state, tokens) -> (y_BD, state)`, and `prefill(x_BLD, tokens) ->
# (y_BLD, state)`: all positions of a prompt at once, and the state after its last token (padding,
# segment 0, may follow), with caches as long as the prompt; `common.Stateless` has these three for
# layers without state. `aux` is a flat dict of metrics, small arrays, or lists of them from several
# parts; 'auxiliary_loss' is added to the objective, averaged over the sublayers and parts that have
# one (as in the papers' runs).
SUBLAYERS: dict[str, type[Sublayer]] = {
  'attention': AttentionSublayer,
  'mlp': MLPSublayer,
  'mot': MoTSublayer,
  'moe': MoESublayer,
  'mamba': MambaSublayer,
  'moe_in_mamba': MoEInMambaSublayer,
}

_POLICIES = jax.checkpoint_policies
# Chosen experts are always saved: a recomputed route could differ.
_CHOICES = _POLICIES.save_only_these_names(routing.CHOICE)
_REMAT = functools.partial(jax.checkpoint, prevent_cse=False)
_DOTS = _POLICIES.dots_with_no_batch_dims_saveable
# `save_moe` exchanges nothing twice and recomputes only the hidden activations of experts, their
# widest arrays. Tokens of ragged plans are gathered again: those of all devices would be saved.
_EXPERTS = _POLICIES.save_only_these_names(routing.CHOICE, exchange.RECEIVED, experts.OUTPUT)
REMAT = {
  'none': lambda f: f,
  'dots': functools.partial(_REMAT, policy=_POLICIES.save_from_both_policies(_DOTS, _CHOICES)),
  'save_moe': functools.partial(_REMAT, policy=_EXPERTS),
  'full': functools.partial(_REMAT, policy=_CHOICES),
}

_DTYPES = ('float32', 'bfloat16', 'float64')
_MOST_REPEATS = 10_000  # a larger number is a mistake, and would take forever to check


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
  """The architecture, and how it is computed."""

  PATH = 'model'

  blocks: tuple = default(
    ((('attention', 'mlp'), 4),),
    'patterns of sublayers and their repeats; names joined by + run in parallel on one input',
  )
  vocab_size: int = default(0, "0: the tokenizer's; more pads the embedding", minimum=0)
  max_length: int = dataclasses.field(kw_only=True)  # positions: data.sequence_length
  d_model: int = default(64, 'width of the stream between sublayers', minimum=1)
  num_heads: int = default(2, 'of attention', minimum=1)
  num_kv_heads: int = default(0, 'of keys and values, shared by queries; 0: num_heads', minimum=0)
  d_ff: int = default(256, 'hidden width of a dense feed-forward', minimum=1)
  activation: str = default(
    'relu', 'of feed-forwards and experts', choices=(*common.ACTIVATIONS, 'swiglu')
  )
  positions: str = default('rope', 'learned: absolute', choices=('rope', 'learned', 'none'))
  rope_theta: float = default(10_000.0, 'base of rotary positions', minimum=1)
  document_mask: bool = default(False, 'tokens see their document only, not the whole sequence')
  norm: str = default('layer_norm', 'before every sublayer', choices=tuple(common.NORMS))
  norm_eps: float = default(1e-5, 'added to the variance or mean square in these norms', minimum=0)
  qk_norm: bool = default(False, 'RMS norms of all queries and of all keys, as in OLMoE')
  biases: bool = default(False, 'of attention and dense feed-forwards, as in GPT-2')
  final_norm: bool = default(False, 'a norm before the output projection')
  tie_embeddings: bool = default(False, 'the output projection is the embedding')
  init: str = default('truncated_normal', 'of the parameters', choices=tuple(common.INITIALIZERS))
  init_scale: float = default(1.0, 'times the initial parameters', minimum=0)
  parameterization: str = default(
    'standard',
    'how initial values, rates and outputs follow size; mup: the best rate fits every width and '
    'granularity, completep: and every depth',
    choices=parameterization.NAMES,
  )
  base: str = default(
    '',
    "sizes at which that is the standard, as in 'd_model=32,d_ff=128'; others are the model's",
  )
  dtype: str = default(
    'float32',
    'of activations; routing and norms are as wide as their parameters, the loss is float32',
    choices=_DTYPES,
  )
  residual_float32: bool = default(False, 'the stream between sublayers is float32 in any dtype')
  param_dtype: str = default(
    'float32',
    'of parameters and, by default, optimizer moments; there is no other copy',
    choices=_DTYPES,
  )
  remat: str = default(
    'none',
    'what the backward pass recomputes; dots: all but matmuls, save_moe: all but outputs of '
    'experts and arrays from other devices',
    choices=tuple(REMAT),
  )
  loss_chunk: int = default(0, 'positions whose logits exist at once; 0: all', minimum=0)
  mot: MoTConfig = section(MoTConfig, 'the Mixture-of-Tokens sublayer')
  moe: MoEConfig = section(MoEConfig, 'the sparse mixture-of-experts sublayer')
  mamba: MambaConfig = section(MambaConfig, 'the Mamba sublayer')

  @property
  def sublayers(self):
    """Names of all sublayers in order, one tuple per block."""
    return [tuple(pattern) for pattern, repeats in self.blocks for _ in range(repeats)]

  @property
  def kinds(self):
    """Kinds of all sublayers in order, those that run in parallel one after the other."""
    return [kind for names in self.sublayers for name in names for kind in name.split('+')]

  @property
  def used(self):
    """The Sublayers of all kinds in use, each once, and of those they are made of."""
    kinds = (SUBLAYERS[kind] for kind in self.kinds)
    return [
      kind(self) for kind in dict.fromkeys(k for used in kinds for k in (used, *used.made_of))
    ]

  def uses(self, kind):
    """Whether any sublayer is of this kind, or made of it."""
    return any(isinstance(sublayer, SUBLAYERS[kind]) for sublayer in self.used)

  # Of all sublayers in use; see `layers.sublayer.Sublayer`.
  groups = property(lambda self: _union(sublayer.groups for sublayer in self.used))
  whole_groups = property(lambda self: _union(sublayer.whole_groups for sublayer in self.used))
  experts = property(lambda self: _union(sublayer.experts for sublayer in self.used))
  widths = property(lambda self: _union(sublayer.widths for sublayer in self.used))
  mixed_sequences = property(lambda self: math.lcm(*(s.mixed_sequences for s in self.used)))
  anneals = property(lambda self: any(sublayer.anneals for sublayer in self.used))

  @property
  def head_width(self):
    """Width of a head of attention."""
    return self.d_model // self.num_heads

  @property
  def base_model(self):
    """The model at the sizes of `base`, in the standard parameterization."""
    return _base_model(self)

  @property
  def group_multiple(self):
    """Number of sequences that must divide a batch."""
    return math.lcm(*self.groups.values())

  def leaks(self):
    """How a token sees later positions, as a sentence; '' if it does not."""
    return ' '.join(filter(None, (sublayer.leaks() for sublayer in self.used)))

  def dropless(self):
    """The same model without dropped tokens, or None if it drops none."""
    changes = _union(sublayer.dropless() for sublayer in self.used)
    return dataclasses.replace(self, **changes) if changes else None

  def costs(self, length):
    """The Cost of every sublayer, in order, in sequences of `length` positions."""
    return [SUBLAYERS[kind](self).cost(length) for kind in self.kinds]

  def with_mot(self, group_size=None, routing=None):
    """The same parameters, mixed in groups of another size or with another routing."""
    mot = dataclasses.replace(
      self.mot,
      expert_width=self.mot.width(self.d_ff),  # 0 would follow the group
      group_size=group_size or self.mot.group_size,
      routing=routing or self.mot.routing,
    )
    return dataclasses.replace(self, mot=mot)

  def conflicts(self):
    if 'float64' in (self.dtype, self.param_dtype) and jnp.result_type(float) != 'float64':
      yield (
        'model.dtype, model.param_dtype: float64 needs JAX_ENABLE_X64=1 in the environment; '
        'without it JAX computes in float32.'
      )
    block_problems = list(self._block_problems())
    yield from block_problems
    if not block_problems:
      problems = [problem for sublayer in self.used for problem in sublayer.problems()]
      yield from problems or self._base_problems()

  def _base_problems(self):
    if not self.base:
      return
    try:
      base = self.base_model
    except ValueError as error:
      yield from (f'model.base = {self.base!r}: {line}' for line in str(error).splitlines())
      return
    here, there = ([tuple(pattern) for pattern, _ in model.blocks] for model in (self, base))
    if here != there:
      yield (
        f'model.base = {self.base!r}: its blocks must be those of the model, repeated more or less '
        f'often; got {base.blocks}.'
      )

  def _block_problems(self):
    if not self.blocks or not all(map(_is_repeated_pattern, self.blocks)):
      yield (
        'model.blocks must hold at least one (pattern, repeats) pair and nothing else, as in '
        f"((('attention', 'mlp'), 4),); got {self.blocks!r}."
      )
      return
    for pattern, repeats in self.blocks:
      if not 1 <= repeats <= _MOST_REPEATS:
        yield f'model.blocks: {pattern} must repeat 1 to {_MOST_REPEATS} times, got {repeats}.'
      for kind in '+'.join(pattern).split('+'):
        if kind not in SUBLAYERS:
          known = ', '.join(SUBLAYERS)
          yield f'model.blocks: no sublayer {kind!r}; there are {known}. {fields.OF_OWN}'


# What the base shape may have of its own.
_SIZES = tuple(
  f'{path}{name}'
  for path, names in {
    '': ('blocks', 'd_model', 'num_heads', 'num_kv_heads', 'd_ff'),
    'mot.': ('num_experts', 'group_size', 'expert_width'),
    'moe.': ('expansion_rate', 'granularity', 'experts_per_token', 'group_size', 'shared_width'),
    'mamba.': ('expand', 'state_size', 'conv_width'),
  }.items()
  for name in names
)


@functools.lru_cache(maxsize=64)
def _base_model(config):
  known, changes = fields.flat(ModelConfig), {}
  for text in filter(None, split_values(config.base)):
    name, _, value = text.partition('=')
    if name not in _SIZES:
      raise ValueError(f'{name!r} is no size of a model{did_you_mean(name, _SIZES)}')
    section, _, field = name.rpartition('.')
    value = fields.read(name, known[f'model.{name}'], value)
    changes.setdefault(section, {})[field] = value
  sections = {
    section: dataclasses.replace(getattr(config, section), **changed)
    for section, changed in changes.items()
    if section
  }
  own = changes.get('', {})
  return dataclasses.replace(config, **own, **sections, parameterization='standard', base='')


def _union(dicts):
  return {name: value for entries in dicts for name, value in entries.items()}


def _is_repeated_pattern(entry):
  match entry:
    case ((*names,), int()):
      return bool(names) and all(isinstance(name, str) for name in names)
  return False


def counted(batch):
  """Which targets of a batch count in the loss, bool [B, L]."""
  counted_BL = batch['segments'] > 0
  return counted_BL & batch['counted'] if 'counted' in batch else counted_BL


class LanguageModel(nnx.Module):
  """A decoder-only language model; `bind` makes one with given parameters.

  `model(ids_BL)` are the logits_BLV of every next token; `loss` is what training minimizes.
  `config` is a ModelConfig; `moejax.build` makes the model of a config file.
  """

  def __init__(self, config, rngs):
    if not isinstance(config, ModelConfig):
      raise ValueError(
        f'LanguageModel takes a ModelConfig, got a {type(config).__name__}; moejax.build(config) '
        'makes the model of a whole config, or of its name.'
      )
    if not config.vocab_size:
      raise ValueError('model.vocab_size = 0: a model needs its number of token ids, such as 256.')
    dtype = jnp.dtype(config.param_dtype)
    init = common.Initializer(config.init, config.init_scale, dtype)
    V, D = config.vocab_size, config.d_model
    self.config = config
    fan_in = _embedding_fan_in(config)
    self.embedding = init(rngs, V, D, fan_in=fan_in)
    if config.positions == 'learned':
      self.position_embedding = init(rngs, config.max_length, D, fan_in=fan_in)
    self.stacks = tuple(f'stack_{i}' for i in range(len(config.blocks)))
    for name, (pattern, repeats) in zip(self.stacks, config.blocks, strict=True):
      make = functools.partial(_make_block, pattern, config, init)
      setattr(self, name, jax.vmap(make)(jax.random.split(rngs.params(), repeats)))
    if config.final_norm:
      self.final_norm = common.NORMS[config.norm](D, dtype, config.norm_eps)
    if not config.tie_embeddings:
      self.head = init(rngs, D, V, fan_in=D)

  def activations(self, inputs_BL, tokens):
    """Runs the stack.

    Returns:
      x_BLD in the compute dtype, ready for the output projection, and aux: a dict of float32
      arrays [sublayers that measure it, ...], in their order.
    """
    x_BLD = self._embed(inputs_BL, tokens)
    aux = {}
    for i, (name, (_, repeats)) in enumerate(zip(self.stacks, self.config.blocks, strict=True)):
      keys = None
      if tokens.key is not None:
        keys = jax.random.split(jax.random.fold_in(tokens.key, i), repeats)

      def body(x_BLD, block_and_key):
        block, key = block_and_key
        block = rules.gather(block, self.config.dtype)
        return block(x_BLD, tokens._replace(key=key))

      body = REMAT[self.config.remat](body)
      x_BLD, stack_aux = jax.lax.scan(body, x_BLD, (getattr(self, name), keys))
      for measured, values in stack_aux.items():
        aux.setdefault(measured, []).append(values.reshape(-1, *values.shape[2:]))
    return self._normalize(x_BLD), {name: jnp.concatenate(parts) for name, parts in aux.items()}

  def loss(self, batch, key=None):
    """Summed cross-entropy (nats) of a batch, the number of targets it sums over, and aux.

    Args:
      batch: int32 arrays [B, L]: 'inputs', 'targets', 'segments' and 'positions'
        (`moejax.data.batch`), the last two optional where each sequence is one document; and
        'counted', optional, bool: False in sequences that are only there to be mixed with.
      key: for the noise that some layers add in training; None: none.
    """
    if 'segments' not in batch:
      batch = common.TokenInfo.unpadded(batch['inputs'].shape)._asdict() | batch
    weights_BL = counted(batch).astype(jnp.float32)
    nats, aux = self.weighted_loss(batch, weights_BL, key)
    return nats, weights_BL.sum(), aux

  def weighted_loss(self, batch, weights_BL, key=None):
    """The sum over targets of weight times cross-entropy (nats), and aux; see `loss`.

    Its gradient by the weights is therefore the cross-entropy of every target.
    """
    x_BLD, aux = self._activations_of(batch, key)
    chunk = self.config.loss_chunk
    nats = loss.next_token_loss(x_BLD, self._head(), batch['targets'], weights_BL, chunk=chunk)
    return nats, aux

  def target_scores(self, batch):
    """The log-probability (nats) of every target, and whether it is the likeliest; [B, L] each."""
    x_BLD, _ = self._activations_of(batch)
    chunk = self.config.loss_chunk
    return cross_entropy.target_scores(x_BLD, self._head(), batch['targets'], chunk=chunk)

  def _activations_of(self, batch, key=None):
    positions_BL = batch['positions']
    if not self.config.document_mask:  # a sequence is one text
      L = positions_BL.shape[1]
      positions_BL = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), positions_BL.shape)
    tokens = common.TokenInfo(batch['segments'], positions_BL, key)
    return self.activations(batch['inputs'], tokens)

  def __call__(self, inputs_BL, tokens=None):
    """Float32 logits_BLV of every next token; of whole documents unless `tokens` says otherwise.

    Raises:
      ValueError: the ids are not integers [B, L], or more positions than the model has.
    """
    inputs_BL = jnp.asarray(inputs_BL)
    if inputs_BL.ndim != 2 or not jnp.issubdtype(inputs_BL.dtype, jnp.integer):
      raise ValueError(
        'a model takes integer ids [sequences, positions], got '
        f'{inputs_BL.dtype}{list(inputs_BL.shape)}.'
      )
    if self.config.positions == 'learned' and inputs_BL.shape[1] > self.config.max_length:
      raise ValueError(
        f'{inputs_BL.shape[1]} positions exceed the {self.config.max_length} that the model '
        'learned (data.sequence_length); model.positions = rope has no limit.'
      )
    return self.logits(inputs_BL, tokens or common.TokenInfo.unpadded(inputs_BL.shape))

  def logits(self, inputs_BL, tokens):
    """Float32 logits_BLV of every next token."""
    x_BLD, _ = self.activations(inputs_BL, tokens)
    return self._project(x_BLD)

  def init_state(self, batch_size, max_length):
    """Empty decoding state of all blocks, stacked like their parameters."""
    dtype = jnp.dtype(self.config.dtype)
    empty = jax.vmap(lambda block: block.init_state(batch_size, max_length, dtype))
    return {name: empty(getattr(self, name)) for name in self.stacks}

  def prefill(self, inputs_BL, tokens, max_length):
    """Processes the first L positions of every sequence in one parallel pass.

    Sequences influence each other as in `step`, and no token is dropped. The end of a sequence may
    be padding (segment 0).

    Returns:
      Float32 logits_BV after the last token of every sequence, and the state for `step` there, with
      room for `max_length` positions.
    """
    x_BLD = self._embed(inputs_BL, tokens)
    state = self.init_state(inputs_BL.shape[0], max_length)
    for name in self.stacks:
      body = lambda x_BLD, block: block.prefill(x_BLD, tokens)
      x_BLD, filled = jax.lax.scan(body, x_BLD, getattr(self, name))
      state[name] = jax.tree.map(_write_prefix, state[name], filled)
    return self._project(self._normalize(common.last_token(x_BLD, tokens))), state

  def step(self, inputs_B, state, tokens):
    """Decodes one position of every sequence: float32 logits_BV and the next state."""
    x_BD = self._embed(inputs_B, tokens)
    new_state = {}
    for name in self.stacks:

      def body(x_BD, block_and_state):
        block, block_state = block_and_state
        return block.step(x_BD, block_state, tokens)

      x_BD, new_state[name] = jax.lax.scan(body, x_BD, (getattr(self, name), state[name]))
    return self._project(self._normalize(x_BD)), new_state

  def _embed(self, inputs, tokens):
    x = self.embedding[...][inputs]
    if self.config.positions == 'learned':
      x = x + self.position_embedding[...][tokens.positions]
    dtype = jnp.dtype(self.config.dtype)
    return x.astype(jnp.promote_types(dtype, 'float32') if self.config.residual_float32 else dtype)

  def _normalize(self, x):
    """Activations that the output projection reads."""
    x = (self.final_norm(x) if self.config.final_norm else x).astype(self.config.dtype)
    scale = parameterization.output_scale(self.config)
    return x if scale == 1 else x * scale

  def _head(self):
    return self.embedding[...].T if self.config.tie_embeddings else self.head[...]

  def _project(self, x):
    head_DV = self._head().astype(x.dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum('...D,DV->...V', x, head_DV, preferred_element_type=wide)


def _write_prefix(empty, filled):
  """Writes a cache of few positions to the start of a longer one; other states are as long."""
  return jax.lax.dynamic_update_slice(empty, filled.astype(empty.dtype), (0,) * empty.ndim)


def _make_block(pattern, config, init, key):
  rngs = nnx.Rngs(key)

  def make_layer(name):
    kinds = name.split('+')
    layers = {f'{i}_{k}': SUBLAYERS[k](config).make(init, rngs) for i, k in enumerate(kinds)}
    return Parallel(layers) if len(layers) > 1 else layers[f'0_{name}']

  norm = common.NORMS[config.norm]
  make_norm = functools.partial(norm, config.d_model, init.dtype, config.norm_eps)
  return Block(pattern, make_layer, make_norm, config.dtype, parameterization.branch_scale(config))


def init_params(config, key):
  """Fresh parameters: a pure nested dict of arrays in `param_dtype`."""
  params = _standard_params(config, key)
  scales = parameter_scales(config)

  def scaled(path, param):
    scale = scales.get(parameters.name_of(path), parameterization.Scales()).init
    return param if scale == 1 else param * scale

  return jax.tree_util.tree_map_with_path(scaled, params)


def _standard_params(config, key):
  model = LanguageModel(config, nnx.Rngs(key))
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@functools.lru_cache(maxsize=8)
def parameter_scales(config):
  """The `parameterization.Scales` of parameters by path; {} under the standard parameterization."""
  if config.parameterization == 'standard':
    return {}
  return parameterization.scales(_terms(config), _terms(config.base_model))


def _terms(config):
  """The `parameterization.Terms` of all parameters by path."""
  params = jax.eval_shape(lambda: _standard_params(config, jax.random.key(0)))
  special = {'embedding': parameterization.Terms(1, 1, init=_embedding_fan_in(config))}
  special['position_embedding'] = special['embedding']
  of_kind = {kind: SUBLAYERS[kind](config).terms() for kind in {*config.kinds}}

  def terms(path, shape):
    known = special
    for part in path.split('/'):  # such as stack_0, 1_mamba+moe, layer, 1_moe, experts, w_out
      known = of_kind.get(re.sub(r'^\d+_', '', part), known)
    about, rank = parameters.of(path), 1
    if about.is_matrix(shape):
      rank = min(math.prod(shape[i] for i in axes) for axes in (about.inputs, about.outputs))
    if found := [of for end, of in known.items() if f'/{path}'.endswith(f'/{end}')]:
      return found[0]._replace(rank=rank)
    fan_in = 1 if about.kind == 'vector' else math.prod(shape[i] for i in about.inputs)
    return parameterization.Terms(fan_in, fan_in, fan_in, rank)

  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {(path := parameters.name_of(keys)): terms(path, leaf.shape) for keys, leaf in leaves}


def _embedding_fan_in(config):
  # A tied embedding is the output projection, too. At half the standard deviation of a projection
  # (GPT-2's 0.02 is that of width 625) the first loss is near log V even if the stream is mostly
  # the token itself. Positions, which are added to it, are initialised alike.
  return 4 * config.d_model if config.tie_embeddings else 1


@functools.lru_cache(maxsize=8)
def _skeleton(config):
  model = nnx.eval_shape(lambda: LanguageModel(config, nnx.Rngs(0)))
  return nnx.split(model, nnx.Param)


def bind(config, params):
  """The model with these parameters inside. Call it inside the jitted function that uses it."""
  graphdef, state = _skeleton(config)
  state = jax.tree.map(lambda leaf: leaf, state)  # a copy: the cached one stays abstract
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graphdef, state)
