"""What all programs share: flags, errors and their exit codes, help, and output."""

import errno
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

import pytest

from moejax import cli, exit_codes

ROOT = pathlib.Path(__file__).parent.parent


def _error_of(source, package='moejax'):
  """The error that source code raises, as if it were part of a package."""
  try:
    exec(compile(source, 'program', 'exec'), {'__package__': package})
  except BaseException as error:
    return error
  raise AssertionError('no error')


IN_A_WITH = """
import contextlib
with contextlib.suppress(KeyError):
  try:
    raise ValueError('data.files: no such file')
  finally:
    pass
"""
FROM_ANOTHER = """
try:
  int('x')
except ValueError as error:
  raise ValueError('data.files: no number') from error
"""
RERAISED = """
try:
  int('x')
except ValueError:
  raise
"""


@pytest.mark.parametrize(
  ('error', 'code', 'said'),
  [
    (_error_of("raise ValueError('steps: too few')"), cli.USAGE, 'error: steps: too few\n'),
    (_error_of("raise ValueError('a\\nb')", 'moejax.data'), cli.USAGE, 'error: a\nerror: b\n'),
    (_error_of(IN_A_WITH), cli.USAGE, 'error: data.files: no such file\n'),
    (_error_of(FROM_ANOTHER), cli.USAGE, 'error: data.files: no number\n'),
    (_error_of("raise RuntimeError('no loss')"), cli.FAILED, 'error: no loss\n'),
    (
      _error_of("from moejax.metrics import Diverged; raise Diverged('nan')"),
      exit_codes.FAILS_AGAIN,
      'error: nan\n',
    ),
    (
      _error_of("from moejax.data.blocks import DamagedData; raise DamagedData('id 9')"),
      exit_codes.FAILS_AGAIN,
      'error: id 9\n',
    ),
    (
      _error_of("from moejax.checkpoint import SaveFailed; raise SaveFailed('full')"),
      exit_codes.RESUMABLE,
      'error: full\n',
    ),
    (_error_of("open('/no/such')"), cli.FAILED, 'error: /no/such: No such file or directory\n'),
    (OSError(errno.ENOSPC, 'No space left on device'), cli.FAILED, 'error: No space left on'),
    (KeyboardInterrupt(), cli.INTERRUPTED, 'error: interrupted'),
  ],
)
def test_user_errors_and_failures_are_one_message(capsys, error, code, said):
  assert cli.exit_code(error) == code
  assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize(
  'error',
  [
    _error_of("'é'.encode('ascii')"),  # a ValueError of C code
    _error_of('round(float("nan"))'),
    _error_of(RERAISED),
    _error_of("raise ValueError('a bug of numpy')", 'numpy'),
    _error_of("import json; json.loads('{')"),
    _error_of("{}['x']"),
    _error_of("raise OSError('no reason known')", 'other'),
  ],
)
def test_bugs_keep_their_traceback(error):
  with pytest.raises(type(error)):
    cli.exit_code(error)


def _python(*arguments, env=None, **options):
  environment = os.environ | {'PYTHONPATH': str(ROOT)} | (env or {})
  return subprocess.Popen([sys.executable, *arguments], env=environment, **options)


PRINTS = """
import sys
from moejax import cli
def main():
  for i in range(9):
    print('\\N{SNOWMAN}' * 9999, flush=True)
  open('done', 'w')
cli.run(main, needs_config=False)
"""


def test_printing_never_fails(tmp_path):
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'cwd': tmp_path}
  with _python('-c', PRINTS, env={'PYTHONIOENCODING': 'ascii'}, **pipes) as ascii_only:
    out, error = ascii_only.communicate()
  assert (ascii_only.returncode, error) == (0, b'')
  assert out.startswith(b'\\u2603\\u2603')

  (tmp_path / 'done').unlink()
  with _python('-c', PRINTS, **pipes) as closed_early:
    closed_early.stdout.close()
    said = b'warning: output is dropped from now on: Broken pipe\n'
    assert closed_early.stderr.read() == said
  assert closed_early.returncode == 0
  assert (tmp_path / 'done').exists()

  with open('/dev/full', 'w') as full:
    with _python('-c', PRINTS, cwd=tmp_path, stdout=full, stderr=full) as to_a_full_disk:
      assert to_a_full_disk.wait() == 0
    with _python('-c', PRINTS, stdout=full, stderr=subprocess.PIPE, cwd=tmp_path) as half:
      assert half.communicate()[1].count(b'from now on: No space left on device') == 1


def test_a_path_is_local(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  assert cli.path('~/my runs/a') == '/home/me/my runs/a'
  assert cli.path('runs/~a') == 'runs/~a'
  for text in ('gs://bucket/run', 's3://bucket'):
    with pytest.raises(ValueError, match=f'expected a local path, got {text}. Mount'):
      cli.path(text)
  with pytest.raises(ValueError, match='expected a path, got nothing'):
    cli.path('')
  with pytest.raises(ValueError, match='got ~nobody-here/a, but there is no such user'):
    cli.path('~nobody-here/a')
  parse = cli._PathsParser().parse
  assert parse('~/a,b c') == ['/home/me/a', 'b c'] and parse([]) == []
  for text in ('', 'a,,b'):
    with pytest.raises(ValueError, match='expected a path, got nothing'):
      parse(text)


@pytest.mark.parametrize('words', ['--config={}', '-config={}', '--config {}', '-config {}'])
def test_a_config_file_is_found_from_anywhere(words, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  find = lambda name: [*map(cli._find_config, cli._joined(words.format(name).split(' ')))]
  assert find('dense.py:debug') == [f'--config={cli._BUNDLED}/dense.py:debug']
  for name in ('nothing.py', '.', ''):
    said = re.escape(f'--config={name}: no such file; bundled files are dense.py')
    with pytest.raises(ValueError, match=f'^{said}'):
      find(name)


def test_what_takes_long_is_said(capsys, monkeypatch):
  with cli.waiting_for('reading'):
    pass
  assert not capsys.readouterr().out
  monkeypatch.setattr(cli, '_PATIENCE', 0)
  with pytest.raises(KeyError), cli.waiting_for('reading', file=sys.stderr):
    time.sleep(0.1)
    raise KeyError
  said = capsys.readouterr()
  assert said.err == 'reading ...\n  took 0s\n' and not said.out


def test_the_command_of_a_program_works_as_it_is_printed(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  given = ['python', '-m', 'moejax.main', '--config.model.blocks=((("mlp",), 1),)']
  monkeypatch.setattr(sys, 'orig_argv', given)
  monkeypatch.setattr(sys, 'executable', f'{tmp_path}/.venv/bin/python')
  command = cli.command('--workdir=my runs')
  assert shlex.split(command) == ['.venv/bin/python', *given[1:], '--workdir=my runs']
  monkeypatch.setattr(sys, 'executable', '/usr/bin/python3')
  assert shlex.split(cli.command()) == ['/usr/bin/python3', *given[1:]]
