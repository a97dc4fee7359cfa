"""Causal self-attention: of many heads or with shared keys and values, rotary positions or none."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moejax import fields, parameterization, parameters
from moejax.layers import common
from moejax.layers.sublayer import Cost, Sublayer
from moejax.ops import softmax_attention
from moejax.sharding import mesh, platform

# Positions of a block of scores; in the caches of a CPU, several times as fast as all at once. On a
# TPU, the most without its kernel, which writes 512 bytes for each position and head.
_BLOCKS = {'cpu': 64, 'gpu': 512, 'tpu': 512}

# Queries, keys and values are a matrix each.
parameters.declare(
  'qkv kv', P(mesh.SHARD_AXES, None, 'tensor', None), inputs=(-4,), outputs=(-2, -1)
)
parameters.declare('q', P(mesh.SHARD_AXES, 'tensor', None), inputs=(-3,), outputs=(-2, -1))
parameters.declare('out', P('tensor', None, mesh.SHARD_AXES), inputs=(-3, -2))
parameters.declare('qkv_bias q_bias kv_bias out_bias', decays=False)


class Attention(nnx.Module):
  """Causal self-attention, scores scaled by 1/sqrt(P).

  Input and output x_BLD, any float dtype; softmax in float32. Sees its own sequence, with
  `document_mask` its own document, at its own and earlier positions. `aux` is empty.

  Args:
    d_model, num_heads: width D and heads H.
    head_dim: width P of a head; 0: D / H.
    num_kv_heads: heads J of keys and values, which groups of H / J queries share
      (arXiv:2305.13245); 0: as many as `num_heads`.
    rope: whether positions are rotary (arXiv:2104.09864), halves paired, with base `rope_theta`.
    document_mask: see above.
    biases: whether all four projections have one.
    qk_norm: root-mean-square norms over all queries and over all keys of a token, before positions,
      with `norm_eps`; with `qk_norm_per_head` over those of each head, which share their scale.
    score_scale: factor of the scores, besides 1/sqrt(P).
    init, rngs: make the parameters.
  """

  def __init__(
    self,
    *,
    d_model,
    num_heads,
    num_kv_heads=0,
    head_dim=0,
    rope=True,
    rope_theta=10_000.0,
    document_mask=False,
    biases=False,
    qk_norm=False,
    qk_norm_per_head=False,
    norm_eps=1e-5,
    score_scale=1.0,
    init='truncated_normal',
    rngs,
  ):
    fields.check(_problems(d_model, num_heads, num_kv_heads, head_dim, rope))
    init = common.initializer(init)
    head_width, kv_heads = head_dim or d_model // num_heads, num_kv_heads or num_heads
    shapes = {'qkv': (3, num_heads, head_width)}
    if kv_heads < num_heads:
      shapes = {'q': (num_heads, head_width), 'kv': (2, kv_heads, head_width)}
    for name, shape in shapes.items():
      setattr(self, name, init(rngs, d_model, *shape, fan_in=d_model))
    self.out = init(rngs, num_heads, head_width, d_model, fan_in=num_heads * head_width)
    if biases:
      for name, shape in shapes.items():
        setattr(self, f'{name}_bias', nnx.Param(jnp.zeros(shape, init.dtype)))
      self.out_bias = nnx.Param(jnp.zeros(d_model, init.dtype))
    if qk_norm:
      normed = (1, 1) if qk_norm_per_head else (num_heads, kv_heads)
      self.q_norm, self.k_norm = (
        common.RMSNorm(heads * head_width, init.dtype, norm_eps) for heads in normed
      )
    self.projections = tuple(shapes)
    self.cached = kv_heads, head_width
    self.rope = rope
    self.rope_theta = rope_theta
    self.document_mask = document_mask
    self.biases = biases
    self.qk_norm = qk_norm
    self.scale = None if score_scale == 1 else score_scale * head_width**-0.5

  def _project(self, x_BLD, positions_BL):
    *queries, together = (self._heads(x_BLD, name) for name in self.projections)
    parts = jnp.split(together, together.shape[2], axis=2)
    q_BLHP, k_BLJP, v_BLJP = *queries, *(jnp.squeeze(part, 2) for part in parts)
    if self.qk_norm:
      q_BLHP, k_BLJP = _norm_heads(self.q_norm, q_BLHP), _norm_heads(self.k_norm, k_BLJP)
    if self.rope:
      q_BLHP, k_BLJP = (rotate(x, positions_BL, self.rope_theta) for x in (q_BLHP, k_BLJP))
    return q_BLHP, k_BLJP, v_BLJP

  def _heads(self, x_BLD, name):
    """Products of tokens with one of the arrays of projections."""
    y = common.product(x_BLD, getattr(self, name)[...].astype(x_BLD.dtype))
    return y + common.row(getattr(self, f'{name}_bias')[...], y) if self.biases else y

  def _join(self, o_BLHP):
    """Outputs of all heads, joined."""
    y_BLD = common.product(o_BLHP, self.out[...].astype(o_BLHP.dtype), axes=2)
    return y_BLD + common.row(self.out_bias[...], y_BLD) if self.biases else y_BLD

  def __call__(self, x_BLD, tokens=None):
    tokens = tokens or common.unpadded(x_BLD, self.out.shape[-1])
    return self.prefill(x_BLD, tokens)[0], {}

  def prefill(self, x_BLD, tokens):
    """The forward pass: y_BLD, and the cache of its positions."""
    q_BLHP, k_BLJP, v_BLJP = self._project(x_BLD, tokens.positions)
    segments_BL = tokens.segments if self.document_mask else None
    o_BLHP = attend(q_BLHP, k_BLJP, v_BLJP, segments_BL, scale=self.scale)
    return self._join(o_BLHP), {'k': jnp.swapaxes(k_BLJP, 1, 2), 'v': jnp.swapaxes(v_BLJP, 1, 2)}

  def init_state(self, batch_size, max_length, dtype):
    """An empty cache: keys and values of every position, [B, J, S, P], as products read them."""
    heads, width = self.cached
    empty = jnp.zeros((batch_size, heads, max_length, width), dtype)
    return {'k': empty, 'v': empty}

  def step(self, x_BD, state, tokens):
    """One position of every sequence, written to the cache at that position."""
    q_BLHP, k_BLJP, v_BLJP = self._project(x_BD[:, None], tokens.positions[:, None])
    # An index for every head: XLA copies the cache of a single sequence for a slice.
    B, J = x_BD.shape[0], self.cached[0]
    here = jnp.arange(B)[:, None], jnp.arange(J)[None], tokens.positions[:, None]
    k_BJSP, v_BJSP = state['k'].at[here].set(k_BLJP[:, 0]), state['v'].at[here].set(v_BLJP[:, 0])
    o_BHP = softmax_attention.of_last(
      q_BLHP[:, 0], k_BJSP, v_BJSP, tokens.positions, scale=self.scale
    )
    return self._join(o_BHP[:, None])[:, 0], {'k': k_BJSP, 'v': v_BJSP}


def _norm_heads(norm, x):
  """The norm over as many heads of a token at a time as it has scales for: all, or one."""
  return norm(x.reshape(*x.shape[:2], -1, *norm.scale.shape)).reshape(x.shape)


class AttentionSublayer(Sublayer):
  """`attention` in `model.blocks`."""

  def make(self, init, rngs):
    c = self.config
    return Attention(
      d_model=c.d_model,
      num_heads=c.num_heads,
      num_kv_heads=c.num_kv_heads,
      head_dim=c.head_dim,
      rope=c.positions == 'rope',
      rope_theta=c.rope_theta,
      document_mask=c.document_mask,
      biases=c.biases,
      qk_norm=c.qk_norm,
      qk_norm_per_head=c.qk_norm_per_head,
      norm_eps=c.norm_eps,
      score_scale=parameterization.score_scale(c),
      init=init,
      rngs=rngs,
    )

  def problems(self):
    c = self.config
    yield from _problems(c.d_model, c.num_heads, c.num_kv_heads, c.head_dim, c.positions == 'rope')
    if c.qk_norm_per_head and not c.qk_norm:
      yield 'model.qk_norm_per_head = True is of the norms of model.qk_norm: set that to True, too.'

  @property
  def kv_heads(self):
    return self.config.num_kv_heads or self.config.num_heads

  @property
  def widths(self):
    widths = {'heads (model.num_heads)': self.config.num_heads}
    if self.config.num_kv_heads:
      widths['heads of keys and values (model.num_kv_heads)'] = self.kv_heads
    return widths

  def cost(self, length):
    c = self.config
    width, kv_width = c.num_heads * c.head_width, self.kv_heads * c.head_width
    weights = 2 * c.d_model * (width + kv_width)  # query and output, key and value
    biases = (width + 2 * kv_width + c.d_model) * c.biases
    norms = (2 * c.head_width if c.qk_norm_per_head else width + kv_width) * c.qk_norm
    # q k^T, then the sum of values: [L, P] by [P, L], H times.
    scores = 2 * 2 * length * width
    return Cost(
      params={'attention': weights + biases, 'norm': norms},
      active=weights + biases + norms,
      model_flops={'attention_projections': 2 * weights, 'attention_scores': scores},
    )


def _problems(d_model, num_heads, num_kv_heads, head_dim, rope):
  if d_model % num_heads and not head_dim:
    yield f'model.num_heads = {num_heads} must divide d_model = {d_model}. Or set model.head_dim.'
  elif rope and (width := head_dim or d_model // num_heads) % 2:
    name = 'model.head_dim' if head_dim else 'd_model / num_heads'
    yield f'model.positions = rope needs an even head width, got {name} = {width}.'
  if num_kv_heads and num_heads % num_kv_heads:
    yield f'model.num_kv_heads = {num_kv_heads} must divide num_heads = {num_heads}.'


def rotate(x_BLHP, positions_BL, base=10000.0):
  """Rotary position embedding: turns each pair (x[i], x[i + P/2]) by position * base**(-2i/P)."""
  half = x_BLHP.shape[-1] // 2
  dtype = jnp.promote_types(x_BLHP.dtype, jnp.float32)
  frequency = base ** (-jnp.arange(half, dtype=dtype) / half)
  angle = positions_BL[..., None, None] * frequency[None, None, None]
  sin, cos = (_shared(turn(angle)) for turn in (jnp.sin, jnp.cos))
  a, b = jnp.split(x_BLHP.astype(dtype), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLHP.dtype)


def _shared(table_BL1P):
  """The same table, computed once for all heads: a CPU would compute the sine again for each.

  XLA fuses everything into what reads it, but no product.
  """
  if platform.current() != 'cpu' or table_BL1P.shape[1] == 1:
    return table_BL1P
  return table_BL1P @ jnp.eye(table_BL1P.shape[-1], dtype=table_BL1P.dtype)


def attend(q_BLHP, k_BLJP, v_BLJP, segments_BL=None, *, scale=None):
  """`softmax_attention.attention` in the fastest form for the platform."""
  on = platform.current()
  if on == 'gpu' and q_BLHP.dtype in (jnp.bfloat16, jnp.float16):
    form = functools.partial(softmax_attention.attention, implementation='cudnn')
  elif q_BLHP.shape[1] <= (block := _BLOCKS[on]):
    form = softmax_attention.attention
  elif on == 'tpu':
    form = functools.partial(_on_every_device, softmax_attention.tpu_kernel)
  else:
    form = functools.partial(softmax_attention.blocked_attention, block=block)
  return form(q_BLHP, k_BLJP, v_BLJP, segments_BL, scale=scale)


def _on_every_device(form, q_BLHP, k_BLJP, v_BLJP, segments_BL, *, scale):
  """`form` of the sequences and heads that each device has; the partitioner takes no kernels."""
  form = functools.partial(form, scale=scale)
  arrays = (q_BLHP, k_BLJP, v_BLJP) + (() if segments_BL is None else (segments_BL,))
  if mesh.size(*mesh.AXES) == 1:
    return form(*arrays)
  axes, devices = mesh.batch_axes(len(q_BLHP)), mesh.size('tensor')
  tensor = 'tensor' if devices > 1 and k_BLJP.shape[2] % devices == 0 else None
  heads, sequences = P(axes or None, None, tensor), P(axes or None)
  form = jax.shard_map(
    form,
    in_specs=(heads, heads, heads, sequences)[: len(arrays)],
    out_specs=heads,
    check_vma=False,  # required by kernels; the body has no collective
  )
  return form(*arrays)
