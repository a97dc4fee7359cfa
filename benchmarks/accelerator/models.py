"""The models of the papers at two sizes, ready to train on one device."""

import dataclasses
import functools

import jax
import numpy as np

from benchmarks.accelerator import timing
from configs import dense, fine_grained, mamba, moe, moe_mamba, mot
from moejax import config as config_lib, flops, sharding, step as step_lib, variants
from moejax.aot.step import without_data

_DOCUMENT = 400  # tokens of a document of random tokens, on average


@dataclasses.dataclass(frozen=True)
class Family:
  """A model at a size, `config` being one of configs/ and its argument.

  `baseline`: the dense model of the same context and about the same active FLOPs.
  """

  config: tuple
  size: str
  baseline: str
  changes: dict = dataclasses.field(default_factory=dict)

  def run_config(self, tiny):
    """Resolved, with one microbatch of the paper per step, on one device, without data files."""
    module, argument = self.config
    config = module.get_config(argument)
    config = without_data(config)  # sets the vocabulary
    if tiny:
      config.model.vocab_size = 0
      variants.shrink(config)
    config.data.batch_size //= config.optimizer.accumulation
    config.optimizer.accumulation = 1
    config.mesh.data = config.mesh.fsdp = config.mesh.expert = 1
    config.update_from_flattened_dict(self.changes)
    return config_lib.resolve(config)


def _family(baseline, module, argument, size, **changes):
  return Family((module, argument), size, f'{baseline} {size}', changes)


# The dense models, by length of context; other models are compared with the one of theirs.
_SHORT, _LONG = 'dense 256', 'dense 1024'
# Name, of the scaling laws, of MoT, expansion rate of expert choice.
_SIZES = ('25M', '25M', 'medium', 64), ('100M', '85M', 'base', 16)
_NO_DROPS = {'model.moe.capacity_factor': 0.0}
_FINE = {'model.moe.granularity': 8, 'model.moe.expansion_rate': 8}


def families():
  """By name, the most important ones first: those with goals, then the rest of both sizes.

  MoT and expert choice have the papers' context of 256, the others 1024. The sizes 25M and 100M of
  the first are `medium` and `base` of MoT, 25M and 85M of the scaling laws. The paper's 64-fold
  expansion of 85M is a state of 45 GB, so 16-fold comes first.
  """

  def choice(size, of_laws, expansion, granularity):
    argument = f'{of_laws},granularity={granularity},expansion_rate={expansion}'
    name = f'expert choice {expansion}x G={granularity} {size}'
    return {name: _family(_SHORT, fine_grained, argument, size)}

  found = {}
  for size, of_laws, of_mot, expansion in _SIZES:
    found |= {
      f'{_SHORT} {size}': _family(_SHORT, dense, of_laws, size),
      **choice(size, of_laws, expansion, 8),
      f'MoT 32E/1 {size}': _family(_SHORT, mot, of_mot, size),
      f'{_LONG} {size}': _family(_LONG, moe, f'{size},dense', size),
      f'Switch 32E {size}': _family(_LONG, moe, size, size),
      f'Mamba {size}': _family(_LONG, mamba, size, size),
      f'MoE-Mamba {size}': _family(_LONG, moe_mamba, size, size),
    }
  for remat in ('dots', 'none'):
    name = f'{_LONG} remat={remat} 25M'
    found[name] = _family(_LONG, moe, '25M,dense', '25M', **{'model.remat': remat})
  for size, of_laws, _, expansion in _SIZES:
    fine = f'token choice 64E k=8 dropless {size}'
    found |= {
      f'Mamba-2 {size}': _family(_LONG, mamba, f'{size},mamba2', size),
      f'Switch 32E dropless {size}': _family(_LONG, moe, size, size, **_NO_DROPS),
      **choice(size, of_laws, expansion, 1),
      **choice(size, of_laws, expansion, 4),
      **choice(size, of_laws, expansion, 16),
      fine: _family(_LONG, moe, size, size, **_FINE, **_NO_DROPS),
    }
  return found | choice('100M', '85M', 64, 8)


class Training:
  """The training step of a RunConfig: compiled, with a state and a batch on the first device."""

  def __init__(self, run_config):
    self.run_config = run_config
    self.mesh = sharding.make_mesh(run_config.mesh, jax.devices()[:1])
    init = step_lib.fresh_state(run_config)
    with jax.set_mesh(self.mesh):
      abstract = sharding.abstract(init, self.mesh)
      lower = functools.partial(step_lib.lower_train_step, run_config, abstract, self.mesh)
      self.program = timing.Program(lower)
      self._state = step_lib.make_state(init, abstract)
      self._batch = sharding.place_batch(random_batch(run_config), self.mesh)
    self._now = jax.device_put(step_lib.Now(np.float32(1e-4), np.float32(1), np.uint32(0)))

  def __call__(self):
    """One step; returns its metrics."""
    self._state, metrics = self.program.compiled(self._state, self._batch, self._now)
    return metrics

  @property
  def flops_per_token(self):
    """Model FLOPs of active experts, forward and backward, without routing."""
    config = self.run_config
    return flops.training_flops_per_token(config.model, config.data.sequence_length)['model']

  @property
  def tokens(self):
    return self.run_config.data.tokens_per_step


def random_batch(run_config):
  """Random tokens, on which experts are loaded about evenly, in documents that are packed."""
  data, rng = run_config.data, np.random.default_rng(0)
  shape = data.batch_size, data.sequence_length
  ids = rng.integers(1, run_config.model.vocab_size, (shape[0], shape[1] + 1), dtype=np.int32)
  starts = rng.random(shape) < 1 / _DOCUMENT
  starts[:, 0] = True
  places = np.arange(shape[1], dtype=np.int32)
  positions = places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)
  return {
    'inputs': ids[:, :-1],
    'targets': ids[:, 1:],
    'segments': np.cumsum(starts, axis=1, dtype=np.int32),
    'positions': positions.astype(np.int32),
  }
