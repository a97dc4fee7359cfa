"""Parameters and floating-point operations of a model, and how many of them a device can do.

Conventions:
- A multiply-add is two FLOPs. Matrix products count; norms, activations, softmax and the embedding
  look-up do not.
- Training takes three times the model FLOPs of the forward pass: the backward pass multiplies every
  product by both of its factors. Recomputation (`model.remat`) does not count.
- The same holds for routing, except for constant weights of MoT (uniform, discrete, raw), whose
  products have one factor to differentiate by, or none.
- Experts count as often as they run: E mixtures for the M tokens of a group; K experts of a token
  under token choice, dropped or not, and on average under ReLU routing, whose penalty keeps them
  there; all slots under expert choice. Routing (controller, merge and emit; router) is counted
  apart, so that MFU does not reward it.
- Mamba and Mamba-2 count three multiply-adds per state and one per tap of the convolution, though
  neither is a matrix product. That is their recurrence: the products by which Mamba-2 computes it
  in chunks depend on the length of a chunk, and do not count.
- Attention scores count for all pairs of positions, masked or not, as in PaLM (arXiv:2204.02311,
  Appendix B) and as XLA computes them. Programs that count the visible half report a lower MFU.
- Embeddings are the tables of tokens and positions and the output projection. Papers that count
  parameters without embeddings mean `non_embedding`.
"""

import jax.numpy as jnp

from moejax import hardware
from moejax.layers.sublayer import sums

_NORM_VECTORS = {'layer_norm': 2, 'rms_norm': 1}  # scale and bias, scale


def param_counts(config):
  """Numbers of parameters of a ModelConfig.

  Returns:
    A dict with `total`; `embedding` (tokens, positions and, where it is a matrix of its own, the
    output projection) and `non_embedding`, which add up to it; `active`, the part of
    `non_embedding` that one token uses; and `by_kind`, a dict that adds up to `total`.
  """
  costs = config.costs(config.max_length)
  D = config.d_model
  embeddings = {
    'token_embedding': config.vocab_size * D,
    'position_embedding': config.max_length * D if config.positions == 'learned' else 0,
    'head': 0 if config.tie_embeddings else config.vocab_size * D,
  }
  norms = _norms(config)
  inner = sums([*(cost.params for cost in costs), {'norm': norms}])
  embedding, non_embedding = sum(embeddings.values()), sum(inner.values())
  return {
    'total': embedding + non_embedding,
    'embedding': embedding,
    'non_embedding': non_embedding,
    'active': round(sum(cost.active for cost in costs)) + norms,
    'by_kind': embeddings | inner,
  }


def _norms(config):
  """Parameters of the norms between sublayers."""
  number = sum(map(len, config.sublayers)) + config.final_norm
  return _NORM_VECTORS[config.norm] * config.d_model * number


def _model_flops(config, length):
  head = {'head': _head_flops(config)}
  return sums([*(cost.model_flops for cost in config.costs(length)), head])


def _head_flops(config):
  return 2 * config.d_model * config.vocab_size


def _routing_flops(config, length):
  return sums(cost.routing_flops for cost in config.costs(length))


def forward_flops_per_token(config, length):
  """Forward FLOPs per token of sequences of `length` positions, by kind.

  Kinds: attention_projections, attention_scores, mlp, experts, mamba_projections,
  mamba_convolution, mamba_scan, head; routing: controller, merge, emit, router. Those not in use
  are absent.
  """
  return _model_flops(config, length) | _routing_flops(config, length)


def by_layer(config, length):
  """Parameters and forward FLOPs per token by kind of layer.

  Returns:
    A dict of 'embedding' (tokens and positions), the kinds of sublayers in order, 'norm' and
    'head', each with `params`, `active` (the part that one token uses; 0 for embedding and head, as
    in `param_counts`) and `flops`. Each of the three adds up to what the other functions count.
  """
  counts = param_counts(config)['by_kind']
  rows = {'embedding': [0, 0, 0]}
  for kind, cost in zip(config.kinds, config.costs(length), strict=True):
    flops = sum([*cost.model_flops.values(), *cost.routing_flops.values()])
    numbers = sum(cost.params.values()), cost.active, flops
    rows[kind] = [sum(pair) for pair in zip(rows.get(kind, (0, 0, 0)), numbers, strict=True)]
  rows['embedding'][0] = counts['token_embedding'] + counts['position_embedding']
  rows['norm'] = [_norms(config), _norms(config), 0]
  rows['head'] = [counts['head'], 0, _head_flops(config)]
  names = 'params', 'active', 'flops'
  return {kind: dict(zip(names, numbers, strict=True)) for kind, numbers in rows.items()}


def training_flops_per_token(config, length):
  """Forward and backward FLOPs per token: a dict of `model`, `routing`, and their sum `total`."""
  model = 3.0 * sum(_model_flops(config, length).values())
  routing = sum(
    (1.0 + cost.routing_gradients.get(kind, 2)) * forward
    for cost in config.costs(length)
    for kind, forward in cost.routing_flops.items()
  )
  return {'model': model, 'routing': routing, 'total': model + routing}


def peak_flops(device, dtype):
  """Specified FLOP/s of a `jax.Device` for matrix products of a 16-bit dtype; else None."""
  chip = hardware.find(device.device_kind) if jnp.dtype(dtype).itemsize == 2 else None
  return chip and chip.flops
