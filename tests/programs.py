"""Programs of the package in one process: importing JAX for each would cost more than they do."""

import contextlib
import io
import os
import runpy
import sys
import traceback
import warnings

from absl import app, flags


def run(module, arguments, folder):
  """What `python -m moejax.MODULE ARGUMENTS` in a folder would do.

  Meant for a process of its own: flags, streams and the current folder are those of the process.

  Returns:
    The exit code, and what was printed on both streams.
  """
  from moejax import distributed

  distributed.initialize = lambda *_: None  # the processes of a test are alone
  of_absl = {'absl.app', 'absl.logging', 'absl.testing', 'absl.flags'}
  for defined_by, defined in flags.FLAGS.flags_by_module_dict().items():
    for flag in [] if defined_by in of_absl else list(defined):
      delattr(flags.FLAGS, flag.name)
  flags.FLAGS.unparse_flags()
  app._run_init.done = app._register_and_parse_flags_with_usage.done = False
  os.chdir(folder)
  output, code = io.StringIO(), None
  with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', RuntimeWarning)  # the module has been imported already
      sys.argv[1:] = arguments
      try:
        runpy.run_module(f'moejax.{module}', run_name='__main__', alter_sys=True)
      except SystemExit as end:
        code = end.code
      except Exception:  # which Python would print, and end with 1
        traceback.print_exc()
        code = 1
  return code or 0, output.getvalue()
