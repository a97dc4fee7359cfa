"""The Python source files of this machine, which are a corpus without a download."""

import os
import pathlib
import site
import sysconfig

# Tests and bundled programs, which not every distribution includes, and installed packages.
_NOT_LIBRARY = {'test', 'tests', 'idle_test', 'idlelib', 'lib2to3'}
_NOT_LIBRARY |= {'site-packages', 'dist-packages', '__pycache__'}


def standard_library(source: str = 'stdlib') -> tuple[pathlib.Path, list[str]]:
  """Returns the folder of Python's standard library and the sorted paths of its .py files.

  Raises ValueError, naming the `source` that asks, if there are none.
  """
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  is_library = lambda name: name not in _NOT_LIBRARY and not name.startswith('config-')
  if not (names := _names(root, is_library)):
    raise ValueError(
      f'data.source: {source!r} reads the source files of Python, but its standard library '
      f"{root} has none (a frozen or stripped Python); use data.source='text' with your own files."
    )
  return root, names


def environment() -> list[tuple[str, pathlib.Path]]:
  """Returns name and path of every .py file of the standard library and of installed packages.

  Packages are those of the running Python, in the order in which it finds them.
  """
  root, names = standard_library('environment')
  found = [(f'stdlib/{name}', root / name) for name in names]
  for folder in _package_folders():
    names = _names(folder, lambda name: name != '__pycache__')
    found += [(f'packages/{name}', folder / name) for name in names]
  return found


def _package_folders() -> list[pathlib.Path]:
  """Returns where packages are installed, each folder once."""
  paths = sysconfig.get_paths()
  folders = [paths['purelib'], paths['platlib'], *site.getsitepackages()]
  folders += [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
  return [pathlib.Path(folder) for folder in dict.fromkeys(map(os.path.realpath, folders))]


def _names(root: pathlib.Path, enters) -> list[str]:
  """Returns the sorted paths, relative to `root`, of the .py files below folders it enters."""
  names = []
  for folder, subfolders, files in os.walk(root):
    subfolders[:] = filter(enters, subfolders)
    below = pathlib.Path(folder).relative_to(root).as_posix()
    prefix = '' if below == '.' else f'{below}/'
    names += [f'{prefix}{name}' for name in files if name.endswith('.py')]
  return sorted(names)
