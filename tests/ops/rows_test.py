"""Products of rows: the form for CPUs against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import rows


@pytest.mark.parametrize(
  'summed, kept', [((3,), (5,)), ((5,), (3,)), ((2, 3), (5,)), ((4,), (2, 3))]
)
def test_product_and_gradients(x64, summed, kept):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
  x, w, dy = draw(7, *summed), draw(*summed, *kept), draw(7, *kept)
  expected, expected_vjp = jax.vjp(rows.reference, x, w)
  got, vjp = jax.vjp(jax.jit(rows.product), x, w)
  for a, b in zip((got, *vjp(dy)), (expected, *expected_vjp(dy)), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)
  np.testing.assert_allclose(got, np.tensordot(x, w, len(summed)), rtol=1e-13, atol=1e-13)


def test_every_matrix_of_a_stack_has_its_own_gradient(x64):
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.standard_normal(shape)) for shape in ((2, 7, 3), (2, 3, 5)))
  gradients = (
    jax.grad(lambda x, w, form=form: jnp.sum(jnp.sin(jax.vmap(form)(x, w))), (0, 1))(x, w)
    for form in (rows.product, rows.reference)
  )
  for a, b in zip(*gradients, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-13)
