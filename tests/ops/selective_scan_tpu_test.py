"""The kernel for TPU: interpreted against the loop, lowered and compiled without a TPU."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from moejax.ops import selective_scan as scan_lib, selective_scan_tpu
from moejax.ops.selective_scan import selective_scan
from moejax.sharding import mesh as mesh_lib, platform
from tests import shapes
from tests.ops import selective_scan_test as scans
from tests.ops.sparse_layer import QUICK_TO_COMPILE

LANES = scan_lib._LANES
CHUNK = 4


@pytest.fixture
def interpreted(monkeypatch):
  """Makes the kernel run anywhere, in small groups, which are quick to compile."""
  interpreted = functools.partial(scan_lib._tpu_kernel, interpret=True)
  monkeypatch.setitem(scan_lib._IMPLEMENTATIONS, 'tpu_kernel', interpreted)
  monkeypatch.setattr(selective_scan_tpu, '_ROWS', CHUNK // 2)
  monkeypatch.setattr(selective_scan_tpu, '_CHUNK', CHUNK)
  monkeypatch.setattr(selective_scan_tpu, '_TILES', (LANES,))


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK_TO_COMPILE)
def _with_gradients(impl, *args):
  return scans._with_gradients.__wrapped__(*args, impl)


def _case(length, dtype, channels=LANES, **sizes):
  inputs = scans._inputs(length, dtype, channels=channels, **sizes)
  return inputs, scans._resets(length, seed=2), scans._cotangents(inputs)


# One tile and two; one group, a part of one, whole chunks, one position more.
@pytest.mark.parametrize(
  ('length', 'channels'), [(1, 128), (CHUNK - 1, 128), (2 * CHUNK, 256), (2 * CHUNK + 1, 128)]
)
def test_is_the_loop(x64, interpreted, length, channels):
  args = _case(length, 'float64', channels)
  assert args[1].any() == (length > 1)
  got, expected = (_with_gradients(impl, *args) for impl in ('tpu_kernel', 'reference'))
  scans._assert_close(got, expected, 1e-12)


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-6), ('bfloat16', 4e-3)])
def test_narrow_dtypes(interpreted, dtype, tolerance):
  args = _case(CHUNK + 1, dtype)
  got, expected = (_with_gradients(impl, *args) for impl in ('tpu_kernel', 'reference'))
  assert jax.tree.map(lambda v: v.dtype, got) == jax.tree.map(lambda v: v.dtype, expected)
  scans._assert_close(got, expected, tolerance)
  scans._assert_close(got[0][1], expected[0][1], 1e-6)  # the state stays wide


@pytest.mark.parametrize('border', [0, CHUNK + 1])
def test_an_infinite_state_ends_with_its_document(interpreted, border):
  inputs, _, _ = _case(CHUNK + 3, 'float32')
  run = functools.partial(_with_gradients, 'tpu_kernel')
  scans.check_an_infinite_state_ends_with_its_document(run, inputs, border)


def test_devices_run_it_on_their_own_part(x64, interpreted):
  inputs, reset_BL, cotangents = _case(CHUNK + 1, 'float64', 2 * LANES, sequences=4)
  reset_BL = jnp.concatenate([reset_BL, ~reset_BL])
  args = inputs, reset_BL, cotangents
  names = (*mesh_lib.BATCH_AXES, scan_lib.CHANNEL_AXIS)
  mesh = jax.make_mesh((2, 2, 1, 2), names, axis_types=(AxisType.Auto,) * 4)
  expected = _with_gradients('reference', *args)
  with jax.set_mesh(mesh):
    got = _with_gradients('tpu_kernel', *jax.device_put(args, NamedSharding(mesh, P())))
  scans._assert_close(got, expected, 1e-12)
  assert got[0][0].sharding.spec == P(('data', 'fsdp'), None, 'tensor')


def test_names_are_true(interpreted):
  args = jax.eval_shape(lambda: _case(CHUNK + 1, 'float32'))
  with shapes.checked():
    jax.eval_shape(functools.partial(_with_gradients.__wrapped__, 'tpu_kernel'), *args)


def test_channels_that_do_not_fill_the_lanes_are_refused():
  with pytest.raises(ValueError, match='multiples of 128, got 130'):
    jax.eval_shape(lambda: _with_gradients('tpu_kernel', *_case(1, 'float32', 130)))


@pytest.mark.parametrize(
  ('channels', 'tensor', 'kernel'),
  [(128, 1, True), (130, 1, False), (128, 2, False), (256, 2, True)],
)
def test_auto_goes_by_the_channels_of_a_device(channels, tensor, kernel):
  inputs = jax.eval_shape(lambda: scans._inputs(2, 'float32', channels=channels))
  mesh = jax.make_mesh((tensor,), ('tensor',), axis_types=(AxisType.Auto,))
  with jax.set_mesh(mesh), platform.compiling_for('tpu'):
    program = jax.make_jaxpr(lambda inputs: selective_scan(**inputs))(inputs)
  assert ('pallas_call' in str(program)) == kernel


IN_XLA = sorted(scan_lib._IMPLEMENTATIONS.keys() - {'tpu_kernel'})


@pytest.mark.parametrize(
  ('impl', 'platform'),
  [('tpu_kernel', 'tpu'), *((impl, platform) for impl in IN_XLA for platform in ('tpu', 'cuda'))],
)
def test_lowers_for_accelerators(impl, platform):
  args = jax.eval_shape(lambda: _case(300, 'bfloat16', states=16))
  f = jax.jit(functools.partial(_with_gradients.__wrapped__, impl))
  text = jax.export.export(f, platforms=[platform])(*args).mlir_module()
  assert text.count('custom_call @tpu_custom_call') == (2 if impl == 'tpu_kernel' else 0)


@pytest.mark.slow  # 10 s each; lowering, where most mistakes show, is tested above
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
  mesh = jax.make_mesh((2, 2), ('fsdp', 'tensor'), devices=devices, axis_types=(AxisType.Auto,) * 2)
  channels = 2 * selective_scan_tpu._TILES[0]
  args = jax.eval_shape(lambda: _case(300, dtype, channels, states=16))
  f = jax.jit(
    functools.partial(_with_gradients.__wrapped__, 'tpu_kernel'),
    in_shardings=NamedSharding(mesh, P()),
  )
  with jax.set_mesh(mesh):
    text = f.trace(*args).lower(lowering_platforms=('tpu',)).compile().as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 2
