"""Every backend of the grouped product against the loops, by value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from moejax.ops import grouped_matmul
from tests import shapes
from tests.ops import oracles

# Mostly of one size, so that little needs compiling: 100 rows, 8 groups, blocks of 16 rows.
GROUPS = {
  'even': (100, [12] * 8),
  'empty groups': (100, [4, 0, 5, 0, 0, 70, 21, 0]),
  'rows beyond': (100, [3, 0, 17, 1, 2, 16, 0, 5]),
  'all to one': (100, [0, 100, 0, 0, 0, 0, 0, 0]),
  'last one only': (100, [0, 0, 0, 0, 0, 0, 0, 33]),
  'nothing': (100, [0] * 8),
  'one row': (1, [0, 1]),
  'many groups': (40, [1, 2, 0, 3] * 6),
}
BACKENDS = ('tiled', 'ragged_dot')


def _inputs(groups, dtype='float64', D=3, F=5):
  T, sizes = GROUPS[groups]
  rng = np.random.default_rng(0)
  arrays = [rng.standard_normal(s) for s in ((T, D), (len(sizes), D, F), (T, F))]
  x_TD, w_EDF, dy_TF = (jnp.asarray(a, dtype) for a in arrays)
  return x_TD, w_EDF, jnp.array(sizes, jnp.int32), dy_TF


@functools.partial(jax.jit, static_argnums=0)
def _with_gradients(impl, x_TD, w_EDF, sizes_E, dy_TF):
  product = lambda x_TD, w_EDF: grouped_matmul.grouped_matmul(x_TD, w_EDF, sizes_E, impl)
  y_TF, backward = jax.vjp(product, x_TD, w_EDF)
  return y_TF, *backward(dy_TF)


def _check(impl, groups, dtype, tolerance, poison=0.0, **sizes):
  x_TD, w_EDF, sizes_E, dy_TF = _inputs(groups, dtype, **sizes)
  total = int(sizes_E.sum())
  got = _with_gradients(impl, x_TD.at[total:].add(poison), w_EDF, sizes_E, dy_TF)
  expected = oracles.grouped_matmul(*(np.asarray(a) for a in (x_TD, w_EDF, sizes_E, dy_TF)))
  for a, b in zip(got, expected, strict=True):
    assert a.dtype == x_TD.dtype
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('impl', BACKENDS)
@pytest.mark.parametrize('groups', GROUPS)
def test_is_the_loops(x64, groups, impl):
  _check(impl, groups, 'float64', 1e-12)


@pytest.mark.parametrize('impl', BACKENDS)
def test_rows_beyond_the_groups_may_hold_anything(x64, impl):
  _check(impl, 'rows beyond', 'float64', 1e-12, poison=np.nan)


@pytest.mark.parametrize('impl', BACKENDS)
def test_bfloat16(impl):
  _check(impl, 'one row', 'bfloat16', 0.05)


def test_blocks_add_up_in_float32():
  T = 4096  # in bfloat16, sums of ones stop growing at 256
  sizes_E = jnp.array([T, 0])
  _, _, dw_EDF = _with_gradients(
    'tiled',
    jnp.ones((T, 1), jnp.bfloat16),
    jnp.ones((2, 1, 1), jnp.bfloat16),
    sizes_E,
    jnp.ones((T, 1), jnp.bfloat16),
  )
  np.testing.assert_array_equal(dw_EDF.astype(jnp.float32)[:, 0, 0], [T, 0])


def test_megablox_interpreted(monkeypatch):
  interpreted = functools.partial(grouped_matmul._megablox, interpret=True)
  monkeypatch.setitem(grouped_matmul._BACKENDS, 'megablox', interpreted)
  _check('megablox', 'rows beyond', 'float32', 1e-5, poison=np.nan, D=16, F=24)


@pytest.mark.parametrize('impl', ['megablox', 'ragged_dot'])
def test_lowers_for_tpu(impl):
  x_TD, w_EDF, sizes_E, dy_TF = _inputs('rows beyond', 'bfloat16', D=128, F=256)
  f = jax.jit(functools.partial(_with_gradients.__wrapped__, impl))
  text = export.export(f, platforms=['tpu'])(x_TD, w_EDF, sizes_E, dy_TF).mlir_module()
  assert ('tpu_custom_call' if impl == 'megablox' else 'ragged_dot') in text


def test_every_platform_has_a_backend():
  on_tpu = 'ragged_dot' if jax.__version_info__ >= (0, 11) else 'megablox'
  fastest = {name: grouped_matmul.fastest(name) for name in ('cpu', 'gpu', 'tpu')}
  assert fastest == {'cpu': 'tiled', 'gpu': 'tiled', 'tpu': on_tpu}


def test_tile_sizes():
  assert [grouped_matmul.tile_size(n) for n in (0, 1, 32, 64, 100, 512, 9999)] == [
    16, 16, 16, 32, 64, 256, 256,
  ]  # fmt: skip


def test_errors():
  x_TD, w_EDF, sizes_E, _ = _inputs('even', 'float32')
  with pytest.raises(ValueError, match='tiled, ragged_dot.*cuda'):
    grouped_matmul.grouped_matmul(x_TD, w_EDF, sizes_E, impl='cuda')
  with pytest.raises(ValueError, match='float32 and bfloat16'):
    grouped_matmul.grouped_matmul(x_TD, w_EDF.astype('bfloat16'), sizes_E, 'tiled')


def test_names_are_true():
  with shapes.checked():
    jax.eval_shape(
      lambda *a: _with_gradients.__wrapped__('tiled', *a),
      *_inputs('rows beyond', 'float32'),
    )
