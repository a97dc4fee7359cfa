"""Rows to experts and back: values, gradients, and that nothing is ever scattered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import dispatch, routing
from tests import shapes

G, T, E, D = 2, 7, 12, 3


@functools.cache
def _plan(name):
  rng = np.random.default_rng(0)
  logits_GTE = np.asarray(rng.standard_normal((G, T, E)), 'float32')
  valid_GT = rng.random((G, T)) < 0.8
  valid_GT[1, :2] = False
  if name == 'expert choice':  # a token has up to E rows, more than one pass adds
    logits_GTE *= np.arange(1, 8)[:, None]
    route = functools.partial(routing.expert_choice, capacity=3)
  else:
    k, capacity, ragged = {
      'capacity': (3, 1, False),
      'ragged': (3, 1, True),
      'dropless': (2, None, True),
      'all experts': (E, None, True),
    }[name]
    route = functools.partial(routing.token_choice, k=k, capacity=capacity, ragged=ragged)
  return jax.device_get(jax.jit(route)(logits_GTE, valid_GT=valid_GT))


PLANS = ('capacity', 'ragged', 'dropless', 'all experts', 'expert choice')


@jax.jit
def _run(plan, x_TD, dy_TD, rows, d_rows):
  """Both functions and their gradients."""
  dispatched, dispatch_backward = jax.vjp(lambda x_TD: dispatch.dispatch(x_TD, plan), x_TD)
  combined_TD, combine_backward = jax.vjp(lambda rows: dispatch.combine(rows, plan), rows)
  return dispatched, dispatch_backward(d_rows)[0], combined_TD, combine_backward(dy_TD)[0]


def _random(shape):
  return np.random.default_rng(1).standard_normal(shape)


def _sums(rows, plan):
  """What `combine` means: every row in use, added to its token."""
  y_TD = np.zeros((G * T, D))
  for row, token in zip(np.asarray(rows)[plan.used], plan.token[plan.used], strict=True):
    y_TD[token] += row
  return y_TD


@pytest.mark.parametrize('name', PLANS)
def test_are_the_loops_by_value_and_gradient(x64, name):
  plan = _plan(name)
  x_TD, dy_TD = _random((2, G * T, D))
  # What is in an empty row is not read, whatever it is.
  rows, d_rows = np.where(plan.used[..., None], _random((2, *plan.used.shape, D)), np.nan)
  dispatched, dx_TD, combined_TD, combine_gradient = _run(plan, x_TD, dy_TD, rows, d_rows)
  np.testing.assert_array_equal(dispatched[plan.used], x_TD[plan.token[plan.used]])
  np.testing.assert_allclose(dx_TD, _sums(d_rows, plan), rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(combined_TD, _sums(rows, plan), rtol=1e-12, atol=1e-12)
  np.testing.assert_array_equal(combine_gradient[plan.used], dy_TD[plan.token[plan.used]])


def test_the_plans_are_awkward():
  """Dropped tokens, padding, empty experts, and tokens with more rows than one pass adds."""
  assert (_plan('capacity').rows_per_token_T == 0).any()
  assert (_plan('capacity').sizes_E < G).any()
  assert _plan('expert choice').rows_per_token_T.max() > 8
  assert not _plan('dropless').used.all()


@pytest.mark.parametrize('name', ['capacity', 'dropless', 'expert choice'])
def test_nothing_is_scattered(name):
  """Scattered additions come in another order from run to run on a GPU."""
  plan = _plan(name)
  f = lambda x_TD: dispatch.combine(jnp.sin(dispatch.dispatch(x_TD, plan)), plan)
  with_gradient = lambda x_TD: jax.vjp(f, x_TD)[1](x_TD)
  text = jax.jit(with_gradient).lower(jnp.ones((G * T, D))).as_text()
  assert 'gather' in text and 'scatter' not in text


def test_rows_add_up_in_float32():
  E = 256  # in bfloat16, adding a hundredth to 1 changes nothing
  route = functools.partial(routing.token_choice, k=E, capacity=None)
  plan = jax.jit(route)(jnp.zeros((1, 1, E)), valid_GT=np.ones((1, 1), bool))
  rows = jnp.full((E, 1), 0.001, jnp.bfloat16).at[0].set(1)
  y = jax.jit(dispatch.combine)(rows, plan)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), rows.astype(jnp.float32).sum(), rtol=4e-3)


@pytest.mark.parametrize('name', PLANS)
def test_names_are_true(name):
  plan = _plan(name)
  with shapes.checked():
    rows = jax.eval_shape(dispatch.dispatch, jnp.ones((G * T, D)), plan)
    jax.eval_shape(dispatch.combine, rows, plan)
