"""The selective scan: Mamba's own numbers reproduced, every form against the loop, its memory."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from moejax.ops import selective_scan as scan_lib
from moejax.ops.selective_scan import selective_scan, step
from tests import shapes

B, I, N = 2, 6, 3
CHUNK = scan_lib._TUNINGS['cpu'].chunk
REFERENCE = pathlib.Path(__file__).parent.parent / 'reference' / 'selective_scan.npz'
ARGUMENTS = ('x_BLI', 'delta_BLI', 'a_IN', 'b_BLN', 'c_BLN', 'skip_I', 'gate_BLI', 'bias_I')
SEQUENCES = tuple(name for name in ARGUMENTS if 'BL' in name)


def _inputs(length, dtype='float64', seed=0, sequences=B, channels=I, states=N):
  rng = np.random.default_rng(seed)
  size = {'B': sequences, 'L': length, 'I': channels, 'N': states}
  arrays = {
    name: rng.standard_normal([size[axis] for axis in shapes.suffix(name)])
    for name in (*ARGUMENTS, 'state_BNI')
  }
  arrays['a_IN'] = -np.exp(arrays['a_IN'])
  wide = 'float64' if dtype == 'float64' else 'float32'
  return {
    name: jnp.asarray(array, dtype if name in SEQUENCES else wide) for name, array in arrays.items()
  }


def _resets(length, seed=0):
  return jnp.asarray(np.random.default_rng(seed).random((B, length)) < 0.2)


@functools.partial(jax.jit, static_argnames='impl')
def _with_gradients(inputs, reset_BL, cotangents, impl):
  f = lambda inputs: selective_scan(**inputs, reset_BL=reset_BL, impl=impl)
  results, backward = jax.vjp(f, inputs)
  return results, backward(cotangents)[0]


def _cotangents(inputs, seed=1):
  rng = np.random.default_rng(seed)
  draw = lambda like: jnp.asarray(rng.standard_normal(like.shape), like.dtype)
  return draw(inputs['x_BLI']), draw(inputs['state_BNI'])


def _error(got, expected):
  """The largest difference as a fraction of the largest value."""
  got, expected = np.asarray(got, 'float64'), np.asarray(expected, 'float64')
  assert got.shape == expected.shape
  return np.abs(got - expected).max() / np.abs(expected).max(initial=1e-300)


def _assert_close(got, expected, tolerance):
  errors = jax.tree.map(_error, got, expected)
  assert max(jax.tree.leaves(errors)) < tolerance, errors


def _case(prefix):
  """Inputs, cotangents, results and gradients of a case of the reference, in our layout."""
  with np.load(REFERENCE) as arrays:
    case = {k.removeprefix(f'{prefix}/'): v for k, v in arrays.items() if k.startswith(prefix)}
  ours = {name: re.sub('_[A-Z]+$', '', name) for name in ARGUMENTS}
  theirs = {'x': 'u', 'a': 'A', 'b': 'B', 'c': 'C', 'skip': 'D', 'gate': 'z', 'bias': 'delta_bias'}

  def read(folder):
    found = {name: case.get(f'{folder}/{theirs.get(key, key)}') for name, key in ours.items()}
    return {name: _swap(array) for name, array in found.items() if array is not None}

  given = read('in')
  given['state_BNI'] = np.zeros(np.swapaxes(case['dlast'], 1, 2).shape)
  cotangents = _swap(case['dout']), _swap(case['dlast'])
  return given, cotangents, (_swap(case['out']), _swap(case['last_state'])), read('grad')


def _swap(array):
  """[batch, channel or state, position or state] <-> [batch, position or state, ...]."""
  return np.swapaxes(array, 1, 2) if array.ndim == 3 else array


@pytest.mark.parametrize('impl', ['reference', 'cpu'])
def test_reproduces_mambas_reference(x64, impl):
  given, cotangents, results, gradients = _case('full')
  got_results, got_gradients = _with_gradients(given, None, cotangents, impl)
  del got_gradients['state_BNI']
  _assert_close((got_results, got_gradients), (results, gradients), 1e-10)


@pytest.mark.parametrize('length', [1, 2, CHUNK - 1, CHUNK, CHUNK + 1])
def test_reproduces_the_start_of_mambas_reference(x64, length):
  given, _, (y_BLI, _), _ = _case('full')
  got_BLI, _ = selective_scan(**_part(given, 0, length), impl='cpu')
  _assert_close(got_BLI, y_BLI[:, :length], 1e-10)


@pytest.mark.parametrize('length', [30, 2 * CHUNK + 1, 1000])
def test_reproduces_mambas_reference_behind_another_document(x64, length):
  """The reference is the last document: what comes before it changes and receives nothing."""
  given, (dy_BLI, dlast_BNI), results, gradients = _case('full')
  B, L, I = given['x_BLI'].shape
  border = length - L
  inputs = _inputs(border, sequences=B, channels=I, states=given['a_IN'].shape[1])
  inputs |= {name: np.concatenate([inputs[name], given[name]], axis=1) for name in SEQUENCES}
  inputs |= {name: v for name, v in given.items() if name not in (*SEQUENCES, 'state_BNI')}
  cotangents = np.pad(dy_BLI, ((0, 0), (border, 0), (0, 0))), dlast_BNI
  reset_BL = jnp.zeros((B, length), bool).at[:, border].set(True)
  (y_BLI, last_BNI), got = _with_gradients(inputs, reset_BL, cotangents, 'cpu')
  _assert_close((y_BLI[:, border:], last_BNI), results, 1e-10)
  _assert_close({name: _part(got, border, length)[name] for name in gradients}, gradients, 1e-10)
  assert not any(np.any(got[name][:, :border]) for name in SEQUENCES)
  assert not np.any(got['state_BNI'])


def check_an_infinite_state_ends_with_its_document(run, inputs, border):
  """What comes after a reset is the same, gradients too, as after a finite state."""
  infinite = inputs | {'state_BNI': jnp.full_like(inputs['state_BNI'], jnp.inf)}
  reset_BL = jnp.zeros(inputs['x_BLI'].shape[:2], bool).at[:, border].set(True)

  def after_reset(inputs):
    (y_BLI, last_BNI), gradients = run(inputs, reset_BL, _cotangents(inputs))
    after = {name: gradients[name][:, border:] for name in SEQUENCES}
    shared = gradients if border == 0 else {}  # else they are sums over the first document, too
    return y_BLI[:, border:], last_BNI, shared | after

  jax.tree.map(np.testing.assert_array_equal, after_reset(infinite), after_reset(inputs))


@pytest.mark.parametrize('border', [0, CHUNK + 1])
@pytest.mark.parametrize('impl', ['reference', 'cpu'])
def test_an_infinite_state_ends_with_its_document(impl, border):
  run = functools.partial(_with_gradients, impl=impl)
  check_an_infinite_state_ends_with_its_document(run, _inputs(CHUNK + 3, 'float32'), border)


def test_reproduces_mambas_reference_without_extras(x64):
  """Its bare recurrence is ours with the inverse of softplus, no skip, and a gate of silu = 1."""
  given, cotangents, results, gradients = _case('plain')
  dt_BLI = given['delta_BLI']
  gate = 1.2784645427610737
  given |= {
    'delta_BLI': np.log(np.expm1(dt_BLI)),
    'skip_I': np.zeros(dt_BLI.shape[2]),
    'bias_I': np.zeros(dt_BLI.shape[2]),
    'gate_BLI': np.full_like(dt_BLI, gate),
  }
  got_results, got_gradients = _with_gradients(given, None, cotangents, 'cpu')
  gradients['delta_BLI'] *= -np.expm1(-dt_BLI)  # by the derivative of softplus
  got_gradients = {name: got_gradients[name] for name in gradients}
  _assert_close((got_results, got_gradients), (results, gradients), 1e-10)


@pytest.mark.parametrize('length', [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 1000])
def test_every_length_is_the_loop(x64, length):
  inputs = _inputs(length)
  args = inputs, _resets(length), _cotangents(inputs)
  _assert_close(_with_gradients(*args, 'cpu'), _with_gradients(*args, 'reference'), 1e-12)


def test_unrolled_loops_with_plain_sums_are_the_same(x64):
  inputs = _inputs(scan_lib._TUNINGS['tpu'].chunk + 5)
  args = inputs, _resets(inputs['x_BLI'].shape[1]), _cotangents(inputs)
  _assert_close(_with_gradients(*args, 'tpu'), _with_gradients(*args, 'cpu'), 1e-12)


@pytest.mark.parametrize('impl', ['reference', 'cpu'])
def test_gradients_are_numerical_ones(x64, impl):
  reset_BL = _resets(5)
  f = lambda inputs: selective_scan(**inputs, reset_BL=reset_BL, impl=impl)
  check_grads(f, (_inputs(5),), order=1, modes=['rev'], rtol=1e-6)


def test_float32_is_close_to_float64(x64):
  inputs = _inputs(200)
  args = None, _cotangents(inputs)
  narrow = jax.tree.map(lambda v: v.astype('float32'), (inputs, *args))
  _assert_close(_with_gradients(*narrow, 'cpu'), _with_gradients(inputs, *args, 'cpu'), 2e-6)


def test_bfloat16_inputs_keep_a_float32_state():
  inputs = _inputs(200, 'bfloat16')
  wide = jax.tree.map(lambda v: v.astype('float32'), inputs)
  dy_BLI, dstate_BNI = _cotangents(inputs)
  (y_BLI, state_BNI), gradients = _with_gradients(inputs, None, (dy_BLI, dstate_BNI), 'cpu')
  assert y_BLI.dtype == jnp.bfloat16 and state_BNI.dtype == jnp.float32
  assert {name: g.dtype for name, g in gradients.items()} == {
    name: v.dtype for name, v in inputs.items()
  }
  dy_BLI = dy_BLI.astype('float32')
  (wide_y_BLI, wide_state_BNI), _ = _with_gradients(wide, None, (dy_BLI, dstate_BNI), 'cpu')
  _assert_close(state_BNI, wide_state_BNI, 1e-6)  # the rounding of y does not enter the state
  _assert_close(y_BLI, wide_y_BLI, 4e-3)


def _part(inputs, start, end):
  cut = {name: inputs[name][:, start:end] for name in SEQUENCES}
  return {**inputs, **cut}


def test_packed_documents_are_separate_documents(x64):
  L, border = 40, 17
  inputs = _inputs(L)
  reset_BL = jnp.zeros((B, L), bool).at[:, border].set(True)
  cotangents = dy_BLI, dstate_BNI = _cotangents(inputs)
  packed, packed_gradients = _with_gradients(inputs, reset_BL, cotangents, 'cpu')
  zero = jnp.zeros_like(dstate_BNI)
  (y1, _), g1 = _with_gradients(_part(inputs, 0, border), None, (dy_BLI[:, :border], zero), 'cpu')
  second = {**_part(inputs, border, L), 'state_BNI': zero}
  (y2, last), g2 = _with_gradients(second, None, (dy_BLI[:, border:], dstate_BNI), 'cpu')
  _assert_close(packed, (jnp.concatenate([y1, y2], axis=1), last), 1e-12)
  for name in SEQUENCES:
    both = jnp.concatenate([g1[name], g2[name]], axis=1)
    _assert_close(packed_gradients[name], both, 1e-12)
  _assert_close(packed_gradients['a_IN'], g1['a_IN'] + g2['a_IN'], 1e-12)
  _assert_close(packed_gradients['state_BNI'], g1['state_BNI'], 1e-12)


@pytest.mark.parametrize('cut', [1, 16, 30])
def test_a_scan_goes_on_from_the_state(x64, cut):
  inputs = _inputs(40)
  whole = selective_scan(**inputs, impl='cpu')
  y1, state_BNI = selective_scan(**_part(inputs, 0, cut), impl='cpu')
  y2, state_BNI = selective_scan(**{**_part(inputs, cut, 40), 'state_BNI': state_BNI}, impl='cpu')
  _assert_close((jnp.concatenate([y1, y2], axis=1), state_BNI), whole, 1e-13)


def test_steps_are_the_scan(x64):
  L = 7
  inputs, reset_BL = _inputs(L), _resets(L)
  state_BNI, columns = inputs['state_BNI'], []
  for t in range(L):
    now = [inputs[name][:, t] if name in SEQUENCES else inputs[name] for name in ARGUMENTS]
    y_BI, state_BNI = step(*now, state_BNI, reset_BL[:, t])
    columns.append(y_BI)
  got = jnp.stack(columns, axis=1), state_BNI
  _assert_close(got, selective_scan(**inputs, reset_BL=reset_BL, impl='cpu'), 1e-13)


def test_without_a_state_it_starts_from_zero():
  inputs = _inputs(5, 'float32')
  zero = {**inputs, 'state_BNI': jnp.zeros_like(inputs['state_BNI'])}
  del inputs['state_BNI']
  got, expected = (selective_scan(**given, impl='cpu') for given in (inputs, zero))
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_vmap_and_remat_change_nothing(x64):
  one, two = _inputs(20), _inputs(20, seed=1)
  both = jax.tree.map(lambda *v: jnp.stack(v), one, two)
  total = lambda inputs: selective_scan(**inputs, impl='cpu')[0].sum()
  got = jax.jit(jax.vmap(jax.grad(jax.checkpoint(total))))(both)
  expected = jax.tree.map(lambda *v: jnp.stack(v), jax.grad(total)(one), jax.grad(total)(two))
  _assert_close(got, expected, 1e-13)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_states_of_all_positions_never_exist(dtype):
  inputs = jax.eval_shape(lambda: _inputs(512, dtype, channels=64, states=16))
  lowered = _with_gradients.lower(inputs, None, (inputs['x_BLI'], inputs['state_BNI']), 'cpu')
  memory = lowered.compile().memory_analysis()
  visible = memory.argument_size_in_bytes + memory.output_size_in_bytes
  assert memory.temp_size_in_bytes < min(2 * visible, 4 * B * 512 * 16 * 64)  # all states


def test_unknown_implementations_are_refused():
  with pytest.raises(ValueError, match='one of reference, cpu, gpu, tpu, tpu_kernel; got .cuda'):
    selective_scan(**_inputs(2, 'float32'), impl='cuda')


def test_names_are_true():
  inputs = _inputs(9, 'float32')
  for impl in ('reference', 'cpu'):
    with shapes.checked():
      jax.eval_shape(
        lambda *args: _with_gradients.__wrapped__(*args, impl),  # noqa: B023
        inputs,
        _resets(9),
        _cotangents(inputs),
      )
