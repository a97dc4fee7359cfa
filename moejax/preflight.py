"""Checks here what a run on another machine needs, before that machine costs anything.

python -m moejax.preflight --topology=v5litepod-16 --config=configs/mot.py:base
python -m moejax.preflight --topology=h100x8 --config=configs/moe.py:25M

Checked are the config, the files it names and whether a training step fits into memory: exactly,
by compiling it, if the compiler is installed (pip install 'moejax[tpu-aot]'), else by an estimate.
launch/tpu_run.sh does this first. The hosts of a TPU slice get a copy of this checkout, so files
are paths inside it, or gs://BUCKET/... (which is not looked into here).

Exit codes: 0, and one line for the launcher, or 2 and what to change.
"""

import glob
import os
import subprocess
import sys

from absl import flags

from moejax import cli

_TOPOLOGY = flags.DEFINE_string(
  'topology', None, 'The machine, as of moejax.aot: v5litepod-16, v5e:4x4, h100x8.', required=True
)
_ESTIMATE = flags.DEFINE_bool('estimate', False, 'Do not compile, even if the compiler is here.')
_SURELY = 1.3  # an estimate is at most this much above what the compiler needs


def main(config):
  from moejax.aot import topologies  # after the flags are checked: importing JAX takes seconds

  topology = topologies.parse(_TOPOLOGY.value)
  if problems := list(_file_problems(config.data, copied=topology.platform == 'tpu')):
    raise ValueError('\n'.join(problems))
  _check_section(config.data)
  _check_fit(config, topology)
  print(*topology.cloud_names)
  return cli.OK


def _say(text):
  print(text, file=sys.stderr, flush=True)


# Files.


def _file_problems(section, copied):
  """One message for each file of a `data` section that the machine will not have.

  Args:
    section: of the ConfigDict.
    copied: the machine gets a copy of this checkout; otherwise it sees the same files.
  """
  from moejax.data import tokenizer

  for field in ('files', 'validation_files', 'tokenizer', 'tfds_data_dir'):
    value = section[field]
    if not value or (field == 'tokenizer' and value == 'bytes'):
      continue
    path = value.removeprefix(tokenizer.GPT2_PREFIX)
    if '://' in path or (copied and os.path.isabs(os.path.expanduser(path))):
      _say(f'data.{field} = {value!r}: not checked, it is on the machine or in a bucket')
      continue
    if field == 'tokenizer':
      missing = [str(file) for file in tokenizer.tokenizer_files(value) if not file.is_file()]
    else:
      missing = [] if glob.glob(os.path.expanduser(path), recursive=True) else [path]
    if missing:
      yield (
        f'data.{field} = {value!r}: there is no {" and no ".join(missing)} here. docs/data.md '
        'says how to get a corpus and a tokenizer; or name a folder of a bucket, gs://BUCKET/....'
      )
    elif copied and _is_ignored(path):
      yield (
        f'data.{field} = {value!r}: git ignores it, so it is not copied to the hosts. Move it, or '
        'name a folder of a bucket, gs://BUCKET/....'
      )
  if section.source == 'seqio' and not section.tfds_data_dir and copied:
    yield from _tfds_problems(section.task)


def _tfds_problems(task):
  if task in ('c4_en', 'c4_realnewslike'):
    yield (
      f'data.task = {task!r}: a new host has no prepared copy of C4. Give its folder in a bucket, '
      '--config.data.tfds_data_dir=gs://BUCKET/tfds, or train on files: docs/data.md.'
    )


def _is_ignored(path):
  command = ['git', 'check-ignore', '--quiet', path]
  try:
    return subprocess.run(command, capture_output=True).returncode == 0
  except FileNotFoundError:  # no git
    return False


def _check_section(section):
  """Raises ValueError if fields of the `data` section contradict each other."""
  from moejax import fields
  from moejax.data import DataConfig

  fields.make(DataConfig, section)


# Memory.


def _check_fit(config, topology):
  """Raises ValueError if a training step surely does not fit, or the config is invalid there."""
  from moejax import config as config_lib
  from moejax.aot import step, topologies

  try:
    sized = step.without_data(config)
  except ValueError as error:  # the vocabulary is in a file that is not here
    _say(f'memory is not checked: {error}')
    return
  run_config = config_lib.resolve(sized)
  if not topology.chip.memory:
    _say(f'memory is not checked: that of {topology} is not known')
    return
  choice = step.choose_mesh(run_config, topology)
  _say(f'{topology}: {choice.describe()}, by an estimate')
  if topologies.can_compile(topology) and not _ESTIMATE.value:
    report = step.compile_step(config, topology)
    if not report.fits:
      lines = [f'does not fit on {topology}: {report.needed or "see moejax.aot"}. What would help:']
      raise ValueError('\n'.join([*lines, *report.advice(config)]))
    _say(f'{topology}: fits, by compiling; a step takes at least {report.step_seconds:.3g} s')
  elif sum(choice.memory.values()) > _SURELY * choice.capacity:
    raise ValueError(
      f'does not fit on {topology}: {choice.describe()}. Take more chips, or '
      f'see what else would help: python -m moejax.aot --search --topology={_TOPOLOGY.value}.'
    )
  elif not choice.fits:
    _say("warning: that is close; pip install '.[tpu-aot]' to know, or take more chips")


if __name__ == '__main__':
  cli.run(main)
