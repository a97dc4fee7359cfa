"""Rows to experts and back: values, gradients, and that nothing is ever scattered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import dispatch, routing
from tests import shapes

G, T, E, D = 2, 7, 12, 3


def _plan(name):
  rng = np.random.default_rng(0)
  logits_GTE = jnp.asarray(rng.standard_normal((G, T, E)))
  valid_GT = rng.random((G, T)) < 0.8
  valid_GT[1, :2] = False
  if name == 'expert choice':  # a token has up to E rows, more than one pass adds
    return routing.expert_choice(logits_GTE * jnp.arange(1, 8)[None, :, None], 3, valid_GT=valid_GT)
  k, capacity, packed = {
    'slotted': (3, 1, False),
    'packed': (3, 1, True),
    'dropless': (2, None, True),
    'all experts': (E, None, True),
  }[name]
  return routing.token_choice(logits_GTE, k, capacity, valid_GT=valid_GT, packed=packed)


PLANS = ('slotted', 'packed', 'dropless', 'all experts', 'expert choice')


def _random(shape, dtype='float64'):
  return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


def _sums(rows, plan):
  """What `combine` means: every row in use, added to its token."""
  y_TD = np.zeros((G * T, D))
  used = np.asarray(plan.used)
  for row, token in zip(np.asarray(rows)[used], np.asarray(plan.token)[used], strict=True):
    y_TD[token] += row
  return y_TD


@pytest.mark.parametrize('name', PLANS)
def test_dispatch_and_its_gradient(x64, name):
  plan = _plan(name)
  x_TD = _random((G * T, D))
  rows, backward = jax.vjp(lambda x_TD: dispatch.dispatch(x_TD, plan), x_TD)
  used = np.asarray(plan.used)
  np.testing.assert_array_equal(rows[used], x_TD[plan.token[used]])
  # The gradient of an empty row is not read, whatever it is.
  d_rows = jnp.where(used[..., None], _random(rows.shape), jnp.nan)
  np.testing.assert_allclose(backward(d_rows)[0], _sums(d_rows, plan), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', PLANS)
def test_combine_and_its_gradient(x64, name):
  plan = _plan(name)
  used = np.asarray(plan.used)
  rows = jnp.where(used[..., None], _random((*used.shape, D)), jnp.nan)
  y_TD, backward = jax.vjp(lambda rows: dispatch.combine(rows, plan), rows)
  np.testing.assert_allclose(y_TD, _sums(rows, plan), rtol=1e-12, atol=1e-12)
  assert np.all(y_TD[plan.number == 0] == 0)
  dy_TD = _random((G * T, D))
  np.testing.assert_array_equal(backward(dy_TD)[0][used], dy_TD[plan.token[used]])


def test_the_plans_are_awkward(x64):
  """Dropped tokens, padding, empty experts, and tokens with more rows than one pass adds."""
  assert (_plan('slotted').number == 0).any()
  assert (_plan('slotted').sizes_E < G).any()
  assert _plan('expert choice').number.max() > 8
  assert not _plan('dropless').used.all()


@pytest.mark.parametrize('name', ['slotted', 'dropless', 'expert choice'])
def test_nothing_is_scattered(name):
  """Scattered additions come in another order from run to run on a GPU."""
  plan = _plan(name)
  f = lambda x_TD: dispatch.combine(jnp.sin(dispatch.dispatch(x_TD, plan)), plan)
  with_gradient = lambda x_TD: jax.vjp(f, x_TD)[1](x_TD)
  text = jax.jit(with_gradient).lower(jnp.ones((G * T, D))).as_text()
  assert 'gather' in text and 'scatter' not in text


def test_rows_add_up_in_float32():
  E = 256  # in bfloat16, adding a hundredth to 1 changes nothing
  plan = routing.token_choice(jnp.zeros((1, 1, E)), E, None, valid_GT=np.ones((1, 1), bool))
  rows = jnp.full((E, 1), 0.001, jnp.bfloat16).at[0].set(1)
  y = dispatch.combine(rows, plan)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), rows.astype(jnp.float32).sum(), rtol=4e-3)


@pytest.mark.parametrize('name', PLANS)
def test_names_are_true(name):
  plan = _plan(name)
  with shapes.checked():
    rows = dispatch.dispatch(jnp.ones((G * T, D)), plan)
    jax.eval_shape(functools.partial(dispatch.combine, plan=plan), rows)
