"""The user's own code that runs need, and when it may be imported.

A router, sublayer, optimizer or seqio task may be registered in the user's own file: a config file,
a file or module that `--imports` names, the module of `data.task`. `config.json` remembers the
first two with a fingerprint, so that every program that opens the run imports them again. Opening a
shared folder must not run its code, though: what a run names, and not the user's command line or
program, is imported only if the user has run this file with this content before, or allows it by
`--allow_imports`. What the user has run is recorded outside of runs, by an empty file for each in
~/.local/state/moejax/imports.
"""

import contextlib
import hashlib
import importlib
import os
import pathlib
import sys
import traceback
import types
from typing import NamedTuple


class Code(NamedTuple):
  """A file of Python."""

  name: str  # of its module, or ''
  path: str  # absolute
  sha256: str  # of its content


_used: dict[str, Code] = {}  # path -> what this process has imported, and runs in it remember
_named: list[str] = []  # what the user named by `use`: paths and modules
_tasks: dict[str, str] = {}  # module of a task -> '', or the config.json that alone names it
_allows_all = False


def use(name):
  """Imports a file (with a / or .py at its end) or a module that the user names.

  Raises:
    ValueError: there is none, or it imports something that does not exist.
  """
  is_file = '/' in name or name.endswith('.py')
  path = os.path.expanduser(name) if is_file else _find(name)
  if not path or not os.path.isfile(path):
    where = (
      'no such file' if is_file else 'no module of this name; its folder must be in PYTHONPATH'
    )
    if not is_file and os.path.isfile(f'{name}.py'):
      where += f', or name its file: --imports={name}.py'
    raise ValueError(f'cannot import {name!r}: {where}.')
  code = _code('' if is_file else name, path)
  _run(code)
  _named.append(code.name or code.path)


def flags():
  """Arguments with which another program imports what the user named."""
  return [f'--imports={",".join(_named)}'] if _named else []


def remember(path):
  """Notes that the user runs this file, which has been executed already."""
  _note(_code('', path))


def remembered():
  """What this process has imported, as JSON has it."""
  return [code._asdict() for code in _used.values()]


def allow_all(yes=True):
  """Lets runs import whatever they name, from now on; returns whether they could before."""
  global _allows_all
  before, _allows_all = _allows_all, yes
  return before


@contextlib.contextmanager
def allowed(yes):
  """A context in which runs may import whatever they name, if `yes`."""
  before = allow_all(yes)
  try:
    yield
  finally:
    allow_all(before)


def of_run(entries, source):
  """Imports what a run remembers.

  Args:
    entries: of `remembered`, from the file `source`.

  Raises:
    ValueError: a file is missing, or the user has not allowed it with its present content.
  """
  for entry in entries:
    try:
      saved = Code(**entry)
    except TypeError as error:
      raise ValueError(f'{source} is damaged: imports holds {entry!r}.') from error
    if any(saved.path == code.path or saved.sha256 == code.sha256 for code in _used.values()):
      continue
    path = (saved.name and _find(saved.name)) or saved.path
    if not os.path.isfile(path) and _named:  # what the user names is in its place
      continue
    if not os.path.isfile(path):
      raise ValueError(
        f'{source}: the run was trained with {path}, which does not exist here. Name the file, '
        'wherever it is now: --imports=FILE.'
      )
    code = _code(saved.name, path)
    changed = code.sha256 != saved.sha256
    _check(code, source, 'has changed since the run was trained' if changed else '')
    if changed:
      print(f'note: {code.path} has changed since {source} was written.', file=sys.stderr)
    _run(code)


def name_task(task, source: str | pathlib.Path = ''):
  """Notes who names `data.task` first: the file `source`, or else the user."""
  if module := task.rpartition(':')[0]:
    _tasks.setdefault(module, str(source))


def of_task(module):
  """Imports the module of a task.

  Raises:
    ValueError: there is none, or only a run names it and the user has not allowed it.
  """
  source, path = _tasks.get(module), _find(module)
  if source and path and module not in sys.modules:
    _check(_code(module, path), source)
  importlib.import_module(module)
  if path:
    _allow(_code(module, path))


def _check(code, source, why=''):
  """Raises ValueError unless the user has run this code before, or allows it now."""
  if not (_allows_all or _record(code).exists()):
    raise ValueError(
      f'{source} would import {code.path}, which {why or "you have not run before"}. Look at that '
      'file; then --allow_imports (in Python allow_imports=True) runs it, now and in future.'
    )


def _run(code):
  """Imports it; a file under a name of its own."""
  try:
    if not code.name:
      _execute(code)
    else:
      if not _find(code.name):  # the run was trained in another folder
        path = pathlib.Path(code.path)
        sys.path.append(str(path.parents[code.name.count('.') + (path.stem == '__init__')]))
      importlib.import_module(code.name)
  except ImportError as error:
    raise ValueError(
      f'cannot import {code.path}: {error}. Set PYTHONPATH to the folder of what is missing.'
    ) from error
  except Exception as error:
    raise ValueError(f'cannot import {_place(error, code.path)}: {error!r}.') from error
  _note(code)


def _place(error, path):
  """'FILE' of one's own or 'FILE, line N': what it was doing when the error came up."""
  if isinstance(error, SyntaxError):
    return f'{error.filename}, line {error.lineno}'
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == path]
  return f'{path}, line {lines[-1]}' if lines else path


def _execute(code):
  content = pathlib.Path(code.path).read_bytes()
  if hashlib.sha256(content).hexdigest() != code.sha256:
    raise ValueError(f'{code.path} has just changed; start again.')
  module = types.ModuleType(f'moejax_imported_{code.sha256[:8]}')
  module.__file__ = code.path
  sys.modules[module.__name__] = module  # dataclasses look for their module there
  exec(compile(content, code.path, 'exec'), module.__dict__)


def _note(code):
  _used[code.path] = code
  _allow(code)


def _code(name, path):
  path = pathlib.Path(path).resolve()
  return Code(name, str(path), hashlib.sha256(path.read_bytes()).hexdigest())


def _find(module):
  """The file of a module, or None. Imports nothing, not even the packages it is in."""
  names, places = module.split('.'), None
  origin = None
  for number in range(1, len(names) + 1):
    full = '.'.join(names[:number])
    specs = (finder.find_spec(full, places) for finder in sys.meta_path)
    spec = next(filter(None, specs), None)
    if spec is None:
      return None
    origin, places = spec.origin, spec.submodule_search_locations
  return origin and str(pathlib.Path(origin).resolve())


def _record(code):
  """The file that exists if the user has run this code."""
  state = os.environ.get('XDG_STATE_HOME') or os.path.expanduser('~/.local/state')
  key = hashlib.sha256(f'{code.path}\n{code.sha256}'.encode()).hexdigest()
  return pathlib.Path(state, 'moejax', 'imports', key)


def _allow(code):
  record = _record(code)
  try:
    record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    record.touch()
  except OSError as error:
    print(
      f'warning: {record.parent} cannot be written ({error.strerror}): opening this run will need '
      '--allow_imports.',
      file=sys.stderr,
    )
