"""The Mamba layer: a gated recurrence whose coefficients depend on the token."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moejax import fields, parameters
from moejax.fields import Section, default
from moejax.layers import common
from moejax.layers.sublayer import Cost, Sublayer
from moejax.ops import routing, selective_scan
from moejax.sharding import mesh, platform

# Initial step sizes, softplus(delta_bias), are log-uniform between these.
MIN_STEP, MAX_STEP = 1e-3, 0.1

parameters.declare('w_in w_gate', P(mesh.SHARD_AXES, 'tensor'))
parameters.declare('w_out', P('tensor', mesh.SHARD_AXES))
parameters.declare('w_delta', P(None, 'tensor'))
parameters.declare('conv_kernel', P(None, 'tensor'), outputs=())  # every channel has its own
parameters.declare('w_select', P('tensor', None))
parameters.declare('a_log', P('tensor', None), decays=False)
parameters.declare('conv_bias delta_bias skip', P('tensor'), decays=False)


@dataclasses.dataclass(frozen=True)
class MambaConfig(Section):
  """The Mamba sublayer."""

  PATH = 'model.mamba'

  expand: float = default(2.0, 'channels per unit of d_model', above=0, maximum=1024)
  state_size: int = default(16, 'states per channel', minimum=1, maximum=1024)
  conv_width: int = default(4, 'positions that its convolution sees', minimum=2, maximum=256)
  moe_in: str = default('conv+gate+out', 'projections with experts in the sublayer moe_in_mamba')
  shared_router: bool = default(False, 'these have one router, of the input of the layer')

  @property
  def sparse_projections(self):
    """Names of the projections that have experts in the sublayer `moe_in_mamba`."""
    return tuple(self.moe_in.split('+'))

  def projections(self, d_model):
    """The large matrices, into the convolution, into the gate, and out: name -> their shape."""
    D, I = d_model, self.inner_width(d_model)
    return {'conv': (D, I), 'gate': (D, I), 'out': (I, D)}

  def inner_width(self, d_model):
    """I, the number of channels."""
    return round(self.expand * d_model)

  def problems(self, d_model):
    """Yields one sentence per value that does not go with the width of the model."""
    if self.inner_width(d_model) < 1:
      yield (
        f'model.mamba.expand = {self.expand} must make at least one channel of d_model = {d_model}.'
      )


class Recurrent(nnx.Module):
  """What Mamba layers share: the passes of a layer, some of whose projections may be experts.

  Theirs are `d_model`; `router`, a matrix of scores that all experts share, or None; and
  `_forward(x_BLD, tokens, through, valid_BL=None)`: y_BLD, and if `valid_BL` says which positions
  are no padding, the state after them. `through(experts, x)` is what experts make of x, in
  `project`.
  """

  d_model: int
  router: nnx.Param | None

  def __call__(self, x_BLD, tokens=None):
    tokens = self._scored(x_BLD, tokens or common.unpadded(x_BLD, self.d_model))
    auxes = []

    def through(experts, x):
      y, aux = experts(x, tokens.for_part(len(auxes)))
      auxes.append(aux)
      return y

    y_BLD, _ = self._forward(x_BLD, tokens, through)
    return y_BLD, common.join_aux(auxes)

  def prefill(self, x_BLD, tokens):
    """The forward pass: y_BLD, and the state after the last token, before any padding."""
    tokens = self._scored(x_BLD, tokens)
    through = lambda experts, x: experts.prefill(x, tokens)[0]
    return self._forward(x_BLD, tokens, through, valid_BL=tokens.segments > 0)

  def _scored(self, x, tokens):
    """`tokens`, with the scores of a router that all experts share."""
    if self.router is None:
      return tokens
    return tokens._replace(scores=routing.router_logits(x, self.router[...]))

  def _forward(self, x_BLD, tokens, through, valid_BL=None):
    raise NotImplementedError


class Mamba(Recurrent):
  """Mamba (arXiv:2312.00752, Figure 3), initialised as in github.com/state-spaces/mamba.

  Input and output x_BLD, any float dtype; convolution, step sizes and state in float32. Sees its
  own sequence, at its own and earlier positions, back to the last one at which a document starts.

  Sizes: I = expand * D channels of N = state_size states, W = conv_width, step sizes of rank R =
  D / 16. The decoding state has N + W - 1 numbers per channel.

  Every matrix is initialised uniformly within 1/sqrt(fan-in), whatever `model.init`.

  `experts(d_in, d_out)`, if given, makes stateless sublayers that replace the matrices in
  `config.sparse_projections` (arXiv:2401.04081, table 3), and `router` their shared matrix of
  scores, if there is one. `aux` is theirs.
  """

  def __init__(
    self,
    config=None,
    *,
    d_model,
    init='truncated_normal',
    rngs,
    experts=None,
    router=None,
    **fields_of_config,
  ):
    config = fields.of_layer(Mamba, MambaConfig, config, fields_of_config)
    fields.check(config.problems(d_model))
    I, R = config.inner_width(d_model), delta_rank(d_model)
    N, W, dtype = config.state_size, config.conv_width, common.initializer(init).dtype
    init = common.Initializer('kaiming_uniform', 3**-0.5, dtype)

    projection = functools.partial(make_projection, config, d_model, init, rngs, experts)
    self.d_model = d_model
    self.router = router
    self.w_in = projection('conv')
    self.w_gate = projection('gate')
    self.conv_kernel = init(rngs, W, I, fan_in=W)
    self.conv_bias = init(rngs, I, fan_in=W)
    self.w_select = init(rngs, I, R + 2 * N, fan_in=I)
    self.w_delta = init(rngs, R, I, fan_in=R)
    self.delta_bias = nnx.Param(initial_delta_bias(rngs.params(), I).astype(dtype))
    self.a_log = nnx.Param(jnp.tile(jnp.log(jnp.arange(1, N + 1, dtype=dtype))[None], (I, 1)))
    self.skip = nnx.Param(jnp.ones(I, dtype))
    self.w_out = projection('out')

  def _forward(self, x_BLD, tokens, through, valid_BL=None):
    W = self.conv_kernel.shape[0]
    u_BLI = project(self.w_in, x_BLD, through)
    gate_BLI = project(self.w_gate, x_BLD, through)
    padded = jnp.pad(u_BLI, ((0, 0), (W - 1, 0), (0, 0)))
    x_BLI = convolve(padded, self.conv_kernel, self.conv_bias, tokens.positions)
    x_BLI, delta_BLI, *others = self._coefficients(x_BLI, gate_BLI)
    if valid_BL is not None:  # a step of size softplus(-inf) = 0 leaves the state as it is
      delta_BLI = jnp.where(valid_BL[..., None], delta_BLI, -jnp.inf)
    y_BLI, state_BNI = sharded_scan(x_BLI, delta_BLI, *others, reset_BL=tokens.positions == 0)
    y_BLD = project(self.w_out, y_BLI, through)
    if valid_BL is None:
      return y_BLD, {}
    return y_BLD, {'window': newest(padded, valid_BL, W - 1), 'scan': state_BNI}

  def init_state(self, batch_size, max_length, dtype):
    """Zeros: the last W - 1 inputs of the convolution, and the state of the scan."""
    del max_length
    W, I = self.conv_kernel.shape
    N = self.a_log.shape[1]
    return {
      'window': jnp.zeros((batch_size, W - 1, I), dtype),
      'scan': jnp.zeros((batch_size, N, I), jnp.promote_types(dtype, jnp.float32)),
    }

  def step(self, x_BD, state, tokens):
    """One position for every sequence."""
    tokens = self._scored(x_BD, tokens)
    through = lambda experts, x: experts.step(x, {}, tokens)[0]
    u_BI = project(self.w_in, x_BD, through)
    gate_BI = project(self.w_gate, x_BD, through)
    window = jnp.concatenate([state['window'], u_BI[:, None]], axis=1)
    x_BI = convolve(window, self.conv_kernel, self.conv_bias, tokens.positions[:, None])[:, 0]
    y_BI, state_BNI = selective_scan.step(
      *self._coefficients(x_BI, gate_BI), state['scan'], tokens.positions == 0
    )
    return project(self.w_out, y_BI, through), {'window': window[:, 1:], 'scan': state_BNI}

  def _coefficients(self, x, gate):
    """Arguments of the scan: x and what depends on it, [..., I]."""
    R, N = self.w_delta.shape[0], self.a_log.shape[1]
    select = common.product(x, self.w_select[...].astype(x.dtype))
    low_rank, b, c = jnp.split(select, [R, R + N], axis=-1)
    delta = common.product(low_rank, self.w_delta[...].astype(x.dtype))
    a_IN = -jnp.exp(self.a_log[...])
    return x, delta, a_IN, b, c, self.skip[...], gate, self.delta_bias[...]


def sharded_scan(x_BLI, delta_BLI, a_IN, b_BLN, c_BLN, skip_I, gate_BLI, bias_I, *, reset_BL):
  """`selective_scan.selective_scan`, of its own sequences and channels on every device.

  XLA alone would put two all-reduces into every step of the backward pass. Here gradients of what
  devices share (a, skip, bias; b, c) are summed once, after the scan.
  """
  B, _, I = x_BLI.shape
  axes, devices = mesh.batch_axes(B), mesh.size('tensor')
  tensor = 'tensor' if devices > 1 and I % devices == 0 else None
  impl = selective_scan.fastest(platform.current(), I // devices if tensor else I)
  scan = lambda *args: selective_scan.selective_scan(*args[:-1], reset_BL=args[-1], impl=impl)
  if mesh.size(*mesh.AXES) > 1:  # also where all have all: the partitioner takes no kernels
    x, sequences, channels = P(axes or None, None, tensor), P(axes or None), P(tensor)
    scan = jax.shard_map(
      scan,
      in_specs=(x, x, channels, sequences, sequences, channels, x, channels, sequences),
      out_specs=(x, x),
      check_vma=False,  # required by kernels; the body has no collective
    )
  # Small arrays are cast here, so that their gradients are summed over devices in float32.
  widen = lambda v: v.astype(jnp.promote_types(x_BLI.dtype, jnp.float32))
  a_IN, b_BLN, c_BLN, skip_I, bias_I = map(widen, (a_IN, b_BLN, c_BLN, skip_I, bias_I))
  return scan(x_BLI, delta_BLI, a_IN, b_BLN, c_BLN, skip_I, gate_BLI, bias_I, reset_BL)


class MambaSublayer(Sublayer):
  """`mamba` in `model.blocks`."""

  def make(self, init, rngs, **experts):
    c = self.config
    return Mamba(c.mamba, d_model=c.d_model, init=init, rngs=rngs, **experts)

  def problems(self):
    return self.config.mamba.problems(self.config.d_model)

  @property
  def widths(self):
    number = self.config.mamba.inner_width(self.config.d_model)
    return {'channels of Mamba (model.mamba.expand * model.d_model)': number}

  def cost(self, length, sparse=()):
    """Without the projections named in `sparse`."""
    del length
    c, D = self.config.mamba, self.config.d_model
    N, W = c.state_size, c.conv_width
    I, R = c.inner_width(D), delta_rank(D)
    shapes = c.projections(D).items()
    projections = sum(d_in * d_out for name, (d_in, d_out) in shapes if name not in sparse)
    projections += I * (R + 2 * N) + R * I  # select, delta
    channels = W * I + N * I + 3 * I  # kernel, a; biases of convolution and delta, skip
    return Cost(
      params={'mamba': projections + channels},
      active=projections + channels,
      model_flops={
        'mamba_projections': 2 * projections,
        'mamba_convolution': 2 * W * I,
        'mamba_scan': 6 * N * I,
      },
    )


def make_projection(config, d_model, init, rngs, experts, name):
  """One of `config.projections`: a matrix, or experts."""
  d_in, d_out = config.projections(d_model)[name]
  if experts and name in config.sparse_projections:
    return experts(d_in, d_out)
  return init(rngs, d_in, d_out, fan_in=d_in)


def project(w, x, through):
  """x times a matrix, or `through(w, x)` if w is experts."""
  return through(w, x) if isinstance(w, nnx.Module) else common.product(x, w[...].astype(x.dtype))


def delta_rank(d_model):
  """R, the rank of the map from tokens to step sizes."""
  return math.ceil(d_model / 16)


def convolve(padded, kernel, bias, positions_BL):
  """silu of `causal_convolution`, in the dtype of its input."""
  y_BLI = causal_convolution(padded, kernel[...], bias[...], positions_BL)
  return jax.nn.silu(y_BLI).astype(padded.dtype)


def causal_convolution(padded, kernel_WI, bias_I, positions_BL):
  """Every channel's own convolution over the last W positions of a document, in float32 or wider.

  Shifted products: `conv_general_dilated` with a group per channel is ten times slower on CPU, and
  cannot mask other documents.

  Args:
    padded: [B, L + W - 1, I]: the W - 1 inputs before the first position, then the positions.
    kernel_WI: weights; the last row is that of the position itself.
    bias_I: added to every position.
    positions_BL: positions inside documents.

  Returns:
    y_BLI.
  """
  W, L = kernel_WI.shape[0], positions_BL.shape[1]
  dtype = jnp.promote_types(padded.dtype, jnp.float32)
  y_BLI = bias_I.astype(dtype)[None, None]
  for lag in range(W):
    earlier_BLI = padded[:, W - 1 - lag : W - 1 - lag + L].astype(dtype)
    same_document = (positions_BL >= lag)[..., None]
    y_BLI = y_BLI + jnp.where(same_document, earlier_BLI, 0) * kernel_WI[W - 1 - lag][None, None]
  return y_BLI


def newest(padded, valid_BL, number):
  """[B, number, I]: of [B, number + L, I], the last of what comes before the padding."""
  last = valid_BL.sum(axis=1)[:, None] + jnp.arange(number)[None]
  return jnp.take_along_axis(padded, last[..., None], axis=1)


def initial_delta_bias(key, channels):
  """The inverse softplus of the initial step sizes."""
  low, high = math.log(MIN_STEP), math.log(MAX_STEP)
  dt_I = jnp.exp(jax.random.uniform(key, (channels,), minval=low, maxval=high))
  return dt_I + jnp.log(-jnp.expm1(-dt_I))
