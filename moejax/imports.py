"""The user's own code that runs need, and when it may be imported.

A router, sublayer, optimizer or seqio task may be registered in the user's own file: a config file,
a file or module that `--imports` names, the module of `data.task`. `config.json` remembers the
first two with a fingerprint, so that every program that opens the run imports them again. Opening a
shared folder must not run its code, though: what a file names (config.json, a grid), and not the
user's command line or program, is executed only if the user has run it with this content before, or
allows it by `--allow_imports`. What the user has run is recorded outside of runs, by an empty file
for each in ~/.local/state/moejax/imports.
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

from moejax import files


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
  if not isinstance(entries, list):
    raise ValueError(f'{source} is damaged: imports is {entries!r}, expected a list.')
  for saved in (_of_entry(entry, source) for entry in entries):
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
    with _findable(code):
      _check(code, source, 'has changed since the run was trained' if changed else '')
      _check_module(code.name, source)
      if changed:
        print(f'note: {code.path} has changed since {source} was written.', file=sys.stderr)
      with _from_source():
        _run(code)


def _of_entry(entry, source):
  """The Code of an entry of `remembered`."""
  try:
    code = Code(**entry)
    if all(isinstance(text, str) for text in code) and '\0' not in code.path:
      return code
  except TypeError:
    pass
  raise ValueError(f'{source} is damaged: imports holds {entry!r}.')


def name_task(task, source: str | pathlib.Path = ''):
  """Notes who names `data.task` first: the file `source`, or else the user."""
  if module := task.rpartition(':')[0]:
    _tasks.setdefault(module, str(source))


def of_task(module):
  """Imports the module of a task.

  Raises:
    ValueError: it is no name of a module, or only a run names it and the user has not allowed it.
    ModuleNotFoundError: there is none.
  """
  if not all(name.isidentifier() for name in module.split('.')):
    raise ValueError(f'data.task: {module!r} is no name of a module.')
  if source := _tasks.get(module):
    _check_module(module, source)
  with _from_source() if source else contextlib.nullcontext():
    importlib.import_module(module)
  _allow(*_codes(module))


def check_task(task, source):
  """Raises ValueError if `data.task`, which the file `source` names, is of code to be allowed."""
  _check_module(task.rpartition(':')[0], source)


def check_file(path, source):
  """Raises ValueError if the user has not run the file `path`, which the file `source` names.

  Its content is that of the user if the user allows it now.
  """
  code = _code('', path)
  _check(code, source)
  _allow(code)


def allow_file(path):
  """Notes that the user runs this file, but not that runs need it."""
  _allow(_code('', path))


def _check_module(module, source):
  """`_check` of all that importing a module would execute."""
  for code in _codes(module):
    if code.name not in sys.modules:
      _check(code, source)


def _check(code, source, why=''):
  """Raises ValueError unless the user has run this code before, or allows it now."""
  if not (_allows_all or _record(code).exists()):
    raise ValueError(
      f'{source} would import {code.path}, which {why or "you have not run before"}. Look at that '
      'file; then --allow_imports (in Python allow_imports=True) runs it, now and in future.'
    )


@contextlib.contextmanager
def _findable(code):
  """A context, and all after it unless it fails, in which the module of a Code is found."""
  path, before = pathlib.Path(code.path), list(sys.path)
  if code.name and not _find(code.name):  # the run was trained in another folder
    above = code.name.count('.') + (path.stem == '__init__')
    sys.path += map(str, path.parents[above : above + 1])
  try:
    yield
  except BaseException:
    sys.path[:] = before
    raise


@contextlib.contextmanager
def _from_source():
  """A context in which bytecode beside a file, which need not be that of the file, is not read."""
  before, sys.pycache_prefix = sys.pycache_prefix, str(files.cache_folder('bytecode') or os.devnull)
  try:
    yield
  finally:
    sys.pycache_prefix = before


def _run(code):
  """Imports it; a file under a name of its own."""
  try:
    if code.name:
      importlib.import_module(code.name)
    else:
      _execute(code)
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
  if not _allow(code, *_codes(code.name)):
    print(
      f'warning: {_record(code).parent} cannot be written: opening this run will need '
      '--allow_imports.',
      file=sys.stderr,
    )


def _code(name, path):
  path = pathlib.Path(path).resolve()
  return Code(name, str(path), hashlib.sha256(path.read_bytes()).hexdigest())


def _find(module):
  """The file of a module, or None. Imports nothing, not even the packages it is in."""
  return next((code.path for code in _codes(module) if code.name == module), None)


def _codes(module):
  """What importing a module executes: the packages it is in, from the outermost, and the module.

  [] if there is none. Imports nothing.
  """
  names, places, found = module.split('.'), None, []
  if not all(name.isidentifier() for name in names):
    return []
  for number in range(1, len(names) + 1):
    if number > 1 and places is None:  # of a module that is no package
      return []
    full = '.'.join(names[:number])
    specs = (finder.find_spec(full, places) for finder in sys.meta_path)
    spec = next(filter(None, specs), None)
    if spec is None:
      return []
    if spec.has_location and spec.origin and os.path.isfile(spec.origin):
      found.append(_code(full, spec.origin))
    places = spec.submodule_search_locations
  return found


def _record(code):
  """The file that exists if the user has run this code."""
  state = os.environ.get('XDG_STATE_HOME') or os.path.expanduser('~/.local/state')
  key = hashlib.sha256(f'{code.path}\n{code.sha256}'.encode('utf-8', 'surrogateescape')).hexdigest()
  return pathlib.Path(state, 'moejax', 'imports', key)


def _allow(*codes):
  """Records that the user has run this code; whether that could be written."""
  try:
    for record in map(_record, codes):
      record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
      record.touch()
  except OSError:
    return False
  return True
