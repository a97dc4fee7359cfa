"""The language model: blocks of sublayers, between an embedding and an output projection.

Every repeated pattern of `model.blocks` is one scan, so compile time does not grow with depth; on
a CPU, few blocks are unrolled.
Around each sublayer is a pre-norm residual.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moejax import parameterization, parameters
from moejax.layers import common, loss
from moejax.layers.block import Block
from moejax.layers.parallel import Parallel
from moejax.model_config import SUBLAYERS, ModelConfig
from moejax.ops import cross_entropy
from moejax.remat import REMAT
from moejax.sharding import platform, rules
from moejax.sharding.mesh import SHARD_AXES

_MOST_UNROLLED = 8  # blocks; compiling more takes long

parameters.declare('embedding', P('tensor', SHARD_AXES), kind='embedding')
parameters.declare('position_embedding', P(None, SHARD_AXES), kind='embedding')
parameters.declare('head', P(SHARD_AXES, 'tensor'), kind='head')


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
      blocks = getattr(self, name), keys
      x_BLD, stack_aux = jax.lax.scan(body, x_BLD, blocks, unroll=self._unrolls(repeats))
      for measured, values in stack_aux.items():
        aux.setdefault(measured, []).append(values.reshape(-1, *values.shape[2:]))
    return self._normalize(x_BLD), {name: jnp.concatenate(parts) for name, parts in aux.items()}

  def _unrolls(self, repeats):
    """Whether a stack is compiled block by block instead of as a loop.

    A loop copies all that blocks keep for the gradient into arrays of the whole stack, and out of
    them again, which on a CPU takes up to a fifth of a step.
    """
    return platform.current() == 'cpu' and self.config.remat == 'none' and repeats <= _MOST_UNROLLED

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

  def observe(self, batch):
    """What the layers with experts did with every token: their part of aux, by 'moe' or 'mot'.

    Returns:
      {'moe': {'logits': [layers, B, L, E], 'weights': the same, 'products': [layers, E, E]}}, see
      `layers.experts.observation`.
    """
    _, aux = self._activations_of(batch, observed=True)
    kinds = [kind for kind in ('moe', 'mot') if f'{kind}/products' in aux]
    names = ('logits', 'weights', 'products')
    return {kind: {name: aux[f'{kind}/{name}'] for name in names} for kind in kinds}

  def _activations_of(self, batch, key=None, observed=None):
    tokens = self.tokens_of(batch)._replace(key=key, observed=observed)
    return self.activations(batch['inputs'], tokens)

  def tokens_of(self, batch):
    """What the sublayers may know about the tokens of a batch."""
    positions_BL = batch['positions']
    if not self.config.document_mask:  # a sequence is one text
      L = positions_BL.shape[1]
      positions_BL = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), positions_BL.shape)
    return common.TokenInfo(batch['segments'], positions_BL)

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
    """Empty decoding state: by stack, that of every block."""
    dtype = jnp.dtype(self.config.dtype)
    empty = lambda block: block.init_state(batch_size, max_length, dtype)
    return {name: tuple(map(empty, blocks)) for name, blocks in self._blocks(None).items()}

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
      state[name] = tuple(
        jax.tree.map(_write_prefix, empty, _of_repeat(filled, i))
        for i, empty in enumerate(state[name])
      )
    return self._project(self._normalize(common.last_token(x_BLD, tokens))), state

  def step(self, inputs_B, state, tokens, prepared=None):
    """Decodes one position of every sequence: float32 logits_BV and the next state.

    A program that is called for every position is given what `prepared` makes of its parameters.
    Else they are copied from the stacks, and cast, for every position.
    """
    x_BD = self._embed(inputs_B, tokens)
    new_state = {}
    for name, blocks in self._blocks(prepared).items():
      states = []
      for block, block_state in zip(blocks, state[name], strict=True):
        block, x_BD = rules.in_turn(block, x_BD)
        x_BD, block_state = block.step(x_BD, block_state, tokens)
        states.append(block_state)
      new_state[name] = tuple(states)
    return self._project(self._normalize(x_BD), prepared), new_state

  def _blocks(self, prepared):
    """The blocks of every stack, by its name; with the parameters of `prepared`, if it is given."""
    blocks = {}
    for name, (_, repeats) in zip(self.stacks, self.config.blocks, strict=True):
      stack = getattr(self, name)
      if prepared is None:
        blocks[name] = [_of_repeat(stack, i) for i in range(repeats)]
      else:
        skeleton = nnx.split(stack)
        blocks[name] = [_bound(*skeleton, params) for params in prepared[name]]
    return blocks

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

  def _head(self, prepared=None):
    name = _head_name(self.config)
    head = getattr(self, name)[...] if prepared is None else prepared[name]
    return head.T if self.config.tie_embeddings else head

  def _project(self, x, prepared=None):
    head_DV = self._head(prepared).astype(x.dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum('...D,DV->...V', x, head_DV, preferred_element_type=wide)


def prepared(config, params):
  """Parameters as `step` multiplies with them, made once for all positions.

  Those of every block in arrays of their own, by stack, a tuple of a dict for each block; and that
  of the output projection. Matrices have the dtype to which layers cast them.
  """
  repeats = lambda stack: range(len(jax.tree.leaves(stack)[0]))
  blocks = {
    name: tuple(_cast_of_repeat(config.dtype, stack, i) for i in repeats(stack))
    for name, stack in params.items()
    if name.startswith('stack_')
  }
  head = _head_name(config)
  return blocks | {head: jnp.asarray(params[head], config.dtype)}


@functools.partial(jax.jit, static_argnums=0)
def _cast_of_repeat(dtype, stack, i):
  is_cast = lambda about, shape: about.kind == 'matrix' and about.is_matrix(shape)

  def cast(path, a):
    about = parameters.of(parameters.name_of(path))
    return a[i].astype(dtype) if is_cast(about, a.shape) else a[i]

  return jax.tree_util.tree_map_with_path(cast, stack)


def _of_repeat(stack, i):
  """Of a pytree of arrays [repeats, ...], those of one repeat."""
  return jax.tree.map(lambda a: a[i], stack)


def _head_name(config):
  return 'embedding' if config.tie_embeddings else 'head'


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
  return _bound(*_skeleton(config), params)


def _bound(graphdef, state, params):
  state = jax.tree.map(lambda leaf: leaf, state)  # a copy: a cached one stays abstract
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graphdef, state)
