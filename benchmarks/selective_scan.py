"""The selective scan compared with other implementations, and a Mamba layer with its matmuls.

  python benchmarks/selective_scan.py
  python benchmarks/selective_scan.py --shape=8,512,1024 --rounds=15 --clock=cpu

All programs run once per round, in random order; a ratio is the median over rounds of the ratios
within a round, which is robust on a busy machine. --clock=cpu counts CPU time, for a machine with
other load.

  scan         `moejax.ops.selective_scan`
  associative  `jax.lax.associative_scan` over the full [B, L, N, I], differentiated by JAX
  loop         one `jax.lax.scan` over positions, differentiated by JAX
  torch        the PyTorch fallback of transformers; its gradient, which takes time quadratic in
               the length, only up to 256 positions; skipped if it is not installed
  duality      Mamba-2 of as many channels and states, in heads of 64 channels: `moejax.ops.ssd`,
               and the gate
  floor        the bytes below at the speed of a copy of x

Floor in bytes. The states stay in the cache, so per position and channel the forward pass reads x,
delta and gate and writes y: 4 numbers. The backward pass reads them and dy, and writes three
gradients: 7 numbers. b, c and their gradients add 2 N / I of that, and the states at the starts of
chunks, written and read once, 2 N / chunk float32 numbers. The scan is far above this floor on a
CPU: it computes 3 (forward) and 9 (backward) multiply-adds, and 1 and 2 exponentials, for each of
the N states.

Targets on a CPU at the default shape: 0.06 of associative forward, 0.10 forward + backward; 50
times faster than torch; duality in half the time of the scan, forward + backward; temporary memory
of at most twice inputs and outputs; the layer at most 3 times its matmuls.
"""

import random
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from moejax.layers import common, mamba
from moejax.ops import selective_scan, ssd

_SHAPE = flags.DEFINE_list('shape', ['4', '1024', '512'], 'Sequences, positions, channels.')
_STATES = flags.DEFINE_integer('states', 16, 'States per channel.', lower_bound=1)
_ROUNDS = flags.DEFINE_integer('rounds', 9, 'Measurement rounds.', lower_bound=1)
_HEAD = 64  # channels
_CLOCK = flags.DEFINE_enum('clock', 'wall', ['wall', 'cpu'], 'Clock: wall or CPU seconds.')


def associative(x_BLI, delta_BLI, a_IN, b_BLN, c_BLN, skip_I, gate_BLI, bias_I):
  """All states in parallel, by pairwise composition of decays and inputs."""
  dt_BLI = jax.nn.softplus(delta_BLI + bias_I[None, None])
  decay = jnp.exp(dt_BLI[:, :, None] * a_IN.T[None, None])
  inputs = (dt_BLI * x_BLI)[:, :, None] * b_BLN[..., None]
  compose = lambda first, then: (then[0] * first[0], then[0] * first[1] + then[1])
  _, states = jax.lax.associative_scan(compose, (decay, inputs), axis=1)
  y_BLI = jnp.sum(states * c_BLN[..., None], axis=2) + skip_I[None, None] * x_BLI
  return y_BLI * jax.nn.silu(gate_BLI)


def duality(x_BLI, delta_BLH, a_H, b_BLN, c_BLN, skip_H, gate_BLI, bias_H):
  """Mamba-2, with one group of heads."""
  x_BLHP = x_BLI.reshape(*delta_BLH.shape, -1)
  b_BLGN, c_BLGN = b_BLN[:, :, None], c_BLN[:, :, None]
  chunk = ssd.CHUNKS[jax.default_backend()]
  y_BLHP, _ = ssd.ssd(x_BLHP, delta_BLH, a_H, b_BLGN, c_BLGN, skip_H, bias_H, chunk=chunk)
  return y_BLHP.reshape(x_BLI.shape) * jax.nn.silu(gate_BLI)


def arguments(B, L, I, N):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  a_IN = jnp.tile(-jnp.arange(1.0, N + 1)[None], (I, 1))
  x_BLI, delta_BLI, gate_BLI = draw(B, L, I), draw(B, L, I), draw(B, L, I)
  return x_BLI, delta_BLI, a_IN, draw(B, L, N), draw(B, L, N), draw(I), gate_BLI, draw(I) - 4


class Program:
  """A compiled function and its arguments."""

  def __init__(self, function, *args):
    self.compiled = jax.jit(function).lower(*args).compile()
    self.args = args

  def __call__(self):
    jax.block_until_ready(self.compiled(*self.args))

  def memory(self):
    """Bytes of temporary memory, and of inputs and outputs."""
    memory = self.compiled.memory_analysis()
    return memory.temp_size_in_bytes, memory.argument_size_in_bytes + memory.output_size_in_bytes


def with_gradients(function):
  def run(dy, *args):
    y, backward = jax.vjp(function, *args)
    return y, backward(dy)

  return run


def torch_programs(args):
  """The fallback of transformers on the same inputs, by pass; empty if it is not installed."""
  try:
    import torch
    from transformers.models.mamba import modeling_mamba
  except ImportError:
    return {}
  x, delta, a, b, c, skip, gate, bias = (torch.tensor(np.asarray(v)) for v in args)
  x, delta, b, c, gate = (v.transpose(1, 2).contiguous() for v in (x, delta, b, c, gate))
  inputs = (x, delta, a, b, c, skip, gate, bias)

  def scan():
    return modeling_mamba.mamba_selective_scan(
      x, delta, a, b, c, skip, gate, delta_bias=bias, delta_softplus=True
    )

  def forward():
    with torch.no_grad():
      scan()

  def both():
    for v in inputs:
      v.requires_grad_()
    torch.autograd.grad(scan().sum(), inputs)

  # The gradient takes time quadratic in the length.
  return {'forward': forward, 'both': both} if x.shape[2] <= 256 else {'forward': forward}


def layer_programs(B, L, I, N):
  """A layer, and the matmuls in it, forward + backward."""
  config = mamba.MambaConfig(state_size=N)
  init = common.Initializer('kaiming_uniform', 1.0, jnp.dtype('float32'))
  layer = mamba.Mamba(config, d_model=I // 2, init=init, rngs=nnx.Rngs(0))
  graph, params = nnx.split(layer)
  x_BLD = jnp.asarray(np.random.default_rng(0).standard_normal((B, L, I // 2)), jnp.float32)
  positions_BL = jnp.tile(jnp.arange(L)[None], (B, 1))
  tokens = common.TokenInfo(jnp.ones_like(positions_BL), positions_BL)

  def matmuls(params, x_BLD):
    layer = nnx.merge(graph, params)
    x_BLI, gate_BLI = x_BLD @ layer.w_in[...], x_BLD @ layer.w_gate[...]
    x_BLI, delta_BLI, _, b_BLN, c_BLN, *_ = layer._coefficients(x_BLI, gate_BLI)
    # A cheap sum that gives every matmul a gradient.
    y_BLI = x_BLI + gate_BLI + delta_BLI + jnp.sum(b_BLN * c_BLN, axis=-1, keepdims=True)
    return y_BLI @ layer.w_out[...]

  full = lambda params, x_BLD: nnx.merge(graph, params)(x_BLD, tokens)[0]
  return {
    name: Program(with_gradients(f), x_BLD, params, x_BLD)
    for name, f in {'layer': full, 'matmuls': matmuls}.items()
  }


def programs(B, L, I, N):
  """Callables by (name, pass)."""
  args = arguments(B, L, I, N)
  fastest = selective_scan.fastest(jax.default_backend(), I)
  implementations = {
    'scan': lambda *args: selective_scan.selective_scan(*args, impl=fastest)[0],
    'loop': lambda *args: selective_scan.selective_scan(*args, impl='reference')[0],
    'associative': associative,
  }
  found = {(name, 'forward'): Program(f, *args) for name, f in implementations.items()}
  for name, f in implementations.items():
    found[name, 'both'] = Program(with_gradients(f), args[0], *args)
  found |= {(name, 'both'): program for name, program in layer_programs(B, L, I, N).items()}
  x_BLI, delta_BLI, a_IN, b_BLN, c_BLN, skip_I, gate_BLI, bias_I = args
  head = min(_HEAD, I)
  of_heads = lambda v: v[..., ::head]
  a_H = -jnp.arange(1.0, I // head + 1)
  of_duality = x_BLI, of_heads(delta_BLI), a_H, b_BLN, c_BLN, of_heads(skip_I), gate_BLI
  of_duality += (of_heads(bias_I),)
  found['duality', 'forward'] = Program(duality, *of_duality)
  found['duality', 'both'] = Program(with_gradients(duality), x_BLI, *of_duality)
  found['copy', 'forward'] = Program(lambda x_BLI: x_BLI + 1, args[0])
  found |= {('torch', kind): program for kind, program in torch_programs(args).items()}
  return found


def measure(programs, rounds):
  """Seconds of every round, by name.

  Every program runs twice and only the second run counts: the first also pays for freeing the
  memory of the previous program, which is gigabytes for `associative`.
  """
  clock = time.process_time if _CLOCK.value == 'cpu' else time.perf_counter
  times = {name: [] for name in programs}
  for _ in range(rounds):
    for name in random.sample(list(programs), len(programs)):
      programs[name]()
      start = clock()
      programs[name]()
      times[name].append(clock() - start)
  return times


def main(argv):
  del argv
  B, L, I = map(int, _SHAPE.value)
  N = _STATES.value
  found = programs(B, L, I, N)
  times = measure(found, _ROUNDS.value)

  def ratio(a, b):
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, B={B} L={L} I={I} N={N}')
  print(f'{_CLOCK.value} seconds, {_ROUNDS.value} rounds; ratios are scan / other')
  chunk = selective_scan._TUNINGS[jax.default_backend()].chunk
  for kind, numbers in (('forward', 4 + N / chunk), ('both', 11 + 2 * N / chunk)):
    numbers += 2 * N / I * (1 if kind == 'forward' else 3)
    temporary, visible = found['scan', kind].memory()
    others = [name for name, k in found if k == kind and name in ('loop', 'associative', 'torch')]
    print(
      f'{kind:8} {statistics.median(times["scan", kind]) * 1e3:8.1f} ms',
      *(f'{name} {ratio(("scan", kind), (name, kind)):.3f}' for name in others),
      # A copy moves two numbers per position and channel.
      f'floor {ratio(("scan", kind), ("copy", "forward")) * 2 / numbers:.1f}',
      f'temporary / (inputs + outputs) {temporary / visible:.2f}',
      f'duality / scan {ratio(("duality", kind), ("scan", kind)):.3f}',
    )
  print(f'layer / its matmuls, both: {ratio(("layer", "both"), ("matmuls", "both")):.2f}')


if __name__ == '__main__':
  app.run(main)
