"""Where a program runs and where its arrays live: mesh, placement rules, groups, collectives."""

from moejax.sharding.arrays import (
  abstract,
  abstract_batch,
  fetch,
  place_batch,
  process_part,
  replicated,
  state_shardings,
)
from moejax.sharding.mesh import AXES, BATCH, MeshConfig, batch_shards, make_mesh

__all__ = [
  'AXES',
  'BATCH',
  'MeshConfig',
  'abstract',
  'abstract_batch',
  'batch_shards',
  'fetch',
  'make_mesh',
  'place_batch',
  'process_part',
  'replicated',
  'state_shardings',
]
