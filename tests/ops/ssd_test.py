"""State-space duality: chunks against the loop, and against the recurrence of Mamba-1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import selective_scan, ssd
from tests import shapes
from tests.ops.selective_scan_test import _assert_close

B, L, H, P, N = 2, 23, 6, 4, 5
ARGUMENTS = ('x_BLHP', 'delta_BLH', 'a_H', 'b_BLGN', 'c_BLGN', 'skip_H', 'bias_H', 'state_BHNP')


def inputs(groups, dtype='float64', sequences=B, length=L):
  """Arguments by name, resets in the middle of chunks and elsewhere, and cotangents."""
  rng = np.random.default_rng(0)
  size = {'B': sequences, 'L': length, 'H': H, 'P': P, 'G': groups, 'N': N}
  draw = lambda axes: jnp.asarray(rng.standard_normal([size[axis] for axis in axes]), dtype)
  arrays = {name: draw(shapes.suffix(name)) for name in ARGUMENTS}
  arrays['a_H'] = -jnp.exp(arrays['a_H'])
  reset_BL = jnp.asarray(rng.random((sequences, length)) < 0.1).at[0, :8].set(False)
  return arrays, reset_BL, (draw('BLHP'), draw('BHNP'))


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(run, arrays, reset_BL, cotangents):
  results, backward = jax.vjp(lambda arrays: run(**arrays, reset_BL=reset_BL), arrays)
  return results, backward(cotangents)[0]


@pytest.mark.parametrize(('groups', 'chunk'), [(1, 64), (2, 7)])
def test_chunks_are_the_loop(x64, groups, chunk):
  args = inputs(groups)
  got = with_gradients(functools.partial(ssd.ssd, chunk=chunk), *args)
  _assert_close(got, with_gradients(ssd.recurrence, *args), 1e-13)


def test_the_loop_is_that_of_mamba_with_one_decay_per_head(x64):
  def of_mamba(x_BLHP, delta_BLH, a_H, b_BLGN, c_BLGN, skip_H, bias_H, state_BHNP, reset_BL):
    by_channel = lambda v: jnp.repeat(v, P, axis=-1)
    x_BLI = x_BLHP.reshape(B, L, H * P)
    y_BLI, state_BNI = selective_scan.selective_scan(
      x_BLI,
      by_channel(delta_BLH),
      jnp.repeat(by_channel(a_H)[:, None], N, axis=1),
      b_BLGN[:, :, 0],
      c_BLGN[:, :, 0],
      by_channel(skip_H),
      jnp.full_like(x_BLI, 1.2784645427610737),  # a gate of silu = 1
      by_channel(bias_H),
      state_BNI=jnp.moveaxis(state_BHNP, 1, 2).reshape(B, N, H * P),
      reset_BL=reset_BL,
      impl='reference',
    )
    state_BHNP = jnp.moveaxis(state_BNI.reshape(B, N, H, P), 2, 1)
    return y_BLI.reshape(B, L, H, P), state_BHNP

  args = inputs(1)
  _assert_close(with_gradients(ssd.recurrence, *args), with_gradients(of_mamba, *args), 1e-13)


def test_bfloat16_inputs_keep_a_float32_state():
  arrays, reset_BL, _ = inputs(2, 'float32')
  narrow = {k: v.astype('bfloat16') if 'BL' in k else v for k, v in arrays.items()}
  wide = {k: v.astype('float32') for k, v in narrow.items()}
  run = jax.jit(functools.partial(ssd.ssd, chunk=8))
  y_BLHP, state_BHNP = run(**narrow, reset_BL=reset_BL)
  assert y_BLHP.dtype == jnp.bfloat16 and state_BHNP.dtype == jnp.float32
  _assert_close((y_BLHP, state_BHNP), ssd.recurrence(**wide, reset_BL=reset_BL), 1e-2)


def test_groups_divide_heads():
  with pytest.raises(ValueError, match='4 groups must divide 6 heads'):
    ssd.recurrence(**inputs(4, 'float32')[0])


def test_names_are_true():
  for run in (functools.partial(ssd.ssd, chunk=7), ssd.recurrence):
    with shapes.checked():
      jax.eval_shape(functools.partial(with_gradients.__wrapped__, run), *inputs(3, 'float32'))
