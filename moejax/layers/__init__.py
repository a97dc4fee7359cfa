"""Sublayers of the residual stack: modules that hold parameters and call `moejax.ops`.

A layer is an `nnx.Module` made by keyword arguments: its sizes, `rngs`, and the fields of its
config (docs/configuration.md). It returns activations, and its measurements beside:

  layer = layers.MixtureOfTokens(d_model=64, num_experts=32, group_size=8, rngs=nnx.Rngs(0))
  y_BLD, aux = layer(x_BLD)

x and y are float arrays [sequences, positions, width] of one dtype; parameters are float32, or as
`init=Initializer(dtype=...)` says. `aux` is a flat dict of small arrays, {} for layers that measure
nothing; `aux['auxiliary_loss']`, where there is one, is a scalar to be added to the loss. Sequences
are whole and unpadded, unless a second argument, a `TokenInfo`, says otherwise. Sizes that do not
fit together raise ValueError.
"""

from moejax.layers.attention import Attention
from moejax.layers.common import Initializer, TokenInfo
from moejax.layers.mamba import Mamba, MambaConfig
from moejax.layers.mamba2 import Mamba2, Mamba2Config
from moejax.layers.mlp import MLP
from moejax.layers.moe import MixtureOfExperts, MoEConfig
from moejax.layers.mot import MixtureOfTokens, MoTConfig

__all__ = [
  'MLP',
  'Attention',
  'Initializer',
  'Mamba',
  'Mamba2',
  'Mamba2Config',
  'MambaConfig',
  'MixtureOfExperts',
  'MixtureOfTokens',
  'MoEConfig',
  'MoTConfig',
  'TokenInfo',
]
