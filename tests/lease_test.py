"""One writer in a folder, whatever happens to processes, hosts and clocks."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from moejax import exit_codes, lease

ROOT = pathlib.Path(__file__).parent.parent
# Holds a folder and writes a file there as fast as it can.
WRITER = """
import pathlib, sys
from moejax import files, lease
lease._RENEWAL = 0.1
folder = pathlib.Path(sys.argv[1])
with lease.held(folder):
  print('held', flush=True)
  for i in range(10**9):
    files.write(folder / 'file', str(i))
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(lease, '_RENEWAL', 0.1)
  monkeypatch.setattr(lease, '_EXPIRY', 0.5)


@contextlib.contextmanager
def writer(folder):
  command = [sys.executable, '-c', WRITER, str(folder)]
  pipe, environment = subprocess.PIPE, os.environ | {'PYTHONPATH': str(ROOT)}
  with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
    try:
      assert process.stdout.readline() == 'held\n'
      yield process
    finally:
      process.kill()


def put(folder, number=3, seconds_ago=0.0, **changes):
  """A lease of another machine, or as `changes` say."""
  path = folder / 'lease' / str(number)
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps({'process': 5, 'host': 'b', 'machine': 'other', **changes}))
  os.utime(path, (time.time() - seconds_ago,) * 2)
  return path


def is_free(folder):
  with contextlib.suppress(lease.Held), lease.held(folder):
    return True
  return False


def test_a_second_process_is_refused_until_the_first_dies(tmp_path):
  with writer(tmp_path / 'new') as first:
    with pytest.raises(lease.Held, match=f'^process {first.pid} on .* \\(-c\\), since 20'):
      with lease.held(tmp_path / 'new'):
        pass
    first.kill()
    first.wait()
    assert is_free(tmp_path / 'new')  # at once
  assert is_free(tmp_path / 'new')  # and again, once it was released


def test_a_stopped_process_that_goes_on_writes_no_more(tmp_path):
  with writer(tmp_path) as stopped:
    stopped.send_signal(signal.SIGSTOP)
    time.sleep(0.6)
    with lease.held(tmp_path):
      (tmp_path / 'file').write_text('ours')
      stopped.send_signal(signal.SIGCONT)
      _, error = stopped.communicate(timeout=60)
      assert (tmp_path / 'file').read_text() == 'ours'
  assert stopped.returncode == exit_codes.USAGE
  assert error.startswith(f'error: {tmp_path} was taken over by process {os.getpid()} on ')
  assert 'nothing was heard of this one for' in error and error.count('\n') == 1


def test_a_process_whose_folder_is_deleted_ends(tmp_path):
  with writer(tmp_path) as process:
    next((tmp_path / 'lease').iterdir()).unlink()
    _, error = process.communicate(timeout=60)
  assert process.returncode == exit_codes.USAGE
  assert error == f'error: {tmp_path} is gone. This process ends, and writes no more.\n'


def test_a_process_elsewhere_that_renews_its_lease_is_alive(tmp_path, capsys, monkeypatch):
  path = put(tmp_path)
  renewing = threading.Timer(0.2, os.utime, [path])
  renewing.start()
  monkeypatch.setattr(time, 'time', lambda: 0.0)  # the clocks of machines do not matter
  with pytest.raises(lease.Held, match='^process 5 on b'):
    with lease.held(tmp_path):
      pass
  renewing.join()
  assert 'process 5 on b' in capsys.readouterr().out
  assert path.exists()


@pytest.mark.parametrize(
  ('changes', 'seconds_ago'), [({}, 0), ({}, 10), ({'machine': lease._machine(), 'process': 1}, 10)]
)
def test_a_process_that_does_not_renew_its_lease_is_dead(tmp_path, changes, seconds_ago):
  path = put(tmp_path, seconds_ago=seconds_ago, **changes)
  with lease.held(tmp_path):
    assert not path.exists()


@pytest.mark.parametrize('content', [b'', b'[]', b'{"pro', b'\xff', b'3', b'[' * 100_000])
def test_a_damaged_lease_is_that_of_an_unknown_process(tmp_path, content):
  path = put(tmp_path)
  path.write_bytes(content)
  begun = time.monotonic()
  with lease.held(tmp_path):
    assert time.monotonic() - begun > 0.3


def run_at_line(number, other, function):
  """Calls `function`, and `other` before the line `number` of lease.py that it executes."""
  count = 0

  def trace(frame, event, argument):
    nonlocal count
    if frame.f_code.co_filename != lease.__file__:
      return None
    if event == 'line':
      if count == number:
        sys.settrace(None)
        other()
      count += 1
    return trace

  sys.settrace(trace)
  try:
    function()
  finally:
    sys.settrace(None)
  return count > number


@pytest.mark.parametrize('meanwhile', ['takes', 'takes and releases, then a third takes'])
def test_of_two_at_once_one_gets_the_folder(tmp_path, monkeypatch, meanwhile):
  monkeypatch.setattr(lease, '_now', lambda folder: time.time())  # no file at every line
  monkeypatch.setattr(lease, '_EXPIRY', 5.0)
  for number in range(1000):
    folder = tmp_path / str(number)
    folder.mkdir()
    put(folder, seconds_ago=10)
    got = []

    def take(folder=folder, got=got):
      with contextlib.suppress(lease.Held):
        got.append(lease._take(folder / 'lease'))

    def others(take=take, got=got):
      take()
      if got and 'third' in meanwhile:
        got.pop().write_text('{}')
        take()

    reached = run_at_line(number, others, take)
    # One has it, and its lease is there and the last one.
    [path] = got
    assert lease._numbers(path.parent) == {int(path.name)}, number
    if not reached:
      break
  assert 20 < number < 999
