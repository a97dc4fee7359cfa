"""Signals by which people, launchers and schedulers end a program."""

import contextlib
import functools
import os
import signal
import threading
import time

from moejax.exit_codes import RESUMABLE

# Ctrl-C; launchers and schedulers; a terminal that is closed; SLURM, if it is asked for.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_PATIENCE = 10  # seconds


@contextlib.contextmanager
def handled_by(handler, numbers=ENDING):
  """A context in which `handler(number, frame)` is called for these signals."""
  before = {number: signal.signal(number, handler) for number in numbers if _arrives(number)}
  try:
    yield
  finally:
    for number, other in before.items():
      signal.signal(number, other)


def _arrives(number):
  return number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN  # by nohup


def say(text: str) -> None:
  """Prints a line on standard error, from a handler too, which might have interrupted a print."""
  with contextlib.suppress(OSError):
    os.write(2, f'{text}\n'.encode())


@functools.cache
def end_program() -> None:
  """From now on, these signals end the program with RESUMABLE, unless they are handled otherwise.

  Ctrl-C raises KeyboardInterrupt, as in all Python programs.
  """
  for number in filter(_arrives, ENDING[1:]):
    signal.signal(number, _end)
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def _end(number, frame):
  say('interrupted; run the same command again')
  raise SystemExit(RESUMABLE)


def _watch(reader):
  """Ends a program that is in C code, a compilation say: until that returns, `_end` is not run."""
  while number := os.read(reader, 1):
    if signal.getsignal(number[0]) is _end:
      time.sleep(_PATIENCE)
      if signal.getsignal(number[0]) is _end:
        say('interrupted; run the same command again')
        os._exit(RESUMABLE)
