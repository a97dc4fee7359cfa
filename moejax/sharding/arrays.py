"""Shardings of the train state and of the batch, and transfers to and from the devices."""

import math
import os

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P

from moejax import parameters
from moejax.sharding import rules
from moejax.sharding.mesh import BATCH


def replicated(mesh):
  """The sharding of a replicated array."""
  return NamedSharding(mesh, P())


def state_shardings(abstract_state, mesh):
  """A NamedSharding for every array of the train state; optimizer moments like their parameters."""

  def place(path, leaf):
    of_mesh = lambda *axes: math.prod(mesh.shape[axis] for axis in axes)
    return NamedSharding(mesh, rules.spec(parameters.name_of(path), leaf.shape, of_mesh))

  return jax.tree_util.tree_map_with_path(place, abstract_state)


def abstract(make, mesh):
  """Shapes, dtypes and shardings of what `make()` returns, without running it.

  Raises:
    ValueError: on CPUs, it is larger than the memory of all hosts.
  """
  tree = jax.eval_shape(make)
  _check_memory(tree, mesh)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree,
    state_shardings(tree, mesh),
  )


def _check_memory(tree, mesh):
  """An accelerator refuses what it has no memory for; an operating system ends some program."""
  if mesh.devices.flat[0].platform == 'cpu':
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') * jax.process_count()
    if needed > memory:
      raise ValueError(
        f'the model: its arrays take {needed / 2**30:,.0f} GiB, more than the memory of '
        f'{memory / 2**30:,.0f} GiB.'
      )


def abstract_batch(data_config, mesh):
  """Shapes, dtypes and shardings of a global batch of training."""
  shape = (data_config.batch_size, data_config.sequence_length)
  leaf = jax.ShapeDtypeStruct(shape, np.int32, sharding=NamedSharding(mesh, BATCH))
  return dict.fromkeys(('inputs', 'targets', 'segments', 'positions'), leaf)


def place_batch(batch, mesh):
  """This process's sequences of a batch as global arrays, sharded over the batch axes."""
  sharding = NamedSharding(mesh, BATCH)
  place = jax.make_array_from_process_local_data
  return jax.tree.map(lambda local: place(sharding, local), batch)


def process_part(mesh, batch_size):
  """Which of `batch_size` sequences the devices of this process hold.

  Returns:
    Arguments of `data.make_loader`: their indices, in order; which of how many equal parts it is.

  Raises:
    ValueError: the parts of processes differ and overlap.
  """
  held = {}
  indices = NamedSharding(mesh, BATCH).devices_indices_map((batch_size,))
  for device, (block,) in indices.items():
    held.setdefault(device.process_index, set()).update(range(*block.indices(batch_size)))
  parts = sorted({tuple(sorted(part)) for part in held.values()})
  if sum(map(len, parts)) != batch_size:
    raise ValueError(
      f'mesh {dict(mesh.shape)}: the sequences of a batch are not divided evenly among '
      f'{len(held)} processes. Make mesh.tensor divide the devices of a process, or be a multiple.'
    )
  mine = tuple(sorted(held[jax.process_index()]))
  return {'sequences': mine, 'part': parts.index(mine), 'num_parts': len(parts)}


def fetch(tree):
  """A pytree of arrays as full numpy arrays on every process; all processes must call it."""
  return multihost_utils.process_allgather(tree, tiled=True)
