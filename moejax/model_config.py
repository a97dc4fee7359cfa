"""The config of a model: the sublayers that exist, how they are stacked, and sizes.

`blocks = ((('attention', 'mlp'), 6), (('attention', 'mot'), 6))` is six blocks of attention and a
dense feed-forward, then six of attention and Mixture of Tokens.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp

from moejax import fields, parameterization
from moejax.fields import Section, default, section, shown
from moejax.layers import common
from moejax.layers.attention import AttentionSublayer
from moejax.layers.mamba import MambaConfig, MambaSublayer
from moejax.layers.mamba2 import Mamba2Config, Mamba2Sublayer
from moejax.layers.mlp import MLPSublayer
from moejax.layers.moe import MoEConfig, MoESublayer
from moejax.layers.moe_in_mamba import MoEInMamba2Sublayer, MoEInMambaSublayer
from moejax.layers.mot import MoTConfig, MoTSublayer
from moejax.layers.sublayer import Sublayer
from moejax.remat import REMAT
from moejax.text import did_you_mean, split_values

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
  'mamba2': Mamba2Sublayer,
  'moe_in_mamba2': MoEInMamba2Sublayer,
}

_DTYPES = ('float32', 'bfloat16', 'float64')
_MOST_SUBLAYERS = 10_000  # more is a mistake, and would take forever to check


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
  d_model: int = default(32, 'width of the stream between sublayers', minimum=1)
  num_heads: int = default(2, 'of attention', minimum=1)
  num_kv_heads: int = default(0, 'of keys and values, shared by queries; 0: num_heads', minimum=0)
  head_dim: int = default(0, 'width of a head; 0: d_model / num_heads', minimum=0)
  d_ff: int = default(128, 'hidden width of a dense feed-forward', minimum=1)
  activation: str = default(
    'relu', 'of feed-forwards and experts', choices=(*common.ACTIVATIONS, 'swiglu')
  )
  positions: str = default('rope', 'learned: absolute', choices=('rope', 'learned', 'none'))
  rope_theta: float = default(10_000.0, 'base of rotary positions', minimum=1)
  document_mask: bool = default(False, 'tokens see their document only, not the whole sequence')
  norm: str = default('layer_norm', 'before every sublayer', choices=tuple(common.NORMS))
  norm_eps: float = default(1e-5, 'added to the variance or mean square in these norms', minimum=0)
  qk_norm: bool = default(False, 'RMS norms of all queries and of all keys, as in OLMoE')
  qk_norm_per_head: bool = default(False, 'these norms are of each head, as in Qwen3')
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
  loss_chunk: int = default(
    -1,
    'positions whose logits exist at once; 0: all, -1: on CPUs those of 2^24 logits, else all',
    minimum=-1,
  )
  mot: MoTConfig = section(MoTConfig, 'the Mixture-of-Tokens sublayer')
  moe: MoEConfig = section(MoEConfig, 'the sparse mixture-of-experts sublayer')
  mamba: MambaConfig = section(MambaConfig, 'the Mamba sublayer')
  mamba2: Mamba2Config = section(Mamba2Config, 'the Mamba-2 sublayer')

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
    return self.head_dim or self.d_model // self.num_heads

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
    total = sum(repeats * len('+'.join(pattern).split('+')) for pattern, repeats in self.blocks)
    if total > _MOST_SUBLAYERS:
      yield f'model.blocks: expected at most {_MOST_SUBLAYERS} sublayers, got {shown(total)}.'
      return
    for pattern, repeats in self.blocks:
      if repeats < 1:
        yield f'model.blocks: {pattern} must repeat once or more, got {shown(repeats)}.'
      for kind in '+'.join(pattern).split('+'):
        if kind not in SUBLAYERS:
          known = ', '.join(SUBLAYERS)
          yield f'model.blocks: no sublayer {kind!r}; there are {known}. {fields.OF_OWN}'


# What the base shape may have of its own.
_SIZES = tuple(
  f'{path}{name}'
  for path, names in {
    '': ('blocks', 'd_model', 'num_heads', 'num_kv_heads', 'head_dim', 'd_ff'),
    'mot.': ('num_experts', 'group_size', 'expert_width'),
    'moe.': ('expansion_rate', 'granularity', 'experts_per_token', 'group_size', 'shared_width'),
    'mamba.': ('expand', 'state_size', 'conv_width'),
    'mamba2.': ('expand', 'state_size', 'conv_width', 'head_width', 'groups'),
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
