"""Memory of a step before it is compiled, and the mesh that is chosen by it."""

import dataclasses
import importlib
import json
import math
import pathlib
import re
import types

import jax
import pytest

from configs import dense, fine_grained, moe, mot
from moejax import config as config_lib, estimate, hardware, sharding, step, train
from moejax.aot import step as aot_step
from moejax.sharding import platform

PODS = json.loads((pathlib.Path(__file__).parent.parent / 'docs' / 'pods.json').read_text())
V5E, V5P = hardware.find('v5e'), hardware.find('v5p')


def _resolved(config, **changes):
  config = aot_step.without_data(config)
  config.update_from_flattened_dict(changes)
  return config_lib.resolve(config)


@pytest.mark.parametrize('mesh, name', [((1, 2, 4, 1), 'adamw'), ((1, 4, 1, 2), 'muon')])
def test_the_state_is_counted_as_it_is_placed(mesh, name):
  changes = {'model.d_model': 20, 'optimizer.name': name}  # 8 does not divide the width
  run_config = _resolved(moe.get_config('debug'), **changes)
  concrete = sharding.make_mesh(sharding.MeshConfig(*mesh))
  state = jax.jit(
    step.fresh_state(run_config),
    out_shardings=jax.tree.map(
      lambda leaf: leaf.sharding, sharding.abstract(step.fresh_state(run_config), concrete)
    ),
  )()
  on_first = lambda tree: sum(
    leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree)
  )
  memory = estimate.Estimator(run_config).memory(concrete, 1)
  assert memory['parameters'] == on_first(state['params'])
  assert memory['parameters'] + memory['optimizer'] == on_first(state)


ROWS = [
  'large | 64x1B G=16 | v5e-256',
  'papers | 64x49M G=8 | v5e-4',
  'papers | MoT-Base 32E/1 | v5e-4',
  'weak | MoE-Mamba 100M, expert 2, fsdp 4 | v5e-16',
]


@pytest.mark.parametrize('row', ROWS)
def test_the_estimate_is_near_what_the_compiler_needs(row):
  report = PODS[row]
  file, variants = re.search(r'--config=configs/(\w+)\.py:(\S+)', report['command']).groups()
  config = importlib.import_module(f'configs.{file}').get_config(variants)
  batch = report['tokens'] // config.data.sequence_length
  changes = {'model.remat': report['remat'], 'data.batch_size': batch}
  if groups := re.search(r'--config\.model\.moe\.group_size=(\d+)', report['command']):
    changes['model.moe.group_size'] = int(groups[1])
  run_config = _resolved(config, **changes, **{'optimizer.accumulation': report['accumulation']})
  sizes = tuple(report['mesh'].get(axis, 1) for axis in sharding.AXES)
  with platform.compiling_for('tpu'):
    estimator = estimate.Estimator(run_config)
  choice = estimate.on(run_config, sizes, V5E, estimator)
  compiled = report['memory']
  for kind in ('parameters', 'optimizer'):
    assert choice.memory[kind] == pytest.approx(compiled[kind], rel=1e-6)
  assert 0.95 < sum(choice.memory.values()) / sum(compiled.values()) < 1.35


def _mesh(config, num_devices, chip=V5E, **changes):
  choice = estimate.choose(_resolved(config, **changes), num_devices, chip)
  return dataclasses.astuple(choice.run_config.mesh), choice


def test_the_mesh_is_the_fastest_that_fits():
  assert _mesh(mot.get_config('base'), 16)[0] == (1, 1, 16, 1)
  assert _mesh(dense.get_config('base'), 8)[0] == (8, 1, 1, 1)
  large, choice = _mesh(dense.get_config('large'), 8)
  assert math.prod(large[1:]) > 1 and choice.fits
  _, choice = _mesh(fine_grained.get_config('1B'), 64)
  assert choice.fits and choice.flags == '--config.mesh.expert=64'
  assert re.fullmatch(r'expert 64; about 1[34]\S* GiB of 16 GiB per device', choice.describe())


def test_sizes_that_are_set_stay():
  assert _mesh(mot.get_config('base'), 16, **{'mesh.data': 16, 'mesh.fsdp': 1})[0][:2] == (16, 1)
  assert _mesh(mot.get_config('base'), 16, **{'mesh.fsdp': 8})[0][1] == 8
  assert _mesh(mot.get_config('base'), 16, **{'mesh.data': 1, 'mesh.fsdp': -1})[0][0] == 1


def test_what_fits_nowhere_takes_the_least_memory_and_says_so():
  mesh, choice = _mesh(fine_grained.get_config('1B'), 4)
  assert mesh[0] == 1 and not choice.fits
  assert estimate.choose(_resolved(mot.get_config('debug')), 3, V5E) is None  # of 8 sequences


def test_slices_are_along_data_or_fsdp():
  run_config = _resolved(mot.get_config('base'))
  mesh = estimate.choose(run_config, 32, V5E, slices=4).run_config.mesh
  assert mesh.data % 4 == 0 or mesh.fsdp % 4 == 0


def test_a_run_uses_the_mesh_that_is_chosen_for_its_devices(monkeypatch, tmp_path, capsys):
  config = mot.get_config('debug')
  assert train.prepare(config, tmp_path).mesh.shape == {
    'data': 8,
    'fsdp': 1,
    'expert': 1,
    'tensor': 1,
  }
  assert 'mesh' not in capsys.readouterr().out
  config.model.d_model = 64
  chip = dataclasses.replace(V5E, memory=2**20)
  monkeypatch.setattr(hardware, 'find', lambda kind: chip)
  run = train.prepare(config, tmp_path)
  assert run.mesh.shape['data'] < 8
  assert re.search(r'^mesh: (expert|fsdp|data) \d', capsys.readouterr().out, re.M)
  assert config.mesh.expert == 0  # the run's config stays as it was given


def test_devices_of_a_slice_are_counted(capsys):
  devices = [types.SimpleNamespace(device_kind='TPU v5 lite', slice_index=0)] * 16
  run_config = estimate.placed(_resolved(mot.get_config('base')), devices)
  assert run_config.mesh.expert == 16
  assert capsys.readouterr().out.startswith('mesh: expert 16; about 1.')
