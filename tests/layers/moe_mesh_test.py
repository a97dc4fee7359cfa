"""The sparse layer on meshes: values, gradients and drops of one device, by few collectives."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import sharding
from moejax.layers import common, moe

B, L, D, F = 8, 6, 5, 28
MESHES = {
  'data 8': (8, 1, 1, 1),
  'expert 4': (1, 1, 4, 1),
  'data 2, expert 4': (2, 1, 4, 1),
  'fsdp 2, expert 2, tensor 2': (1, 2, 2, 2),
}
ROUTERS = {
  'capacity': {'capacity_factor': 0.67},  # 2 slots
  'dropless': {'capacity_factor': 0.0},
  'expert choice': {'router': 'expert_choice', 'capacity_factor': 0.67},
  'more slots than devices': {'router': 'expert_choice', 'capacity_factor': 2.0},
  'relu': {'router': 'relu', 'capacity_factor': 0.0},
}
SIZES = {'expansion_rate': 2, 'granularity': 2, 'group_size': 1, 'group_by': 'sequence'}


def _layer(router, impl):
  return moe.MixtureOfExperts(
    moe.MoEConfig(**SIZES | ROUTERS[router], impl=impl, z_loss=0.1),
    d_model=D,
    d_ff=F,
    activation='relu',
    init=common.Initializer('kaiming_uniform', 1.0, jnp.dtype('float32')),
    rngs=nnx.Rngs(0),
  )


def _inputs():
  rng = np.random.default_rng(0)
  x_BLD, dy_BLD = rng.standard_normal((2, B, L, D)).astype(np.float32)
  x_BLD[:3, :, 0] += 2  # uneven: most tokens of some groups want one expert
  segments_BL = (rng.random((B, L)) < 0.8).astype(np.int32)
  return x_BLD, dy_BLD, segments_BL


def _compiled(router, impl, sizes):
  graph, params = nnx.split(_layer(router, impl))
  params['router'][...] = params['router'][...].at[0, 1].set(4)
  x_BLD, dy_BLD, segments_BL = _inputs()
  tokens = common.TokenInfo(jnp.asarray(segments_BL), jnp.zeros((B, L), jnp.int32))

  def value_and_gradients(params, x_BLD):
    forward = lambda params, x_BLD: nnx.merge(graph, params)(x_BLD, tokens)
    (y_BLD, aux), backward = jax.vjp(forward, params, x_BLD)
    zeros = jax.tree.map(jnp.zeros_like, aux)
    return y_BLD, aux, backward((dy_BLD, zeros | {'auxiliary_loss': jnp.float32(1)}))

  mesh = sharding.make_mesh(sharding.MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
  with jax.set_mesh(mesh):
    params = jax.device_put(params, sharding.state_shardings(params, mesh))
    args = params, jax.device_put(x_BLD, jax.NamedSharding(mesh, sharding.BATCH))
    return jax.jit(value_and_gradients).lower(*args).compile(), args


@functools.cache
def _on_one_device(router, impl):
  program, args = _compiled(router, impl, (1, 1, 1, 1))
  return jax.tree.map(np.asarray, program(*args))


CASES = [(mesh, router, 'rows') for mesh in MESHES for router in [*ROUTERS][:4] if 'data' in mesh]
CASES += [('data 2, expert 4', router, 'loop') for router in ('capacity', 'dropless')]
CASES += [('fsdp 2, expert 2, tensor 2', 'relu', 'loop'), ('expert 4', 'capacity', 'rows')]


@pytest.mark.parametrize('mesh, router, impl', CASES)
def test_is_the_layer_of_one_device(mesh, router, impl):
  program, args = _compiled(router, impl, MESHES[mesh])
  expected = _on_one_device(router, impl)
  assert (router == 'capacity') == (expected[1]['moe/dropped'] > 0)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  got = program(*args)
  jax.tree.map(close, got, expected)
  for name in ('moe/load', 'moe/dropped', 'moe/unrouted'):
    np.testing.assert_array_equal(got[1][name], expected[1][name])


COLLECTIVES = r' (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(?:-start)?\('


@pytest.mark.parametrize(
  'router, sizes, expected',
  [
    ('capacity', 'data 8', {'all-reduce'}),
    ('capacity', 'data 2, expert 4', {'all-reduce', 'all-to-all'}),
    ('dropless', 'data 2, expert 4', {'all-reduce', 'all-gather', 'reduce-scatter'}),
  ],
)
def test_collectives(router, sizes, expected):
  program, _ = _compiled(router, 'rows', MESHES[sizes])
  assert set(re.findall(COLLECTIVES, program.as_text())) == expected
