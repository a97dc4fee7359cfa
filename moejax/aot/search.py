"""Searches for the fastest mesh, remat policy and accumulation on a machine.

A rough estimate ranks all candidates; the best are compiled and ranked by their reports.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

from moejax import config as config_lib, flops, model as model_lib, sharding, step as step_lib
from moejax.aot import step, topologies
from moejax.sharding import platform

# Rough numbers: they only decide what is compiled first; a wrong one costs time.
# Time over that of the model's matmuls, by policy: `full` adds one pass to three, `save_moe` one
# without the experts; `none` recomputes nothing, but moves more memory than `dots`.
_WORK = {'none': 1.15, 'dots': 1.1, 'save_moe': 1.25, 'full': 4 / 3}
# Fraction of memory for parameters, optimizer and saved activations; temporaries take the rest. It
# is at most 0.55 in the steps of docs/pods.json that fit.
_MEMORY_FRACTION = 0.6
_NOT_OVERLAPPED = 0.3  # fraction of compute or communication, whichever is shorter
_TENSOR_SLOWDOWN = 1.5  # small matmuls are slow, and the compiler rejects these meshes more often


class Candidate(NamedTuple):
  """Config fields to change, by name, and the estimated seconds per step."""

  changes: dict
  seconds: float


def search(config, topology, num_compiled):
  """Compiles the most promising candidates, prints their ranking, and returns the best Report.

  Args:
    config: a ConfigDict.
    topology: a Topology.
    num_compiled: candidates that fit to compile; at most three times as many are tried.
  """
  candidates = sorted(_candidates(config, topology), key=lambda candidate: candidate.seconds)
  if not candidates:
    print('Parameters and optimizer fit on no mesh: use more chips, or larger ones.')
    return step.compile_step(config, topology)
  print(f'{len(candidates)} candidates may fit; compiling the most promising, about a minute each.')
  ranked = []
  for candidate in candidates[: 3 * num_compiled]:
    report = step.compile_step(_changed(config, candidate.changes), topology)
    print(f'{_outcome(report):44} {_as_flags(candidate.changes)}', flush=True)
    ranked.append((not report.fits, report.step_seconds, candidate.changes, report))
    if sum(entry[-1].fits for entry in ranked) == num_compiled:
      break
  *_, changes, best = min(ranked, key=lambda entry: entry[:2])
  print(f'\nBest: {_as_flags(changes)}\n{best.describe()}')
  return best


def _outcome(report):
  if not report.fits:
    return f'does not fit {report.needed}'
  return f'{1e3 * report.step_seconds:.4g} ms, bound by {report.bound}, MFU {100 * report.mfu:.0f}%'


def _as_flags(changes):
  return ' '.join(f'--config.{name}={value}' for name, value in changes.items())


def _changed(config, changes):
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(changes)
  return config


def _candidates(config, topology):
  config = step.without_data(config)
  run_config = config_lib.resolve(_changed(config, {'mesh.data': -1, 'mesh.fsdp': 1}))
  with platform.compiling_for(topology.platform):
    saved = {policy: _saved_per_sequence(run_config, policy) for policy in model_lib.REMAT}
  devices = topologies.devices(topology)
  experts = math.gcd(*run_config.model.experts.values()) or 1
  for sizes in _mesh_shapes(topology.num_chips, experts):
    names = {f'mesh.{axis}': n for axis, n in zip(sharding.AXES, sizes, strict=True)}
    mesh = sharding.make_mesh(sharding.MeshConfig(*sizes), devices)
    state = step.shard_bytes(sharding.abstract(step_lib.fresh_state(run_config), mesh))
    for policy, bytes_per_sequence in saved.items():
      for accumulation in _powers_of_two(run_config.data.batch_size):
        changes = names | {'model.remat': policy, 'optimizer.accumulation': accumulation}
        sequences = run_config.data.batch_size / accumulation / sharding.batch_shards(mesh)
        fits = state + sequences * bytes_per_sequence < _MEMORY_FRACTION * topology.chip.memory
        if fits and _is_possible(_changed(config, changes), mesh):
          yield Candidate(changes, _seconds(run_config, topology, sizes, policy, accumulation))
          break  # more microbatches are slower


def _is_possible(config, mesh):
  try:
    config_lib.check_mesh(config_lib.resolve(config), mesh)
  except ValueError:
    return False
  return True


def _mesh_shapes(chips, experts):
  for tensor, expert in itertools.product((1, 2, 4), _powers_of_two(chips)):
    if experts % expert or chips % (tensor * expert):
      continue
    for fsdp in _powers_of_two(chips // tensor // expert):
      yield chips // tensor // expert // fsdp, fsdp, expert, tensor


def _powers_of_two(limit):
  return [2**i for i in range(int(math.log2(limit)) + 1) if limit % 2**i == 0]


def _saved_per_sequence(run_config, policy):
  model = dataclasses.replace(run_config.model, remat=policy)
  sequences = math.lcm(*model.groups.values())
  return step.saved_bytes(dataclasses.replace(run_config, model=model), sequences) / sequences


def _seconds(run_config, topology, sizes, policy, accumulation):
  """Compute, and communication: parameters and gradients (data, fsdp), tokens (expert)."""
  data, fsdp, expert, tensor = sizes
  chip, model = topology.chip, run_config.model
  tokens = run_config.data.batch_size * run_config.data.sequence_length / topology.num_chips
  per_token = flops.training_flops_per_token(model, run_config.data.sequence_length)['total']
  compute = _WORK[policy] * tokens * per_token / chip.flops
  param_bytes = 2 * flops.param_counts(model)['total'] / expert / tensor  # bfloat16
  gathers = 2 * accumulation * (fsdp - 1) / fsdp
  reductions = accumulation * (fsdp - 1) / fsdp + 2 * (data - 1) / data / fsdp
  width = 2 * model.d_model * tokens * tensor
  blocks = sum(kind in ('moe', 'mot', 'moe_in_mamba') for kind in model.kinds)
  exchanged = 4 * blocks * width * min(model.moe.top_k, expert) * (expert - 1) / expert
  partial_sums = 4 * len(model.kinds) * width * (tensor - 1) / tensor
  num_bytes = param_bytes * (gathers + reductions) + exchanged + partial_sums
  communication = num_bytes / chip.link
  slowdown = 1 if tensor == 1 else _TENSOR_SLOWDOWN
  shorter, longer = sorted((compute, communication))
  return slowdown * (longer + _NOT_OVERLAPPED * shorter)
