"""What part `ops` measures: ops of ours, other forms of them in JAX, and the work they must do."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator.limits import Work
from moejax.layers import attention
from moejax.ops import (
  cross_entropy,
  dispatch,
  grouped_matmul,
  routing,
  selective_scan,
  softmax_attention,
)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of the ops: of a large Mamba layer, attention and head of the papers' 100M, 64 experts."""

  scan: tuple = (8, 2048, 1536, 16)  # B, L, I, N
  attention: tuple = (32, 1024, 12, 64)  # B, L, H, P
  head: tuple = (8, 1024, 768, 50_304)  # B, L, D, V
  experts: tuple = (65_536, 1024, 512, 64, 8)  # T, D, F, E, K


FULL = Sizes()
TINY = Sizes((2, 32, 16, 4), (2, 32, 2, 8), (2, 32, 16, 100), (64, 16, 8, 4, 2))


@dataclasses.dataclass(frozen=True)
class Op:
  """An op at a size.

  `args`: makes its arguments; by the first `differentiated` there are gradients. `forms`: by name,
  functions of them. `forward`, `gradients`: the Work of the first pass, and of both.
  """

  args: Callable
  differentiated: int
  forms: dict[str, Callable]
  forward: Work
  gradients: Work

  def work(self, passes):
    return self.forward if passes == 'forward' else self.gradients


def _normal(seed, *shape, scale=1.0, dtype=jnp.bfloat16):
  return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def _scan(sizes):
  B, L, I, N = sizes.scan

  def args():
    x, delta, gate = (_normal(seed, B, L, I) for seed in range(3))
    b, c = (_normal(seed, B, L, N) for seed in (3, 4))
    a_IN = -jnp.tile(jnp.arange(1.0, N + 1)[None], (I, 1))
    return x, delta, a_IN, b, c, jnp.ones(I), gate, jnp.full(I, -4.0)

  def run(impl, *args):
    return selective_scan.selective_scan(*args, impl=impl)[0]

  def associative(x, delta, a_IN, b, c, skip_I, gate, bias_I):
    """All states in parallel, in memory."""
    x, delta, b, c, gate = (v.astype(jnp.float32) for v in (x, delta, b, c, gate))
    dt = jax.nn.softplus(delta + bias_I[None, None])
    decay = jnp.exp(dt[:, :, None] * a_IN.T[None, None])
    inputs = (dt * x)[:, :, None] * b[..., None]
    compose = lambda first, then: (then[0] * first[0], then[0] * first[1] + then[1])
    _, states = jax.lax.associative_scan(compose, (decay, inputs), axis=1)
    y = jnp.sum(states * c[..., None], axis=2) + skip_I[None, None] * x
    return (y * jax.nn.silu(gate)).astype(jnp.bfloat16)

  wide, narrow, states = 2 * B * L * I, 2 * B * L * N, B * L * I * N
  return Op(
    args,
    8,
    {
      'ours': functools.partial(run, selective_scan.fastest(jax.default_backend(), I)),
      'loop over positions': functools.partial(run, 'reference'),
      'associative_scan': associative,
    },
    Work(bytes=4 * wide + 2 * narrow, exps=states),
    Work(bytes=11 * wide + 6 * narrow, exps=3 * states),
  )


def _attention(sizes):
  B, L, H, P = sizes.attention
  starts = np.random.default_rng(0).random((B, L)) < 1 / 400
  segments = np.cumsum(starts, axis=1)

  def args():
    s = jnp.asarray(segments)
    return *(_normal(seed, B, L, H, P) for seed in range(3)), s

  def without_documents(form, q, k, v, s):
    return form(q, k, v)

  def tokamax(q, k, v):
    import tokamax

    return tokamax.dot_product_attention(q, k, v, is_causal=True)

  blocked = functools.partial(softmax_attention.blocked_attention, block=min(L, 512))
  causal = {'ours': attention.attend, 'xla': softmax_attention.attention, 'blocked': blocked}
  causal |= _if_installed('tokamax', {'tokamax': tokamax})
  found = {
    f'{name}, causal': functools.partial(without_documents, form) for name, form in causal.items()
  }
  found |= {'ours, documents': attention.attend, 'blocked, documents': blocked}
  # The least of all forms: of the pairs within documents, at or before a position.
  pairs = sum(n * (n + 1) / 2 for row in segments for n in np.bincount(row))
  products, wide = 2 * H * P * pairs, 2 * B * L * H * P
  return Op(
    args,
    3,
    found,
    Work(flops=2 * products, bytes=4 * wide),
    Work(flops=6 * products, bytes=11 * wide),
  )


def _head(sizes):
  B, L, D, V = sizes.head
  targets = np.random.default_rng(0).integers(0, V, (B, L))

  def args():
    head = _normal(1, D, V, scale=D**-0.5, dtype=jnp.float32)
    return _normal(0, B, L, D), head, jnp.asarray(targets, jnp.int32), jnp.ones((B, L))

  loss = lambda chunk: functools.partial(cross_entropy.chunked_cross_entropy, chunk=chunk)
  product, moved = 2 * B * L * D * V, 2 * B * L * D + 4 * D * V
  return Op(
    args,
    2,
    {'ours, chunks of 32': loss(32), 'ours, chunks of 256': loss(256), 'ours, whole': loss(0)},
    Work(flops=product, bytes=moved),
    Work(flops=3 * product, bytes=3 * moved),
  )


def group_sizes(sizes):
  """Rows of each expert, unevenly many."""
  T, _, _, E, K = sizes.experts
  rng = np.random.default_rng(0)
  return rng.multinomial(T * K, rng.dirichlet(np.full(E, 20.0))).astype(np.int32)


def _grouped(sizes):
  T, D, F, E, K = sizes.experts

  def args():
    rows, w = _normal(0, T * K, D), _normal(1, E, D, F, scale=D**-0.5)
    return rows, w, jnp.asarray(group_sizes(sizes))

  def product(impl):
    return lambda rows, w, sizes_E: grouped_matmul.grouped_matmul(rows, w, sizes_E, impl)

  def equal(rows, w, sizes_E):
    """As many rows for each: what a capacity makes possible."""
    return jnp.einsum('ECD,EDF->ECF', rows.reshape(E, -1, D), w)

  def tokamax(rows, w, sizes_E):
    import tokamax

    return tokamax.ragged_dot(rows, w, sizes_E)

  fastest = grouped_matmul.fastest(jax.default_backend())
  others = ['tiled', 'ragged_dot'] + ['megablox'] * (jax.default_backend() == 'tpu')
  found = {'ours': product(fastest)} | {i: product(i) for i in others if i != fastest}
  flops, moved = 2 * T * K * D * F, 2 * (T * K * (D + F) + E * D * F)
  return Op(
    args,
    2,
    found | {'equal groups': equal} | _if_installed('tokamax', {'tokamax': tokamax}),
    Work(flops=flops, bytes=moved),
    Work(flops=3 * flops, bytes=3 * moved),
  )


def _router(sizes):
  T, D, _, E, _ = sizes.experts

  def args():
    return _normal(0, T, D), _normal(1, D, E, scale=D**-0.5, dtype=jnp.float32)

  flops, moved = 2 * T * D * E, 2 * T * (D + E)
  return Op(
    args,
    2,
    {'ours': routing.router_logits, 'in bf16': lambda x, w: x @ w.astype(x.dtype)},
    Work(flops=flops, bytes=moved),
    Work(flops=3 * flops, bytes=3 * moved),
  )


def _token_plan(sizes):
  T, _, _, E, K = sizes.experts

  def plan(capacity, logits):
    valid = jnp.ones(logits.shape[:2], bool)
    return _arrays(routing.token_choice(logits, K, capacity, valid_GT=valid))

  found = {
    'ours, capacity': functools.partial(plan, T * K // E),
    'ours, dropless': functools.partial(plan, None),
    'top_k alone': lambda logits: jax.lax.top_k(logits, K)[0],
  }
  return _plan(sizes, (1, T, E), found)


def _expert_plan(sizes):
  T, _, _, E, K = sizes.experts
  group = min(256, T // 4)
  capacity = K * group // E

  def plan(logits):
    valid = jnp.ones(logits.shape[:2], bool)
    return _arrays(routing.expert_choice(logits, capacity, valid_GT=valid))

  def top_k(logits):
    return jax.lax.top_k(jnp.swapaxes(logits, 1, 2), capacity)[0]

  return _plan(sizes, (T // group, group, E), {'ours': plan, 'top_k alone': top_k})


def _arrays(plan):
  """What experts need of a plan; as floats, so that all of it is computed with gradients too."""
  whole = plan.token, plan.used, plan.rows_by_token, plan.row_start_T, plan.rows_per_token_T
  return plan.weight, [a.astype(jnp.float32) for a in whole]


def _plan(sizes, shape, found):
  T, _, _, E, K = sizes.experts
  # The scores are read, a weight of every choice is written.
  moved = 4 * T * E + 4 * T * K
  args = lambda: (_normal(0, *shape, dtype=jnp.float32),)
  return Op(args, 1, found, Work(bytes=moved), Work(bytes=2 * moved))


def _move(sizes, direction):
  """A dispatch or a combine, of a dropless plan."""
  T, D, _, E, K = sizes.experts

  def args():
    logits = _normal(0, 1, T, E, dtype=jnp.float32)
    plan = routing.token_choice(logits, K, None, valid_GT=jnp.ones((1, T), bool))
    return _normal(1, T if direction == 'dispatch' else T * K, D), plan

  plain = {
    'dispatch': lambda x, plan: x[plan.token],
    'combine': lambda rows, plan: jax.ops.segment_sum(rows, plan.token, T),
  }
  moved = 2 * T * D * (1 + K) + 4 * T * K
  return Op(
    args,
    1,
    {'ours': getattr(dispatch, direction), 'plain XLA': plain[direction]},
    Work(bytes=moved),
    Work(bytes=2 * moved),
  )


def _if_installed(package, found):
  return found if importlib.util.find_spec(package) else {}


OPS = {
  'selective scan': _scan,
  'grouped matmul': _grouped,
  'attention': _attention,
  'cross-entropy': _head,
  'router': _router,
  'plan of token choice': _token_plan,
  'plan of expert choice': _expert_plan,
  'dispatch': functools.partial(_move, direction='dispatch'),
  'combine': functools.partial(_move, direction='combine'),
}
