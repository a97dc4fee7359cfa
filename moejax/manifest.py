"""The folder of a saved step: when it is complete, whether it is as it was saved.

`manifest.json` is written when a save begins, and says that it is not finished. When every other
file of the step is flushed to the disk, it is replaced by one that names them all, with their sizes
and checksums, and holds its own: that is the commit. So, after a kill or a power cut at any time,

  a manifest that is not finished  is an interrupted save: no step, removed by the next save;
  one that agrees with all files   is an intact step;
  any other one, or none           is a damaged step. It is never used, and not taken for nothing.

Deleting a step starts with its metadata.json, and only when a newer one is committed. Who reads a
step while a run may delete it has read a whole one if metadata.json is still there afterwards.
"""

import concurrent.futures
import contextlib
import json
import pathlib
import zlib

from moejax import buckets, files

_NAME = 'manifest.json'
ARRAYS = 'state/manifest.ocdbt'  # of all processes, merged
_UNFINISHED = b'{"finished": false}'


def begin(folder: pathlib.Path) -> None:
  """Makes the folder of a step to be saved; deletes what is there."""
  delete(folder)
  files.write(folder / _NAME, _UNFINISHED)


def commit(folder: pathlib.Path) -> None:
  """Completes a step whose files are all written."""
  files.flush(folder)
  write(folder, checksums(folder, sorted(_names(folder))))
  files.flush_name(folder)


def write(folder: pathlib.Path, entries: dict) -> None:
  """Writes the manifest of `checksums` of all files, which must be on the disk."""
  files.write(folder / _NAME, json.dumps({'files': entries, 'crc32': _crc32(entries)}))


def read(folder: pathlib.Path) -> dict:
  """`checksums` of a step's files, as they were saved.

  Raises:
    ValueError: there is no manifest, or it is damaged.
  """
  try:
    manifest = json.loads(files.read(folder / _NAME))
    entries = manifest.get('files')
    is_sealed = isinstance(entries, dict)
    is_right = not is_sealed or manifest.get('crc32') == _crc32(entries)
  except FileNotFoundError:
    raise ValueError(f'{_NAME} is missing') from None
  except (OSError, ValueError, AttributeError, RecursionError) as error:
    raise ValueError(f'{_NAME} cannot be read: {error}') from error
  if not is_right:
    raise ValueError(f'{_NAME} is not as it was saved')
  if is_sealed:
    return entries
  # Before manifests held a checksum of their own, they had one entry for every file.
  for name in sorted(_names(folder) - manifest.keys()):
    if not pathlib.PurePath(name).name.startswith('.'):
      raise ValueError(f'{_NAME} does not name {name}')
  return manifest


def problem(folder: pathlib.Path) -> str:
  """Why a step cannot be used, or ''. Reads all its files."""
  names = _names(folder)
  for name in ('metadata.json', ARRAYS):
    if name not in names:
      return f'{name} is missing'
  try:
    expected = read(folder)
  except ValueError as error:
    return str(error)
  if missing := expected.keys() - names:
    return f'{min(missing)} is missing'
  try:
    found = checksums(folder, expected)
  except OSError as error:
    return f'a file cannot be read: {error}'
  changed = [name for name in expected if found[name] != expected[name]]
  return f'{min(changed)} is not as it was saved' if changed else ''


def is_unverifiable(folder: pathlib.Path) -> bool:
  """Whether a damaged step may yet be whole: what is missing could be made again.

  That is its manifest; or the list of arrays, which versions before 2026-11 forgot, without a word,
  in folders with * ? [ in their path.
  """
  if not files.exists(folder / 'metadata.json') or not (folder / 'state').is_dir():
    return False
  try:
    read(folder)
  except ValueError:
    return True
  return not buckets.is_bucket(folder) and not files.exists(folder / ARRAYS)


def steps(directory: pathlib.Path) -> list[int]:
  """The saved steps, sorted, damaged or not.

  A run may save and delete steps meanwhile.
  """
  while True:
    found = _numbers(directory)
    # A newer step is committed before an older one is deleted: in this order one of them is seen.
    saved = [step for step in found if was_saved(directory / str(step))]
    if _numbers(directory) == found:
      return saved


def _numbers(directory):
  return sorted(int(name) for name in files.children(directory) if is_step(name))


def is_step(name: str) -> bool:
  """Whether a folder has the name of a step; 06, which somebody renamed, is none."""
  return name.isdecimal() and str(int(name)) == name and int(name) < 2**31


def was_saved(folder: pathlib.Path) -> bool:
  """Whether a step was saved completely; its files may have been damaged since."""
  try:
    return files.read(folder / _NAME) != _UNFINISHED
  except OSError:
    return files.exists(folder / 'state')  # its name is given when all arrays are written


def newest(
  directory: pathlib.Path, at_most: int | None = None
) -> tuple[int | None, dict[int, str]]:
  """The newest intact step, or None, and what is wrong with newer ones; none is after `at_most`.

  A run may save and delete steps meanwhile.
  """
  while True:
    found, damaged = steps(directory), {}
    for step in reversed(found):
      if at_most is not None and step > at_most:
        continue
      if not (why := problem(directory / str(step))):
        break
      damaged[step] = why
    else:
      step = None
    # A step is deleted when a newer one is committed: if there is none, it is really damaged.
    if not damaged or steps(directory) == found:
      return step, damaged


def delete(folder: pathlib.Path) -> None:
  """Deletes a step, or whatever is in its place."""
  with contextlib.suppress(OSError):
    files.delete(folder / 'metadata.json')
  for part in ('state', 'data'):  # a save that is not finished is marked so until the end
    files.delete(folder / part)
  files.delete(folder)


def checksums(folder, names) -> dict:
  """{'size': of bytes, 'crc32': ...} of files, by name."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return dict(zip(names, pool.map(lambda name: _checksum(folder / name), names), strict=True))


def _checksum(path):
  size = crc = 0
  for chunk in files.chunks(path):
    size, crc = size + len(chunk), zlib.crc32(chunk, crc)
  return {'size': size, 'crc32': crc}


def _crc32(entries):
  return zlib.crc32(json.dumps(entries, sort_keys=True).encode())


def _names(folder):
  """The files of a step, but for its manifest."""
  return files.names(folder) - {_NAME}
