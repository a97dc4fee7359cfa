"""Compiles the training step of a config ahead of time: does it fit a machine, and how fast is it?

python -m moejax.aot --config=configs/mot.py:base --topology=v5e:4x4
python -m moejax.aot --config=configs/fine_grained.py:25M --topology=v5p-128 --search

The program is the one that a run there would execute; what it does is read from it (aot/hlo.py).
The time is a roofline: products at the peak of the chip, memory and interconnect at full bandwidth,
all of them at once. Norms, softmax, routing and kernels on the vector units are not estimated, nor
latencies: a real step takes longer. Exit code 0: it fits; 1: it does not.
"""

import dataclasses
import json

import jax
from absl import flags

from moejax import cli, files
from moejax.aot import search, step, topologies

_TOPOLOGY = flags.DEFINE_string(
  'topology', None, 'Such as v5e:4x4, v5e-16, v5p-128, v4-512, v6e:16x16, h100x8.'
)
_SLICES = flags.DEFINE_integer('slices', 1, 'How many slices of a TPU, joined by the network.')
_SEARCH = flags.DEFINE_bool('search', False, 'Try meshes, model.remat and accumulation.')
_NUM_COMPILED = flags.DEFINE_integer('num_compiled', 6, 'How many of them a search compiles.')
cli.define_path('json', None, 'File for the numbers of the report.')


def main(config):
  if not _TOPOLOGY.value:
    raise ValueError('--topology: expected a machine, such as --topology=v5e:4x4.')
  topology = topologies.parse(_TOPOLOGY.value, _SLICES.value)
  jax.config.update('jax_platforms', 'cpu')  # where this process itself computes
  jax.config.update('jax_enable_compilation_cache', False)  # it cannot hold these programs
  if _SEARCH.value:
    report = search.search(config, topology, _NUM_COMPILED.value)
  else:
    report = step.compile_step(config, topology)
    print(report.describe())
    if not report.fits:
      print('\n'.join(['', 'What would help:', *(f'  {line}' for line in report.advice(config))]))
  if flags.FLAGS.json:
    numbers = dataclasses.asdict(report)
    numbers |= {'step_seconds': report.step_seconds, 'bound': report.bound, 'mfu': report.mfu}
    files.write(flags.FLAGS.json, json.dumps(numbers, indent=2))
  return cli.OK if report.fits else cli.FAILED


if __name__ == '__main__':
  cli.run(main)
