"""Mamba's scan on meshes: every device scans what it has, with the kernel that it can use."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from moejax.layers import mamba
from moejax.ops import selective_scan as scan_lib, selective_scan_tpu
from moejax.sharding import mesh as mesh_lib, platform
from tests import shapes
from tests.ops import selective_scan_test as scans

LANES = scan_lib._LANES


@pytest.fixture
def interpreted(monkeypatch):
  """Makes the kernel for TPU run anywhere, in a small tile, which is quick to compile."""
  kernel = functools.partial(scan_lib._tpu_kernel, interpret=True)
  monkeypatch.setitem(scan_lib._IMPLEMENTATIONS, 'tpu_kernel', kernel)
  for name, value in {'_ROWS': 2, '_CHUNK': 4, '_TILES': (LANES,)}.items():
    monkeypatch.setattr(selective_scan_tpu, name, value)


def _inputs(length, dtype='float64', **sizes):
  inputs = scans._inputs(length, dtype, **sizes)
  cotangents = scans._cotangents(inputs)
  del inputs['state_BNI']
  B = inputs['x_BLI'].shape[0]
  reset_BL = jnp.arange(B * length).reshape(B, length) % 7 == 3
  return inputs, reset_BL, cotangents


def _with_gradients(scan, inputs, reset_BL, cotangents):
  results, backward = jax.vjp(lambda inputs: scan(**inputs, reset_BL=reset_BL), inputs)
  return results, backward(cotangents)[0]


def _reference(*args):
  scan = functools.partial(scan_lib.selective_scan, impl='reference')
  return jax.jit(functools.partial(_with_gradients, scan))(*args)


_sharded = functools.partial(_with_gradients, mamba.sharded_scan)


def _mesh(sizes=(2, 2, 1, 2), names=mesh_lib.AXES, **options):
  return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names), **options)


def _spec(name):
  """Sequences over data and fsdp, channels over tensor, each where the array has the axis."""
  place = {'B': ('data', 'fsdp'), 'I': 'tensor'}
  return P(*(place.get(axis) for axis in shapes.suffix(name)))


def _loops(text):
  """The parts of an XLA program that lie outside its entry computation."""
  return text[: text.index('\nENTRY')]


def test_devices_scan_their_own_part_without_communication(x64):
  inputs, reset_BL, cotangents = args = _inputs(40, sequences=4, channels=8)
  expected = _reference(*args)
  mesh = _mesh()
  put = lambda v, name: jax.device_put(v, NamedSharding(mesh, _spec(name)))
  with jax.set_mesh(mesh):
    placed = {name: put(v, name) for name, v in inputs.items()}
    cotangents = put(cotangents[0], 'x_BLI'), put(cotangents[1], 'state_BNI')
    args = placed, put(reset_BL, 'reset_BL'), cotangents
    compiled = jax.jit(_sharded).lower(*args).compile()
    scans._assert_close(compiled(*args), expected, 1e-12)
  collective = r'(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\('
  text = compiled.as_text()
  assert re.search(collective, text)  # the gradients of what devices share
  assert not re.search(collective, _loops(text))
  (y_BLI, state_BNI), _ = compiled(*args)
  assert y_BLI.sharding.spec == _spec('x_BLI') and state_BNI.sharding.spec == _spec('state_BNI')


def test_devices_run_the_kernel_on_their_own_part(x64, interpreted):
  args = _inputs(5, sequences=4, channels=2 * LANES)
  expected = _reference(*args)
  mesh = _mesh()
  with jax.set_mesh(mesh), platform.compiling_for('tpu'):
    got = jax.jit(_sharded)(*jax.device_put(args, NamedSharding(mesh, P())))
  scans._assert_close(got, expected, 1e-12)
  assert got[0][0].sharding.spec == P(('data', 'fsdp'), None, 'tensor')


@pytest.mark.parametrize(
  ('channels', 'tensor', 'kernel'),
  [(128, 1, True), (130, 1, False), (128, 2, False), (256, 2, True)],
)
def test_the_kernel_goes_by_the_channels_of_a_device(channels, tensor, kernel):
  args = jax.eval_shape(lambda: _inputs(2, 'float32', channels=channels))
  with jax.set_mesh(_mesh((tensor,), ('tensor',))), platform.compiling_for('tpu'):
    program = jax.make_jaxpr(lambda *args: _sharded(*args))(*args)
  assert ('pallas_call' in str(program)) == kernel


def test_one_sequence_on_several_devices_gives_the_partitioner_no_kernel():
  args = jax.eval_shape(lambda: _inputs(2, 'float32', sequences=1, channels=LANES))
  with jax.set_mesh(_mesh((2, 2, 2, 1))), platform.compiling_for('tpu'):
    program = str(jax.make_jaxpr(lambda *args: _sharded(*args))(*args))
  assert 'pallas_call' in program and 'shard_map' in program


@pytest.mark.slow  # 10 s each; lowering, where most mistakes show, is tested with the op
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='needs libtpu: extra tpu-aot')
@pytest.mark.parametrize(
  ('topology', 'dtype'),
  [
    ('v5e:2x2', 'bfloat16'),
    ('v5e:2x2', 'float32'),
    ('v5p:2x2x1', 'bfloat16'),
    ('v6e:2x2', 'bfloat16'),
  ],
)
def test_compiles_for_tpu(monkeypatch, topology, dtype):
  """For four chips that are not there, with the largest tile."""
  for name in ('TPU_SKIP_MDS_QUERY', 'ALLOW_MULTIPLE_LIBTPU_LOAD'):
    monkeypatch.setenv(name, '1')
  devices = topologies.get_topology_desc(topology, 'tpu').devices
  mesh = _mesh((2, 2), ('fsdp', 'tensor'), devices=devices)
  channels = 2 * selective_scan_tpu._TILES[0]
  args = jax.eval_shape(lambda: _inputs(300, dtype, channels=channels))
  f = jax.jit(_sharded, in_shardings=NamedSharding(mesh, P()))
  with jax.set_mesh(mesh), platform.compiling_for('tpu'):
    text = f.trace(*args).lower(lowering_platforms=('tpu',)).compile().as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 2
