"""Which mesh, remat policy and accumulation are the fastest on a machine?

All that are possible are ranked by a rough estimate; the first are compiled, and ranked by what the
compiler makes of them.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

from moejax import config as config_lib, flops, model as model_lib, sharding, step as step_lib
from moejax.aot import step, topologies
from moejax.sharding import platform

# Rough numbers: they only order what is compiled, and a wrong one costs time.
# Work over that of the model's products, by policy: `full` is one pass beside three, `save_moe`
# that without the experts; `none` computes nothing again, but writes and reads more than `dots`.
_WORK = {'none': 1.15, 'dots': 1.1, 'save_moe': 1.25, 'full': 4 / 3}
# Of the memory, for parameters, optimizer and saved activations; temporaries take the rest. In the
# steps of docs/pods.json that fit, it is up to 0.55.
_ROOM = 0.6
_NOT_OVERLAPPED = 0.3  # of products or exchanges, whichever takes less
_NARROW = 1.5  # slower: products cut along `tensor`, which also are refused more often


class Candidate(NamedTuple):
  """Fields of the config, by name, and the roughly estimated seconds of a step."""

  changes: dict
  seconds: float


def search(config, topology, num_compiled):
  """Compiles the most promising candidates, prints how they rank, and returns the best Report.

  Args:
    config: a ConfigDict.
    topology: a Topology.
    num_compiled: how many that fit to compile, of at most three times as many that are tried.
  """
  candidates = sorted(_candidates(config, topology), key=lambda candidate: candidate.seconds)
  if not candidates:
    print('No mesh leaves room for parameters and optimizer: more chips, or larger ones.')
    return step.compile_step(config, topology)
  print(f'{len(candidates)} ways may fit; compiling the most promising, about a minute each.')
  ranked = []
  for candidate in candidates[: 3 * num_compiled]:
    report = step.compile_step(_changed(config, candidate.changes), topology)
    print(f'{_outcome(report):44} {_as_flags(candidate.changes)}', flush=True)
    ranked.append((not report.fits, report.step_seconds, candidate.changes, report))
    if sum(entry[-1].fits for entry in ranked) == num_compiled:
      break
  *_, changes, best = min(ranked, key=lambda entry: entry[:2])
  print(f'\nThe best: {_as_flags(changes)}\n{best.describe()}')
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
  config = step.without_text(config)
  stages = config_lib.resolve(_changed(config, {'mesh.data': -1, 'mesh.fsdp': 1}))
  with platform.compiling_for(topology.platform):
    saved = {policy: _saved_by_sequence(stages, policy) for policy in model_lib.REMAT}
  devices = topologies.devices(topology)
  experts = math.gcd(*stages.model.experts.values()) or 1
  for sizes in _mesh_shapes(topology.num_chips, experts):
    names = {f'mesh.{axis}': n for axis, n in zip(sharding.AXES, sizes, strict=True)}
    mesh = sharding.make_mesh(sharding.MeshConfig(*sizes), devices)
    state = step.shard_bytes(sharding.abstract(step_lib.fresh_state(stages), mesh))
    for policy, bytes_by_sequence in saved.items():
      for accumulation in _powers_of_two(stages.data.batch_size):
        changes = names | {'model.remat': policy, 'optimizer.accumulation': accumulation}
        rows = stages.data.batch_size / accumulation / sharding.batch_shards(mesh)
        fits = state + rows * bytes_by_sequence < _ROOM * topology.chip.memory
        if fits and _is_possible(_changed(config, changes), mesh):
          yield Candidate(changes, _seconds(stages, topology, sizes, policy, accumulation))
          break  # more passes are slower


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


def _saved_by_sequence(stages, policy):
  model = dataclasses.replace(stages.model, remat=policy)
  rows = math.lcm(*model.groups.values())
  return step.saved_bytes(dataclasses.replace(stages, model=model), rows) / rows


def _seconds(stages, topology, sizes, policy, accumulation):
  """Products, and what moves: parameters and gradients along data and fsdp, tokens to experts."""
  data, fsdp, expert, tensor = sizes
  chip, model = topology.chip, stages.model
  tokens = stages.data.batch_size * stages.data.sequence_length / topology.num_chips
  per_token = flops.training_flops_per_token(model, stages.data.sequence_length)['total']
  products = _WORK[policy] * tokens * per_token / chip.flops
  matrices = 2 * flops.param_counts(model)['total'] / expert / tensor  # bytes in 16 bits
  gathers = 2 * accumulation * (fsdp - 1) / fsdp
  reductions = accumulation * (fsdp - 1) / fsdp + 2 * (data - 1) / data / fsdp
  width = 2 * model.d_model * tokens * tensor
  blocks = sum(kind in ('moe', 'mot', 'moe_in_mamba') for kind in model.kinds)
  exchanged = 4 * blocks * width * min(model.moe.top_k, expert) * (expert - 1) / expert
  partial_sums = 4 * len(model.kinds) * width * (tensor - 1) / tensor
  moved = matrices * (gathers + reductions) + exchanged + partial_sums
  moving = moved / chip.link
  slower = 1 if tensor == 1 else _NARROW
  return slower * (max(products, moving) + _NOT_OVERLAPPED * min(products, moving))
