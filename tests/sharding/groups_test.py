"""Mixing groups: whole on every mesh, and back where they came from, by one all-to-all."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import sharding
from moejax.sharding import groups

B, L, M = 8, 5, 4
MESHES = {
  'data 8': (8, 1, 1, 1),
  'data 2, expert 4': (2, 1, 4, 1),
  'fsdp 2, expert 2, tensor 2': (1, 2, 2, 2),
  'data 2, tensor 4': (2, 1, 1, 4),
}
# Every token is its sequence and its position.
TOKENS = np.stack(np.meshgrid(np.arange(B), np.arange(1, L + 1), indexing='ij'), axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _there_and_back(size, x, order_B):
  grouped = groups.Groups(B, L, size, order_B)
  split = grouped.split(x)
  return split, grouped.join(split)


def _run(sizes, size, order_B):
  if sizes is None:
    split, joined = _there_and_back(size, TOKENS, order_B)
    return np.asarray(split), np.asarray(joined), ''
  mesh = sharding.make_mesh(sharding.MeshConfig(*sizes))
  with jax.set_mesh(mesh):
    x = jax.device_put(TOKENS, jax.NamedSharding(mesh, sharding.BATCH))
    compiled = _there_and_back.lower(size, x, order_B).compile()
    split, joined = compiled(x, order_B)
    return np.asarray(split), np.asarray(joined), compiled.as_text()


@pytest.mark.parametrize('order', ['batch', 'random'])
@pytest.mark.parametrize('sizes', [None, *MESHES.values()], ids=['no mesh', *MESHES])
def test_a_group_is_the_same_sequences_at_one_position_on_every_mesh(sizes, order):
  order_B = None if order == 'batch' else np.random.default_rng(0).permutation(B)
  split, joined, program = _run(sizes, M, order_B)
  np.testing.assert_array_equal(joined, TOKENS)
  sequences = np.arange(B) if order_B is None else order_B
  expected = {
    tuple((b, l) for b in sequences[first : first + M])
    for first in range(0, B, M)
    for l in range(1, L + 1)
  }
  got = [tuple(map(tuple, row)) for row in split.tolist() if row[0][1]]  # position 0 is padding
  assert len(got) == len(expected) and set(got) == expected
  assert not re.search(r' (all-gather|all-reduce|collective-permute)\(', program)
  swaps = len(re.findall(r' all-to-all\(', program))
  local = sizes is None or (order == 'batch' and sizes == MESHES['data 2, tensor 4'])
  assert swaps == (0 if local else 2)


def test_a_batch_that_does_not_divide_among_the_devices_is_grouped_all_the_same():
  mesh = sharding.make_mesh(sharding.MeshConfig(8, 1, 1, 1))
  with jax.set_mesh(mesh):
    grouped = groups.Groups(6, L, 3)
    x = jnp.asarray(TOKENS[:6])
    split = grouped.split(x)
    assert split.shape == (2 * L, 3, 2)
    np.testing.assert_array_equal(grouped.join(split), x)
