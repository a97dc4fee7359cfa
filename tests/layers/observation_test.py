"""What layers with experts say they did with every token, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import sharding
from moejax.layers import MixtureOfExperts, MixtureOfTokens, TokenInfo

B, L, D, E, M = 8, 5, 12, 4, 4
LAYERS = {
  'token choice, some dropped': (MixtureOfExperts, {'capacity_factor': 0.7}),
  'token choice, nobody dropped': (MixtureOfExperts, {'capacity_factor': 0.0}),
  'expert choice': (MixtureOfExperts, {'router': 'expert_choice'}),
  'mixture of tokens': (MixtureOfTokens, {'num_experts': E, 'expert_width': 8}),
}
# Tokens or slots go to the devices of their experts, or mixtures do.
ON_A_MESH = ('token choice, nobody dropped', 'expert choice', 'mixture of tokens')


def _make(kind):
  layer, changes = LAYERS[kind]
  if layer is MixtureOfExperts:
    changes = {'expansion_rate': E // 2, 'granularity': 2, **changes}
  return layer(d_model=D, d_ff=8, group_size=M, rngs=nnx.Rngs(0), **changes)


def _outputs(layer, x_ND):
  """Of every expert, for the same inputs."""
  w_in, w_out = np.asarray(layer.experts.w_in), np.asarray(layer.experts.w_out)
  return np.maximum(x_ND @ w_in, 0) @ w_out


@pytest.mark.parametrize('kind', LAYERS)
def test_outputs_are_made_of_the_weights_that_are_observed(kind):
  layer = _make(kind)
  x_BLD = np.random.default_rng(0).standard_normal((B, L, D)).astype(np.float32)
  tokens = TokenInfo.unpadded(x_BLD.shape)
  tokens = tokens._replace(segments=tokens.segments.at[1, 3:].set(0))
  graph, state = nnx.split(layer)

  @jax.jit
  def run(state, x_BLD):
    plain, aux = nnx.merge(graph, state)(x_BLD, tokens)
    y_BLD, seen = nnx.merge(graph, state)(x_BLD, tokens._replace(observed=True))
    return plain, y_BLD, {name: seen[name] for name in seen.keys() - aux.keys()}

  plain, y_BLD, seen = run(state, x_BLD)
  np.testing.assert_array_equal(plain, y_BLD)
  prefix = 'mot' if kind == 'mixture of tokens' else 'moe'
  assert seen.keys() == {f'{prefix}/{name}' for name in ('logits', 'weights', 'products')}
  weights_BLE = seen[f'{prefix}/weights']
  assert not weights_BLE[1, 3:].any()

  if prefix == 'moe':
    inputs = x_BLD.reshape(-1, D)
    out = np.einsum(
      'eBLD,BLe->BLD', _outputs(layer, x_BLD.reshape(1, -1, D)).reshape(E, B, L, D), weights_BLE
    )
    inputs = inputs[np.asarray(tokens.segments).reshape(-1) > 0]
  else:
    grouped = weights_BLE.reshape(B // M, M, L, E)
    mixed = np.einsum('gmle,gmlD->elgD', grouped, x_BLD.reshape(B // M, M, L, D))
    of_expert = _outputs(layer, mixed.reshape(E, -1, D)).reshape(mixed.shape)
    out = np.einsum('gmle,elgD->gmlD', grouped, of_expert).reshape(B, L, D)
    inputs = mixed.reshape(-1, D)
  np.testing.assert_allclose(out, y_BLD, atol=1e-5)
  outputs = _outputs(layer, inputs[None]).reshape(E, -1)
  np.testing.assert_allclose(seen[f'{prefix}/products'], outputs @ outputs.T, rtol=1e-4, atol=1e-6)

  if kind not in ON_A_MESH:
    return
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 4, 2, 1))
  with jax.set_mesh(mesh):
    spread = jax.tree.map(jnp.asarray, run(state, sharding.place_batch(x_BLD, mesh)))
  for name, values in spread[2].items():
    np.testing.assert_allclose(values, seen[name], rtol=1e-4, atol=1e-6, err_msg=name)
