"""Reports of training steps, compiled for CPU devices in place of TPUs, and for TPUs."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from configs import moe, mot
from moejax import config as config_lib, flops, variants
from moejax.aot import report as report_lib, search, step, topologies

_HAS_LIBTPU = importlib.util.find_spec('libtpu') is not None
needs_libtpu = pytest.mark.skipif(not _HAS_LIBTPU, reason='needs libtpu: the extra tpu-aot')


class _OfCpu(topologies.Topology):
  """8 CPU devices in place of chips."""

  platform = 'cpu'


@pytest.fixture
def machine(monkeypatch):
  monkeypatch.setattr(topologies, 'devices', lambda topology: jax.devices())
  return _OfCpu('v5e', (2, 4))


def _config(module, **changes):
  config = module.get_config('debug')
  config.train.sample_length = 0  # compiles two programs
  config.update_from_flattened_dict(changes)
  return config


MESH = {'mesh.data': 2, 'mesh.expert': 4, 'model.moe.group_size': 1}


def test_a_report(machine):
  config = _config(moe, **MESH)
  report = step.compile_step(config, machine)
  run_config = config_lib.resolve(config)
  counts = flops.param_counts(run_config.model)
  tokens = run_config.data.batch_size * run_config.data.sequence_length
  assert report.fits and report.chips == 8 and report.mesh == {'data': 2, 'expert': 4}
  assert (report.params, report.active_params) == (counts['total'], counts['active'])
  assert report.tokens == tokens
  per_token = flops.training_flops_per_token(run_config.model, run_config.data.sequence_length)
  assert report.model_flops == per_token['model'] * tokens / 8
  # Experts have spare slots, and everything is sharded over all axes but `data`.
  assert report.model_flops < report.flops < 2 * report.model_flops
  assert 4 * counts['total'] / 4 <= report.memory['parameters'] < 4 * counts['total']
  assert 1.9 < report.memory['optimizer'] / report.memory['parameters'] < 2.1
  axes = {(exchange.kind, exchange.axes) for exchange in report.exchanges}
  assert ('all-to-all', 'expert') in axes and ('all-reduce', 'data') in axes
  assert report.step_seconds == max(report.seconds.values()) == report.seconds[report.bound]
  assert 0 < report.mfu < 1
  text = report.describe()
  assert 'data 2, expert 4' in text and 'fits                 yes' in text


def test_fits_means_training_evaluation_and_sample(machine, monkeypatch):
  changes = {'data.batch_size': 16, 'optimizer.accumulation': 2, 'train.sample_length': 8}
  config = _config(moe, **MESH | changes)
  compile_, programs = step._compile, []

  def recorded(lowered):
    programs.append(compile_(lowered))
    return programs[-1]

  monkeypatch.setattr(step, '_compile', recorded)
  report = step.compile_step(config, machine)
  state = report.memory['parameters'] + report.memory['optimizer']
  assert report.fits
  total = sum(report.memory.values())
  assert state < report.evaluation < total  # same microbatch as in training
  assert state < report.sampling < total
  for number in (report.evaluation, report.sampling):
    assert f'{report_lib.size(number)}, separately' in report.describe()
  for large in (1, 4):  # of training, two evaluations, and the two programs of the sample
    again, peaks = iter(programs), iter([20 * 2**30 if i == large else 0 for i in range(5)])
    monkeypatch.setattr(step, '_compile', lambda lowered, again=again: next(again))
    monkeypatch.setattr(step, 'peak_bytes', lambda compiled, peaks=peaks: next(peaks))
    report = step.compile_step(config, machine)
    assert not report.fits
  (advice,) = report.advice(config)
  assert advice.startswith('train.sample_length=0: ')
  report = dataclasses.replace(report, sampling=0.0, needed='sampling: the compiler needs 21.3GiB')
  assert list(report.advice(config)) == [advice]


def test_remat_shows_in_the_report(machine):
  reports = {
    policy: step.compile_step(_config(moe, **MESH | {'model.remat': policy}), machine)
    for policy in ('none', 'full')
  }
  assert reports['full'].flops > 1.1 * reports['none'].flops
  saved = {policy: report.memory['saved activations'] for policy, report in reports.items()}
  assert saved['full'] < saved['none'] / 2


def test_the_vocabulary_size_needs_no_file():
  base = mot.get_config('base')
  base.data.source, base.data.files = 'tokens', 'nowhere'
  config = step.without_data(base)
  assert config.model.vocab_size == 50260
  assert config_lib.resolve(config).model.vocab_size == 50260
  missing = mot.get_config('base')
  missing.data.tokenizer = 'nowhere.model'
  with pytest.raises(ValueError, match='set model.vocab_size'):
    step.without_data(missing)


def _report(**changes):
  fields = {
    'topology': 'v5e:4x4',
    'chips': 16,
    'mesh': {'data': 16},
    'remat': 'none',
    'accumulation': 1,
    'params': 10**9,
    'active_params': 10**8,
    'memory': {'parameters': 4 * 2**30, 'optimizer': 8 * 2**30, 'saved activations': 9 * 2**30},
    'evaluation': 0.0,
    'sampling': 0.0,
    'capacity': 16 * 2**30,
    'fits': False,
    'needed': 'the compiler needs 21.3GiB of 15.75GiB',
    'better_mesh': '--config.mesh.expert=16',
    'better_state': 0.78e9,
    'tokens': 2**16,
    'model_flops': 1e12,
    'flops': 0.0,
    'memory_traffic': 0.0,
    'exchanges': [],
    'seconds': {'compute': 0.0, 'memory': 0.0, 'interconnect': 0.0},
    'compile_seconds': 3.0,
  }
  return report_lib.Report(**fields | changes)


def test_advice_for_what_does_not_fit():
  config = mot.get_config('base')
  config.model.remat, config.model.loss_chunk = 'none', 0
  advice = list(_report().advice(config))
  assert [line.split(' ')[0].split('=')[0] for line in advice] == [
    '--config.mesh.expert',
    'model.remat',
    'optimizer.accumulation',
    'model.loss_chunk',
    'more',
  ]
  assert (
    '(now data 16): parameters and optimizer take 744 MiB on each chip, now 12 GiB.' in advice[0]
  )
  config.model.remat, config.model.loss_chunk = 'full', 32
  sharded = _report(mesh={'fsdp': 16}, accumulation=16, better_mesh='')
  config.optimizer.accumulation = 16
  assert [line[:10] for line in sharded.advice(config)] == ['more chips']
  assert 'needs 21.3GiB' in sharded.describe() and sharded.describe().endswith('NO')


@pytest.mark.heavy
def test_the_advice_is_computed_from_how_parameters_are_placed(machine, monkeypatch):
  """Dimensions that a mesh axis does not divide stay whole: one part in eight is not the truth."""
  monkeypatch.setattr(step, '_compile', lambda lowered: (None, 'the compiler needs more'))
  changes = {'mesh.data': 8, 'mesh.fsdp': 1, 'mesh.expert': 1}
  changes |= {'model.d_model': 20, 'model.moe.group_size': 1}
  report = step.compile_step(_config(moe, **changes), machine)
  assert not report.fits
  state = report.memory['parameters'] + report.memory['optimizer']
  flags = dict(flag.removeprefix('--config.').split('=') for flag in report.better_mesh.split())
  mesh = {'mesh.data': 1, 'mesh.fsdp': 1, 'mesh.expert': 1}
  mesh |= {name: int(n) for name, n in flags.items()}
  better = step.compile_step(_config(moe, **changes | mesh), machine)
  assert report.better_state == better.memory['parameters'] + better.memory['optimizer']
  assert state / 8 < report.better_state < state


@pytest.mark.heavy
def test_a_search_ranks_what_is_possible(machine, capsys):
  config = _config(moe, **{'model.moe.group_size': 2})
  best = search.search(config, machine, num_compiled=2)
  assert best.fits
  lines = capsys.readouterr().out.splitlines()
  ranked = [line for line in lines if line.startswith(tuple('0123456789')) and 'bound by' in line]
  assert len(ranked) == 2
  assert f'--config.model.remat={best.remat}' in next(l for l in lines if l.startswith('Best: '))


@pytest.mark.parametrize('too_large', [0, 1, 2])
def test_a_search_compiles_one_sample_unless_it_does_not_fit(machine, monkeypatch, too_large):
  seconds, sampled = iter((3.0, 1.0, 2.0)), []

  def compile_step(config, topology, sample):
    times = {'compute': next(seconds), 'memory': 0.0, 'interconnect': 0.0}
    return _report(fits=not sample, seconds=times, needed='', flops=1.0, compile_seconds=0.0)

  def with_sample(report, config, topology):
    sampled.append(report.step_seconds)
    fits = len(sampled) > too_large
    return dataclasses.replace(report, fits=fits, sampling=float(len(sampled)))

  monkeypatch.setattr(step, 'compile_step', compile_step)
  monkeypatch.setattr(step, 'with_sample', with_sample)
  best = search.search(_config(moe, **{'model.moe.group_size': 2}), machine, num_compiled=3)
  assert sampled == [1.0, 2.0, 3.0][: too_large + 1]
  assert best.fits and best.sampling == too_large + 1


def _run(*args, **environment):
  command = [sys.executable, '-m', 'moejax.aot', *args]
  return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.parametrize(
  'args, message',
  [
    ([], '--topology: expected a machine'),
    (['--topology=v5e-17'], 'no such v5e'),
  ],
)
def test_bad_names(args, message):
  done = _run('--config=configs/mot.py', *args)
  assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'mesh.data': 3}, 'does not fit 8 devices'),
    (
      {'mesh.data': 1, 'mesh.expert': 8, 'model.moe.expansion_rate': 6},
      'must divide the 6 experts',
    ),
  ],
)
def test_bad_meshes(machine, changes, message):
  with pytest.raises(ValueError, match=message):
    step.compile_step(_config(moe, **changes), machine)


def _compiled_for_tpu(tmp_path, *args, **environment):
  """The report and the exit code of moejax.aot in a separate process."""
  path = tmp_path / 'report.json'
  done = _run(f'--json={path}', *args, **environment)
  assert path.exists(), done.stderr
  fields = json.loads(path.read_text())
  names = {field.name for field in dataclasses.fields(report_lib.Report)}
  exchanges = [report_lib.Exchange(**exchange) for exchange in fields.pop('exchanges')]
  fields = {name: value for name, value in fields.items() if name in names}
  return report_lib.Report(**fields, exchanges=exchanges), done.returncode


GROUPS_OF_8 = '--config.model.moe.group_size=8'  # so that every device holds whole groups
NO_SAMPLE = '--config.train.sample_length=0'  # compiles two programs, which paper sizes have
# What docs/launch.md promises: config, slice, mesh, GiB per chip by the compiler.
PAPER_SIZES = [
  ('mot.py:base', 'v5litepod-16', {'expert': 16}, 1.38),
  ('moe.py:100M', 'v5litepod-8', {'expert': 8}, 7.49),
  ('moe_mamba.py:100M', 'v5litepod-8', {'data': 2, 'fsdp': 2, 'expert': 2}, 13.0),
  ('fine_grained.py:1B', 'v5p-32', {'expert': 16}, 52.3),
]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize('config, topology, mesh, gib', PAPER_SIZES)
def test_paper_sizes_fit_with_the_mesh_that_is_chosen(tmp_path, config, topology, mesh, gib):
  args = [f'--config=configs/{config}', f'--topology={topology}']
  grouped = [GROUPS_OF_8, '--config.optimizer.accumulation=8']
  args += grouped if config.startswith('moe') else []
  effort = {'JAX_EXEC_TIME_OPTIMIZATION_EFFORT': '-1.0'}  # a quarter of the compiler's time
  report, code = _compiled_for_tpu(tmp_path, *args, **effort)
  assert code == 0 and report.fits and report.mesh == mesh
  assert sum(report.memory.values()) / 2**30 == pytest.approx(gib, rel=0.1)
  page = (pathlib.Path(__file__).parents[2] / 'docs' / 'launch.md').read_text()
  sizes = ', '.join(f'{axis} {n}' for axis, n in mesh.items())
  mark = ' ¹' if GROUPS_OF_8 in args else ''
  assert f'| `{config}`{mark} | {topology} | {sizes} | {gib:g} of ' in page


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize('family', ['moe.py:3M', 'mot.py:mini'])
def test_experts_exchange_slots_on_a_tpu(tmp_path, family):
  args = [f'--config=configs/{family}', '--topology=v5e:2x4', '--config.mesh.data=2']
  args += [
    '--config.mesh.expert=4',
    '--config.data.batch_size=128',
    '--config.model.remat=save_moe',
    '--config.model.vocab_size=512',
    GROUPS_OF_8,
    NO_SAMPLE,
  ]
  report, code = _compiled_for_tpu(tmp_path, *args)
  assert code == 0 and report.fits
  assert 'expert' in {e.axes for e in report.exchanges if e.kind == 'all-to-all'}
  # Only non-expert parameters are gathered: a fraction of the experts' bytes per chip.
  gathered = sum(e.bytes for e in report.exchanges if e.kind == 'all-gather')
  assert 0 < gathered < 2 * 0.9 * report.params / 4 / 2


@pytest.mark.slow
@needs_libtpu
def test_parameters_are_gathered_a_block_at_a_time_on_a_tpu(tmp_path):
  args = ['--config=configs/moe.py:3M', '--topology=v5e:2x4', '--config.mesh.data=1', GROUPS_OF_8]
  report, code = _compiled_for_tpu(tmp_path, *args, '--config.mesh.fsdp=8', NO_SAMPLE)
  assert code == 0 and report.fits
  d_model, blocks, *_ = variants.MOE_MAMBA_SIZES['3M']
  matrix = 2 * 32 * d_model * 4 * d_model  # all experts of a block
  gathers = [e for e in report.exchanges if e.kind == 'all-gather']
  gathered = sum(e.bytes for e in gathers) / (7 / 8)
  # Both matrices of every block, for the forward and the backward pass, and little else.
  assert 1 <= gathered / (2 * 2 * blocks * matrix) < 1.4
  assert gathered / sum(e.count for e in gathers) < matrix
