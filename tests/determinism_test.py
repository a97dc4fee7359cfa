"""The same bits after a kill, in every family; what `train.deterministic` sets and refuses."""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import jax
import pytest
from jax._src import xla_bridge

from moejax import determinism

ROOT = pathlib.Path(__file__).parent.parent
FLAG = '--xla_gpu_deterministic_ops'
QUICKLY = os.environ.get('XLA_FLAGS', '')  # as all tests compile
FAMILIES = [
  p.stem for p in (ROOT / 'configs').glob('*.py') if p.stem not in ('__init__', 'common', 'run')
]
# Prints the environment when a run first asks for devices, and whether XLA takes it.
STARTS = """
import os, jax
from configs import mot
from jax._src import xla_bridge
from moejax import start

def devices(started=jax.devices):
  print(xla_bridge.backends_are_initialized(), os.environ['XLA_FLAGS'], flush=True)
  print(len(started()))
  raise SystemExit(0)

config = mot.get_config('debug')
config.train.deterministic = True
jax.devices = devices
start.prepare(config, None)
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  for name in ('XLA_FLAGS', 'NCCL_NVLS_ENABLE'):
    monkeypatch.setenv(name, '')
    monkeypatch.delenv(name)
  return monkeypatch


def test_a_run_sets_what_is_needed_before_its_devices_start(environment):
  environment.setenv('XLA_FLAGS', '--xla_cpu_multi_thread_eigen=false')
  given = os.environ | {'PYTHONPATH': str(ROOT)}
  command = [sys.executable, '-c', STARTS]
  process = subprocess.run(command, env=given, capture_output=True, text=True, cwd=ROOT)
  first, *_ = process.stdout.splitlines() or [process.stderr]
  assert first == f'False --xla_cpu_multi_thread_eigen=false {FLAG}=true'
  assert process.returncode == 0, process.stderr  # XLA ends a program for flags it does not know


@pytest.mark.parametrize(
  ('name', 'value', 'message'),
  [
    ('XLA_FLAGS', f'{FLAG}=false', f'XLA_FLAGS sets {FLAG}=false'),
    ('XLA_FLAGS', f'{FLAG} {FLAG}=0', f'XLA_FLAGS sets {FLAG}=0'),
    ('NCCL_NVLS_ENABLE', '1', 'NCCL_NVLS_ENABLE is 1'),
  ],
)
def test_an_environment_that_says_the_opposite_is_refused(environment, name, value, message):
  environment.setenv(name, value)
  with pytest.raises(ValueError, match=f'^train.deterministic: {message}. Remove it.$'):
    determinism.require()


def test_gpus_that_have_started_need_it_from_outside(environment):
  environment.setattr(xla_bridge, 'backends_are_initialized', lambda: True)
  environment.setattr(jax, 'default_backend', lambda: 'gpu')
  with pytest.raises(ValueError, match="Start the program with XLA_FLAGS='--xla_gpu_determ"):
    determinism.require()
  environment.setenv('XLA_FLAGS', f'{FLAG}=True')
  environment.setenv('NCCL_NVLS_ENABLE', '0')
  determinism.require()
  environment.setattr(jax, 'default_backend', lambda: 'cpu')
  environment.delenv('XLA_FLAGS')
  determinism.require()
  assert 'XLA_FLAGS' not in os.environ


def _trains(action, folder, names, **options):
  command = [sys.executable, '-m', 'tests.trains', action, str(folder), *names]
  environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': '8'}
  environment['XLA_FLAGS'] = QUICKLY
  return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
  'names',
  [
    # Between them, all sublayers: attention, MoT, Mamba and experts.
    pytest.param(['mot:8', 'moe_mamba:8'], marks=pytest.mark.heavy),
    pytest.param([f'{name}:{n}' for name in FAMILIES for n in (1, 8)], marks=pytest.mark.slow),
  ],
  ids=['two', 'all'],
)
def test_models_that_are_killed_end_with_the_same_bits(tmp_path, names):
  with _trains('train', tmp_path, names) as process:
    for _ in range(3):
      assert process.stdout.readline()
    time.sleep(random.random())
    process.kill()
  with _trains('resume', tmp_path, names) as process:
    found = json.loads(process.stdout.read().splitlines()[-1])
  assert found.keys() == {*names}
  for saved, differences in found.values():
    assert saved >= 2 and not differences
