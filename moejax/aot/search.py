"""Searches for the fastest mesh, remat policy and accumulation on a machine.

A rough estimate ranks all candidates; the best are compiled and ranked by their reports. The sample
is compiled only for the chosen one.
"""

import dataclasses
from typing import NamedTuple

from moejax import config as config_lib, estimate, sharding
from moejax.aot import step
from moejax.remat import REMAT
from moejax.sharding import platform


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
  tried = []
  for candidate in candidates[: 3 * num_compiled]:
    report = step.compile_step(_changed(config, candidate.changes), topology, sample=False)
    print(f'{_outcome(report):44} {_as_flags(candidate.changes)}', flush=True)
    tried.append((candidate.changes, report))
    if sum(report.fits for _, report in tried) == num_compiled:
      break
  tried.sort(key=lambda entry: (not entry[1].fits, entry[1].step_seconds))
  changes, best = _with_sample(tried, config, topology)
  print(f'\nBest: {_as_flags(changes)}\n{best.describe()}')
  return best


def _with_sample(ranked, config, topology):
  """The first whose sample fits, too, with it; if none does, the first with its sample."""
  completed = []
  for changes, report in ranked:
    if report.fits:
      report = step.with_sample(report, _changed(config, changes), topology)
    completed.append((changes, report))
    if report.fits:
      return changes, report
  return completed[0]


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
  given = config_lib.resolve(step.without_data(config))
  with platform.compiling_for(topology.platform):
    for policy in REMAT:
      model = dataclasses.replace(given.model, remat=policy)
      run_config = dataclasses.replace(given, model=model)
      estimator = estimate.Estimator(run_config)
      for tensor in (1, 2, 4):
        mesh = sharding.MeshConfig(tensor=tensor)
        free = dataclasses.replace(run_config, mesh=mesh)
        for shape in estimate.mesh_shapes(free, topology.num_devices):
          yield from _fewest_microbatches(free, shape, topology, estimator)


def _fewest_microbatches(run_config, shape, topology, estimator):
  """The Candidate of a mesh and remat policy, if any fits: more microbatches are slower."""
  for accumulation in estimate.powers_of_two(run_config.data.batch_size):
    optimizer = dataclasses.replace(run_config.optimizer, accumulation=accumulation)
    run_config = dataclasses.replace(run_config, optimizer=optimizer)
    choice = estimate.on(run_config, shape, topology.chip, estimator)
    if choice.fits and not estimate.problems(run_config, shape, topology.slices):
      changes = {f'mesh.{axis}': n for axis, n in zip(sharding.AXES, shape, strict=True)}
      changes |= {'model.remat': run_config.model.remat, 'optimizer.accumulation': accumulation}
      yield Candidate(changes, choice.seconds)
      return
