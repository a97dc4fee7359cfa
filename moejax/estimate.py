"""Memory and time of a training step on each device, estimated without compiling; a mesh that fits.

The train state is exact: its arrays with their shardings. The rest of the memory is estimated: the
gradients of a microbatch and their sum are as large as the parameters each; activations that the
forward pass saves are counted in the program before compilation; the backward pass holds, besides,
all activations of one block. For the steps of docs/pods.json that fill more than a tenth of a chip,
the sum is 0.96 to 1.32 times what the compiler needs. moejax.aot compiles, and is exact.
"""

import contextlib
import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

from moejax import (
  config as config_lib,
  flops,
  hardware,
  model as model_lib,
  sharding,
  step as step_lib,
)
from moejax.sharding import mesh as mesh_lib
from moejax.text import size

USABLE = 0.9  # fraction of a device's memory that an estimate may fill
# Rough numbers: they rank meshes, and a wrong one costs time only.
# Time over that of the model's matmuls, by policy: `full` adds one pass to three, `save_moe` one
# without the experts; `none` recomputes nothing, but moves more memory than `dots`.
_WORK = {'none': 1.15, 'dots': 1.1, 'save_moe': 1.25, 'full': 4 / 3}
_NOT_OVERLAPPED = 0.3  # fraction of compute or communication, whichever is shorter
_EQUAL = 1.02  # times within this ratio are equal: then the mesh that takes less memory is better
_TENSOR_SLOWDOWN = 1.5  # small matmuls are slow, and the compiler rejects these meshes more often


class Estimator:
  """Estimates for one RunConfig on any mesh: what does not depend on the mesh is computed once."""

  def __init__(self, run_config):
    self.run_config = run_config
    self._state = jax.eval_shape(step_lib.fresh_state(run_config))
    model = run_config.model
    self._saved, self._fixed = _saved(run_config)
    everything, _ = _saved(_with_remat(run_config, 'none'))
    self._block = everything / sum(repeats for _, repeats in model.blocks)

  def memory(self, mesh, accumulation):
    """Bytes per device, by kind, on a mesh or an AbstractMesh."""
    state = state_bytes(self._state, mesh)
    sequences = self.run_config.data.batch_size / accumulation / sharding.batch_shards(mesh)
    return state | {
      'gradients': 2 * state['parameters'],
      'saved activations': sequences * self._saved + self._fixed,
      'activations of a block': sequences * self._block,
    }


def state_bytes(state, mesh):
  """Bytes per device of a train state, of arrays or of their shapes: parameters, optimizer."""
  shardings = sharding.state_shardings(state, mesh)
  sizes = jax.tree.map(
    lambda leaf, placed: math.prod(placed.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
    state,
    shardings,
  )
  params, total = (sum(jax.tree.leaves(tree)) for tree in (sizes['params'], sizes))
  return {'parameters': params, 'optimizer': total - params}


def saved_bytes(run_config, num_sequences):
  """Bytes that a forward pass saves for its backward pass, without its inputs."""
  leaf = jax.ShapeDtypeStruct((num_sequences, run_config.data.sequence_length), jnp.int32)
  batch = dict.fromkeys(('inputs', 'targets', 'segments', 'positions'), leaf)

  def saved(params, batch):
    loss = lambda params: model_lib.bind(run_config.model, params).loss(batch)[0]
    return jax.tree.leaves(jax.vjp(loss, params)[1])

  params = jax.eval_shape(lambda: model_lib.init_params(run_config.model, jax.random.key(0)))
  jaxpr = jax.make_jaxpr(saved)(params, batch).jaxpr
  variables = {v for v in jaxpr.outvars if isinstance(v, jax.extend.core.Var)}
  residuals: Any = variables - {*jaxpr.invars, *jaxpr.constvars}
  return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in residuals)


def _saved(run_config):
  """Bytes that are saved per sequence, and independently of their number."""
  sequences = run_config.model.group_multiple
  one, two = (saved_bytes(run_config, n * sequences) for n in (1, 2))
  return (two - one) / sequences, 2 * one - two


def _with_remat(run_config, policy):
  model = dataclasses.replace(run_config.model, remat=policy)
  return dataclasses.replace(run_config, model=model)


def seconds(run_config, mesh, chip, detour=1.0):
  """Rough time of a step: compute, and communication of parameters, gradients and tokens.

  `detour`: how much longer an exchange between all devices takes than over one link of each.
  """
  data, fsdp, expert, tensor = (mesh.shape[axis] for axis in sharding.AXES)
  model, accumulation = run_config.model, run_config.optimizer.accumulation
  devices = math.prod(mesh.shape.values())
  tokens = run_config.data.tokens_per_step / devices
  per_token = flops.training_flops_per_token(model, run_config.data.sequence_length)['total']
  compute = _WORK[model.remat] * tokens * per_token / chip.flops
  param_bytes = 2 * flops.param_counts(model)['total'] / expert / tensor  # bfloat16
  gathers = 2 * accumulation * (fsdp - 1) / fsdp
  reductions = accumulation * (fsdp - 1) / fsdp + 2 * (data - 1) / data / fsdp
  width = 2 * model.d_model * tokens * tensor
  blocks = sum(kind in ('moe', 'mot', 'moe_in_mamba', 'moe_in_mamba2') for kind in model.kinds)
  passes = 4 if model.remat in ('none', 'save_moe') else 6  # to experts and back; gradients; again
  exchanged = (
    detour * passes * blocks * width * min(model.moe.top_k, expert) * (expert - 1) / expert
  )
  partial_sums = 4 * len(model.kinds) * width * (tensor - 1) / tensor
  num_bytes = param_bytes * (gathers + reductions) + exchanged + partial_sums
  shorter, longer = sorted((compute, num_bytes / chip.link))
  slowdown = 1 if tensor == 1 else _TENSOR_SLOWDOWN
  return slowdown * (longer + _NOT_OVERLAPPED * shorter)


# Meshes.


@dataclasses.dataclass(frozen=True)
class Choice:
  """A mesh for a RunConfig on devices of a kind."""

  run_config: Any  # with this mesh
  memory: dict[str, float]  # estimated bytes per device, by kind
  capacity: float  # bytes of a device
  seconds: float  # estimated, per step

  @property
  def fits(self):
    return sum(self.memory.values()) <= USABLE * self.capacity

  def describe(self):
    """One line: the mesh, and the memory that it is estimated to take."""
    sizes = dataclasses.asdict(self.run_config.mesh)
    needed = f'about {size(sum(self.memory.values()))} of {size(self.capacity)} per device'
    return f'{sharding.describe(sizes)}; {needed}'

  @property
  def state_bytes(self):
    return self.memory['parameters'] + self.memory['optimizer']

  @property
  def flags(self):
    """The flags of the command line that set this mesh."""
    sizes = dataclasses.asdict(self.run_config.mesh)
    return ' '.join(f'--config.mesh.{axis}={n}' for axis, n in sizes.items() if n > 1)


def placed(run_config, devices):
  """The RunConfig with its mesh chosen for these devices, which it prints.

  On devices whose memory is not known, such as CPUs, it is unchanged.
  """
  chip = hardware.find(devices[0].device_kind)
  slices = len({getattr(device, 'slice_index', None) for device in devices})
  if not chip or not chip.memory:
    return run_config
  choice = choose(run_config, len(devices), chip, slices)
  if not choice:
    return run_config
  print(f'mesh: {choice.describe()}', flush=True)
  if not choice.fits:
    print('warning: a step may not fit into memory; python -m moejax.aot says what would help.')
  return choice.run_config


def choose(run_config, num_devices, chip, slices=1, estimator=None):
  """The Choice of the mesh sizes that are 0, or None if the batch can be split on no such mesh.

  Of all meshes with the sizes that are set, it is the fastest that fits into memory, by these
  estimates; if none fits, the one that takes the least. It is a function of the config, the
  `hardware.Chip` and the number of devices alone, so all processes make the same. Results do not
  depend on the mesh. `estimator`: of the same model and batch, if there is one already.
  """
  shapes = [
    shape
    for shape in mesh_shapes(run_config, num_devices)
    if not problems(run_config, shape, slices)
  ]
  if not shapes:
    return None
  estimator = estimator or Estimator(run_config)
  choices = [on(run_config, shape, chip, estimator) for shape in shapes]
  needed = lambda choice: sum(choice.memory.values())
  fitting = [choice for choice in choices if choice.fits] or [min(choices, key=needed)]
  fastest = min(choice.seconds for choice in fitting)
  return min((c for c in fitting if c.seconds <= _EQUAL * fastest), key=needed)


def on(run_config, shape, chip, estimator):
  """The Choice of a mesh of this shape; `estimator`: of the same model and batch."""
  placed = dataclasses.replace(run_config, mesh=sharding.MeshConfig(*shape))
  mesh = sharding.abstract_mesh(placed.mesh)
  memory = estimator.memory(mesh, run_config.optimizer.accumulation)
  return Choice(placed, memory, chip.memory, seconds(run_config, mesh, chip))


def mesh_shapes(run_config, num_devices):
  """Sizes of the mesh axes that the config allows: a size of 0 may be any power of two."""
  given = dataclasses.astuple(run_config.mesh)
  free = [powers_of_two(num_devices) if n == 0 else (n,) for n in given]
  if not run_config.model.experts and not run_config.mesh.expert:
    free[sharding.AXES.index('expert')] = (1,)  # it would be a second fsdp
  for sizes in itertools.product(*free):
    with contextlib.suppress(ValueError):
      yield sharding.MeshConfig(*sizes).shape(num_devices)


def problems(run_config, shape, slices=1):
  """What a config and a mesh of these sizes have against each other."""
  try:
    mesh_lib.by_slices(shape, slices)
  except ValueError as error:
    return [str(error)]
  batch = config_lib.batch_problems(run_config.data, run_config.model, run_config.optimizer)
  return [
    *batch,
    *config_lib.mesh_problems(run_config, sharding.abstract_mesh(sharding.MeshConfig(*shape))),
  ]


def powers_of_two(limit):
  return [2**i for i in range(limit.bit_length()) if limit % 2**i == 0]
