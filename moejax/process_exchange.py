"""Bytes that one process of a run gives to another, over the links of their devices.

All processes make every call. Their bytes may differ in length; they pass part by part, so that a
device never holds more than one.
"""

import functools

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

_PART = 1 << 26  # bytes that pass at once


def from_neighbour(data: bytes) -> bytes:
  """What the process before this one, process N - 1 for process 0, gives to the next."""
  before = (jax.process_index() - 1) % jax.process_count()
  lengths = _lengths(data)
  part = min(_PART, max(lengths))
  mesh = _one_device_each()
  sharding = NamedSharding(mesh, P('process'))
  received = bytearray()
  with jax.set_mesh(mesh):
    for start in range(0, max(lengths), part or 1):
      mine = jax.make_array_from_process_local_data(sharding, _cut(data, start, part)[None])
      received += np.asarray(_pass_on(mesh)(mine).addressable_shards[0].data).tobytes()
  return bytes(received[: lengths[before]])


def from_process(source: int, data: bytes) -> bytes:
  """What the process `source` gives to all; the `data` of others is not used."""
  length = _lengths(data)[source]
  is_source = jax.process_index() == source
  received = bytearray()
  for start in range(0, length, _PART):
    part = _cut(data, start, min(_PART, length - start))
    received += np.asarray(multihost_utils.broadcast_one_to_all(part, is_source)).tobytes()
  return bytes(received)


def _lengths(data):
  """Of every process; halves, as there are no integers of 64 bits on devices."""
  halves = np.array(divmod(len(data), _PART), np.int32)
  gathered = multihost_utils.process_allgather(halves).reshape(-1, 2)
  return [int(high) * _PART + int(low) for high, low in gathered]


def _cut(data, start, length):
  """`length` bytes from `start` on, with zeros after the end."""
  part = np.zeros(length, np.uint8)
  found = np.frombuffer(data[start : start + length], np.uint8)
  part[: len(found)] = found
  return part


@functools.cache
def _one_device_each():
  first = {device.process_index: device for device in reversed(jax.devices())}
  return Mesh(np.array([first[i] for i in range(jax.process_count())]), ('process',))


@functools.cache
def _pass_on(mesh):
  ring = [(i, (i + 1) % mesh.size) for i in range(mesh.size)]
  shift = lambda x_PB: jax.lax.ppermute(x_PB, 'process', ring)
  return jax.jit(jax.shard_map(shift, mesh=mesh, in_specs=P('process'), out_specs=P('process')))
