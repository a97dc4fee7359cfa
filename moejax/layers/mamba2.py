"""The Mamba-2 layer: heads that forget at one rate, computed as products of matrices."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moejax import fields, parameters
from moejax.fields import default
from moejax.layers import common, mamba
from moejax.layers.sublayer import Cost, Sublayer
from moejax.ops import ssd
from moejax.sharding import mesh, platform

MIN_RATE, MAX_RATE = 1, 16  # initial rates of decay, -a, are uniform between these

parameters.declare('w_bc', P(mesh.SHARD_AXES, None))
parameters.declare('bc_kernel', outputs=())  # every channel has its own
parameters.declare('bc_bias', decays=False)
parameters.declare('log_rate norm_scale', P('tensor'), decays=False)


@dataclasses.dataclass(frozen=True)
class Mamba2Config(mamba.MambaConfig):
  """The Mamba-2 sublayer."""

  PATH = 'model.mamba2'

  expand: float = default(
    2.0, 'channels per unit of d_model, rounded to whole heads', above=0, maximum=1024
  )
  state_size: int = default(128, 'states per channel', minimum=1, maximum=1024)
  moe_in: str = default('conv+gate+out', 'projections with experts in the sublayer moe_in_mamba2')
  head_width: int = default(64, 'channels of a head', minimum=1, maximum=1024)
  groups: int = default(1, 'of heads, which share what enters and leaves their states', minimum=1)

  def heads(self, d_model):
    """H, the number of heads."""
    return round(self.expand * d_model / self.head_width)

  def inner_width(self, d_model):
    return self.heads(d_model) * self.head_width

  def problems(self, d_model):
    if self.heads(d_model) < 1:
      yield (
        f'model.mamba2.head_width = {self.head_width}: expand * d_model = '
        f'{self.expand * d_model:g} channels are no head; set it to {self.expand * d_model:g} or '
        'less.'
      )
    elif self.heads(d_model) % self.groups:
      yield (
        f'model.mamba2.groups = {self.groups} must divide the heads, expand * d_model / head_width '
        f'= {self.heads(d_model)}.'
      )


class Mamba2(mamba.Recurrent):
  """Mamba-2 (arXiv:2405.21060, Figure 6), initialised as in github.com/state-spaces/mamba.

  Input and output x_BLD, any float dtype; convolution, step sizes and state in float32, products as
  wide as x. Sees its own sequence, at its own and earlier positions, back to the last one at which
  a document starts.

  Sizes: H = expand * D / P heads of P = head_width channels, I in all, of N = state_size states, in
  G = groups with their own b and c; W = conv_width. The decoding state has N + W - 1 numbers per
  channel, and W - 1 for each of the 2 G N numbers of b and c. The gated norm, before the last
  product, is one of all channels of a group.

  Every matrix is initialised uniformly within 1/sqrt(fan-in), whatever `model.init`.

  `experts(d_in, d_out)`, if given, makes stateless sublayers that replace the matrices in
  `config.sparse_projections`, and `router`, as in `Mamba`. `aux` is theirs.
  """

  def __init__(
    self,
    config=None,
    *,
    d_model,
    norm_eps=1e-5,
    init='truncated_normal',
    rngs,
    experts=None,
    router=None,
    **fields_of_config,
  ):
    config = fields.of_layer(Mamba2, Mamba2Config, config, fields_of_config)
    fields.check(config.problems(d_model))
    D, H, I = d_model, config.heads(d_model), config.inner_width(d_model)
    G, N, W = config.groups, config.state_size, config.conv_width
    dtype = common.initializer(init).dtype
    init = common.Initializer('kaiming_uniform', 3**-0.5, dtype)
    projection = functools.partial(mamba.make_projection, config, d_model, init, rngs, experts)
    self.d_model = d_model
    self.router = router
    self.groups = G
    self.norm_eps = norm_eps
    self.w_in = projection('conv')
    self.w_gate = projection('gate')
    self.w_bc = init(rngs, D, 2 * G * N, fan_in=D)
    self.w_delta = init(rngs, D, H, fan_in=D)
    self.conv_kernel = init(rngs, W, I, fan_in=W)
    self.conv_bias = init(rngs, I, fan_in=W)
    self.bc_kernel = init(rngs, W, 2 * G * N, fan_in=W)
    self.bc_bias = init(rngs, 2 * G * N, fan_in=W)
    self.delta_bias = nnx.Param(mamba.initial_delta_bias(rngs.params(), H).astype(dtype))
    rate_H = jax.random.uniform(rngs.params(), (H,), dtype, MIN_RATE, MAX_RATE)
    self.log_rate = nnx.Param(jnp.log(rate_H))
    self.skip = nnx.Param(jnp.ones(H, dtype))
    self.norm_scale = nnx.Param(jnp.ones(I, dtype))
    self.w_out = projection('out')

  def _forward(self, x_BLD, tokens, through, valid_BL=None):
    before = self.conv_kernel.shape[0] - 1
    u_BLI, gate_BLI, bc, delta_BLH = self._inputs(x_BLD, through)
    pad = lambda v: jnp.pad(v, ((0, 0), (before, 0), (0, 0)))
    windows = {'x': pad(u_BLI), 'bc': pad(bc)}
    sequences = self._convolve(windows, tokens.positions)
    if valid_BL is not None:  # a step of size softplus(-inf) = 0 leaves the state as it is
      delta_BLH = jnp.where(valid_BL[..., None], delta_BLH, -jnp.inf)
    reset_BL = tokens.positions == 0
    y_BLHP, state_BHNP = sharded_ssd(*self._coefficients(delta_BLH, *sequences), reset_BL=reset_BL)
    y_BLD = self._outputs(y_BLHP, gate_BLI, through)
    if valid_BL is None:
      return y_BLD, {}
    windows = {name: mamba.newest(v, valid_BL, before) for name, v in windows.items()}
    return y_BLD, windows | {'state': state_BHNP}

  def init_state(self, batch_size, max_length, dtype):
    """Zeros: the last W - 1 inputs of the convolution, and the state of the recurrence."""
    del max_length
    (W, I), H = self.conv_kernel.shape, self.skip.shape[0]
    both = self.bc_bias.shape[0]
    wide = jnp.promote_types(dtype, jnp.float32)
    return {
      'x': jnp.zeros((batch_size, W - 1, I), dtype),
      'bc': jnp.zeros((batch_size, W - 1, both), dtype),
      'state': jnp.zeros((batch_size, H, both // (2 * self.groups), I // H), wide),
    }

  def step(self, x_BD, state, tokens):
    """One position of every sequence."""
    tokens = self._scored(x_BD, tokens)
    through = lambda experts, x: experts.step(x, {}, tokens)[0]
    u_BI, gate_BI, bc, delta_BH = self._inputs(x_BD, through)
    windows = {
      name: jnp.concatenate([state[name], new[:, None]], axis=1)
      for name, new in {'x': u_BI, 'bc': bc}.items()
    }
    x_BI, bc = (v[:, 0] for v in self._convolve(windows, tokens.positions[:, None]))
    y_BHP, state_BHNP = ssd.step(
      *self._coefficients(delta_BH, x_BI, bc), state['state'], tokens.positions == 0
    )
    y_BD = self._outputs(y_BHP, gate_BI, through)
    return y_BD, {name: v[:, 1:] for name, v in windows.items()} | {'state': state_BHNP}

  def _inputs(self, x, through):
    """x and gate [..., I], b and c [..., 2GN], all before convolutions, and delta [..., H]."""
    wide = (mamba.project(w, x, through) for w in (self.w_in, self.w_gate))
    return *wide, *(common.product(x, w[...].astype(x.dtype)) for w in (self.w_bc, self.w_delta))

  def _convolve(self, windows, positions_BL):
    """x, and b and c, from them and the positions before them."""
    kernels = {'x': (self.conv_kernel, self.conv_bias), 'bc': (self.bc_kernel, self.bc_bias)}
    return [mamba.convolve(windows[name], *kernels[name], positions_BL) for name in ('x', 'bc')]

  def _coefficients(self, delta, x, bc):
    """Arguments of the recurrence, with heads, groups and states as axes."""
    axes, H = x.shape[:-1], self.skip.shape[0]
    b, c = (v.reshape(*axes, self.groups, -1) for v in jnp.split(bc, 2, axis=-1))
    a_H = -jnp.exp(self.log_rate[...])
    return x.reshape(*axes, H, -1), delta, a_H, b, c, self.skip[...], self.delta_bias[...]

  def _outputs(self, y, gate, through):
    """The gated norm of the heads' outputs [..., H, P], over the channels of a group; projected."""
    dtype = jnp.promote_types(y.dtype, jnp.float32)
    gated = y.reshape(gate.shape).astype(dtype) * jax.nn.silu(gate.astype(dtype))
    grouped = gated.reshape(*gate.shape[:-1], self.groups, -1)
    mean_square = jnp.square(grouped).mean(-1, keepdims=True)
    normal = (grouped * jax.lax.rsqrt(mean_square + self.norm_eps)).reshape(gate.shape)
    scaled = normal * common.row(self.norm_scale[...], normal)
    return mamba.project(self.w_out, scaled.astype(gate.dtype), through)


def sharded_ssd(x_BLHP, delta_BLH, a_H, b_BLGN, c_BLGN, skip_H, bias_H, *, reset_BL):
  """`ssd.ssd`, of its own sequences and heads on every device.

  Gradients of what devices share (a, skip, bias; b, c) are summed once, after the loop.
  """
  (B, _, H, _), G = x_BLHP.shape, b_BLGN.shape[2]
  axes, devices = mesh.batch_axes(B), mesh.size('tensor')
  tensor = 'tensor' if devices > 1 and H % devices == 0 else None
  chunk = ssd.CHUNKS[platform.current()]
  run = lambda *args: ssd.ssd(*args[:-1], reset_BL=args[-1], chunk=chunk)
  # Small arrays are cast here, so that their gradients are summed over devices in float32.
  wide = jnp.promote_types(x_BLHP.dtype, jnp.float32)
  a_H, skip_H, bias_H = (v.astype(wide) for v in (a_H, skip_H, bias_H))
  if axes or tensor:
    # Every device gets the groups of its own heads.
    copies = math.lcm(G, devices) // G if tensor else 1
    b_BLGN, c_BLGN = (jnp.repeat(v.astype(wide), copies, axis=2) for v in (b_BLGN, c_BLGN))
    x, sequences, heads = P(axes, None, tensor), P(axes), P(tensor)
    run = jax.shard_map(
      run,
      in_specs=(x, x, heads, x, x, heads, heads, sequences),
      out_specs=(x, P(axes, tensor)),
      check_vma=False,  # the body has no collective
    )
  return run(x_BLHP, delta_BLH, a_H, b_BLGN, c_BLGN, skip_H, bias_H, reset_BL)


class Mamba2Sublayer(Sublayer):
  """`mamba2` in `model.blocks`."""

  def make(self, init, rngs, **experts):
    c = self.config
    return Mamba2(c.mamba2, d_model=c.d_model, norm_eps=c.norm_eps, init=init, rngs=rngs, **experts)

  def problems(self):
    return self.config.mamba2.problems(self.config.d_model)

  @property
  def widths(self):
    heads = self.config.mamba2.heads(self.config.d_model)
    return {'heads of Mamba-2 (model.mamba2.expand * model.d_model / head_width)': heads}

  def cost(self, length, sparse=()):
    """Without the projections named in `sparse`."""
    del length
    c, D = self.config.mamba2, self.config.d_model
    H, I, W, N = c.heads(D), c.inner_width(D), c.conv_width, c.state_size
    both = 2 * c.groups * N  # b and c
    shapes = c.projections(D).items()
    projections = sum(d_in * d_out for name, (d_in, d_out) in shapes if name not in sparse)
    projections += D * (both + H)  # b and c, delta
    channels = (W + 1) * (I + both) + 3 * H + I  # convolution; rate, delta's bias, skip; norm
    return Cost(
      params={'mamba2': projections + channels},
      active=projections + channels,
      model_flops={
        'mamba_projections': 2 * projections,
        'mamba_convolution': 2 * W * (I + both),
        'mamba_scan': 6 * N * I,
      },
    )
