"""Meshes: sizes that fit, and slices of a TPU."""

import pytest

from moejax import sharding
from moejax.sharding import mesh as mesh_lib


@pytest.mark.parametrize(
  'sizes, message',
  [
    ((3, 1, 1, 1), 'does not fit 8 devices'),
    ((-1, -1, 1, 1), 'at most one -1'),
    ((0, 1, 1, 1), 'must be positive'),
    ((-1, 3, 1, 1), 'does not fit 8 devices'),
  ],
)
def test_impossible_meshes_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(sharding.MeshConfig(*sizes))


@pytest.mark.parametrize(
  'shape, slices, inside, between',
  [
    ((8, 2, 4, 1), 4, [2, 2, 4, 1], [4, 1, 1, 1]),
    ((1, 8, 4, 1), 4, [1, 2, 4, 1], [1, 4, 1, 1]),
  ],
)
def test_slices_lie_along_an_outer_axis(shape, slices, inside, between):
  assert mesh_lib.by_slices(shape, slices) == (inside, between)


def test_slices_that_fit_no_axis_are_refused():
  with pytest.raises(ValueError, match='the 2 slices must divide mesh.data or mesh.fsdp'):
    mesh_lib.by_slices((1, 1, 32, 1), 2)
