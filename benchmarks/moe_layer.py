"""MoE layers compared with a dense layer of the same active FLOPs, forward + backward.

  python benchmarks/moe_layer.py                      all cases of the default device
  python benchmarks/moe_layer.py --only=32x8 --rounds=15

All programs of a case run once per round, in random order; a ratio is the median over rounds of
the ratios within a round, which is robust on a busy machine. --clock=cpu counts CPU time, for a
machine with other load: it ignores how well the work is parallelized.

Floor. T tokens of width D, each sent to k of E experts of width F; the dense layer has width k * F.
  FLOPs    dense: 12 T D k F. Sparse: the same plus the router's three matmuls, 6 T D E, a total of
           1 + E / (2 k F) times the dense layer: 1.00 for 8x1, 1.02 for 32x8, 1.25 for 512x8, 2.00
           for expert choice at G=32 (for which the target counts the router twice).
           Empty slots and partially filled tiles are not included.
  numbers  x, dy read, y, dx written: 4 T D. Hidden activations written and read: 2 T k F. Weights
           of all experts read in both directions, their gradients written: 6 D E F. Tokens of x
           gathered in both directions and of dy in one, outputs added to y and to dx (read,
           written): 7 T k D. Logits written and read in both directions: 4 T E.
The floor of a ratio is the larger of its FLOPs at the speed of the dense layer and of its bytes at
the speed of a copy to new memory, both measured in the same rounds. It omits two costs of fine
experts on a CPU. Small matmuls are slower than large ones: 64 tokens of width 256 by 128 reach
about 3/4 of the speed forward and at most 1/2 backward. And every run allocates new pages for the
weights' gradients (134 MB for 512x8), which overlaps with no matmul.

`move` is dispatch and combine without the experts, `experts` the rest of the layer.
"""

import dataclasses
import functools
import random
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from moejax.ops import dispatch, expert_loop, routing

_ROUNDS = flags.DEFINE_integer('rounds', 9, 'Measurement rounds.', lower_bound=1)
_CLOCK = flags.DEFINE_enum('clock', 'wall', ['wall', 'cpu'], 'Clock: wall or CPU seconds.')
_ONLY = flags.DEFINE_string('only', '', 'Run the cases whose names contain this.')


@dataclasses.dataclass(frozen=True)
class Case:
  """One MoE layer: token choice, or expert choice if `group` is set."""

  name: str
  num_experts: int
  width: int
  k: int
  target: str
  factor: float | None = None  # capacity factor; None is dropless
  ragged: bool = True
  loop: bool = True  # dispatch, experts and combine fused in one loop, or separate
  group: int | None = None
  tokens: int = 4096
  d_model: int = 256
  dtype: str = 'float32'


def _expert_choice(granularity, expansion_rate=64):
  return Case(
    f'expert choice G={granularity}',
    num_experts=granularity * expansion_rate,
    width=1024 // granularity,
    k=granularity,
    group=256,
    ragged=False,
    target='1.3 x (dense + router)',
  )


ON_CPU = (
  Case('8x1', 8, 1024, 1, '1.35', factor=1.25),
  Case('8x1 dropless', 8, 1024, 1, '1.35'),
  Case('32x8', 32, 128, 8, '1.6', factor=1.25),
  Case('32x8 dropless', 32, 128, 8, '1.6'),
  Case('512x8', 512, 128, 8, '2.2', factor=1.25, ragged=False),
  Case('512x8 dropless', 512, 128, 8, '1.3 x with capacity'),
  Case('512x8 ragged', 512, 128, 8, '-', factor=1.25),
  Case('512x8 three steps', 512, 128, 8, '-', factor=1.25, ragged=False, loop=False),
  *(_expert_choice(granularity) for granularity in (1, 2, 4, 8, 16, 32)),
)
_GPU = dict(tokens=32768, d_model=1024, dtype='bfloat16', ragged=False, loop=False, target='1.67')
ON_GPU = (
  Case('64x1', 64, 4096, 1, factor=1.25, **_GPU),
  Case('64x8', 64, 512, 8, factor=1.25, **_GPU),
)


def _weighted_relu(h, weight):
  return jax.nn.relu(h) * weight[..., None].astype(h.dtype)


_EXPERT = expert_loop.Expert(
  inner=lambda x_CD, w: x_CD @ w[0],
  outer=lambda h_CF, weight_C, w: _weighted_relu(h_CF, weight_C) @ w[1],
)
_MOVE_ONLY = expert_loop.Expert(
  inner=lambda x_CD, w: x_CD, outer=lambda x_CD, weight_C, w: x_CD * weight_C[:, None]
)


def dense(x_TD, w_in_DF, w_out_FD):
  return jax.nn.relu(x_TD @ w_in_DF) @ w_out_FD


def route(case, logits_TE):
  logits_GTE = logits_TE.reshape(-1, case.group or case.tokens, case.num_experts)
  T = logits_GTE.shape[1]
  valid_GT = np.ones(logits_GTE.shape[:2], bool)
  capacity = None
  if case.factor or case.group:
    capacity = routing.expert_capacity(T, case.k, case.num_experts, case.factor or 1.0)
  if case.group:
    return routing.expert_choice(logits_GTE, capacity, valid_GT=valid_GT)
  return routing.token_choice(logits_GTE, case.k, capacity, valid_GT=valid_GT, ragged=case.ragged)


def experts(case, x_TD, plan, *w):
  if case.loop:
    return expert_loop.map_experts(_EXPERT, x_TD, plan, w)
  h_ECF = jnp.einsum('ECD,EDF->ECF', dispatch.dispatch(x_TD, plan), w[0])
  h_ECF = _weighted_relu(h_ECF, plan.weight)
  return dispatch.combine(jnp.einsum('ECF,EFD->ECD', h_ECF, w[1]), plan)


def move(case, x_TD, plan):
  """Dispatch and combine without experts."""
  if case.loop:
    no_weights = jnp.zeros((case.num_experts, 0), x_TD.dtype)
    return expert_loop.map_experts(_MOVE_ONLY, x_TD, plan, no_weights)
  x_ECD = dispatch.dispatch(x_TD, plan)
  return dispatch.combine(x_ECD * plan.weight[..., None].astype(x_ECD.dtype), plan)


def sparse(case, x_TD, router_DE, *w):
  return experts(case, x_TD, route(case, routing.router_logits(x_TD, router_DE)), *w)


class Program:
  """A function compiled together with its gradient with respect to all float arguments."""

  def __init__(self, function, *args):
    @jax.jit
    def with_gradient(args, dy):
      is_float = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
      leaves, tree = jax.tree.flatten(args)
      floats = [a for a in leaves if is_float(a)]

      def of_floats(floats):
        floats = iter(floats)
        return function(*tree.unflatten([next(floats) if is_float(a) else a for a in leaves]))

      y, backward = jax.vjp(of_floats, floats)
      return y, backward(dy)

    y = jax.eval_shape(function, *args)
    self.args = args, jnp.ones(y.shape, y.dtype)
    self.compiled = with_gradient.lower(*self.args).compile()
    self.temporary = self.compiled.memory_analysis().temp_size_in_bytes
    self.seconds()

  def seconds(self):
    clock = time.process_time if _CLOCK.value == 'cpu' else time.perf_counter
    start = clock()
    jax.block_until_ready(self.compiled(*self.args))
    return clock() - start


def measure(programs, rounds):
  """Seconds of every round, by name."""
  times = {name: [] for name in programs}
  for _ in range(rounds):
    for name in random.sample(list(programs), len(programs)):
      times[name].append(programs[name].seconds())
  return times


def median_ratio(times, others):
  """The median of the ratios within each round."""
  return statistics.median(t / o for t, o in zip(times, others, strict=True))


def floor(case, dense_seconds, bytes_per_second):
  """The least possible ratio to the dense layer; see the module docstring."""
  T, D, E, F, k = case.tokens, case.d_model, case.num_experts, case.width, case.k
  flops_ratio = 1 + E / (2 * k * F)
  numbers = 7 * T * k * D + 4 * T * E + 2 * T * k * F + 6 * D * E * F
  num_bytes = numbers * jnp.dtype(case.dtype).itemsize
  return max(flops_ratio, num_bytes / bytes_per_second / dense_seconds)


def programs_of(case):
  T, D, E, F = case.tokens, case.d_model, case.num_experts, case.width
  keys = iter(jax.random.split(jax.random.key(0), 6))
  normal = lambda *shape: jax.random.normal(next(keys), shape, case.dtype) / shape[-2] ** 0.5
  x_TD = normal(T, D) * T**0.5
  router_DE = normal(D, E).astype(jnp.float32)
  w = normal(E, D, F), normal(E, F, D)
  logits_TE = routing.router_logits(x_TD, router_DE)
  plan = jax.jit(functools.partial(route, case))(logits_TE)
  copied = jnp.zeros(1 << 24, jnp.float32)  # 64 MiB: larger than any cache
  return {
    'dense': Program(dense, x_TD, normal(D, case.k * F), normal(case.k * F, D)),
    'sparse': Program(functools.partial(sparse, case), x_TD, router_DE, *w),
    'router': Program(routing.router_logits, x_TD, router_DE),
    'plan': Program(lambda logits_TE: route(case, logits_TE).weight, logits_TE),
    'move': Program(functools.partial(move, case), x_TD, plan),
    'all but router': Program(functools.partial(experts, case), x_TD, plan, *w),
    'copy': Program(jnp.negative, copied),
  }, copied.nbytes


def report(case, rounds):
  programs, copied_bytes = programs_of(case)
  times = measure(programs, rounds)

  dense_seconds = statistics.median(times['dense'])
  # A negation and its gradient: each reads and writes one such array.
  bytes_per_second = 4 * copied_bytes / statistics.median(times['copy'])
  ratio = {name: median_ratio(times[name], times['dense']) for name in programs}
  least = floor(case, dense_seconds, bytes_per_second)
  temporary = {name: programs[name].temporary for name in ('sparse', 'dense')}
  print(
    f'{case.name:<22}{ratio["sparse"]:6.2f}'
    f'{least:7.2f}{ratio["sparse"] / least:7.2f}'
    f'{ratio["router"]:9.2f}{ratio["plan"]:6.2f}{ratio["move"]:6.2f}'
    f'{ratio["all but router"] - ratio["move"]:9.2f}'
    f'{dense_seconds * 1e3:9.0f}'
    f'{temporary["sparse"] / 2**20:7.0f}{temporary["sparse"] / max(temporary["dense"], 1):6.2f}'
    f'  {case.target}',
    flush=True,
  )


def main(argv):
  del argv
  device = jax.devices()[0]
  print(f'{device.device_kind}, jax {jax.__version__}, {_ROUNDS.value} rounds; all but the last')
  print('columns are ratios to the dense layer')
  print(
    f'{"case":<22}{"ratio":>6}{"floor":>7}{"/floor":>7}{"router":>9}{"plan":>6}{"move":>6}'
    f'{"experts":>9}{"dense ms":>9}{"MiB":>7}{"ratio":>6}  target'
  )
  for case in ON_GPU if device.platform == 'gpu' else ON_CPU:
    if _ONLY.value in case.name:
      report(case, _ROUNDS.value)


if __name__ == '__main__':
  app.run(main)
