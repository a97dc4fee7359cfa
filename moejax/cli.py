"""The command line of all programs: `--config=FILE[:words]`, overrides, friendly errors."""

import pathlib
import re
import sys
import traceback

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config file, optionally FILE:words; fields by --config.section.field=value.'
)
_BUNDLED = pathlib.Path(__file__).resolve().parent.parent
_DEFAULT = 'configs/mot.py'

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 75


def run(main, needs_config=True, takes_arguments=False):
  """Runs `main(config)`, `main()` or `main(arguments)`, and exits with the code it returns.

  A ValueError that this package raises is the user's to fix: its message, exit code 2. One that
  comes from elsewhere is a fault, and keeps its traceback.
  """

  def guarded(argv):
    if len(argv) > 1 and not takes_arguments:
      return _fail(f'unexpected argument {argv[1]!r}; flags are written --name=value.')
    try:
      if takes_arguments:
        return main(argv[1:])
      return main(_CONFIG.value) if needs_config else main()
    except ValueError as error:
      if not _is_ours(error):
        raise
      return _fail(str(error))

  app.run(guarded, flags_parser=_parse_with_config if needs_config else _parse)


def define_process_flags():
  """Flags of a program that may run as several processes, for where jax cannot find them itself."""
  flags.DEFINE_string('coordinator_address', None, 'HOST:PORT of process 0, of several.')
  flags.DEFINE_integer('num_processes', None, 'How many processes there are.')
  flags.DEFINE_integer('process_id', None, 'Which one this is: 0, 1, ...')


def join_processes():
  """Makes this process one of those that run the same command, as flags or environment say."""
  from moejax import distributed  # importing JAX takes seconds

  args = flags.FLAGS
  distributed.initialize(args.coordinator_address, args.num_processes, args.process_id)


def _is_ours(error):
  raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
  return pathlib.Path(raised_in).is_relative_to(_BUNDLED / 'moejax')


def _fail(message):
  for line in message.splitlines():
    print(f'error: {line}', file=sys.stderr)
  return USAGE


def _parse(argv):
  app.define_help_flags()
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    # ml_collections hands a config file's ValueError on as the text of its traceback.
    _, in_config_file, message = str(error).rpartition('\nValueError: ')
    sys.exit(_fail(message if in_config_file else str(error)))


def _parse_with_config(argv):
  """Parses flags, with the config file found from anywhere and unknown fields named plainly."""
  argv = [argv[0], *map(_find_config, argv[1:])]
  if not any(a.startswith('--config=') for a in argv):
    argv.insert(1, f'--config={_BUNDLED / _DEFAULT}')
  sys.argv[:] = argv  # config_flags reads overrides from here as well
  if str(_BUNDLED) not in sys.path:
    sys.path.append(str(_BUNDLED))  # config files import `configs.common`
  try:
    return _parse(argv)
  except (AttributeError, KeyError, ValueError) as error:
    sys.exit(_fail(_explain(error, argv)))


def _find_config(argument):
  if not argument.startswith('--config='):
    return argument
  path, colon, words = argument.removeprefix('--config=').partition(':')
  bundled = _BUNDLED / 'configs' / pathlib.Path(path).name
  if not pathlib.Path(path).exists() and bundled.exists():
    path = bundled
  elif not pathlib.Path(path).exists():
    known = sorted(
      p.name for p in bundled.parent.glob('*.py') if p.stem not in ('__init__', 'common')
    )
    sys.exit(_fail(f'--config={path}: there is no such file; bundled ones are {", ".join(known)}.'))
  return f'--config={path}{colon}{words}'


def _explain(error, argv):
  """One sentence for an unknown config field, with the closest known one."""
  match = re.search(r'Did you mean "([^"]+)" instead of "([^"]+)"', str(error))
  if not match:
    return str(error).splitlines()[-1].strip('\'"')
  known, unknown = match.groups()
  flag = next((a for a in argv if f'.{unknown}' in a), unknown)
  return f'{flag}: the config has no field {unknown!r}; did you mean {known!r}?'
