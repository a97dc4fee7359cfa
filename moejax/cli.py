"""The command line of every program: `--config=FILE[:VARIANTS]`, overrides, error messages."""

import contextlib
import dis
import functools
import gc
import inspect
import os
import pathlib
import re
import shlex
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

from absl import app, flags, logging
from ml_collections import config_flags

from moejax import allocator, buckets, compilation_cache, group, imports, signals
from moejax.exit_codes import FAILED, OK, RESUMABLE, USAGE
from moejax.text import did_you_mean, duration

_PACKAGE = pathlib.Path(__file__).resolve().parent
# The bundled config files: of the installed package, or of the checkout around it.
_BUNDLED = next(p for p in (_PACKAGE / 'configs', _PACKAGE.parent / 'configs') if p.is_dir())
_DEFAULT = 'mot.py'

INTERRUPTED = RESUMABLE
_PATIENCE = 3  # seconds without output
HELP = {'--help', '-help', '-h', '-?', '--helpshort', '--helpfull'}


_PROCESS_FLAGS = (
  (
    flags.DEFINE_string,
    'coordinator_address',
    'HOST:PORT of process 0; only where no TPU slice, SLURM or Open MPI tells jax.',
  ),
  (flags.DEFINE_integer, 'num_processes', 'Number of processes, with --coordinator_address.'),
  (flags.DEFINE_integer, 'process_id', 'Index of this process, from 0.'),
  (
    functools.partial(flags.DEFINE_integer, lower_bound=1),
    'join_timeout',
    'Seconds in which all processes join; default: 60.',
  ),
)


def run(main, needs_config=True, takes_arguments=False, takes_overrides=False):
  """Runs `main(config)`, `main()`, `main(arguments)` or `main(overrides)`, and exits with its code.

  `takes_overrides` is for programs that load the config of a run: `overrides` maps 'section.field'
  to the text of its flag `--config.section.field=text`, as `config.override` takes them.
  """
  overrides = {}

  def parse(argv):
    if HELP.intersection(argv):
      _print_help(main, takes_overrides)
      sys.exit(OK)
    argv = _import_own_code(argv)
    if takes_overrides:
      argv = _without_overrides(argv, overrides)
    return _parse_with_config(argv) if needs_config else _parse(argv)

  def guarded(argv):
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)  # absl's default also shows what libraries log
    if len(argv) > 1 and not takes_arguments:
      return fail(f'unexpected argument {argv[1]!r}; flags are written --name=value.')
    compilation_cache.enable()
    try:
      if takes_arguments:
        code = main(argv[1:])
      elif takes_overrides:
        code = main(overrides)
      else:
        code = main(flags.FLAGS.config) if needs_config else main()
    except (Exception, KeyboardInterrupt, SystemExit) as error:
      return group.fail(error, exit_code)
    group.leave()
    return code

  if needs_config:
    config_flags.DEFINE_config_file('config', None, 'FILE or FILE:VARIANTS, a file of configs/.')
  allocator.keep_pages()
  gc.set_threshold(20_000)  # the default looks again and again at what tracing makes
  _protect_output()
  signals.end_program()
  app.run(guarded, flags_parser=parse)


def exit_code(error):
  """Prints an error as one message and returns the exit code; re-raises it if it is a bug.

  A ValueError that this package raises is a mistake of the user, a RuntimeError a failure, unless
  an attribute `exit_code` says otherwise; both carry a message for the user. Errors of other code,
  C code included, are bugs: they keep their traceback, and the exit code is FAILED as well.
  """
  if isinstance(error, KeyboardInterrupt):
    return fail('interrupted; run the same command again', INTERRUPTED)
  if isinstance(error, OSError) and error.strerror:  # no such file, no permission, disk full
    name = error.filename2 or error.filename
    return fail(f'{name}: {error.strerror}' if name else error.strerror, FAILED)
  if isinstance(error, ValueError | RuntimeError) and _is_raised_here(error):
    default = USAGE if isinstance(error, ValueError) else FAILED
    return fail(str(error), getattr(error, 'exit_code', default))
  raise error


class Command(NamedTuple):
  """One subcommand of a program."""

  define: Callable  # its flags
  main: Callable  # as `run` takes it
  needs_config: bool = False
  takes_arguments: bool = False
  takes_overrides: bool = False


def run_command(commands):
  """Runs the one of `commands`, a dict of Commands by name, that the first argument names."""
  _protect_output()
  name = sys.argv[1] if len(sys.argv) > 1 else ''
  if name in HELP:
    print(inspect.cleandoc(sys.modules['__main__'].__doc__ or ''))
    print('\nEach command has its own --help:')
    for name, one in commands.items():
      print(f'  {name:18}{_first_line(one.main)}')
    sys.exit(OK)
  if name not in commands:
    sys.exit(
      fail(f'expected one of {", ".join(commands)}, got {name!r}{did_you_mean(name, commands)}')
    )
  define, main, *options = commands[name]
  define()
  del sys.argv[1]
  flags.FLAGS.set_gnu_getopt()  # allows flags before, between and after arguments
  run(main, *options)


def command(*more):
  """The command that started this program and `more` arguments, quoted for a shell.

  It works in the folder where the program was started, whatever `python` means there.
  """
  python = pathlib.Path(sys.executable)
  with contextlib.suppress(ValueError):  # shorter, if it is a virtual environment in this folder
    python = python.relative_to(pathlib.Path.cwd())
  return shlex.join([str(python), *sys.orig_argv[1:], *more])


def portable_command():
  """The command that started this program, for files that are read on other machines."""
  return shlex.join(['python', *sys.orig_argv[1:]])


def say_how_to_resume(*more):
  """Prints the command that resumes this program; `more`: flags that it was not given."""
  print(f'resume with\n  {command(*more)}', flush=True)


@contextlib.contextmanager
def waiting_for(what, file=None):
  """Prints what is going on if the block takes seconds, then every minute, and how long it took.

  Args:
    what: such as 'compiling the step'.
    file: where to; default: sys.stdout.
  """
  done, started = threading.Event(), time.monotonic()
  say = lambda what: print(what, file=file or sys.stdout, flush=True)
  seconds = lambda: duration(time.monotonic() - started)

  def tell():
    if not done.wait(_PATIENCE):
      say(f'{what} ...')
      while not done.wait(60):
        say(f'  still {what} after {seconds()}')
      say(f'  took {seconds()}')

  teller = threading.Thread(target=tell, daemon=True)
  teller.start()
  try:
    yield
  finally:
    done.set()
    teller.join()


def define_process_flags():
  """Defines the flags of a multi-process run, for clusters that jax cannot detect itself."""
  for define, name, meaning in _PROCESS_FLAGS:
    define(name, None, meaning)


def join_processes():
  """Joins the other processes of this run, if flags or environment name any."""
  from moejax import distributed  # importing JAX takes seconds

  args = flags.FLAGS
  given = args.coordinator_address, args.num_processes, args.process_id
  with waiting_for('joining the other processes'):
    distributed.initialize(*given, args.join_timeout or group.TIMEOUT)


def path(text, bucket=False):
  """The path that a flag or an argument names, with `~` expanded; `bucket`: it may be in one.

  Raises:
    ValueError: the path is empty, in a bucket, or in the home of an unknown user.
  """
  if not text:
    raise ValueError('expected a path, got nothing.')
  if bucket and buckets.is_bucket(text):
    return str(buckets.path(text))
  if '://' in text:
    expected = 'a local path, or one in gs:// or s3://,' if bucket else 'a local path,'
    raise ValueError(
      f'expected {expected} got {text}. Mount the bucket, as launch/tpu_run.sh does (see '
      'docs/launch.md).'
    )
  expanded = os.path.expanduser(text)
  if expanded.startswith('~'):
    raise ValueError(f'expected a path, got {text}, but there is no such user; or write ./{text}.')
  return expanded


class _PathParser(flags.ArgumentParser):
  syntactic_help = 'a path'

  def __init__(self, bucket=False):
    super().__init__()
    self._bucket = bucket

  def parse(self, argument):
    return path(argument, self._bucket)


class _PathsParser(flags.ListParser):
  def __init__(self, bucket=False):
    super().__init__()
    self._bucket = bucket

  def parse(self, argument):
    items = [''] if argument == '' else super().parse(argument)
    return [path(item, self._bucket) for item in items]


def define_path(name, default, meaning, required=False, bucket=False):
  """Defines a flag that holds a path; `bucket`: it may be in one."""
  serializer, parser = flags.ArgumentSerializer(), _PathParser(bucket)
  flags.DEFINE(parser, name, default, meaning, serializer=serializer, required=required)


def define_paths(name, default, meaning, required=False, bucket=False):
  """Defines a flag that holds a comma-separated list of paths; `bucket`: they may be in one."""
  serializer, parser = flags.ListSerializer(','), _PathsParser(bucket)
  flags.DEFINE(parser, name, default, meaning, serializer=serializer, required=required)


def integers(flag, texts) -> list[int]:
  """The values of a list flag; raises ValueError unless all are integers, each given once."""
  if not texts or not all(text.strip().isdecimal() for text in texts) or len({*texts}) < len(texts):
    raise ValueError(f'--{flag}: expected different integers, as in 1,2,3; got {",".join(texts)}.')
  return [int(text) for text in texts]


class _Output:
  """A stream whose writes never fail.

  Characters outside its encoding are escaped. Once it cannot be written to (a closed pipe or
  terminal, a full disk), that is said on standard error, output is dropped and the program goes on.
  """

  def __init__(self, stream):
    self._stream = stream
    if hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors='backslashreplace')

  def __getattr__(self, name):
    return getattr(self._stream, name)

  def write(self, text):
    return self._dropping(self._stream.write, text)

  def flush(self):
    return self._dropping(self._stream.flush)

  def _dropping(self, method, *arguments):
    try:
      return method(*arguments)
    except OSError as error:
      signals.say(f'warning: output is dropped from now on: {error.strerror}')
      os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # also drains the buffer
      return method(*arguments)


def _protect_output():
  for name in ('stdout', 'stderr'):
    stream = getattr(sys, name)
    if stream is not None and not isinstance(stream, _Output):  # None: closed at startup
      setattr(sys, name, _Output(stream))


def _is_raised_here(error):
  """Whether a `raise` statement of this package raised the error, not other code or C code."""
  last = error.__traceback__
  while last.tb_next:
    last = last.tb_next
  package, code = last.tb_frame.f_globals.get('__package__') or '', last.tb_frame.f_code.co_code
  return package.split('.')[0] == __package__ and dis.opname[code[last.tb_lasti]] == 'RAISE_VARARGS'


def fail(message, code=USAGE):
  for line in message.splitlines():
    print(f'error: {line}', file=sys.stderr)
  return code


def _parse(argv):
  app.define_help_flags()
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    # ml_collections turns a config file's ValueError into the text of its traceback.
    _, in_config_file, message = str(error).rpartition('\nValueError: ')
    sys.exit(fail(message if in_config_file else _plain(str(error))))


def _plain(message):
  """Rewords absl's message about a flag in our style."""
  missing = re.search('Flag --(.*) must have a value other than None', message)
  if missing:
    return f'--{missing[1]} is required: {flags.FLAGS[missing[1]].help}'
  field = re.search(r"Unknown command line flag '(\w+\.[\w.]+)'", message)
  if field and not field[1].startswith('config.'):
    return f'--{field[1]}: fields of the config are written --config.{field[1]}=VALUE.'
  return message.removeprefix('flag ')


def _print_help(main, takes_overrides):
  """Prints what a program does, and its own flags with meanings and defaults."""
  print(_help_of(main), '\n\nFlags:', sep='')
  defined = [
    *flags.FLAGS.flags_by_module_dict().items(),
    *_import_flags().flags_by_module_dict().items(),
  ]
  ours = [
    flag
    for module, of_module in defined
    for flag in of_module
    if module == sys.argv[0] or module.startswith('moejax')
  ]
  last = [name for _, name, _ in _PROCESS_FLAGS] + ['imports', 'allow_imports']
  for flag in sorted(ours, key=lambda flag: flag.name in last):
    meaning = ' '.join(flag.help.partition(';\n')[0].split())  # absl appends the rest
    line = f'--{flag.name}: {meaning}{_default(flag)}'
    print(textwrap.fill(line, 100, subsequent_indent=' ' * 4))
  if 'config' in flags.FLAGS:
    from moejax import config  # importing JAX takes seconds

    print(f'--config.SECTION.FIELD=VALUE: a field of the config.\n\n{config.reference()}', end='')
  elif takes_overrides:
    print("--config.SECTION.FIELD=VALUE: changes a field of the run's config.")


def _default(flag):
  """' Default: x.', ' Required.' or ''."""
  if any('other than None' in validator.message for validator in flag.validators):
    return ' Required.'
  values = flag.default if isinstance(flag.default, list) else [flag.default]
  shown = ', '.join(str(value) for value in values if value not in (None, '', False))
  return f' Default: {shown}.' if shown else ''


def _first_line(function):
  return inspect.cleandoc(function.__doc__ or '').partition('\n')[0]


def _help_of(main):
  """A program's docstring; of a command, its own and the program's examples of it."""
  program = inspect.cleandoc(sys.modules[main.__module__].__doc__ or '')
  if not main.__doc__:
    return program
  examples = re.findall(rf'^ *python -m \S+ {main.__name__} .*(?:\\\n.*)*', program, re.MULTILINE)
  return '\n'.join([inspect.cleandoc(main.__doc__).partition('\n\n')[0], '', *examples])


def _import_flags():
  """The flags about the user's own code, which is imported before other flags are read."""
  values = flags.FlagValues()
  flags.DEFINE_list(
    'imports',
    [],
    'Files or modules of your own that register routers, sublayers, optimizers or tasks. The run '
    'remembers them.',
    flag_values=values,
  )
  flags.DEFINE_bool(
    'allow_imports',
    False,
    'Lets a run import the files that it remembers, although you have not run them before.',
    flag_values=values,
  )
  return values


def _import_own_code(argv):
  """Imports what `--imports` names; returns the other arguments."""
  values = _import_flags()
  values.set_gnu_getopt()
  try:
    rest = values(argv, known_only=True)
    if values['allow_imports'].value:
      imports.allow_all()
    for name in values['imports'].value or ():
      imports.use(name)
  except (flags.Error, ValueError) as error:
    sys.exit(fail(str(error).removeprefix('flag ')))
  return rest


@contextlib.contextmanager
def _remembering_config_file(argv):
  """Remembers the file of `--config=` if executing it, in this context, registers anything."""
  from moejax import config  # importing JAX takes seconds

  before, remembered = config.registered(), imports.remembered()
  yield
  *_, given = (a.removeprefix('--config=') for a in argv if a.startswith('--config='))
  path = pathlib.Path(given.partition(':')[0])
  of_a_run = imports.remembered() != remembered  # configs/run.py: what it reads has imports
  if config.registered() != before and not of_a_run:
    imports.remember(path)
  elif not _is_bundled(path):
    imports.allow_file(path)


def _without_overrides(argv, overrides):
  """argv without the `--config.FIELD=` flags, which are moved into `overrides`."""
  rest = []
  for argument in argv:
    name, equals, text = argument.removeprefix('--config.').partition('=')
    if argument.startswith('--config.') and equals:
      overrides[name] = text
    else:
      rest.append(argument)
  return rest


def _parse_with_config(argv):
  """Parses flags; finds bundled config files from any directory, and names unknown fields."""
  try:
    argv = [argv[0], *map(_find_config, _joined(argv[1:]))]
  except ValueError as error:
    sys.exit(fail(str(error)))
  if not any(a.startswith('--config=') for a in argv):
    argv.insert(1, f'--config={_BUNDLED / _DEFAULT}')
  overrides = {}
  sys.argv[:] = argv = _without_overrides(argv, overrides)  # config_flags also reads it
  try:
    with _remembering_config_file(argv):
      rest = _parse(argv)
    if overrides:
      from moejax import config

      config.set_fields(flags.FLAGS.config, overrides)
    return rest
  except ImportError as error:
    if (error.name or '').split('.')[0] != 'configs':
      raise
    sys.exit(fail(f'--config: {error}; what config files share is in moejax.variants.'))
  except (AttributeError, KeyError, ValueError) as error:
    sys.exit(fail(_config_error(error)))


def _joined(arguments):
  """The arguments with `--config FILE`, in two words or with one dash, as `--config=FILE`."""
  rest = iter(arguments)
  for argument in rest:
    argument = re.sub('^-config(?=$|=)', '--config', argument)
    yield f'{argument}={next(rest, "")}' if argument == '--config' else argument


def _find_config(argument):
  if not argument.startswith('--config='):
    return argument
  given, colon, variants = argument.removeprefix('--config=').partition(':')
  path = pathlib.Path(os.path.expanduser(given))
  bundled = _BUNDLED / (path.name if path.suffix else f'{path.name}.py')
  if not path.is_file() and given in (path.name, f'configs/{path.name}') and bundled.is_file():
    path = bundled
  elif not path.is_file():
    known = sorted(p.name for p in _BUNDLED.glob('*.py') if p.stem not in ('__init__', 'common'))
    raise ValueError(f'--config={given}: no such file; bundled files are {", ".join(known)}.')
  return f'--config={path}{colon}{variants}'


def _config_error(error):
  """One line about what is wrong in a config file: an unknown field, or no get_config."""
  text = str(error).splitlines()[-1].strip('\'"')
  if text.endswith("no attribute 'get_config"):
    return '--config: the file must have a function get_config(arg=None) that returns a config.'
  if isinstance(error, ValueError):
    return text
  known = re.search(r'Did you mean "(.+?)" instead', text)
  unknown = re.search(r'Key "(.+?)" does not exist', str(error)) or ('', text)
  advice = f'did you mean {known[1]!r}?' if known else '--help lists all fields.'
  return f'--config: the config has no field {unknown[1]!r}; {advice}'


def check_config(argument, source):
  """Raises ValueError unless the config file of `--config=FILE`, which `source` names, may run.

  It may if it is one of the bundled files, or the user has run it before or allows it now.
  """
  path = pathlib.Path(_find_config(argument).removeprefix('--config=').partition(':')[0])
  if not _is_bundled(path):
    imports.check_file(path, source)


def _is_bundled(path):
  bundled = _BUNDLED / path.name
  return bundled.is_file() and bundled.read_bytes() == path.read_bytes()


def config_of(arguments):
  """The ConfigDict that a program would run with these arguments, which include `--config=`."""
  from moejax import config  # importing JAX takes seconds

  values = flags.FlagValues()
  overrides = {}
  argv = _without_overrides(['', *map(_find_config, arguments)], overrides)
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
  try:
    with _remembering_config_file(argv), warnings.catch_warnings():
      warnings.filterwarnings('ignore', 'the load_module')  # ml_collections calls it
      values(argv, known_only=True)
  except flags.Error as error:
    raise ValueError(str(error).rpartition('\nValueError: ')[2].strip()) from error
  except (AttributeError, KeyError, ValueError) as error:
    raise ValueError(_config_error(error)) from error
  config.set_fields(values.config, overrides)
  return values.config
