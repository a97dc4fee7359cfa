"""What `train.deterministic` sets and refuses."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest
from jax._src import xla_bridge

from moejax import determinism

ROOT = pathlib.Path(__file__).parent.parent
FLAG = '--xla_gpu_deterministic_ops'
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
