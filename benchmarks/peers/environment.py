"""Virtual environments of the packages in environments/NAME.txt, made once."""

import hashlib
import os
import pathlib
import subprocess
import sys

_REQUIREMENTS = pathlib.Path(__file__).parent / 'environments'
_OLDEST = {'maxtext': 12}  # minor version of Python 3 that it needs


def python(name, folder, log):
  """The interpreter of an environment in `folder`; makes it if it is not there.

  Raises:
    RuntimeError: it cannot be made; `log`, a path, has what was printed.
  """
  base = _interpreter(_OLDEST.get(name, 10))
  requirements = _REQUIREMENTS / f'{name}.txt'
  digest = hashlib.sha256(f'{base} {requirements.read_text()}'.encode()).hexdigest()[:8]
  place = folder / f'{name}-{digest}'
  found, complete = place / 'bin' / 'python', place / 'complete'
  if not complete.exists():
    print(f'making {place}, once, of {requirements}', flush=True)
    with log.open('w') as output:
      for command in (
        [base, '-m', 'venv', '--clear', place],
        [found, '-m', 'pip', 'install', '--requirement', requirements],
      ):
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        if done.returncode:
          raise RuntimeError(f'its environment could not be made, see {log}')
    complete.touch()
  return found


def _interpreter(minor):
  """This Python, or another on PATH, of at least 3.`minor`."""
  names = [f'python3.{newer}' for newer in range(minor, minor + 3)]
  found = [os.path.join(folder, name) for folder in os.get_exec_path() for name in names]
  is_old = f'import sys; sys.exit(sys.version_info < (3, {minor}))'
  for candidate in (sys.executable, *filter(os.path.exists, found)):
    if not subprocess.run([candidate, '-c', is_old], capture_output=True).returncode:
      return candidate
  raise RuntimeError(f'it needs Python 3.{minor} or newer, and none is on PATH')
