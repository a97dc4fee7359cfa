"""Signals end a program with the code for launchers, wherever they find it."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from moejax import distributed, exit_codes, signals

ROOT = pathlib.Path(__file__).parent.parent
SLEEPS = """
import time
from moejax import signals
signals.end_program()
print('ready', flush=True)
time.sleep(60)
"""
IN_C_CODE = """
import hashlib
from moejax import signals
signals._PATIENCE = 0.2
signals.end_program()
print('ready', flush=True)
hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)
"""


@pytest.mark.parametrize(
  ('program', 'number'),
  [
    (SLEEPS, signal.SIGTERM),
    (SLEEPS, signal.SIGHUP),
    (SLEEPS, signal.SIGUSR1),
    (IN_C_CODE, signal.SIGTERM),
  ],
)
def test_a_program_ends_at_once_and_can_be_started_again(program, number):
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  with subprocess.Popen([sys.executable, '-c', program], env=environment, **pipes) as process:
    process.stdout.readline()
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
  assert (process.returncode, error) == (
    exit_codes.RESUMABLE,
    'interrupted; run the same command again\n',
  )


def test_nohup_stays_in_force():
  program = f'{SLEEPS.replace("60", "0.5")}\nprint("done")'
  command = ['nohup', sys.executable, '-c', program]
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=60)[0] == 'done\n' and process.returncode == 0


@pytest.mark.parametrize('number', signals.ENDING)
def test_a_run_stops_at_the_next_place_and_a_repeated_signal_does_not_kill_it(number, capfd):
  before = [signal.getsignal(number) for number in signals.ENDING]
  with distributed.Interrupt() as interrupt:
    assert not interrupt.reached(0) and not interrupt.has_come()
    for _ in range(1 if number == signal.SIGINT else 2):
      os.kill(os.getpid(), number)
      time.sleep(0.01)
    assert interrupt.has_come() and interrupt.reached(1)
    assert (signal.getsignal(number) == signal.SIG_DFL) == (number == signal.SIGINT)
  assert [signal.getsignal(number) for number in signals.ENDING] == before
  assert capfd.readouterr().err == f'{distributed._STOPPING}\n'


def test_a_signal_is_answered_without_a_place_to_say_so(monkeypatch):
  def closed(*_):
    raise BrokenPipeError

  monkeypatch.setattr(os, 'write', closed)
  with distributed.Interrupt() as interrupt:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
    assert interrupt.has_come()
