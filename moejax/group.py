"""The processes of a run find each other, and end together.

jax's coordination service waits minutes for a process that does not come, does not say which one it
is, and ends the others in C++. Here process 0 listens at the address of the run before jax does,
and every other process keeps a connection to it until it ends. A connection that breaks is a
process that died. One that is stopped, or whose host hangs, keeps its connection: jax's heartbeats
notice that, and the signs of life on the connections tell which one it is.
"""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback

from moejax import signals
from moejax.exit_codes import FAILED, RESUMABLE, USAGE

TIMEOUT = 60  # seconds in which all processes join
_BEAT = 1.0  # seconds between signs of life
_SILENCE = 4.0  # seconds without one that explain why jax missed heartbeats
_PATIENCE = 2.0  # seconds in which the cause of an error shows, or the same error here
_ENDING = 'This one ends too; run the same command on all hosts to resume from the last checkpoint.'
_HERE = socket.gethostname()

_ending = threading.Lock()
_group = None  # of this process, if the run has several


class _Peer:
  """The other end of a connection, whose messages are lines of JSON."""

  def __init__(self, connection, index=None, host='?'):
    connection.settimeout(5)
    self.index, self.host, self.heard = index, host, time.monotonic()
    self._connection, self._rest = connection, b''
    self.fileno, self.close = connection.fileno, connection.close

  def __str__(self):
    return f'process {self.index} on {self.host}'

  def send(self, **message):
    with contextlib.suppress(OSError):  # reading will show that it is gone
      self._connection.sendall(json.dumps(message).encode() + b'\n')

  def read(self, seconds=5.0, size=1 << 16):
    """The messages that came; OSError or ValueError: the connection is broken, or not of a run."""
    self._connection.settimeout(seconds)
    if not (received := self._connection.recv(size)):
      raise ConnectionResetError
    self.heard = time.monotonic()
    *lines, self._rest = (self._rest + received).split(b'\n')
    return [dict(json.loads(line)) for line in lines]


def join(address: str, number: int, index: int, timeout: float = TIMEOUT) -> None:
  """Waits for all processes of a run; from then on, this one ends when another one dies or fails.

  Args:
    address: HOST:PORT of process 0; the port is free again when this returns.
    number: of processes.
    index: of this process, from 0.
    timeout: seconds until the missing ones are named.

  Raises:
    ValueError: two processes have the same index, or different numbers of processes.
    RuntimeError: not all processes came.
  """
  global _group
  host, _, port = address.rpartition(':')
  end = time.monotonic() + timeout
  if index == 0:
    peers = _gather(int(port), number, end, timeout)
  else:
    peers = [_find(host.strip('[]'), int(port), number, index, end, timeout)]
  _group = _Group(index, peers)


def _gather(port, number, end, timeout):
  """The connections of process 0 to all others."""
  peers = {}
  with _listen(port, end) as listener, selectors.DefaultSelector() as waiting:
    waiting.register(listener, selectors.EVENT_READ)
    while len(peers) < number - 1 and (left := end - time.monotonic()) > 0:
      for key, _ in waiting.select(left):
        if not (peer := key.data):
          peer = _Peer(listener.accept()[0])
          waiting.register(peer, selectors.EVENT_READ, peer)
          continue
        try:
          for hello in peer.read():
            _welcome(peer, hello, peers, number)
        except (OSError, ValueError, KeyError, TypeError):  # it died, or is no process of a run
          waiting.unregister(peer)
          peer.close()
          if peers.get(peer.index) is peer:
            del peers[peer.index]
  if len(peers) < number - 1:
    missing = [str(i) for i in range(1, number) if i not in peers]
    came = [f'0 on {_HERE}', *(f'{i} on {peers[i].host}' for i in sorted(peers))]
    text = (
      f'of {number} processes, {_listed(missing)} did not join within {timeout:g} s; these did: '
      f'{_listed(came)}. {_advice(missing)}'
    )
    for peer in peers.values():
      peer.send(failed=text, code=FAILED)
    raise RuntimeError(text)
  for peer in peers.values():
    peer.send(joined=_HERE)
  return list(peers.values())


def _listen(port, end):
  """A socket at a port, which a run that is just ending may still hold."""
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  while True:
    try:
      return socket.create_server(('', port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
      if time.monotonic() > end:
        raise RuntimeError(
          f'process 0 cannot listen at port {port} of {_HERE}: {error.strerror}. End the program '
          'that does, or choose another port.'
        ) from error
    time.sleep(0.2)


def _welcome(peer, hello, peers, number):
  """Adds a process that says which one it is to `peers`, or refuses it."""
  index, host, its_number = int(hello['process']), str(hello['host']), int(hello['of'])
  if its_number != number:
    problem = f'--num_processes: {its_number} on {host}, but {number} on {_HERE}, of process 0.'
  elif index == 0 or index in peers:
    other = peers[index].host if index else _HERE
    problem = (
      f'--process_id: both {host} and {other} have {index}; each process has one of its own.'
    )
  else:
    peer.index, peer.host = index, host
    peers[index] = peer
    return
  peer.send(failed=problem, code=USAGE)


def _find(host, port, number, index, end, timeout):
  """The connection of any other process to process 0, which has those to all processes."""
  while (left := end - time.monotonic()) > 0:
    answer = {}
    with contextlib.suppress(OSError, ValueError):  # it is not there yet, or is another program
      peer = _Peer(socket.create_connection((host, port), timeout=min(left, 5)), 0, host)
      peer.send(process=index, of=number, host=_HERE)
      answer = _first(peer, left + 5)  # process 0 ends before, and knows more about who is missing
    if 'joined' in answer:
      peer.host = answer['joined']
      return peer
    if 'failed' in answer:
      raise (ValueError if answer['code'] == USAGE else RuntimeError)(answer['failed'])
    time.sleep(0.2)
  raise RuntimeError(
    f'process 0 did not join within {timeout:g} s: it does not answer at {host}:{port}. '
    f'{_advice(["0"])}'
  )


def _first(peer, seconds):
  """The first message, byte by byte: what follows it is for `_watch`."""
  while not (messages := peer.read(seconds, 1)):
    pass
  return messages[0]


def _advice(missing):
  return (
    f'See the log{"s" * (len(missing) > 1)} of {_listed(missing)}, and start the same command on '
    'all hosts; if that takes longer, with --join_timeout=SECONDS.'
  )


def _listed(items, shown=8):
  more = [f'{len(items) - shown} more'] if len(items) > shown else []
  return ', '.join([*items[:shown], *more])


class _Group:
  """What a process knows of the others: process 0 of all, they of process 0."""

  def __init__(self, index, peers):
    self.index, self.peers = index, peers
    self.has_saved = False
    self._looked = time.monotonic()
    threading.Thread(target=self._watch, daemon=True).start()

  def _watch(self):
    while self.peers:
      with selectors.DefaultSelector() as waiting:
        for peer in self.peers:
          waiting.register(peer, selectors.EVENT_READ, peer)
        ready = [key.data for key, _ in waiting.select(_BEAT)]
      for peer in ready:
        try:
          for message in peer.read():
            self._hear(peer, message)
        except (OSError, ValueError):
          if peer in self.peers:  # this process is not done itself
            self.end(f'{peer}, which died: see its log')
      if time.monotonic() - self._looked >= _BEAT:
        self._looked = time.monotonic()
        self.tell()

  def _hear(self, peer, message):
    if 'lost' in message:
      self.end(message['lost'])
    elif 'failed' in message:
      self.tell(peer, **message)
      time.sleep(_PATIENCE)  # to fail in the same way, with a message of its own
      _exit(message['failed'], message['code'])
    elif 'done' in message:
      self.peers = [other for other in self.peers if other is not peer]

  def tell(self, *but, **message):
    for peer in self.peers:
      if peer not in but:
        peer.send(**message)

  def end(self, lost):
    """Ends all processes, because they lost one."""
    self.tell(lost=lost)
    _exit(f'the run has lost {lost}. {_ENDING}', RESUMABLE if self.has_saved else FAILED)

  def explain_abort(self):
    """Ends this process instead of jax, which missed heartbeats."""
    now = time.monotonic()
    is_watching = now - self._looked < _SILENCE  # it was not stopped itself
    silent = [peer for peer in self.peers if now - peer.heard > _SILENCE]
    if silent and is_watching:
      self.end(f'{silent[0]}, which gave no sign of life for {now - silent[0].heard:.0f} s')
    time.sleep(_PATIENCE)  # process 0 may know which one it was, and says so
    self.end('a process (see the messages above, and the log of process 0)')


def _exit(text, code):
  _ending.acquire()  # for good: the first thread that gets here has the last word
  signals.say(f'error: {text}')
  os._exit(code)


def note_save() -> None:
  """A checkpoint is complete: from now on, a restart resumes from it."""
  if _group:
    _group.has_saved = True


def leave() -> None:
  """This process is done, as all others are or will be: that it ends is no failure."""
  if _group:
    peers, _group.peers = _group.peers, []  # first: who hears that it is done hangs up
    for peer in peers:
      peer.send(done=True)


def fail(error, explain) -> int:
  """Ends all processes after an error in this one, or returns `explain(error)` if it is alone.

  `explain` prints the error and returns its exit code, or raises it again.
  """
  if not _group:
    return explain(error)
  time.sleep(_PATIENCE / 2)  # if another process died, `_watch` ends this one meanwhile
  try:
    code = explain(error)
  except SystemExit as end:
    code = int(end.code or 0)
  except Exception:
    traceback.print_exc()
    code = FAILED
  what = f'process {_group.index} on {_HERE} failed, so this one ends too: {error or "interrupted"}'
  _group.tell(failed=what, code=code)
  sys.stdout.flush()
  os._exit(code)  # jax would wait for the others, which wait for this one


def end_all(text: str, code: int) -> None:
  """Ends all processes at once, for a reason that only this one knows."""
  if _group:
    _group.tell(failed=f'process {_group.index} on {_HERE}: {text}', code=code)
  _exit(text, code)


def explain_aborts() -> None:
  """From now on, when jax aborts because of another process, a sentence says so at the end.

  Python cannot catch that: it happens in a thread of C++.
  """
  global _on_abort  # the C library keeps no reference

  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def _on_abort(number):
    del number
    if _group:
      _group.explain_abort()
    _exit(f'the run has lost a process (see the messages above). {_ENDING}', FAILED)

  ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
