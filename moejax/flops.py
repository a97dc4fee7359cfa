"""Parameters and floating-point operations of a model, and how many of them a device can do.

Conventions:
- A multiply-add is two FLOPs. Matrix products count; norms, activations, softmax and the embedding
  look-up do not.
- Model FLOPs of training are three times those of the forward pass: the backward pass multiplies
  every product by both of its factors. What `model.remat` computes again does not count.
- The same holds for routing, but where weights of MoT are not learnt (uniform, discrete and raw
  ones) the products have one factor to derive by, or none.
- Experts count as often as they run: E mixtures for the M tokens of a group; K experts of a token
  under token choice, whether it is dropped or not; all slots under expert choice. Routing
  (controller, merge and emit; router) is counted apart, so that MFU does not reward it.
- The recurrence of Mamba counts as what it is, three multiply-adds per state, and its convolution
  as one per tap, though neither is a matrix product.
- Attention scores count for every pair of positions, also those that the causal mask hides, as in
  PaLM (arXiv:2204.02311, Appendix B) and as XLA computes them. Programs that count only the visible
  half report a lower MFU.
- Embeddings are the tables of tokens and positions and the output projection. Papers that count
  parameters without embeddings mean `non_embedding`.
"""

import collections
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from moejax import hardware
from moejax.layers import mamba, mlp


@dataclasses.dataclass(frozen=True)
class Cost:
  """One sublayer: its parameters, and its forward FLOPs per token, by kind."""

  params: dict[str, int]
  active: float  # parameters that one token uses
  model_flops: dict[str, float]
  routing_flops: dict[str, float] = dataclasses.field(default_factory=dict)
  # Products in the backward pass for one of the forward pass, by kind of routing; not named: two.
  routing_gradients: dict[str, int] = dataclasses.field(default_factory=dict)


def _attention(config, length):
  weights = 4 * config.d_model**2  # query, key, value, output
  # q k^T, then the sum of values: [L, P] by [P, L], H times.
  scores = 2 * 2 * length * config.d_model
  return Cost(
    params={'attention': weights},
    active=weights,
    model_flops={'attention_projections': 2 * weights, 'attention_scores': scores},
  )


def _feed_forward(d_in, width, activation, d_out=None):
  """Parameters of one feed-forward network, dense or expert."""
  ends = d_in + (d_out or d_in)
  return (d_in + ends) * mlp.gated_width(width) if activation == 'swiglu' else ends * width


def _mlp(config, length):
  del length
  weights = _feed_forward(config.d_model, config.d_ff, config.activation)
  return Cost(params={'mlp': weights}, active=weights, model_flops={'mlp': 2 * weights})


def _mot(config, length):
  del length
  mot, D = config.mot, config.d_model
  E, M = mot.num_experts, mot.group_size
  expert = _feed_forward(D, mot.width(config.d_ff), config.activation)
  experts = E * expert
  controllers = D * E * (1 + mot.separate_controllers)
  temperatures = {'fixed': 0, 'learned_per_expert': E}.get(mot.temperature_mode, 1)
  scores = controllers + temperatures * (1 + mot.separate_temperatures)
  norm = 4 * D * mot.expert_norm
  # Weights that nothing is learnt from have no gradient.
  gradients = {'softmax': {}, 'discrete': {'controller': 0, 'merge': 1, 'emit': 1}}.get(
    mot.routing, {'merge': 1, 'emit': 1}
  )
  if mot.emit in ('raw', 'top_1'):
    gradients = gradients | {'emit': 1}
  return Cost(
    params={'experts': experts, 'controller': scores, 'norm': norm},
    active=experts / M + scores + norm,
    model_flops={'experts': 2 * experts / M},
    routing_flops={
      'controller': 0 if mot.routing == 'uniform' else 2 * controllers,
      'merge': 2 * D * E,
      'emit': 2 * D * E,
    },
    routing_gradients=gradients,
  )


def _moe(config, length, d_in=None, d_out=None):
  moe, D = config.moe, d_in or config.d_model
  E, K = moe.num_experts, moe.top_k
  if moe.router == 'expert_choice':  # every slot is taken
    group = moe.group_size * (1 if moe.by_position else length)
    K = E * moe.capacity(group) / group
  expert = _feed_forward(D, moe.expert_width(config.d_ff), config.activation, d_out)
  shared = _feed_forward(D, moe.shared_width, config.activation) if moe.shared_width else 0
  router = D * E
  bias, norm = E * moe.balance_bias, 2 * (d_out or D) * moe.output_norm
  return Cost(
    params={'experts': E * expert, 'mlp': shared, 'router': router + bias, 'norm': norm},
    active=K * expert + shared + router + bias + norm,
    model_flops={'experts': 2 * K * expert, 'mlp': 2 * shared},
    routing_flops={'router': 2 * router},
  )


def _mamba(config, length, sparse=()):
  del length
  D, N, W = config.d_model, config.mamba.state_size, config.mamba.conv_width
  I, R = config.mamba.inner_width(D), mamba.delta_rank(D)
  widths = config.mamba.projections(D).items()
  projections = sum(d_in * d_out for name, (d_in, d_out) in widths if name not in sparse)
  projections += I * (R + 2 * N) + R * I  # select, delta
  channels = W * I + N * I + 3 * I  # kernel, a; biases of convolution and delta, skip
  return Cost(
    params={'mamba': projections + channels},
    active=projections + channels,
    model_flops={
      'mamba_projections': 2 * projections,
      'mamba_convolution': 2 * W * I,
      'mamba_scan': 6 * N * I,
    },
  )


def _moe_in_mamba(config, length):
  sparse = config.mamba.sparse_projections
  widths = config.mamba.projections(config.d_model)
  rest = _mamba(config, length, sparse)
  costs = [rest, *(_moe(config, length, *widths[name]) for name in sparse)]
  return Cost(
    params=_sums(cost.params for cost in costs),
    active=sum(cost.active for cost in costs),
    model_flops=_sums(cost.model_flops for cost in costs),
    routing_flops=_sums(cost.routing_flops for cost in costs),
  )


# Name of a sublayer in `model.blocks` -> function of ModelConfig and sequence length.
COSTS = {
  'attention': _attention,
  'mlp': _mlp,
  'mot': _mot,
  'moe': _moe,
  'mamba': _mamba,
  'moe_in_mamba': _moe_in_mamba,
}

_NORM_ROWS = {'layer_norm': 2, 'rms_norm': 1}  # vectors of parameters: scale and bias, scale


def _costs(config, length):
  return [COSTS[kind](config, length) for kind in config.kinds]


def _sums(dicts) -> dict:
  total = collections.Counter()
  for numbers in dicts:
    total.update(numbers)
  return {kind: number for kind, number in total.items() if number}


def param_counts(config):
  """Numbers of parameters of a ModelConfig.

  Returns:
    A dict with `total`; `embedding` (tokens, positions and, where it is a matrix of its own, the
    output projection) and `non_embedding`, which add up to it; `active`, the part of
    `non_embedding` that one token uses; and `by_kind`, a dict that adds up to `total`.
  """
  costs = _costs(config, config.max_length)
  D = config.d_model
  embeddings = {
    'token_embedding': config.vocab_size * D,
    'position_embedding': config.max_length * D if config.positions == 'learned' else 0,
    'head': 0 if config.tie_embeddings else config.vocab_size * D,
  }
  norms = _NORM_ROWS[config.norm] * D * (sum(map(len, config.sublayers)) + config.final_norm)
  inner = _sums([*(cost.params for cost in costs), {'norm': norms}])
  embedding, non_embedding = sum(embeddings.values()), sum(inner.values())
  return {
    'total': embedding + non_embedding,
    'embedding': embedding,
    'non_embedding': non_embedding,
    'active': round(sum(cost.active for cost in costs)) + norms,
    'by_kind': embeddings | inner,
  }


def _model_flops(config, length):
  head = {'head': 2 * config.d_model * config.vocab_size}
  return _sums([*(cost.model_flops for cost in _costs(config, length)), head])


def _routing_flops(config, length):
  return _sums(cost.routing_flops for cost in _costs(config, length))


def forward_flops_per_token(config, length):
  """Forward FLOPs per token of sequences of `length` positions, by kind.

  Kinds: attention_projections, attention_scores, mlp, experts, mamba_projections,
  mamba_convolution, mamba_scan, head; routing: controller, merge, emit, router. Those not in use
  are absent.
  """
  return _model_flops(config, length) | _routing_flops(config, length)


def training_flops_per_token(config, length):
  """Forward and backward FLOPs per token: a dict of `model`, `routing`, and their sum `total`."""
  model = 3.0 * sum(_model_flops(config, length).values())
  routing = sum(
    (1.0 + cost.routing_gradients.get(kind, 2)) * forward
    for cost in _costs(config, length)
    for kind, forward in cost.routing_flops.items()
  )
  return {'model': model, 'routing': routing, 'total': model + routing}


def peak_flops(device, dtype):
  """FLOP/s that the maker of a `jax.Device` states for matrix products, or None if not known.

  Only 16-bit types have an entry.
  """
  chip = hardware.find(device.device_kind) if jnp.dtype(dtype).itemsize == 2 else None
  return chip and chip.flops


def measured_peak_flops(dtype, seconds=0.2):
  """FLOP/s of the fastest of the square matrix products that one device does in `seconds`.

  For devices that `peak_flops` does not know, such as a CPU: MFU is then the share of what a plain
  matrix product reaches on this machine, not of what its maker promises.
  """
  n = 1024 if jax.default_backend() == 'cpu' else 8192  # an accelerator would still be waiting
  # A mesh of its own: under the training mesh every device would compute a copy.
  alone = jax.sharding.Mesh(
    np.array(jax.local_devices()[:1]), ('one',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  with jax.set_mesh(alone):
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()  # compiles
    best = float('inf')
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
      start = time.perf_counter()
      product(a, a).block_until_ready()
      best = min(best, time.perf_counter() - start)
  return 2 * n**3 / best
