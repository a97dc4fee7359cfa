"""The command line of all programs: `--config=FILE[:words]`, overrides, friendly errors."""

import pathlib
import re
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config file, optionally FILE:words; fields by --config.section.field=value.'
)
_BUNDLED = pathlib.Path(__file__).resolve().parent.parent
_DEFAULT = 'configs/mot.py'

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 75


def run(main, needs_config=True, takes_arguments=False, takes_overrides=False):
  """Runs `main(config)`, `main()`, `main(arguments)` or `main(overrides)`, and exits with its code.

  `takes_overrides` is for programs that take the config of a run: overrides are the texts of flags
  `--config.section.field=text`, by 'section.field', for `config.override`.

  A ValueError that this package raises is the user's to fix: its message, exit code 2. One that
  comes from elsewhere is a fault, and keeps its traceback.
  """

  overrides = {}

  def parse(argv):
    return _parse(_without_overrides(argv, overrides) if takes_overrides else argv)

  def guarded(argv):
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)  # at absl's default, libraries tell of themselves
    if len(argv) > 1 and not takes_arguments:
      return _fail(f'unexpected argument {argv[1]!r}; flags are written --name=value.')
    try:
      if takes_arguments:
        return main(argv[1:])
      if takes_overrides:
        return main(overrides)
      return main(_CONFIG.value) if needs_config else main()
    except ValueError as error:
      if not _is_ours(error):
        raise
      return _fail(str(error))

  app.run(guarded, flags_parser=_parse_with_config if needs_config else parse)


class Command(NamedTuple):
  """One of several in a program."""

  define: Callable  # its flags
  main: Callable  # as `run` takes it
  needs_config: bool = False
  takes_arguments: bool = False


def run_command(commands):
  """`run` of the Command, in a dict by name, that the first argument names."""
  name = sys.argv[1] if len(sys.argv) > 1 else ''
  if name not in commands:
    sys.exit(_fail(f'expected one of {", ".join(commands)}, got {name!r}.'))
  define, main, needs_config, takes_arguments = commands[name]
  define()
  del sys.argv[1]
  flags.FLAGS.set_gnu_getopt()  # flags may stand before, between and after arguments
  run(main, needs_config, takes_arguments)


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


def _without_overrides(argv, overrides):
  """argv without the flags for fields of a config, which go into `overrides`."""
  rest = []
  for argument in argv:
    name, equals, text = argument.removeprefix('--config.').partition('=')
    if argument.startswith('--config.') and equals:
      overrides[name] = text
    else:
      rest.append(argument)
  return rest


def _parse_with_config(argv):
  """Parses flags, with the config file found from anywhere and unknown fields named plainly."""
  argv = [argv[0], *map(_find_config, argv[1:])]
  if not any(a.startswith('--config=') for a in argv):
    argv.insert(1, f'--config={_BUNDLED / _DEFAULT}')
  if {'--help', '-help', '-h', '-?'} & set(argv):
    _help()
  sys.argv[:] = argv  # config_flags reads overrides from here as well
  try:
    return _parse(argv)
  except (AttributeError, KeyError, ValueError) as error:
    sys.exit(_fail(_explain(error, argv)))


def _help():
  """Prints what the program does, its flags, and all fields of a config, and exits."""
  from moejax import config  # importing JAX takes seconds

  app.usage(shorthelp=True, writeto_stdout=True)
  print('--config=FILE[:VARIANTS] and --config.SECTION.FIELD=VALUE, with these defaults:\n')
  print(config.reference(), end='')
  sys.exit(OK)


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
  """One sentence for an unknown config field, with the closest known one if there is any."""
  text = str(error).splitlines()[-1].strip('\'"')
  if isinstance(error, ValueError):
    return text
  match = re.search(r'Did you mean "([^"]+)" instead of "([^"]+)"', text)
  known, unknown = match.groups() if match else (None, text)
  flag = next((a for a in argv if f'.{unknown}' in a), unknown)
  advice = f'did you mean {known!r}?' if known else '--print_config shows those that it has.'
  return f'{flag}: the config has no field {unknown!r}; {advice}'
