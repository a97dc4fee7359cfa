"""The dense feed-forward layer."""

import jax
import numpy as np
import pytest
from flax import nnx

from moejax.layers import mlp

B, L, D, F = 2, 3, 8, 24


@pytest.mark.parametrize(
  ('activation', 'kept'), [('relu', 1), ('relu2', 1), ('gelu', 1), ('swiglu', 2)]
)
def test_only_what_the_nonlinearity_reads_is_kept_for_the_gradient(activation, kept):
  d_ff = F * 3 // 2 if activation == 'swiglu' else F
  layer = mlp.MLP(d_model=D, d_ff=d_ff, activation=activation, rngs=nnx.Rngs(0))
  graph, params = nnx.split(layer, nnx.Param)
  x_BLD = np.ones((B, L, D), np.float32)
  apply = lambda params, x_BLD: nnx.merge(graph, params)(x_BLD)[0]
  saved = jax.eval_shape(lambda *args: jax.tree.leaves(jax.vjp(apply, *args)[1]), params, x_BLD)
  assert [a.shape for a in saved].count((B, L, F)) == kept
