"""One writer in a folder: the process that holds its lease, and renews it while it runs.

  lease/7   who holds the folder and since when; touched every 10 seconds, {} once it is free

Whoever takes the folder creates the file of the next number, which only one process can, and then
deletes those before it. So a process that was stopped for long, or cut off from a shared disk,
finds its lease gone when it goes on, and ends before it writes. Nobody needs locks of the operating
system, which many shared disks and buckets have not, or clocks that agree: the age of a lease is
told by the clock of its disk or storage service. An object is touched by writing it again.
"""

import contextlib
import datetime
import errno
import json
import os
import pathlib
import socket
import sys
import tempfile
import threading
import time
import uuid

from moejax import buckets, group
from moejax.exit_codes import USAGE
from moejax.text import duration

_RENEWAL = 10.0  # seconds
_EXPIRY = 60.0  # seconds without a renewal after which the holder counts as dead
_HOST = socket.gethostname()

_held = []  # the leases of this process


class Held(Exception):
  """Another process holds the folder; the message says which one."""


@contextlib.contextmanager
def held(folder):
  """A context in which no other process holds `folder`, which is made if it does not exist.

  Takes over from a process that has died or hangs; if it ran on another machine, that shows after
  up to a minute.

  Raises:
    Held: another process holds the folder.
    OSError: the folder cannot be written; buckets.Failed if it is in a bucket.
  """
  leases = folder / 'lease'
  if not buckets.is_bucket(leases):
    leases.mkdir(parents=True, exist_ok=True)
  lease = _Lease(_take(leases))
  _held.append(lease)
  try:
    yield
  finally:
    _held.remove(lease)
    lease.release()


def check() -> None:
  """Ends this program if another process has taken a folder of it: called before it writes."""
  for lease in [*_held]:
    lease.check()


def _take(leases):
  """The file of a new lease of this process."""
  holder = {
    'process': os.getpid(),
    'host': _HOST,
    'machine': _machine(),
    'program': _program(),
    'since': f'{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}',
    'key': str(uuid.uuid4()),  # no two leases are the same
  }
  while True:
    last = _last(leases)
    _wait_until_free(leases / str(last))
    path = leases / str(last + 1)
    try:
      _create(path, json.dumps(holder))
    except FileExistsError:  # another process was faster
      continue
    if _last(leases) > last + 1:  # others came and went, and deleted `last`, since we saw it
      _delete(path)
      continue
    for older in _numbers(leases) - {last + 1}:
      _delete(leases / str(older))
    return path


def _numbers(leases):
  names = buckets.children(leases) if buckets.is_bucket(leases) else os.listdir(leases)
  return {int(name) for name in names if name.isdecimal()}


def _last(leases):
  return max(_numbers(leases), default=0)


def _wait_until_free(path):
  """Returns once the holder of a lease has released it or is dead; raises Held if it is alive."""
  first = None
  while True:
    holder, renewed = _read(path)
    age = _now(path.parent) - renewed
    is_here = holder.get('machine') == _machine()
    if not holder or age > _EXPIRY or (is_here and not _runs(holder.get('process'))):
      return
    if is_here or first not in (None, renewed):
      raise Held(f'{_description(holder)} last heard of {duration(max(age, 0))} ago,')
    if first is None:
      first = renewed
      print(
        f'{_description(holder)} holds {path.parent.parent}: waiting for up to {_EXPIRY:.0f} s to '
        'see whether it is alive',
        flush=True,
      )
    time.sleep(_RENEWAL / 10)


def _create(path, content):
  """Writes a file; FileExistsError if it is there."""
  if buckets.is_bucket(path):
    return buckets.create(path, content.encode())
  with path.open('x') as file:
    file.write(content)


def _delete(path):
  if buckets.is_bucket(path):
    return buckets.delete(path)
  path.unlink(missing_ok=True)


def _touch(path):
  """Makes a file one of this moment; FileNotFoundError if it is not there."""
  if buckets.is_bucket(path):
    return buckets.write(path, buckets.read(path))
  os.utime(path)


def _free(path):
  """Says in a lease that it is free, if it is still there."""
  if buckets.is_bucket(path):
    return buckets.exists(path) and buckets.write(path, b'{}')
  with path.open('r+') as file:
    file.write('{}')
    file.truncate()


def _content_and_time(path):
  if buckets.is_bucket(path):
    return buckets.read(path), buckets.modified(path)
  with path.open('rb') as file:  # a shared disk looks at the file anew when it is opened
    return file.read(), os.fstat(file.fileno()).st_mtime


def _read(path):
  """Who has a lease, {} if it is free; and when it was renewed."""
  try:
    content, renewed = _content_and_time(path)
  except FileNotFoundError:
    return {}, 0.0
  try:
    holder = json.loads(content)
  except (ValueError, RecursionError):
    holder = None  # it is being written, or damaged
  return (holder if isinstance(holder, dict) else {'host': 'unknown'}), renewed


def _now(folder):
  """The time by the clock of a disk or a storage service."""
  if buckets.is_bucket(folder):
    probe = folder / f'now-{uuid.uuid4()}'
    buckets.write(probe, b'')
    try:
      return buckets.modified(probe)
    finally:
      buckets.delete(probe)
  with tempfile.TemporaryFile(dir=folder) as probe:
    probe.write(b'.')
    probe.flush()
    return os.fstat(probe.fileno()).st_mtime


def _description(holder):
  """Such as 'process 12 on host-b (moejax.main), since 2026-11-27 04:05:06 UTC'."""
  shown = lambda name: ''.join(filter(str.isprintable, str(holder.get(name, '?'))[:80]))
  return (
    f'process {shown("process")} on {shown("host")} ({shown("program")}), since {shown("since")},'
  )


def _machine():
  """What processes that see each other's numbers have in common."""
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:  # not Linux
    return _HOST


def _program():
  name, *more = sys.orig_argv[1:] or ['python']
  return more[0] if name == '-m' and more else pathlib.Path(name).name


def _runs(process):
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except (OSError, TypeError, OverflowError):  # of another user, or no number
    pass
  return True


def _clock():
  """Seconds that also pass while the machine sleeps, where that is known."""
  return time.clock_gettime(getattr(time, 'CLOCK_BOOTTIME', time.CLOCK_MONOTONIC))


class _Lease:
  """A lease of this process, which a thread renews."""

  def __init__(self, path):
    self._path, self._renewed = path, _clock()
    self._released = threading.Event()
    threading.Thread(target=self._renew_always, daemon=True).start()

  def _renew_always(self):
    while not self._released.wait(_RENEWAL):
      self._renew()

  def _renew(self):
    now = _clock()
    try:
      _touch(self._path)
      is_lost = _last(self._path.parent) > int(self._path.name)
    except buckets.Failed:
      return
    except OSError as error:
      if error.errno not in (errno.ENOENT, errno.ESTALE):
        return  # the disk fails: what is written next says so
      is_lost = True
    if is_lost and not self._released.is_set():
      self._end(now - self._renewed)
    self._renewed = now

  def _end(self, silence):
    folder, leases = self._path.parent.parent, self._path.parent
    what = 'is gone'
    with contextlib.suppress(OSError, buckets.Failed):
      if (last := _last(leases)) > int(self._path.name):
        by = _description(_read(leases / str(last))[0])
        what = (
          f'was taken over by {by} because nothing was heard of this one for {duration(silence)}'
        )
    group.end_all(f'{folder} {what}. This process ends, and writes no more.', USAGE)

  def check(self):
    if _clock() - self._renewed > 2 * _RENEWAL:  # it was stopped
      self._renew()

  def release(self):
    self._released.set()
    with contextlib.suppress(OSError, buckets.Failed):
      _free(self._path)
