"""Multi-process runs: all processes start together and stop together.

Every process runs the same program on its own devices, reads its own sequences of each batch, and
takes part in every collective. Only process 0 prints, and writes everything except checkpoints.
"""

import inspect
import os
import signal
import sys
from typing import Any

import jax
from jax._src import clusters
from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]
from jax.experimental import multihost_utils

from moejax import group, signals

_HEARTBEAT_TIMEOUT = 30  # seconds without a heartbeat after which jax ends the other processes
_SHUTDOWN_TIMEOUT = 30  # seconds that a process waits for the others before it exits
_STOPPING = 'stopping after this step, to save; a second Ctrl-C ends the program at once'


def initialize(
  coordinator_address=None, num_processes=None, process_id=None, join_timeout=group.TIMEOUT
):
  """Joins this process to its run; call it before any other use of jax.

  When a process dies, fails or hangs, all others end within a minute, with a message that names it
  and a nonzero exit code, so that a launcher can restart them.

  Args:
    coordinator_address: HOST:PORT of process 0, or None: jax looks for a TPU slice, a SLURM step of
      several tasks, or Open MPI; without any of them, the run has one process.
    num_processes: number of processes; None if `coordinator_address` is.
    process_id: index of this process, from 0; None if `coordinator_address` is.
    join_timeout: seconds in which all processes join.

  Raises:
    ValueError: some of the three are missing or invalid, or do not fit those of other processes.
    RuntimeError: processes are missing.
  """
  given: Any = (coordinator_address, num_processes, process_id)
  if any(value is not None for value in given):
    _check(*given)
  elif _is_single_process() or None in (given := _detect(join_timeout)):
    return
  _, number, index = given
  if number > 1:
    group.join(*given, timeout=join_timeout)
  _explain_aborts()
  timeouts: dict[str, Any] = {'heartbeat_timeout_seconds': _HEARTBEAT_TIMEOUT}
  if 'shutdown_timeout_seconds' in inspect.signature(jax.distributed.initialize).parameters:
    timeouts['shutdown_timeout_seconds'] = _SHUTDOWN_TIMEOUT  # jax 0.7 always waits 5 minutes
  jax.distributed.initialize(*given, initialization_timeout=group.TIMEOUT, **timeouts)
  if index:
    sys.stdout = open(os.devnull, 'w')


def _detect(timeout):
  """The address, number and index that jax finds for itself, or None for each."""
  address = os.environ.get('JAX_COORDINATOR_ADDRESS')
  detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
  return detect(address, None, None, None, None, int(timeout))[:3]


def _explain_aborts():
  """Has jax abort when it misses heartbeats, which `group` explains.

  Without any callback, jax before 0.10 ends the process by `_exit`, after which nothing can come.
  No version can pass an argument to a callback in Python, which is an abort as well.
  """
  group.explain_aborts()
  connect, last_word = _jax.get_distributed_runtime_client, lambda _: os.abort()
  client = lambda *args, **options: connect(*args, missed_heartbeat_callback=last_word, **options)
  _jax.get_distributed_runtime_client = client


def _is_single_process():
  """Whether SLURM or Open MPI, if present, started this process alone.

  A shell in a SLURM allocation (salloc, srun --pty) has its variables too; only a step has several
  processes. A process that joins as the only one uses one GPU and leaves the others idle.
  """
  if 'OMPI_MCA_orte_hnp_uri' in os.environ:
    return os.environ.get('OMPI_COMM_WORLD_SIZE', '1') == '1'
  if 'SLURM_JOB_ID' in os.environ:
    in_a_shell = sys.stdin is not None and sys.stdin.isatty()  # a task of srun has no terminal
    return in_a_shell or os.environ.get('SLURM_STEP_NUM_TASKS', '1') == '1'
  return False


def _check(address, num_processes, process_id):
  missing = [
    f'--{name}'
    for name, value in (
      ('coordinator_address', address),
      ('num_processes', num_processes),
      ('process_id', process_id),
    )
    if value is None
  ]
  if missing:
    raise ValueError(
      f'{" and ".join(missing)} missing: processes that are not started by SLURM or on a TPU slice '
      'need --coordinator_address=HOST:PORT (of process 0), --num_processes and --process_id.'
    )
  host, _, port = address.rpartition(':')
  if not host or not port.isdecimal():
    raise ValueError(f'--coordinator_address: expected HOST:PORT, got {address!r}.')
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f'--process_id: expected 0 to --num_processes - 1 = {num_processes - 1}, got {process_id}.'
    )


def is_process_0():
  """Whether this is process 0, the one that prints and writes."""
  return jax.process_index() == 0


class Interrupt:
  """A context in which a signal of `signals.ENDING` to any process stops all at the same place.

  A single process checks a flag. Several use jax's preemption service, which handles SIGTERM from
  `initialize` on and agrees on a place that none of them has reached. Schedulers and terminals may
  repeat a signal: only a second SIGINT ends a process at once.
  """

  def __init__(self):
    self._was_signaled = self._has_come = False
    self._several = jax.process_count() > 1
    self._places = 0  # at which it was asked whether to stop

  def __enter__(self):
    ours = [n for n in signals.ENDING if not self._several or n != signal.SIGTERM]
    self._handled = signals.handled_by(self._on_signal, ours)
    self._handled.__enter__()
    return self

  def __exit__(self, *error):
    self._handled.__exit__(*error)

  def _on_signal(self, number, frame):
    del frame
    if number == signal.SIGINT:
      signal.signal(number, signal.SIG_DFL)
    if self._was_signaled:
      return
    self._was_signaled = True
    if is_process_0():
      signals.say(_STOPPING)
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)

  def reached(self, step):
    """Whether to stop before this step; all processes call it once before every step."""
    del step
    return self.has_come()

  def has_come(self):
    """Whether to stop here, between two batches of an evaluation; all processes call it there."""
    if not self._has_come and self._several:
      self._places += 1
      self._has_come = multihost_utils.reached_preemption_sync_point(self._places)
    elif not self._several:
      self._has_come = self._was_signaled
    return self._has_come
