"""Mixture of Tokens compared with a dense layer of the same FLOPs, forward + backward.

  python benchmarks/mot_layer.py                      all cases
  python benchmarks/mot_layer.py --only=d256 --rounds=15 --clock=cpu

Programs and ratios as in benchmarks/moe_layer.py.

Floor. T tokens of width D in groups of M, E experts of width F = 4 D M / E, C = T / M mixtures for
each expert; the dense layer has width 4 D and the FLOPs of the experts, 48 T D^2. The layer adds
three matmuls of 6 T D E each; the floor is the time of the dense layer plus that of these matmuls,
measured separately in the same rounds:
  controller  [T, D] by [D, E]
  merge       C times [E, M] by [M, D]
  emit        C times [M, E] by [E, D]
The target is 1.15 times the floor. It omits softmax, sums over groups, layout changes and the cost
of many small experts over one layer. Column `experts` is that cost: the experts applied to their
mixtures, over the dense layer. For E > M they read and write E / M times the numbers: mixtures and
outputs have E C D = T D E / M each, written and read several times in both directions.
"""

import jax
import jax.numpy as jnp
import moe_layer  # in this folder
from absl import app, flags
from flax import nnx
from moe_layer import Program, measure

from moejax.layers import common, mot

TOKENS, LENGTH, M = 4096, 64, 32
_EXPERTS = flags.DEFINE_multi_integer('experts', [32, 64, 128, 256, 512, 1024], 'Expert counts.')


def programs_of(D, E):
  B, C, F = TOKENS // LENGTH, TOKENS // M, 4 * D * M // E
  keys = iter(jax.random.split(jax.random.key(0), 12))
  normal = lambda *shape: jax.random.normal(next(keys), shape) / shape[-2] ** 0.5
  layer = mot.MixtureOfTokens(
    mot.MoTConfig(num_experts=E, group_size=M, expert_width=F),
    d_model=D,
    d_ff=4 * D,
    activation='relu',
    init=common.Initializer('truncated_normal', 1.0, jnp.dtype('float32')),
    rngs=nnx.Rngs(0),
  )
  graph, params = nnx.split(layer)
  tokens = common.TokenInfo(*(2 * (jnp.ones((B, LENGTH), jnp.int32),)))
  return {
    'dense': Program(moe_layer.dense, normal(TOKENS, D), normal(D, 4 * D), normal(4 * D, D)),
    'controller': Program(jnp.matmul, normal(TOKENS, D), params['controller'][...]),
    'merge': Program(jnp.matmul, normal(C, E, M), normal(C, M, D)),
    'emit': Program(jnp.matmul, normal(C, M, E), normal(C, E, D)),
    'experts': Program(
      lambda params, x_ECD: nnx.merge(graph, params).experts(x_ECD), params, normal(E, C, D)
    ),
    'mot': Program(
      lambda params, x_BLD: nnx.merge(graph, params)(x_BLD, tokens)[0],
      params,
      normal(B, LENGTH, D),
    ),
  }


def report(name, D, E, rounds):
  programs = programs_of(D, E)
  times = measure(programs, rounds)
  matmuls = ('controller', 'merge', 'emit')
  floors = [sum(parts) for parts in zip(times['dense'], *(times[m] for m in matmuls), strict=True)]
  over_floor = moe_layer.median_ratio(times['mot'], floors)
  over_dense = {name: moe_layer.median_ratio(t, times['dense']) for name, t in times.items()}
  columns = (*matmuls, 'experts', 'mot')
  print(
    f'{name:<12}{over_floor:7.2f}'
    + ''.join(f'{over_dense[name]:11.2f}' for name in columns)
    + f'{programs["mot"].temporary / 2**20:7.0f}',
    flush=True,
  )


def main(argv):
  del argv
  rounds = flags.FLAGS.rounds
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {rounds} rounds; over the floor,')
  print('then over the dense layer, then MiB of temporary arrays')
  columns = ('controller', 'merge', 'emit', 'experts', 'all')
  print(f'{"case":<12}{"/floor":>7}' + ''.join(f'{name:>11}' for name in columns) + f'{"MiB":>7}')
  for D in (256, 512):
    for E in _EXPERTS.value:
      name = f'd{D} {E}E'
      if flags.FLAGS.only in name:
        report(name, D, E, rounds)


if __name__ == '__main__':
  app.run(main)
