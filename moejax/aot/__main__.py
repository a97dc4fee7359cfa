"""Compiles a config's training step ahead of time: does it fit in memory, and how fast is it?

python -m moejax.aot --config=configs/mot.py:base --topology=v5e:4x4
python -m moejax.aot --config=configs/fine_grained.py:25M --topology=v5p-128 --search

The program is the one that a run on that machine would execute; aot/hlo.py analyses its HLO.
The time is a roofline: matmuls at the chip's peak, memory and interconnect at full bandwidth, all
overlapped. Norms, softmax, routing, vector-unit kernels and latencies are not modelled: a real step
takes longer. Exit code 0: it fits; 1: it does not.
"""

import dataclasses
import json

import jax
from absl import flags

from moejax import cli, files
from moejax.aot import search, step, topologies

_TOPOLOGY = flags.DEFINE_string(
  'topology', None, 'Target machine: v5e:4x4, v5litepod-16, v5p-128, v6e:16x16, h100x8, ...'
)
_SLICES = flags.DEFINE_integer('slices', 1, 'TPU slices, connected by the data-center network.')
_SEARCH = flags.DEFINE_bool('search', False, 'Search over meshes, model.remat and accumulation.')
_NUM_COMPILED = flags.DEFINE_integer('num_compiled', 6, 'Candidates that --search compiles.')
cli.define_path('json', None, 'JSON file to write the report to.')


def main(config):
  if not _TOPOLOGY.value:
    raise ValueError('--topology: expected a machine, such as --topology=v5e:4x4.')
  topology = topologies.parse(_TOPOLOGY.value, _SLICES.value)
  jax.config.update('jax_platforms', 'cpu')  # for this process itself
  jax.config.update('jax_enable_compilation_cache', False)  # it cannot hold these programs
  if _SEARCH.value:
    report = search.search(config, topology, _NUM_COMPILED.value)
  else:
    report = step.compile_step(config, topology)
    print(report.describe())
    if not report.fits:
      print('\n'.join(['', 'Suggestions:', *(f'  {line}' for line in report.advice(config))]))
  if flags.FLAGS.json:
    numbers = dataclasses.asdict(report)
    numbers |= {'command': cli.portable_command()}
    numbers |= {'step_seconds': report.step_seconds, 'bound': report.bound, 'mfu': report.mfu}
    files.write(flags.FLAGS.json, json.dumps(numbers, indent=2))
  return cli.OK if report.fits else cli.FAILED


if __name__ == '__main__':
  cli.run(main)
