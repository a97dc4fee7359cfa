"""The launchers against a fake cloud and cluster, which record calls and fail on demand."""

import json
import os
import pathlib
import re
import shlex
import stat
import subprocess
import sys
import textwrap
import types

import pytest

from moejax import runner

pytestmark = pytest.mark.heavy

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / 'launch'
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in ('.sh', '.sbatch'))


def test_shellcheck():
  assert len(SCRIPTS) == 3
  command = ['shellcheck', *map(str, SCRIPTS)]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
  assert all(path.stat().st_mode & stat.S_IXUSR for path in SCRIPTS)


def _script(path, text):
  path.write_text(textwrap.dedent(text))
  path.chmod(0o755)


# A slice with the states and exit codes of a plan; each list is used up, then its last entry stays.
GCLOUD = f"""\
  #!{sys.executable}
  import json, os, pathlib, sys
  folder, args = pathlib.Path(os.environ['FAKE']), sys.argv[1:]
  verb = args[3]
  if verb == 'ssh':
    words = next(a for a in args if a.startswith('--command=')).split()
    verb = words[2]
  with (folder / 'calls').open('a') as calls:
    calls.write(json.dumps([verb, *args]) + '\\n')
  plan = json.loads((folder / 'plan').read_text())
  left = plan.get(verb) or [0]
  answer = left[0]
  plan[verb] = left[1:] or left
  (folder / 'plan').write_text(json.dumps(plan))
  if verb != 'describe':
    sys.exit(answer)
  if answer in ('NONE', 'BROKEN'):
    sys.exit('ERROR: NOT_FOUND: no such resource' if answer == 'NONE' else 'ERROR: no network')
  print(answer)
"""


# In place of the programs, which take seconds: there is no variant `bsae`, and `huge` does not fit.
PYTHON = """\
  #!/usr/bin/env bash
  if [[ "$*" == *:bsae* ]]; then echo 'error: not one of small, base' >&2 && exit 2; fi
  if [[ "$*" == *moejax.preflight* ]]; then
    if [[ "$*" == *:huge* ]]; then echo 'error: does not fit' >&2 && exit 2; fi
    echo v5litepod-16 v2-alpha-tpuv5-lite
  fi
"""


@pytest.fixture
def tpu_run(tmp_path):
  """`tpu_run(*flags, verb=answers, ...)` gives the finished launcher, and its calls of gcloud."""
  _script(tmp_path / 'gcloud', GCLOUD)
  _script(tmp_path / 'python', PYTHON)

  def go(*flags, **plan):
    (tmp_path / 'plan').write_text(json.dumps(plan))
    (tmp_path / 'calls').write_text('')
    path = f'{tmp_path}:{os.environ["PATH"]}'
    fake = {'PATH': path, 'FAKE': str(tmp_path), 'PAUSE': '0'}
    done = subprocess.run(
      [LAUNCH / 'tpu_run.sh', *flags],
      env={**os.environ, **fake},
      capture_output=True,
      text=True,
      timeout=60,
    )
    return done, [json.loads(line) for line in (tmp_path / 'calls').read_text().splitlines()]

  return go


SLICE = ('--name=t', '--zone=z')
RUN = (*SLICE, '--type=v5litepod-16', '--config=configs/mot.py:base', '--workdir=gs://bucket/mot')


def _verbs(calls):
  return [verb for verb, *_ in calls if verb != 'describe']


def test_a_slice_is_created_used_and_deleted(tpu_run):
  states = ['NONE', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE']
  done, calls = tpu_run(*RUN, '--spot', '--project=p', describe=states)
  assert done.returncode == 0, done.stderr
  assert _verbs(calls) == ['create', 'scp', 'install', 'start', 'follow', 'delete']
  create, scp, install, start, follow, delete = (c[1:] for c in calls if c[0] != 'describe')
  assert create[:5] == ['compute', 'tpus', 'queued-resources', 'create', 't']
  flags = {'--spot', '--node-id=t', '--accelerator-type=v5litepod-16'}
  assert {*flags, '--runtime-version=v2-alpha-tpuv5-lite'} <= set(create)
  assert '--worker=all' in scp and '--worker=all' in install and '--worker=all' in start
  assert '--worker=0' in follow
  assert '--force' in delete and '--quiet' in delete
  assert all({'--zone=z', '--project=p'} <= set(call) for call in calls)
  command = next(a for a in start if a.startswith('--command='))
  assert command.endswith('--config=configs/mot.py:base --workdir=gs://bucket/mot')


def test_a_config_error_is_found_before_the_slice_is_created(tpu_run):
  done, calls = tpu_run(*RUN, '--config=configs/mot.py:bsae')
  assert (done.returncode, calls) == (2, [])
  assert done.stderr == 'error: not one of small, base\n'
  for flags in ([], ['--dry_run']):
    done, calls = tpu_run(*RUN, '--config=configs/mot.py:huge', *flags)
    assert (done.returncode, calls, done.stdout) == (2, [], '')
    assert done.stderr == 'error: does not fit\n'


@pytest.mark.parametrize('flags', [['--help'], ['help'], [*RUN, '-h']])
def test_help(tpu_run, flags):
  done, calls = tpu_run(*flags)
  assert (done.returncode, calls, done.stderr) == (0, [], '')
  assert done.stdout.startswith('Trains on a Cloud TPU slice') and '--max_failures=N' in done.stdout
  assert done.stdout.endswith('65 the run fails again for certain.\n')


@pytest.fixture
def preflight(tmp_path):
  """`preflight(*flags)`: the launcher's dry run with the real program; its output."""
  (tmp_path / 'python').write_text(f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
  (tmp_path / 'python').chmod(0o755)

  def go(*flags):
    path = f'{tmp_path}:{os.environ["PATH"]}'
    command = [LAUNCH / 'tpu_run.sh', *flags, '--dry_run', '--estimate']
    environment = os.environ | {'PATH': path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

  return go


IN_A_BUCKET = (
  '--config.data.tokenizer=gpt2:gs://bucket/gpt2',
  '--config.data.tfds_data_dir=gs://bucket/tfds',
)


def test_everything_is_checked_at_home(preflight):
  start = [*SLICE, '--workdir=gs://bucket/mot']
  done = preflight(*start, '--type=v5e:4x4', '--config=configs/mot.py:base', *IN_A_BUCKET)
  assert done.returncode == 0, done.stderr
  create = shlex.split(done.stdout.splitlines()[0])
  assert '--accelerator-type=v5litepod-16' in create
  assert '--runtime-version=v2-alpha-tpuv5-lite' in create
  assert 'v5e:4x4: expert 16; about 1.' in done.stderr


def test_mistakes_are_found_at_home(preflight):
  start = [*SLICE, '--workdir=gs://bucket/mot', '--type=v5e-16']
  for flags, message in [(['--wrokdir=x'], 'wrokdir'), (['--config=mot.py:base'], 'no gpt2/vocab')]:
    done = preflight(*start, *flags)
    assert done.returncode == 2 and not done.stdout
    assert message in done.stderr and 'Traceback' not in done.stderr


def test_a_preempted_slice_is_recreated_and_the_run_resumes(tpu_run):
  states = ['ACTIVE', 'SUSPENDED', 'SUSPENDED', 'NONE', 'ACTIVE']
  done, calls = tpu_run(*RUN, describe=states, follow=[255, 0])
  assert done.returncode == 0, done.stderr
  attempt = ['scp', 'install', 'start', 'follow']
  assert _verbs(calls) == [*attempt, 'delete', 'create', *attempt, 'delete']


def test_an_interrupted_run_resumes_on_the_same_slice_any_number_of_times(tpu_run):
  done, calls = tpu_run(*RUN, describe=['ACTIVE'], follow=[75] * 5 + [0])
  assert done.returncode == 0, done.stderr
  assert _verbs(calls)[:6] == ['scp', 'install', 'start', 'follow', 'stop', 'start']
  assert _verbs(calls).count('start') == 6


def test_a_broken_connection_does_not_end_the_run(tpu_run):
  done, calls = tpu_run(*RUN, describe=['ACTIVE'], follow=[255, 0])
  assert done.returncode == 0, done.stderr
  assert _verbs(calls) == ['scp', 'install', 'start', 'follow', 'start', 'follow', 'delete']


def test_what_fails_once_is_retried(tpu_run):
  fails = {verb: [1, 0] for verb in ('create', 'scp', 'start')}
  states = ['BROKEN', 'NONE', 'NONE', 'ACTIVE']
  done, calls = tpu_run(*RUN, '--max_failures=4', describe=states, **fails)
  assert done.returncode == 0, done.stderr
  verbs = ['create', 'create', 'scp', 'scp', 'install', 'start', 'start', 'follow', 'delete']
  assert _verbs(calls) == verbs


@pytest.mark.parametrize('failing', ['create', 'install', 'start', 'follow'])
def test_what_keeps_failing_is_given_up(tpu_run, failing):
  state = 'NONE' if failing == 'create' else 'ACTIVE'
  done, calls = tpu_run(*RUN, '--max_failures=2', describe=[state], **{failing: [1]})
  assert done.returncode == 1
  assert _verbs(calls).count(failing) == 2 and 'gave up after 2 failures' in done.stderr
  assert _verbs(calls)[-1] == 'delete'
  assert ('tail' in _verbs(calls)) == (failing == 'follow')  # the logs of all hosts


@pytest.mark.parametrize('code', [2, 65])
def test_what_fails_again_for_certain_stops_at_once(tpu_run, code):
  done, calls = tpu_run(*RUN, describe=['ACTIVE', 'SUSPENDED'], follow=[code])
  assert done.returncode == code
  assert _verbs(calls) == ['scp', 'install', 'start', 'follow', 'delete']


def test_keep_and_a_failing_delete_are_reported(tpu_run):
  done, calls = tpu_run(*RUN, '--keep', describe=['ACTIVE'])
  assert done.returncode == 0 and 'delete' not in _verbs(calls) and 'costs' in done.stderr
  done, _ = tpu_run(*RUN, describe=['ACTIVE'], delete=[1])
  assert done.returncode == 0 and 'delete it by hand' in done.stderr


def test_following_and_deleting_by_hand(tpu_run):
  done, calls = tpu_run('logs', *SLICE, follow=[75])
  assert done.returncode == 75 and _verbs(calls) == ['follow']
  done, calls = tpu_run('delete', *SLICE)
  assert done.returncode == 0 and _verbs(calls) == ['delete']


def test_dry_run_prints_every_command_and_calls_nothing(tpu_run):
  odd = "--config.train.sample_prompt=a b; $(echo 'c')"
  done, calls = tpu_run(*RUN, '--spot', odd, '--dry_run')
  assert done.returncode == 0 and not calls, done.stderr
  printed = [shlex.split(line) for line in done.stdout.splitlines()]
  assert [words[:3] for words in printed] == [['gcloud', 'compute', 'tpus']] * len(printed)
  assert [words[4] for words in printed] == ['create', 'scp', 'ssh', 'ssh', 'ssh', 'delete']
  (start,) = (w for words in printed for w in words if 'worker.sh start' in w)
  assert shlex.split(start.removeprefix('--command='))[3:] == [*RUN[3:], odd]


@pytest.mark.parametrize(
  'flags, message',
  [
    (RUN[1:], '--name is missing'),
    (('--name=t', *RUN[2:]), '--zone is missing'),
    ((*SLICE, '--workdir=w'), '--type is missing'),
    (RUN[:-1], '--workdir is missing'),
    ((*RUN, '--max_failures=x'), '--max_failures: expected a number'),
    ((*RUN, 'more'), "unexpected argument 'more'"),
    (('stop', *RUN), "expected run, logs or delete, got 'stop'"),
  ],
)
def test_usage_errors_are_one_line(tpu_run, flags, message):
  done, calls = tpu_run(*flags)
  assert done.returncode == 2 and not calls
  assert message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.fixture
def host(tmp_path):
  """A slice's host: `host(command, ...)` runs worker.sh there; moejax is a fake Python."""
  home = tmp_path / 'home'
  (home / 'moejax-run' / 'venv' / 'bin').mkdir(parents=True)
  (home / 'moejax').mkdir()
  _script(
    home / 'moejax-run' / 'venv' / 'bin' / 'python',
    """\
    #!/usr/bin/env bash
    printf '%s\\n' "$@"
    until [[ -f ~/go ]]; do sleep 0.05; done
    exit "$(<~/go)"
    """,
  )
  tools = tmp_path / 'tools'
  tools.mkdir()
  _script(tools / 'gcsfuse', '#!/usr/bin/env bash\nprintf "%s\\n" "$*" >>~/mounts')
  _script(tools / 'mountpoint', '#!/usr/bin/env bash\nexit 1')

  def go(*args):
    return subprocess.run(
      [LAUNCH / 'worker.sh', *args],
      env={**os.environ, 'HOME': str(home), 'PATH': f'{tools}:{os.environ["PATH"]}'},
      capture_output=True,
      text=True,
      timeout=60,
    )

  go.home = home
  yield go
  go('stop')


@pytest.mark.parametrize('code', [0, 2, 65, 75])
def test_a_host_runs_once_and_passes_on_the_exit_code(host, code):
  flags = [
    '--workdir=gs://bucket/a b',
    '--config.data.files=gs://texts/a b',
    '--config.data.tfds_data_dir=gs://other/tfds',
  ]
  for _ in range(2):  # gcloud may repeat a command
    assert host('start', *flags).returncode == 0
  (host.home / 'go').write_text(str(code))
  followed = host('follow')
  assert followed.returncode == code, followed.stderr
  mounted = f'--config.data.files={host.home}/gs/texts/a b'
  expected = ['-u', '-m', 'moejax.main', flags[0], mounted, flags[2]]
  assert followed.stdout.splitlines() == expected
  (mount,) = (host.home / 'mounts').read_text().splitlines()
  assert mount.endswith(f' texts {host.home}/gs/texts')


def test_buckets_anywhere_in_a_flag_become_folders(host):
  (host.home / 'go').write_text('0')
  flags = [
    '--config.data.tokenizer=gpt2:gs://one/gpt2',
    '--config.data.files=gs://two/a,gs://one/b',
    '--config.train.sample_prompt=see gs://three',
  ]
  host('start', '--workdir=/shared/gs', *flags)
  folder = f'{host.home}/gs'
  assert host('follow').stdout.splitlines()[3:] == [
    '--workdir=/shared/gs',
    f'--config.data.tokenizer=gpt2:{folder}/one/gpt2',
    f'--config.data.files={folder}/two/a,{folder}/one/b',
    flags[-1],
  ]
  mounts = (host.home / 'mounts').read_text().splitlines()
  assert [line.split()[-2] for line in mounts] == ['one', 'two', 'one']


def test_a_host_kills_the_run(host):
  host('start')
  pid = int((host.home / 'moejax-run' / 'pid').read_text())
  assert host('stop').returncode == 0
  assert host('follow').returncode == 1
  with pytest.raises(ProcessLookupError):
    for _ in range(100):
      os.kill(pid, 0)
  assert host('stop').returncode == 0  # nothing is left


@pytest.fixture
def sbatch(tmp_path):
  """`sbatch(code)` runs the batch script as SLURM would, with a task that ends with `code`."""
  _script(
    tmp_path / 'srun', f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" >{tmp_path}/srun.args\nexit $CODE'
  )
  _script(tmp_path / 'scontrol', f'#!/usr/bin/env bash\necho "$*" >>{tmp_path}/scontrol.args')

  def go(code, *args):
    (tmp_path / 'scontrol.args').unlink(missing_ok=True)
    path = f'{tmp_path}:{os.environ["PATH"]}'
    slurm = {'SLURM_JOB_ID': '7', 'SLURM_SUBMIT_DIR': str(tmp_path), 'CODE': str(code)}
    done = subprocess.run(
      ['bash', LAUNCH / 'slurm.sbatch', *args],
      env={**os.environ, 'PATH': path, **slurm},
      capture_output=True,
      text=True,
      timeout=60,
    )
    requeued = (tmp_path / 'scontrol.args').exists()
    assert not requeued or (tmp_path / 'scontrol.args').read_text() == 'requeue 7\n'
    return done.returncode, requeued

  go.folder = tmp_path
  return go


def test_slurm_requeues_what_can_resume_and_nothing_else(sbatch):
  flags = ['--config=configs/mot.py:base', '--workdir=/shared/a b']
  assert sbatch(0, *flags) == (0, False)
  words = (sbatch.folder / 'srun.args').read_text().splitlines()
  assert words[-5:] == ['python', '-m', 'moejax.main', *flags]
  assert sbatch(2) == (2, False)
  assert sbatch(65) == (65, False)
  for _ in range(5):
    assert sbatch(75) == (0, True)
  assert [sbatch(code) for code in (1, 134, 75, 137, 1, 1)] == [(0, True)] * 5 + [(1, False)]
  assert not list(sbatch.folder.glob('*.failures'))


def test_slurm_gives_each_task_one_gpu_and_time_to_save():
  options = dict(
    re.findall(r'^#SBATCH --([a-z-]+)=(\S+)', (LAUNCH / 'slurm.sbatch').read_text(), re.M)
  )
  assert options['ntasks-per-node'] == options['gpus-per-node']
  assert options['signal'].startswith('TERM@')


def test_commands_for_other_machines_survive_a_space():
  cell = types.SimpleNamespace(name='a', command='python -m moejax.main --config.x="((1,),)"')
  (line,) = runner.launch_commands([cell], '/data/my $runs/', 'ssh {name} --command={command}')
  *_, command = shlex.split(line)
  words = shlex.split(command.removeprefix('--command='))
  assert words[-2:] == ['--config.x=((1,),)', '--workdir=/data/my $runs/a']
