"""Where a program runs and where its arrays live: mesh, placement rules, groups, collectives."""

# ruff: noqa: F401 (what programs use of it)

from moejax.sharding.arrays import (
  abstract,
  abstract_batch,
  fetch,
  place_batch,
  process_part,
  replicated,
  state_shardings,
)
from moejax.sharding.mesh import (
  AXES,
  BATCH,
  MeshConfig,
  abstract_mesh,
  batch_shards,
  describe,
  make_mesh,
)
