"""The training step of every model family lowers for accelerators that are not there."""

import dataclasses
import math

import jax
import pytest

from moejax import config as config_lib, sharding, step as step_lib
from moejax.sharding import platform
from tests import tiny

pytestmark = pytest.mark.heavy

# JAX's name of a platform: ours.
PLATFORMS = {'tpu': 'tpu', 'cuda': 'gpu'}
MESHES = {'one device': (1, 1, 1, 1), 'fsdp 2, expert 2, tensor 2': (1, 2, 2, 2)}
MODELS = tiny.MODELS | {'dropless': {'blocks': tiny.MOE, 'moe_capacity_factor': 0.0}}
# On a mesh: attention, mixing, experts without slots, experts inside of Mamba.
ON_A_MESH = ('mot', 'dropless', 'moe in mamba')
CASES = [(m, mesh) for mesh in MESHES for m in (MODELS if mesh == 'one device' else ON_A_MESH)]
# What kernels take: 128 channels of Mamba and positions in multiples of 64 on every device.
SIZES = {'vocab_size': 256, 'max_length': 64, 'd_model': 128, 'num_heads': 2, 'd_ff': 256}
SIZES |= {'mot_num_experts': 8, 'moe_expansion_rate': 4, 'dtype': 'bfloat16', 'remat': 'full'}


def _lowered(target, model_config, sizes):
  """The training step on a mesh for one of PLATFORMS, as text."""
  fields = config_lib.baseline()
  fields.data.sequence_length = model_config.max_length
  run_config = dataclasses.replace(config_lib.resolve(fields), model=model_config)
  mesh = sharding.make_mesh(sharding.MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
  with jax.set_mesh(mesh), platform.compiling_for(PLATFORMS[target]):
    state = sharding.abstract(step_lib.fresh_state(run_config), mesh)
    return step_lib.lower_train_step(run_config, state, mesh, (target,)).as_text()


@pytest.fixture
def cudnn(monkeypatch):
  """Stands in for the libraries that JAX asks for their version before it lowers attention."""
  versions = 'jax._src.cudnn.fused_attention_stablehlo.'
  monkeypatch.setattr(f'{versions}check_cudnn_version', lambda: 91000)
  monkeypatch.setattr(f'{versions}check_compute_capability', lambda capability: True)


@pytest.mark.parametrize('model, mesh', CASES)
def test_lowers_for_tpu(model, mesh):
  config = tiny.model_config(**SIZES | MODELS[model])
  text = _lowered('tpu', config, MESHES[mesh])
  grouped = model == 'dropless' and jax.__version_info__ < (0, 11)
  assert ('@tpu_custom_call' in text) == (grouped or config.uses('mamba'))


@pytest.mark.parametrize('model, mesh', CASES)
def test_lowers_for_cuda(cudnn, model, mesh):
  config = tiny.model_config(**SIZES | MODELS[model])
  text = _lowered('cuda', config, MESHES[mesh])
  # On several devices the kernel comes with the partitioner.
  kernel = '@__cudnn$fmha' if mesh == 'one device' else '@CustomSPMDPartitioning'
  assert (kernel in text) == config.uses('attention')
