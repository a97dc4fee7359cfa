"""From names of parameters to mesh axes."""

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from moejax import sharding
from moejax.sharding import rules


def test_experts_too_few_for_fsdp_are_sharded_by_their_width():
  sizes = {'fsdp': 4, 'expert': 2, 'tensor': 1, 'data': 1}
  of_mesh = lambda *axes: int(np.prod([sizes[axis] for axis in axes]))
  assert rules.spec('experts/w_in', (16, 12, 5), of_mesh) == P(('expert', 'fsdp'), None, 'tensor')
  assert rules.spec('experts/w_in', (4, 12, 5), of_mesh) == P('expert', 'fsdp', 'tensor')
  assert rules.spec('experts/w_out', (4, 5, 6), of_mesh) == P('expert', 'tensor', None)


def test_a_dimension_that_does_not_divide_is_not_sharded():
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1, 8))
  params = {'head': jax.ShapeDtypeStruct((12, 37), 'float32')}
  spec = sharding.state_shardings(params, mesh)['head'].spec
  assert spec == P(('fsdp', 'expert'), None)
