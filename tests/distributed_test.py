"""Several processes on one machine: same results as one, all stop together, and none hangs."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from random import Random

import jax
import numpy as np
import pytest
from jax._src import clusters

from moejax import cli, distributed, group, metrics, run_folder
from moejax.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parent.parent
CHANGES = {
  'model.blocks': ((('mot',), 1),),
  'model.loss_chunk': 0,
  'optimizer.accumulation': 1,
  'mesh.data': 2,
  'mesh.fsdp': 2,
  'train.steps': 60,
  'train.eval_interval': 60,
  'train.checkpoint_interval': 10,
  'train.sample_length': 4,
}
# Like main, but a dead process is noticed sooner.
PROGRAM = 'from moejax import distributed, main; distributed._HEARTBEAT_TIMEOUT = 10; main.run()'


class Processes:
  """Processes on this machine, with 4 devices in total, that train with `CHANGES`."""

  def __init__(self, folder, number, *args):
    folder.mkdir()
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': str(4 // number)}
    args += (f'--coordinator_address=127.0.0.1:{port}', f'--num_processes={number}')
    args += tuple(f'--config.{field}={value}' for field, value in CHANGES.items())
    command = [sys.executable, '-u', '-c', PROGRAM, '--config=configs/mot.py:debug', *args]
    self.logs = [folder / f'{i}.log' for i in range(number)]
    self.processes = []
    for i, path in enumerate(self.logs):
      with path.open('w') as log:
        process = subprocess.Popen(
          [*command, f'--process_id={i}'], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
      self.processes.append(process)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    for process in self.processes:
      process.kill()
      process.wait()

  def output(self, process=0):
    return self.logs[process].read_text(errors='replace')

  def last_line(self, process=0):
    return self.output(process).splitlines()[-1]

  def wait_for(self, pattern):
    """Waits until process 0 has printed something, and returns the match."""
    while not (found := re.search(pattern, self.output())):
      assert all(process.poll() is None for process in self.processes), self.output()
      time.sleep(0.01)
    return found

  def codes(self):
    return [process.wait(300) for process in self.processes]


def _params_of(workdir):
  _, step, params, _ = run_folder.load_run(workdir)
  return step, jax.device_get(params)


def _assert_same_runs(workdir, other):
  (step, params), (other_step, other_params) = _params_of(workdir), _params_of(other)
  assert step == other_step == CHANGES['train.steps']
  jax.tree.map(np.testing.assert_array_equal, params, other_params)
  for name in ('loss', 'grad_norm', 'validation/loss', 'mot/entropy/00'):
    assert metrics.loss_curve(workdir, name) == metrics.loss_curve(other, name) != []


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """A single-process run; the collectives are those of several processes."""
  folder = tmp_path_factory.mktemp('alone')
  with Processes(folder / 'logs', 1, f'--workdir={folder}/run') as run:
    assert run.codes() == [cli.OK], run.output()
  return folder / 'run'


@pytest.mark.heavy
def test_two_processes_interrupted_and_killed_match_one(alone, tmp_path):
  folder = tmp_path / 'lr[3e-4]'  # no pattern
  workdir = f'--workdir={folder}'
  with Processes(tmp_path / 'interrupted', 2, workdir) as run:
    run.wait_for(r'step +3/60')
    run.processes[1].send_signal(signal.SIGINT)  # forwarded as SIGTERM
    assert run.codes() == [cli.INTERRUPTED] * 2, run.output()
    assert 'resume with\n' in run.output() and str(workdir) in run.output()
    assert 'step' not in run.output(1)

  with Processes(tmp_path / 'killed', 2, workdir) as run:
    run.wait_for(r'step +24/60')
    run.processes[0].kill()
    assert 'resuming from step' in run.output()
    assert run.codes() == [-signal.SIGKILL, cli.INTERRUPTED], run.output(1)
    assert re.match('error: .* lost process 0 on .*, which died', run.last_line(1))

  with Processes(tmp_path / 'resumed', 1, workdir) as run:  # another number of processes
    assert run.codes() == [cli.OK], run.output()
    assert re.search('resuming from step [12]0', run.output())
  _assert_same_runs(alone, folder)


def _in_memory(folder, every):
  """Flags of a run in `folder` that saves in memory, and on the disk only at the end."""
  changes = {'memory_checkpoint': every, 'memory_folder': folder, 'checkpoint_interval': 60}
  return f'--workdir={folder}/run', *(f'--config.train.{k}={v}' for k, v in changes.items())


def _lose_host(folder, index):
  """Deletes what a process held in memory."""
  (held,) = folder.glob(f'moejax-*/*/{index}')
  shutil.rmtree(held)


@pytest.mark.heavy
def test_a_lost_host_costs_a_few_steps(alone, tmp_path):
  args = _in_memory(tmp_path, 2)
  with Processes(tmp_path / 'killed', 2, *args) as run:
    run.wait_for(r'step +24/60')
    run.processes[1].kill()
    run.codes()
  _lose_host(tmp_path, 1)
  with Processes(tmp_path / 'resumed', 2, *args) as run:
    assert run.codes() == [cli.OK] * 2, run.output()
    assert re.search('resuming from step (2[2468]|30) in memory', run.output())
  _assert_same_runs(alone, tmp_path / 'run')
  assert not any(path.is_file() for path in tmp_path.glob('moejax-*/*/*/*'))


@pytest.mark.slow
def test_twenty_lost_hosts_of_four(alone, tmp_path):
  args, generator = (*_in_memory(tmp_path, 2), '--config.train.log_interval=1'), Random(0)
  lost = reached = step = 0
  for number in range(21):
    with Processes(tmp_path / str(number), 4, *args) as run:
      if number:
        step = int(run.wait_for('resuming from step ([0-9]+) in memory')[1])
        print(f'process {lost} was lost at step {reached}, which cost {reached - step} steps')
        assert 0 <= reached - step <= 2
      if number == 20:
        assert run.codes() == [cli.OK] * 4, run.output()
        break
      run.wait_for(f'step +{step + 3}/60')
      lost = generator.randrange(4)
      run.processes[lost].kill()
      run.codes()
      reached = max(map(int, re.findall('step +([0-9]+)/60', run.output())))
    _lose_host(tmp_path, lost)
  jax.tree.map(np.testing.assert_array_equal, *map(_params_of, (alone, tmp_path / 'run')))


@pytest.mark.slow
def test_four_processes_match_one(alone, tmp_path):
  with Processes(tmp_path / 'logs', 4, f'--workdir={tmp_path}/run') as run:
    assert run.codes() == [cli.OK] * 4, run.output()
  _assert_same_runs(alone, tmp_path / 'run')
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert summary['sample'] == json.loads((alone / 'summary.json').read_text())['sample']


@pytest.mark.parametrize(
  'given, message',
  [
    (('host:1', None, None), '--num_processes and --process_id missing'),
    ((None, 2, 0), '--coordinator_address missing'),
    (('host', 2, 0), "--coordinator_address: expected HOST:PORT, got 'host'"),
    (('host:1', 2, 2), r'--process_id: expected 0 to --num_processes - 1 = 1, got 2'),
  ],
)
def test_incomplete_or_invalid_flags_are_rejected(given, message):
  with pytest.raises(ValueError, match=message):
    distributed.initialize(*given)


class Cluster(clusters.ClusterEnv):
  """A cluster of two hosts, which jax detects if it `is_here`."""

  is_here = False

  @classmethod
  def is_env_present(cls):
    return cls.is_here

  @classmethod
  def get_coordinator_address(cls, timeout_secs, override_coordinator_port=None):
    return 'host:1'

  @classmethod
  def get_process_count(cls):
    return 2

  @classmethod
  def get_process_id(cls):
    return 0


@pytest.fixture
def joined(monkeypatch):
  """What `initialize` joins: calls of `group.join` and of jax, with their arguments."""
  calls = []
  monkeypatch.setattr(group, 'join', lambda *given, timeout: calls.append((*given, timeout)))
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda *given, **rest: calls.append((given, rest))
  )
  monkeypatch.setattr(distributed, '_explain_aborts', lambda: None)
  for name in [n for n in os.environ if n.startswith(('SLURM_', 'OMPI_'))]:
    monkeypatch.delenv(name)
  return calls


def test_without_a_cluster_a_run_has_one_process(joined):
  distributed.initialize()
  assert not joined


def test_the_processes_of_a_cluster_join(joined, monkeypatch):
  monkeypatch.setattr(Cluster, 'is_here', True)
  distributed.initialize(join_timeout=7)
  of_group, (of_jax, timeouts) = joined
  assert of_group == ('host:1', 2, 0, 7) and of_jax == ('host:1', 2, 0)
  assert timeouts['heartbeat_timeout_seconds'] < 60


SLURM_STEP = {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '8', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'}
SLURM_STEP |= {'SLURM_STEP_NODELIST': 'host'}
OPEN_MPI = {'OMPI_MCA_orte_hnp_uri': '4096.0;tcp://10.0.0.1:1', 'OMPI_COMM_WORLD_RANK': '0'}
OPEN_MPI |= {'OMPI_COMM_WORLD_LOCAL_RANK': '0'}


@pytest.mark.parametrize(
  ('environment', 'terminal', 'alone'),
  [
    ({**SLURM_STEP, 'SLURM_STEP_NUM_TASKS': '8'}, False, False),
    ({**SLURM_STEP, 'SLURM_STEP_NUM_TASKS': '1'}, False, True),  # salloc with an interactive step
    ({**SLURM_STEP, 'SLURM_STEP_NUM_TASKS': '8'}, True, True),  # srun --pty bash
    (SLURM_STEP, False, True),  # in the script of sbatch
    ({**OPEN_MPI, 'OMPI_COMM_WORLD_SIZE': '2'}, True, False),
    ({**OPEN_MPI, 'OMPI_COMM_WORLD_SIZE': '1'}, True, True),
    (OPEN_MPI, True, True),
    ({**SLURM_STEP, **OPEN_MPI, 'OMPI_COMM_WORLD_SIZE': '2'}, False, False),
  ],
)
def test_only_processes_of_one_step_wait_for_each_other(
  monkeypatch, joined, environment, terminal, alone
):
  monkeypatch.setattr(Cluster, 'is_here', True)
  monkeypatch.setattr(sys.stdin, 'isatty', lambda: terminal, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  distributed.initialize()
  assert bool(joined) != alone


def test_a_folder_that_is_not_shared_is_rejected(monkeypatch, tmp_path):
  checkpoints = Checkpoints(tmp_path)
  gather = lambda seen: np.array([seen, 0])  # the other process does not see it
  multihost = 'moejax.checkpoint.multihost_utils'
  monkeypatch.setattr(f'{multihost}.sync_global_devices', lambda name: None)
  monkeypatch.setattr(f'{multihost}.process_allgather', gather)
  with pytest.raises(ValueError, match='workdir: not all processes see the same folder'):
    checkpoints.check_writable(0)
  checkpoints.close()
