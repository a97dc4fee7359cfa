"""Processes without jax: who is missing, and that all end when one does."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from moejax import exit_codes, group

ROOT = pathlib.Path(__file__).parent.parent
HOST = socket.gethostname()
PROGRAM = """
import os, sys, time
from moejax import cli, group
group._BEAT, group._SILENCE, group._PATIENCE = 0.1, 0.5, 0.5
join = group.join
if 'jax' in sys.argv[5]:
  from moejax import distributed
  distributed._HEARTBEAT_TIMEOUT = 5
  join = distributed.initialize
try:
  join(f'127.0.0.1:{sys.argv[1]}', *map(int, sys.argv[2:5]))
  print('joined', file=sys.stderr)
  exec(sys.argv[5])
  time.sleep(60)
except Exception as error:
  sys.exit(group.fail(error, cli.exit_code))
"""


class Process:
  """A process of a run, which executes `then` once it has joined."""

  def __init__(self, log, port, number, index, timeout, then):
    self.log = log
    arguments = map(str, (port, number, index, timeout, then))
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    with log.open('w') as file:
      self.process = subprocess.Popen(
        [sys.executable, '-c', PROGRAM, *arguments], env=environment, stdout=file, stderr=file
      )

  def wait_until_joined(self):
    while not self.log.read_text():
      assert self.process.poll() is None
      time.sleep(0.01)

  def end(self):
    """Its exit code and the last line of its log."""
    return self.process.wait(60), self.log.read_text().splitlines()[-1]


@pytest.fixture
def port():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


@pytest.fixture
def start(tmp_path, port):
  """Starts the processes `indices` of `number`."""
  processes = []

  def start(number, then='', indices=None, timeout=60):
    for i in range(number) if indices is None else indices:
      processes.append(Process(tmp_path / f'{i}.log', port, number, i, timeout, then))
    return processes.copy()

  yield start
  for each in processes:
    each.process.kill()
    each.process.wait()


def connect(port, **hello):
  """Connects as another process does that says `hello`."""
  while True:
    with contextlib.suppress(ConnectionRefusedError):
      peer = group._Peer(socket.create_connection(('127.0.0.1', port)))
      peer.send(**hello)
      return peer
    time.sleep(0.01)


def test_the_missing_processes_are_named(start, port):
  processes = start(4, indices=(0, 2), timeout=2)
  connect(port, process=1, of=4, host='b').close()  # dies before all have joined
  connect(port, key='of another program').close()
  for each in processes:
    code, line = each.end()
    assert code == exit_codes.FAILED
    assert line.startswith(
      f'error: of 4 processes, 1, 3 did not join within 2 s; these did: 0 on {HOST}, 2 on {HOST}.'
    )
    assert 'See the logs of 1, 3' in line and '--join_timeout=SECONDS' in line


def test_a_missing_process_0_is_named(start):
  [process] = start(2, indices=[1], timeout=1)
  code, line = process.end()
  assert code == exit_codes.FAILED
  assert line.startswith('error: process 0 did not join within 1 s: it does not answer at 127.0')


def test_processes_that_do_not_fit_are_refused(start, port):
  start(3, indices=[0])
  with contextlib.closing(connect(port, process=1, of=3, host='b')):
    time.sleep(0.1)
    for hello, message in (
      ({'process': 1, 'of': 3}, '--process_id: both c and b have 1;'),
      ({'process': 0, 'of': 3}, f'--process_id: both c and {HOST} have 0;'),
      ({'process': 2, 'of': 4}, f'--num_processes: 4 on c, but 3 on {HOST}, of process 0.'),
    ):
      with contextlib.closing(connect(port, host='c', **hello)) as peer:
        [answer] = peer.read()
      assert answer['code'] == exit_codes.USAGE and answer['failed'].startswith(message)


@pytest.mark.parametrize(
  ('lost', 'then', 'expected'), [(0, '', 'FAILED'), (1, 'group.note_save()', 'RESUMABLE')]
)
def test_all_end_when_one_dies(start, lost, then, expected):
  processes = start(3, then)
  for each in processes:
    each.wait_until_joined()
  time.sleep(0.2)
  processes.pop(lost).process.kill()
  for each in processes:
    code, line = each.end()
    assert code == getattr(exit_codes, expected)
    assert line.startswith(f'error: the run has lost process {lost} on {HOST}, which died: see')


def test_all_end_when_one_fails(start):
  fails = "if sys.argv[3] == '1': raise FileNotFoundError(2, 'No such file', 'tokens.bin')"
  first, failed, third = [each.end() for each in start(3, fails)]
  assert failed == (exit_codes.FAILED, 'error: tokens.bin: No such file')
  assert first == third and first[0] == exit_codes.FAILED
  assert f'process 1 on {HOST} failed, so this one ends too' in first[1]
  assert 'tokens.bin' in first[1]


def test_who_fails_alike_says_so_itself(start):
  for i, each in enumerate(start(2, "raise FileNotFoundError(2, 'No such file', sys.argv[3])")):
    assert each.end() == (exit_codes.FAILED, f'error: {i}: No such file')


def test_who_is_done_may_end(start):
  slow = (
    'send = group._Peer.send; group._Peer.send = lambda *a, **m: (send(*a, **m), time.sleep(0.5))'
  )
  leave = "if sys.argv[3] != '2': group.leave(); time.sleep(0.3); sys.exit(0)"
  *done, at_work = start(3, f'{slow}\n{leave}')  # others hear of it before it has left
  assert [each.end() for each in done] == [(0, 'joined')] * 2
  time.sleep(0.2)
  assert at_work.process.poll() is None


@pytest.mark.parametrize(
  ('stopped', 'then'),
  [
    (0, 'pass  # jax aborts'),
    (0, ABORTS := 'group.explain_aborts(); time.sleep(1.5); os.abort()'),  # in the same way
    (1, ABORTS),
  ],
)
def test_who_is_stopped_is_named_when_jax_misses_it(start, stopped, then):
  processes = start(2 if 'jax' in then else 3, then)
  for each in processes:
    each.wait_until_joined()
  processes.pop(stopped).process.send_signal(signal.SIGSTOP)
  for each in processes:
    code, line = each.end()
    assert code == exit_codes.FAILED
    assert f'lost process {stopped} on {HOST}, which gave no sign of life for' in line
