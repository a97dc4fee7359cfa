"""Transports: on every mesh the values, gradients and drops of one device, by few collectives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import sharding
from moejax.layers import experts as experts_lib
from moejax.layers.common import Initializer
from moejax.ops import routing

G, T, D, F, E, K = 8, 6, 5, 14, 4, 2
MESHES = {
  'data 8': (8, 1, 1, 1),
  'expert 4': (1, 1, 4, 1),
  'data 2, expert 4': (2, 1, 4, 1),
  'fsdp 2, expert 2, tensor 2': (1, 2, 2, 2),
}
# Router -> a function from scores to a plan.
PLANS = {
  'slots': lambda logits, valid, packed: routing.token_choice(
    logits, K, 2, valid_GT=valid, packed=packed
  ),
  'dropless': lambda logits, valid, packed: routing.token_choice(
    logits, K, None, valid_GT=valid, packed=packed
  ),
  'expert choice': lambda logits, valid, packed: routing.expert_choice(logits, 2, valid_GT=valid),
  'more slots than devices': lambda logits, valid, packed: routing.expert_choice(
    logits, T, valid_GT=valid
  ),
}


def _mesh(sizes):
  devices = jax.devices()[: int(np.prod(sizes))]
  return sharding.make_mesh(sharding.MeshConfig(*sizes), devices)


@functools.cache
def _experts():
  init = Initializer('kaiming_uniform', 1.0, jnp.dtype('float32'))
  bank = experts_lib.Experts(
    num_experts=E, d_model=D, expert_width=F, activation='relu', init=init, rngs=nnx.Rngs(0)
  )
  return nnx.split(bank)


def _inputs():
  rng = np.random.default_rng(0)
  x_GTD, dy_GTD = rng.standard_normal((2, G, T, D)).astype(np.float32)
  logits_GTE = rng.standard_normal((G, T, E)).astype(np.float32)
  logits_GTE[:3, :, 1] += 4  # uneven: most tokens of some groups want one expert
  return x_GTD, logits_GTE, dy_GTD, rng.random((G, T)) < 0.8


def _compiled(router, impl, sizes):
  graph, params = _experts()
  x_GTD, logits_GTE, dy_GTD, valid_GT = _inputs()

  def run(params, x_GTD, logits_GTE):
    bank = nnx.merge(graph, params)
    routed = bank.route(PLANS[router], x_GTD, logits_GTE, valid_GT, impl)
    return routed.y, (routed.counts_GE, routed.number_GT)

  def value_and_gradients(*args):
    y_GTD, backward, counts = jax.vjp(run, *args, has_aux=True)
    return y_GTD, counts, backward(dy_GTD)

  with jax.set_mesh(_mesh(sizes)):
    place = lambda a, spec: jax.device_put(a, jax.sharding.PartitionSpec(*spec))
    bank = jax.tree.map(lambda w: place(w, ['expert']), params)
    args = bank, place(x_GTD, sharding.BATCH), place(logits_GTE, sharding.BATCH)
    return jax.jit(value_and_gradients).lower(*args).compile(), args


@functools.cache
def _on_one_device(router, impl):
  program, args = _compiled(router, impl, (1, 1, 1, 1))
  return jax.tree.map(np.asarray, program(*args))


CASES = [(mesh, router, 'rows') for mesh in MESHES for router in PLANS if 'data' in mesh]
CASES += [('data 2, expert 4', router, 'loop') for router in ('slots', 'dropless')]
CASES += [('fsdp 2, expert 2, tensor 2', 'dropless', 'loop'), ('expert 4', 'slots', 'rows')]


@pytest.mark.parametrize('mesh, router, impl', CASES)
def test_is_the_plan_of_one_device(mesh, router, impl):
  program, args = _compiled(router, impl, MESHES[mesh])
  y_GTD, counts, gradients = program(*args)
  expected_GTD, expected_counts, expected = _on_one_device(router, impl)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  close(y_GTD, expected_GTD)
  jax.tree.map(np.testing.assert_array_equal, counts, expected_counts)
  jax.tree.map(close, gradients, expected)


COLLECTIVES = r' (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(?:-start)?\('


@pytest.mark.parametrize(
  'router, sizes, expected',
  [
    ('slots', 'data 8', {'all-reduce'}),
    ('slots', 'data 2, expert 4', {'all-reduce', 'all-to-all'}),
    ('dropless', 'data 2, expert 4', {'all-reduce', 'all-gather', 'reduce-scatter'}),
  ],
)
def test_collectives(router, sizes, expected):
  program, _ = _compiled(router, 'rows', MESHES[sizes])
  found = re.findall(COLLECTIVES, program.as_text())
  print(found)
  assert set(found) == expected
