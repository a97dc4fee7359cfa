"""Tiny models and batches whose sizes all differ, so that a swapped axis cannot pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import step as step_lib
from moejax.fields import baseline
from moejax.layers.common import TokenInfo
from moejax.model import ModelConfig

V, L, B, D, H, F, M, E = 37, 11, 8, 12, 3, 24, 4, 6

MOT = ((('attention', 'mlp'), 1), (('attention', 'mot'), 2))
DENSE = ((('attention', 'mlp'), 2),)
MOE = ((('attention', 'moe'), 2),)
MAMBA = ((('mamba', 'mlp'), 2),)
MOE_MAMBA = ((('mamba', 'moe'), 2),)
MOE_IN_MAMBA = ((('mamba+moe', 'moe_in_mamba'), 1),)
MOE_IN_MAMBA2 = ((('mamba2+moe', 'moe_in_mamba2'), 1),)
# Changes to `model_config`, by kind of model.
MODELS = {
  'dense': {'blocks': DENSE},
  'mot': {},
  'token choice': {'blocks': MOE, 'moe_capacity_factor': 0.7},  # tokens are dropped
  'expert choice': {'blocks': MOE, 'moe_router': 'expert_choice', 'moe_output_norm': True},
  'mamba': {'blocks': MAMBA},
  'moe mamba': {'blocks': MOE_MAMBA},
  'moe in mamba': {'blocks': MOE_IN_MAMBA, 'mamba_moe_in': 'conv+out'},
  'moe in mamba2': {'blocks': MOE_IN_MAMBA2, 'mamba2_moe_in': 'conv+out'},
}


def models(slow):
  """Names of MODELS for a test that is slow for one of them, as like another."""
  return [pytest.param(m, marks=[pytest.mark.slow] * (m == slow)) for m in MODELS]


def model_config(**changes):
  """A tiny ModelConfig with the baseline's defaults; `SECTION_...` goes to its section."""
  fields = baseline(ModelConfig)
  fields |= {'vocab_size': V, 'max_length': L, 'd_model': D, 'num_heads': H, 'd_ff': F}
  fields |= {'blocks': MOT, 'positions': 'learned'}
  fields['mot'] |= {'num_experts': E, 'group_size': M, 'expert_width': 16}
  fields['moe'] |= {'expansion_rate': E // 2, 'granularity': 2, 'group_size': M}
  fields['mamba'] |= {'state_size': 5, 'conv_width': 3}
  fields['mamba2'] |= {'state_size': 5, 'conv_width': 3, 'head_width': 4}
  for name, value in changes.items():
    section, _, field = name.partition('_')
    if section in ('mot', 'moe', 'mamba', 'mamba2') and field:
      fields[section][field] = value
    else:
      fields[name] = value
  return ModelConfig(**fields)


def batch(seed=0, rows=B, length=L):
  """Random tokens, nothing padded."""
  ids = np.random.default_rng(seed).integers(1, V, (rows, length + 1), dtype=np.int32)
  return {
    'inputs': ids[:, :-1],
    'targets': ids[:, 1:],
    'segments': np.ones((rows, length), np.int32),
    'positions': np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
  }


def train_step(config, optimizer, accumulation=1, schedule=lambda step: jnp.float32(0)):
  """The step of a training run, as a function of its state and a batch."""
  return functools.partial(
    step_lib.train_step,
    model_config=config,
    optimizer=optimizer,
    schedule=schedule,
    accumulation=accumulation,
    key=jax.random.key(0),
  )


def tokens(batch):
  """What the layers see of a batch."""
  return TokenInfo(jnp.asarray(batch['segments']), jnp.asarray(batch['positions']))


def abstract(init):
  """What `init()` would return, on one device, as checkpoints restore it."""
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), jax.eval_shape(init)
  )


class Counter:
  """A loader with a state: how many batches it gave."""

  def __init__(self, count=0):
    self.count = count

  def save(self, directory):
    (directory / 'p00000.count').write_text(str(self.count))

  def load(self, directory):
    self.count = int((directory / 'p00000.count').read_text())
