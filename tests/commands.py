"""The commands of README.md and docs/, as bash gives them to programs."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('**/*.md'))]
# Programs that begin a line of a page, beside the words of bash. In place of them, bash finds files
# that write down what they are called with.
PROGRAMS = ('python', 'pip', 'make', 'gcloud', 'docker', 'xpk', 'sbatch', 'hf', 'launch/tpu_run.sh')
PROGRAMS += ('.venv/bin/pip',)
_FIRST_WORDS = {*PROGRAMS, '$', 'for', 'cat', 'export'}
_RECORDER = f"""#!{sys.executable} -S
import json, os, sys
with open(os.environ['RECORD'], 'a') as file:
  file.write(json.dumps(sys.argv) + '\\n')
"""


def blocks(page):
  """The code blocks of a page that are not Python, as (text, whether it is commands)."""
  for language, text in re.findall(r'^```(\w*)\n(.*?)^```$', page.read_text(), re.M | re.S):
    if language != 'python':
      yield text, text.split()[0] in _FIRST_WORDS


def _script(text):
  """What is typed of a block; where some lines begin with a prompt, the others are output."""
  typed = re.findall(r'^\$ ((?:.*\\\n)*.*)', text, re.M)  # with the lines that it goes on in
  return '\n'.join(typed) or text


def of(page):
  """Lists of words, in order: a program of PROGRAMS, and its arguments."""
  script = '\n'.join(_script(text) for text, is_commands in blocks(page) if is_commands)
  with tempfile.TemporaryDirectory() as folder:
    for name in PROGRAMS:
      path = pathlib.Path(folder, name)
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(_RECORDER)
      path.chmod(0o755)
    environment = {'PATH': f'{folder}:{os.environ["PATH"]}', 'RECORD': f'{folder}/record'}
    subprocess.run(['bash', '-euc', f'{script}\nwait'], cwd=folder, env=environment, check=True)
    lines = pathlib.Path(folder, 'record').read_text() if '\n' in script else ''
  calls = map(json.loads, lines.splitlines())
  return [[call[0].removeprefix(f'{folder}/'), *call[1:]] for call in calls]
