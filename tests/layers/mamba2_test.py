"""The Mamba-2 layer: transformers' numbers reproduced, its initialisation, documents, decoding."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax.layers import common, mamba2
from moejax.ops import ssd
from moejax.sharding import mesh as mesh_lib
from tests import shapes
from tests.layers import mamba_test
from tests.layers.mamba_test import _forward, _prefill, _steps
from tests.ops import ssd_test
from tests.ops.selective_scan_test import _assert_close

B, L, D = mamba_test.B, mamba_test.L, mamba_test.D
REFERENCE = pathlib.Path(__file__).parent.parent / 'reference' / 'hf_mamba2_mixer.npz'
SIZES = {'state_size': 3, 'head_width': 4, 'groups': 2}


def _layer(d_model=D, dtype='float32', **sizes):
  init = common.Initializer(dtype=jnp.dtype(dtype))
  return mamba2.Mamba2(d_model=d_model, init=init, rngs=nnx.Rngs(0), **SIZES | sizes)


@pytest.fixture
def random_layer(x64):
  """A layer, as (graph, parameters), in which every parameter matters, in small chunks."""
  graph, params = nnx.split(_layer(dtype='float64'))
  rng = np.random.default_rng(0)
  return graph, jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape), params)


def test_reproduces_transformers(monkeypatch):
  monkeypatch.setitem(ssd.CHUNKS, 'cpu', 4)
  with np.load(REFERENCE) as arrays:
    reference = dict(arrays)

  def ours(prefix):
    theirs = {k.removeprefix(prefix): v for k, v in reference.items() if k.startswith(prefix)}
    parts = np.split(theirs['in_proj.weight'].T, [40, 80, 100], axis=1)
    kernel = theirs['conv1d.weight'][:, 0].T
    return dict(zip(('w_gate', 'w_in', 'w_bc', 'w_delta'), parts, strict=True)) | {
      'conv_kernel': kernel[:, :40],
      'bc_kernel': kernel[:, 40:],
      'conv_bias': theirs['conv1d.bias'][:40],
      'bc_bias': theirs['conv1d.bias'][40:],
      'delta_bias': theirs['dt_bias'],
      'log_rate': theirs['A_log'],
      'skip': theirs['D'],
      'norm_scale': theirs['norm.weight'],
      'w_out': theirs['out_proj.weight'].T,
    }

  got = mamba_test.run_with(_layer(d_model=20, state_size=5), ours('w.'), reference)
  _assert_close(got, (reference['y'], (ours('g.'), reference['dx'])), 5e-6)


def test_starts_as_the_reference_does():
  layer = _layer(d_model=512, head_width=8, groups=1, state_size=16)  # 128 heads
  steps, rates = jax.nn.softplus(layer.delta_bias[...]), jnp.exp(layer.log_rate[...])
  assert 0.999e-3 < steps.min() < 2e-3 and 0.06 < steps.max() < 0.1001
  assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16.0001 and 7 < rates.mean() < 10
  for name in ('skip', 'norm_scale'):
    np.testing.assert_array_equal(getattr(layer, name)[...], 1)
  fan_in = dict.fromkeys(('w_in', 'w_gate', 'w_bc', 'w_delta'), 512) | {'w_out': 1024}
  fan_in |= dict.fromkeys(('conv_kernel', 'conv_bias', 'bc_kernel'), 4)
  for name, n in fan_in.items():
    largest = np.abs(getattr(layer, name)[...]).max() * n**0.5
    assert 0.97 < largest <= 1.0001, name


def test_prefill_and_steps_are_the_forward_pass(random_layer, monkeypatch):
  """With documents, before and behind the cut, inside of chunks."""
  monkeypatch.setitem(ssd.CHUNKS, 'cpu', 3)
  x_BLD, tokens = mamba_test._x('float64'), mamba_test._tokens(0, 2, 6)
  expected = _forward(*random_layer, x_BLD, tokens)
  empty = nnx.merge(*random_layer).init_state(B, L, jnp.float64)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)
  close(_steps(*random_layer, empty, x_BLD, tokens), expected)
  split = lambda part: jax.tree.map(lambda v: v[:, part], (x_BLD, tokens))
  y_BLD, state = _prefill(*random_layer, *split(slice(4)))
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, empty)
  close(y_BLD, expected[:, :4])
  close(_steps(*random_layer, state, *split(slice(4, None))), expected[:, 4:])
  # Padding behind the prompt changes nothing.
  padded = mamba_test._tokens(0, 2)
  padded = padded._replace(segments=padded.segments.at[:, 4:].set(0))
  jax.tree.map(close, _prefill(*random_layer, x_BLD, padded)[1], state)


def test_packed_documents_are_separate_documents(random_layer, monkeypatch):
  monkeypatch.setitem(ssd.CHUNKS, 'cpu', 4)
  x_BLD, border = mamba_test._x('float64'), 5
  packed = _forward(*random_layer, x_BLD, mamba_test._tokens(0, border))
  first = _forward(*random_layer, x_BLD[:, :border], mamba_test._tokens(0, length=border))
  second = _forward(*random_layer, x_BLD[:, border:], mamba_test._tokens(0, length=L - border))
  expected = jnp.concatenate([first, second], axis=1)
  np.testing.assert_allclose(packed, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.heavy
def test_devices_compute_their_own_heads(x64):
  """With three groups of heads on two devices."""
  arrays, reset_BL, cotangents = ssd_test.inputs(3, sequences=4)
  del arrays['state_BHNP']
  expected = ssd_test.with_gradients(ssd.recurrence, arrays, reset_BL, cotangents)
  mesh = jax.make_mesh((2, 2, 1, 2), mesh_lib.AXES, axis_types=(AxisType.Auto,) * 4)
  with jax.set_mesh(mesh):
    args = jax.device_put((arrays, reset_BL, cotangents), NamedSharding(mesh, PartitionSpec()))
    got = ssd_test.with_gradients(mamba2.sharded_ssd, *args)
    _assert_close(got, expected, 1e-12)
  assert got[0][0].sharding.spec == PartitionSpec(('data', 'fsdp'), None, 'tensor')
  assert got[0][1].sharding.spec == PartitionSpec(('data', 'fsdp'), 'tensor')


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ({'head_width': 64}, 'head_width = 64: .* 24 channels are no head; set it to 24 or less'),
    ({'groups': 4}, 'groups = 4 must divide the heads, .* = 6'),
  ],
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    _layer(**sizes)


def test_names_are_true():
  graph, params = nnx.split(_layer())
  x_BLD, tokens = mamba_test._x(), mamba_test._tokens(0)
  with shapes.checked():
    jax.eval_shape(lambda p: _prefill.__wrapped__(graph, p, x_BLD, tokens), params)
    layer = nnx.merge(graph, params)
    now = jax.tree.map(lambda v: v[:, 0], tokens)
    layer.step(x_BLD[:, 0], layer.init_state(B, L, jnp.float32), now)
