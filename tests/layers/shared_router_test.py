"""One router for all experts inside of a Mamba layer: its reference, decoding, and what it sees."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.layers import common
from moejax.model_config import SUBLAYERS
from tests import tiny

B, L, K = 3, 5, 2


def _layer(kind, dtype):
  shared = {f'{kind.removeprefix("moe_in_")}_shared_router': True}
  sizes = {'moe_capacity_factor': 0.0, 'moe_group_size': 1, 'moe_impl': 'rows'}
  config = tiny.model_config(blocks=(((kind,), 1),), d_model=8, d_ff=8, **sizes, **shared)
  init = common.Initializer('kaiming_uniform', 1.0, jnp.dtype(dtype))
  return nnx.split(SUBLAYERS[kind](config).make(init, nnx.Rngs(0)))


def _inputs(dtype):
  x_BLD, dy_BLD = np.random.default_rng(0).standard_normal((2, B, L, 8)).astype(dtype)
  return x_BLD, dy_BLD, common.TokenInfo.unpadded(x_BLD.shape)


def test_every_projection_has_the_experts_that_the_input_of_the_layer_chooses(x64):
  graph, params = _layer('moe_in_mamba', 'float64')
  x_BLD, dy_BLD, tokens = _inputs('float64')

  def layer(params, x_BLD):
    return nnx.merge(graph, params)(x_BLD, tokens)[0]

  def all_experts(params, x_BLD):
    mamba = nnx.merge(graph, params)
    scores_BLE = jax.nn.softmax(x_BLD @ mamba.router[...])
    least_BL1 = jnp.sort(scores_BLE)[..., -K, None]
    weights_BLE = jnp.where(scores_BLE >= least_BL1, scores_BLE, 0)

    def through(moe, x):
      hidden = jax.nn.relu(jnp.einsum('bld,edf->blef', x, moe.experts.w_in[...]))
      return jnp.einsum('ble,blef,efd->bld', weights_BLE, hidden, moe.experts.w_out[...])

    return mamba._forward(x_BLD, tokens, through)[0]

  def with_gradients(f, *args):
    y_BLD, backward = jax.vjp(f, *args)
    return y_BLD, backward(dy_BLD)

  got, expected = (
    jax.jit(with_gradients, static_argnums=0)(f, params, x_BLD) for f in (layer, all_experts)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), got, expected)
  assert [
    path[0].key for path, _ in jax.tree.leaves_with_path(params) if 'router' in str(path)
  ] == ['router']


def test_decoding_is_the_forward_pass_and_no_token_sees_later_ones_or_other_examples():
  graph, params = _layer('moe_in_mamba', 'float32')
  x_BLD, _, tokens = _inputs('float32')

  @jax.jit
  def run(params, x_BLD):
    layer = nnx.merge(graph, params)
    before, last = (jax.tree.map(lambda a, at=at: a[:, at], tokens) for at in (slice(L - 1), L - 1))
    prefilled, state = layer.prefill(x_BLD[:, :-1], before)
    stepped, _ = layer.step(x_BLD[:, -1], state, last)
    return layer(x_BLD, tokens)[0], jnp.concatenate([prefilled, stepped[:, None]], axis=1)

  y_BLD, decoded = run(params, x_BLD)
  np.testing.assert_allclose(decoded, y_BLD, rtol=1e-5, atol=1e-6)
  x_BLD[1, 2] *= -3
  changed_BL = np.any(run(params, x_BLD)[0] != y_BLD, axis=-1)
  assert np.argwhere(changed_BL).tolist() == [[1, 2], [1, 3], [1, 4]]
