"""The kernel for TPU: interpreted against the loop, lowered and compiled without a TPU."""

import functools

import jax
import pytest

from moejax.ops import selective_scan as scan_lib, selective_scan_tpu
from tests import shapes
from tests.ops import selective_scan_test as scans

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


@functools.partial(jax.jit, static_argnums=0)
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


def test_names_are_true(interpreted):
  args = jax.eval_shape(lambda: _case(CHUNK + 1, 'float32'))
  with shapes.checked():
    jax.eval_shape(functools.partial(_with_gradients.__wrapped__, 'tpu_kernel'), *args)


def test_channels_that_do_not_fill_the_lanes_are_refused():
  with pytest.raises(ValueError, match='multiples of 128, got 130'):
    jax.eval_shape(lambda: _with_gradients('tpu_kernel', *_case(1, 'float32', 130)))


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
