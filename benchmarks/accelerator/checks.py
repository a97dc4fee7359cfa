"""What part `values` checks: ops and layers, and plain forms of them."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import layers
from moejax.layers import attention, mamba
from moejax.ops import (
  cross_entropy,
  dispatch,
  expert_loop,
  grouped_matmul,
  mixing,
  routing,
  sampling,
  selective_scan,
  ssd,
)


@dataclasses.dataclass(frozen=True)
class Check:
  """An op, and what it must equal.

  Both take the activations, the parameters and the rest, in this order, and return a pytree.
  Activations are cast to the dtype; gradients are by them and by the parameters.
  """

  op: Callable
  reference: Callable
  activations: tuple
  parameters: tuple = ()
  rest: tuple = ()


@dataclasses.dataclass(frozen=True)
class Sizes:
  B: int = 8
  L: int = 256
  D: int = 256
  F: int = 256
  E: int = 8
  H: int = 4
  I: int = 512
  N: int = 16
  V: int = 1000

  @property
  def T(self):
    return self.B * self.L


FULL = Sizes()
TINY = Sizes(B=4, L=12, D=16, F=24, E=4, H=2, I=128, N=4, V=37)


def _normal(rng, *shape):
  return rng.standard_normal(shape).astype(np.float32)


def _documents(rng, s):
  """Segments and positions of packed documents."""
  starts_BL = rng.random((s.B, s.L)) < 4 / s.L
  starts_BL[:, 0] = True
  places_L = np.arange(s.L)
  first_BL = np.maximum.accumulate(np.where(starts_BL, places_L, 0), axis=1)
  positions_BL = (places_L - first_BL).astype(np.int32)
  return np.cumsum(starts_BL, axis=1, dtype=np.int32), positions_BL


def _scan(impl, rng, s):
  x, delta, gate = (_normal(rng, s.B, s.L, s.I) for _ in range(3))
  b, c = (_normal(rng, s.B, s.L, s.N) for _ in range(2))
  a_IN = -np.tile(np.arange(1, s.N + 1, dtype=np.float32), (s.I, 1))
  parameters = a_IN, _normal(rng, s.I), _normal(rng, s.I) - 4, _normal(rng, s.B, s.N, s.I)
  reset_BL = _documents(rng, s)[1] == 0
  reset_BL[::2, 0] = False  # goes on from the given state

  def scan(impl, x, delta, gate, b, c, a, skip, bias, state, reset):
    return selective_scan.selective_scan(
      x, delta, a, b, c, skip, gate, bias, state_BNI=state, reset_BL=reset, impl=impl
    )

  impl = impl or selective_scan.fastest(jax.default_backend(), s.I)
  of = functools.partial
  return Check(
    of(scan, impl), of(scan, 'reference'), (x, delta, gate, b, c), parameters, (reset_BL,)
  )


def _ssd(rng, s):
  x, delta = _normal(rng, s.B, s.L, s.H, s.I // s.H), _normal(rng, s.B, s.L, s.H)
  b, c = (_normal(rng, s.B, s.L, 1, s.N) for _ in range(2))
  state = _normal(rng, s.B, s.H, s.N, s.I // s.H)
  a_H = -np.arange(1, s.H + 1, dtype=np.float32)
  reset_BL = _documents(rng, s)[1] == 0
  reset_BL[::2, 0] = False  # goes on from the given state

  def run(form, x, delta, b, c, a, skip, bias, state, reset):
    return form(x, delta, a, b, c, skip, bias, state_BHNP=state, reset_BL=reset)

  chunked = functools.partial(ssd.ssd, chunk=ssd.CHUNKS[jax.default_backend()])
  of = functools.partial
  parameters = a_H, _normal(rng, s.H), _normal(rng, s.H) - 4, state
  return Check(of(run, chunked), of(run, ssd.recurrence), (x, delta, b, c), parameters, (reset_BL,))


def _grouped(impl, rng, s):
  sizes_E = rng.multinomial(s.T - 5, rng.dirichlet(np.ones(s.E))).astype(np.int32)
  sizes_E[-1] += sizes_E[0]
  sizes_E[0] = 0  # a group without rows
  activations = _normal(rng, s.T, s.D), _normal(rng, s.E, s.D, s.F) / s.D**0.5

  def plain(x_TD, w_EDF, sizes_E):
    group_T = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(len(x_TD)), side='right')
    of_group_TE = jax.nn.one_hot(group_T, len(sizes_E))  # beyond the groups: 0
    return jnp.einsum('TE,TD,EDF->TF', of_group_TE, x_TD, w_EDF)

  return Check(
    lambda x, w, sizes: grouped_matmul.grouped_matmul(x, w, sizes, impl),
    plain,
    activations,
    rest=(sizes_E,),
  )


def _token_choice(rng, s, **options):
  """Scores, and a plan of them."""
  logits_GTE = 2 * _normal(rng, 2, s.T // 2, s.E)
  valid_GT = rng.random((2, s.T // 2)) < 0.9
  plan = functools.partial(routing.token_choice, k=2, **options)
  return logits_GTE, valid_GT, lambda logits, valid: plan(logits, valid_GT=valid)


def _expert_choice(rng, s):
  logits_GTE = 2 * _normal(rng, 2, s.T // 2, s.E)
  valid_GT = rng.random((2, s.T // 2)) < 0.9
  capacity = s.T // 2 // s.E
  return (
    logits_GTE,
    valid_GT,
    lambda logits, valid: routing.expert_choice(logits, capacity, valid_GT=valid),
  )


def _capacity(s):
  return {'capacity': s.T // 2 * 2 // s.E}


def _plan(make, rng, s):
  logits_GTE, valid_GT, plan = make(rng, s)

  def defined(logits, valid):
    """A plan without what is arbitrary in empty rows."""
    made = plan(logits, valid)
    token = jnp.where(made.used, made.token, -1)
    others = made.sizes_E, made.rows_per_token_T, made.counts_GE
    return made.weight, token, *others

  return Check(defined, defined, (), (logits_GTE,), (valid_GT,))


def _moved(make, rng, s):
  """Dispatch and combine."""
  logits_GTE, valid_GT, plan = make(rng, s)

  def move(x_TD, logits_GTE, valid_GT):
    made = plan(logits_GTE, valid_GT)
    rows = jnp.where(made.used[..., None], dispatch.dispatch(x_TD, made), 0)
    return rows, dispatch.combine(rows * made.weight[..., None].astype(rows.dtype), made)

  def plain(x_TD, logits_GTE, valid_GT):
    made = plan(logits_GTE, valid_GT)
    rows = jnp.where(made.used[..., None], x_TD[made.token], 0)
    weighed = (rows * made.weight[..., None]).reshape(-1, x_TD.shape[1])
    return rows, jax.ops.segment_sum(weighed, made.token.reshape(-1), len(x_TD))

  return Check(move, plain, (_normal(rng, s.T, s.D),), (logits_GTE,), (valid_GT,))


def _loop(make, rng, s):
  logits_GTE, valid_GT, plan = make(rng, s)
  w = _normal(rng, s.E, s.D, s.F) / s.D**0.5, _normal(rng, s.E, s.F, s.D) / s.F**0.5
  expert = expert_loop.Expert(
    lambda x, w: x @ w[0],
    lambda h, weight, w: (jax.nn.silu(h) * weight[..., None].astype(h.dtype)) @ w[1],
  )

  def loop(x_TD, w_in, w_out, logits_GTE, valid_GT):
    return expert_loop.map_experts(expert, x_TD, plan(logits_GTE, valid_GT), (w_in, w_out))

  def plain(x_TD, w_in, w_out, logits_GTE, valid_GT):
    made = plan(logits_GTE, valid_GT)
    h_TEF = jax.nn.silu(jnp.einsum('TD,EDF->TEF', x_TD, w_in))
    y_TED = jnp.einsum('TEF,EFD->TED', h_TEF, w_out)
    experts = jnp.arange(len(w_in))
    if made.ragged:
      expert = jnp.searchsorted(jnp.cumsum(made.sizes_E), jnp.arange(len(made.token)), side='right')
    else:
      expert = jnp.broadcast_to(experts[:, None], made.token.shape)
    weight_TE = (
      jnp.zeros((len(x_TD), len(w_in)))
      .at[made.token, expert]
      .add(jnp.where(made.used, made.weight, 0), mode='drop')
    )
    return jnp.einsum('TED,TE->TD', y_TED, weight_TE)

  return Check(loop, plain, (_normal(rng, s.T, s.D), *w), (logits_GTE,), (valid_GT,))


def _router(rng, s):
  def scores(x_GTD, w_DE, valid_GT):
    logits = routing.router_logits(x_GTD, w_DE)
    counts = jnp.ones((len(x_GTD), w_DE.shape[1]))
    balance = routing.load_balancing_loss(logits, counts, valid_GT, k=2)
    return logits, balance, routing.z_loss(logits, valid_GT)

  activations, w_DE = (_normal(rng, 2, s.T // 2, s.D),), _normal(rng, s.D, s.E) / s.D**0.5
  return Check(scores, scores, activations, (w_DE,), (rng.random((2, s.T // 2)) < 0.9,))


def _mixing(rng, s):
  def mix(x_CMD, logits_CME, valid_CM):
    weights_CME = mixing.softmax(logits_CME, valid_CM)
    return mixing.emit(jnp.tanh(mixing.merge(x_CMD, weights_CME)), weights_CME)

  M = s.B
  logits = _normal(rng, s.L, M, s.E)
  return Check(mix, mix, (_normal(rng, s.L, M, s.D),), (logits,), (rng.random((s.L, M)) < 0.9,))


def _cross_entropy(chunk, rng, s):
  args = _normal(rng, s.B, s.L, s.D), _normal(rng, s.D, s.V) / s.D**0.5
  targets_BL = rng.integers(0, s.V, (s.B, s.L), dtype=np.int32)
  weights_BL = (rng.random((s.B, s.L)) < 0.9).astype(np.float32)
  chunked = functools.partial(cross_entropy.chunked_cross_entropy, chunk=chunk)
  return Check(chunked, cross_entropy.cross_entropy, args[:1], args[1:], (targets_BL, weights_BL))


def _target_scores(rng, s):
  args = _normal(rng, s.B, s.L, s.D), _normal(rng, s.D, s.V) / s.D**0.5
  targets_BL = rng.integers(0, s.V, (s.B, s.L), dtype=np.int32)
  score = lambda x, head, targets: cross_entropy.target_scores(x, head, targets, chunk=5)
  return Check(score, score, args[:1], args[1:], (targets_BL,))


def _rotation(rng, s):
  x, positions_BL = _normal(rng, s.B, s.L, s.H, 2 * (s.D // s.H // 2)), _documents(rng, s)[1]
  return Check(attention.rotate, attention.rotate, (x,), (), (positions_BL,))


def _convolution(rng, s):
  width = 4
  padded, kernel = _normal(rng, s.B, s.L + width - 1, s.I), _normal(rng, width, s.I)
  convolve = mamba.causal_convolution
  return Check(convolve, convolve, (padded,), (kernel, _normal(rng, s.I)), (_documents(rng, s)[1],))


def _sampling(rng, s):
  def sample(logits_BV, seen_BV, seed_B):
    noise_BV = sampling.noise(seed_B, jnp.zeros_like(seed_B), logits_BV.shape[1])
    settings = {'repetition_penalty': 1.1, 'temperature': 0.8}
    settings |= {'top_k': 50, 'top_p': 0.9, 'min_p': 0.01}
    return sampling.next_token(logits_BV, seen_BV, noise_BV, **settings)

  seen_BV = rng.random((s.B, s.V)) < 0.1
  seeds_B = np.arange(s.B, dtype=np.uint32)
  return Check(sample, sample, (), (3 * _normal(rng, s.B, s.V),), (seen_BV, seeds_B))


def _layer(make, rng, s):
  """A layer on packed documents, as here against as on a CPU."""
  graph, params = nnx.split(make(s))
  leaves, tree = jax.tree.flatten(params)

  def apply(x_BLD, *rest):
    *leaves, segments_BL, positions_BL = rest
    layer = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
    return layer(x_BLD, layers.TokenInfo(segments_BL, positions_BL))[0]

  x = _normal(rng, s.B, s.L, s.D)
  return Check(apply, apply, (x,), tuple(map(np.asarray, leaves)), _documents(rng, s))


# Of ReLU, a rounded zero has another gradient.
_SMOOTH = {'activation': 'swiglu'}


def _attention(s, **options):
  return layers.Attention(d_model=s.D, num_heads=s.H, rngs=nnx.Rngs(0), **options)


def _experts(s, **options):
  return layers.MixtureOfExperts(
    d_model=s.D, d_ff=s.F, expansion_rate=s.E, group_size=4, rngs=nnx.Rngs(0), **_SMOOTH, **options
  )


def _mot(s):
  return layers.MixtureOfTokens(
    d_model=s.D, d_ff=s.F, num_experts=s.E, group_size=4, rngs=nnx.Rngs(0), **_SMOOTH
  )


def _feed_forward(s):
  return layers.MLP(d_model=s.D, d_ff=s.F, rngs=nnx.Rngs(0), **_SMOOTH)


_of = functools.partial
_DROPPING = lambda rng, s: _token_choice(rng, s, **_capacity(s))
_DROPLESS = lambda rng, s: _token_choice(rng, s, capacity=None)
_RAGGED = lambda rng, s: _token_choice(rng, s, **_capacity(s), ragged=True)
_CHECKS = {
  'selective scan': _of(_scan, None),
  'state-space duality': _ssd,
  'attention, documents': _of(_layer, _of(_attention, document_mask=True)),
  'attention, causal': _of(_layer, _attention),
  'layer of experts, capacity': _of(_layer, _experts),
  'layer of experts, dropless': _of(_layer, _of(_experts, capacity_factor=0.0)),
  'layer of experts, expert choice': _of(
    _layer, _of(_experts, router='expert_choice', capacity_factor=1.0)
  ),
  'Mixture of Tokens': _of(_layer, _mot),
  'Mamba': _of(_layer, lambda s: layers.Mamba(d_model=s.D, rngs=nnx.Rngs(0))),
  'Mamba-2': _of(_layer, lambda s: layers.Mamba2(d_model=s.D, head_width=8, rngs=nnx.Rngs(0))),
  'feed-forward': _of(
    _layer, lambda s: layers.MLP(d_model=s.D, d_ff=s.F, rngs=nnx.Rngs(0), **_SMOOTH)
  ),
  'grouped matmul, tiled': _of(_grouped, 'tiled'),
  'grouped matmul, ragged_dot': _of(_grouped, 'ragged_dot'),
  'cross-entropy, chunked': _of(_cross_entropy, 5),
  'cross-entropy': _of(_cross_entropy, 0),
  'plan of token choice': _of(_plan, _DROPPING),
  'plan of token choice, ragged': _of(_plan, _RAGGED),
  'plan of token choice, dropless': _of(_plan, _DROPLESS),
  'plan of expert choice': _of(_plan, _expert_choice),
  'dispatch and combine': _of(_moved, _DROPPING),
  'dispatch and combine, ragged': _of(_moved, _DROPLESS),
  'dispatch and combine, expert choice': _of(_moved, _expert_choice),
  'router, balance and z loss': _router,
  'merge and emit': _mixing,
  'loop over experts, capacity': _of(_loop, _DROPPING),
  'loop over experts, dropless': _of(_loop, _DROPLESS),
  'convolution': _convolution,
  'rotary positions': _rotation,
  'scores of targets': _target_scores,
  'sampling': _sampling,
}
_ON_TPU = {
  'selective scan, plain XLA': _of(_scan, 'tpu'),
  'grouped matmul, megablox': _of(_grouped, 'megablox'),
}


def by_name():
  """Functions of a random generator and Sizes that make a Check, the most important ones first."""
  return _CHECKS | (_ON_TPU if jax.default_backend() == 'tpu' else {})
