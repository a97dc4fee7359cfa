"""Every config file through the real entry point, and its error messages."""

import functools
import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from configs import dense, fine_grained, moe as moe_config, moe_mamba, mot
from moejax import metrics, model, variants

pytestmark = pytest.mark.heavy

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted(
  p.stem
  for p in (ROOT / 'configs').glob('*.py')
  if p.stem not in ('__init__', 'common', 'run', 'like')  # like: tests/like_test.py
)


def _moejax(*args, program='main', cwd=ROOT, **kwargs):
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  command = [sys.executable, '-m', f'moejax.{program}', *args]
  return subprocess.run(
    command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, **kwargs
  )


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """`trained(name)`: a finished run of a config's debug form, its folder and what it printed."""

  @functools.cache
  def train(name):
    folder = tmp_path_factory.mktemp(name)
    workdir = folder / 'run'
    result = _moejax(f'--config=configs/{name}.py:debug', f'--workdir={workdir}', cwd=folder)
    assert result.returncode == 0, result.stderr
    return workdir, result

  return train


@pytest.mark.heavy
@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_trains(name, trained):
  workdir, result = trained(name)
  assert 'sample: def ' in result.stdout and 'bits per byte' in result.stdout
  assert not result.stderr
  assert json.loads((workdir / 'summary.json').read_text())['steps'] == 6


@pytest.mark.heavy
@pytest.mark.parametrize('name', ['mot', 'moe'])
def test_a_run_resumes_evaluates_and_generates_in_a_fresh_process(name, trained, tmp_path):
  run = shutil.copytree(trained(name)[0], tmp_path / 'run')
  losses = metrics.loss_curve(run)
  shutil.rmtree(run / 'checkpoints' / '6')  # as if it had been killed before
  again = _moejax(f'--config=configs/{name}.py:debug', f'--workdir={run}')
  assert again.returncode == 0, again.stderr
  assert 'resuming from step 3' in again.stdout
  assert metrics.loss_curve(run) == losses  # bitwise
  summary = json.loads((run / 'summary.json').read_text())
  assert summary['steps'] == 6 and summary['resumed_from'] == 3
  evaluated = _moejax(f'--workdir={run}', program='evaluate')
  assert evaluated.returncode == 0, evaluated.stderr
  loss = json.loads(evaluated.stdout)['loss']
  assert loss == pytest.approx(summary['validation']['loss'], rel=1e-6)
  generated = _moejax(f'--workdir={run}', '--prompt=def ', '--length=5', program='generate')
  assert generated.returncode == 0, generated.stderr
  assert generated.stdout.startswith('def ')


@pytest.mark.parametrize(
  'args, message',
  [
    (['--config=configs/mot.py:mediun'], "did you mean 'medium'?"),
    (['--config=configs/mot.py:experts=x'], 'expected experts=<a positive integer>'),
    (['--config=configs/nothing.py'], 'nothing.py: no such file; bundled files are dense.py'),
    (['--config', 'nothing.py'], '--config=nothing.py: no such file; bundled files are dense.py'),
    (['--model.num_heads=3'], 'written --config.model.num_heads=VALUE'),
    (['--config.model.num_head=3'], "no such field; did you mean 'model.num_heads'?"),
    (['--config.model.mot.qqq=1'], 'mot.qqq: the config has no such field.'),
    (['--config.model.d_model=abc'], "--config.model.d_model must be an integer, got 'abc'"),
    (['--config.model.final_norm=maybe'], "final_norm must be True or False, got 'maybe'"),
    (['--config.train.seed=4294967296'], '--config.train.seed must be at least 0 and at most'),
    (['train'], "unexpected argument 'train'"),
    (['--config=configs/mot.py:debug', '--workdir=az://bucket/run'], 'expected a local path'),
    (['--config=configs/mot.py:debug', '--process_id=1'], '--coordinator_address and --num_proc'),
    (['--config=configs/mot.py:debug', '--config.mesh.data=3'], 'does not fit'),
    (['--config=configs/mot.py:debug', '--workdir=/proc/none'], 'workdir'),
  ],
)
def test_user_errors_are_one_clear_line(args, message, tmp_path):
  result = _moejax(*args, cwd=tmp_path)
  assert result.returncode != 0
  assert message in result.stderr
  assert 'Traceback' not in result.stderr
  assert not list(tmp_path.iterdir())


@pytest.mark.heavy
def test_an_interrupted_run_prints_the_command_that_resumes_it(tmp_path):
  args = ['--config=configs/dense.py:debug', '--config.train.steps=100000']
  args += ['--config.model.blocks=((("attention", "mlp"), 2),)']
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': '1'}
  environment['XLA_FLAGS'] = ''  # this run is compiled as users compile
  process = subprocess.Popen(
    [sys.executable, '-m', 'moejax.main', *args],
    cwd=tmp_path,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout
  for line in process.stdout:
    if re.match('step +[0-9]+/', line):
      break
  time.sleep(0.5)
  process.send_signal(signal.SIGTERM)
  output, error = process.communicate(timeout=120)
  assert process.returncode == 75
  assert error == 'stopping after this step, to save; a second Ctrl-C ends the program at once\n'
  (folder,) = (tmp_path / 'runs').iterdir()  # that nobody named
  step = max(int(p.name) for p in (folder / 'checkpoints').iterdir() if p.name.isdecimal())
  *_, saved, resume, command = output.splitlines()
  assert (saved, resume) == (f'interrupted at step {step} of 100000; saved', 'resume with')
  assert json.loads((folder / 'summary.json').read_text())['finished'] is False
  assert (folder / 'loss.png').exists()

  command = command.replace('steps=100000', f'steps={step + 2}')
  resumed = subprocess.run(
    command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
  )
  assert resumed.returncode == 0, resumed.stderr
  assert f'resuming from step {step}' in resumed.stdout
  summary = json.loads((folder / 'summary.json').read_text())
  assert (summary['finished'], summary['steps']) == (True, step + 2)


def test_help_and_print_config_do_not_train(tmp_path):
  printed = _moejax('--config=configs/mot.py:mini', '--print_config', cwd=tmp_path)
  assert printed.returncode == 0 and 'd_model: 256' in printed.stdout
  assert printed.stderr.startswith('note: training would stop here with\ndata.tokenizer: ')
  printed = _moejax('--config=configs/mot.py:debug', '--print_config', cwd=tmp_path)
  assert yaml.safe_load(printed.stdout)['train']['steps'] == 6 and not printed.stderr
  assert '\n#   mot: 8 experts of width 32 per 4 tokens\n' in printed.stdout
  explained = _moejax('--help', cwd=tmp_path)
  assert explained.returncode == 0 and '`d_ff = 128`: hidden width of a' in explained.stdout
  assert not list(tmp_path.iterdir())


def test_sizes_of_the_mot_paper():
  c = mot.get_config('medium,experts=32,mixtures=16')
  assert (c.model.mot.num_experts, c.model.mot.group_size) == (512, 32)
  assert c.model.blocks == ((('attention', 'mlp'), 4), (('attention', 'mot'), 4))
  assert c.optimizer.peak_lr == 7e-4 and c.data.batch_size == 256


INNER = ('conv', 'gate', 'out', 'conv+gate', 'conv+out', 'gate+out', 'conv+gate+out')
MOE_MAMBA = [
  'parallel',
  *(f'ratio={n}x{6 - n}' for n in range(1, 6)),
  *(f'inner={inner}' for inner in INNER),
  *(f'inner={inner},every_other' for inner in INNER),
]


@pytest.mark.parametrize('size', ['debug', '3M', '25M', '100M'])
@pytest.mark.parametrize('variants', MOE_MAMBA)
def test_variants_of_moe_mamba(variants, size):
  c = moe_mamba.get_config(f'{size},{variants}')
  model.ModelConfig(**c.model.to_dict() | {'vocab_size': 259, 'max_length': c.data.sequence_length})
  assert c.model.positions == 'none' and c.model.moe.balance_loss == 0.01
  if size != 'debug':
    assert c.model.moe.capacity_factor == 1


def test_mamba2_takes_the_place_of_mamba():
  c = moe_mamba.get_config('25M,ratio=4x2,mamba2')
  assert c.model.blocks == ((('mamba2', 'moe'), 8),)
  assert model.ModelConfig(**c.model.to_dict() | {'vocab_size': 259, 'max_length': 8})
  assert c.model.mamba2.expand == pytest.approx(2 + 2 / 3)  # 21 heads of 64 channels
  c = moe_mamba.get_config('debug,inner=conv+out,every_other,mamba2')
  assert c.model.blocks == ((('mamba2', 'moe_in_mamba2'), 2),)
  assert c.model.mamba2.moe_in == 'conv+out'
  assert moe_mamba.get_config('parallel,mamba2').model.blocks[0][0] == ('mamba2+moe',)


def test_sizes_of_the_moe_mamba_paper():
  c = moe_mamba.get_config('25M')
  assert c.model.blocks == ((('mamba', 'moe'), 8),)
  assert (c.model.d_ff, c.model.moe.expansion_rate, c.optimizer.peak_lr) == (1536, 42, 5e-4)
  c = moe_mamba.get_config('25M,ratio=4x2')
  assert c.model.mamba.expand == pytest.approx(2 + 2 / 3)
  assert (c.model.d_ff, c.model.moe.expansion_rate) == (1024, 48)
  c = moe_mamba.get_config('25M,inner=conv+out,every_other')
  assert c.model.blocks == ((('mamba', 'moe_in_mamba'), 8),)
  assert (c.model.d_ff, c.model.moe.expansion_rate) == (352, 24)
  c = moe_mamba.get_config('100M,parallel,experts=16')
  assert c.model.blocks == ((('mamba+moe',), 16),) and c.model.moe.expansion_rate == 16
  c = moe_config.get_config('25M,dense')
  assert c.model.blocks == ((('attention', 'mlp'), 8),) and c.data.sequence_length == 1024


@pytest.mark.parametrize('module', [moe_config, moe_mamba])
@pytest.mark.parametrize(('size', 'pool'), [('3M', 64), ('25M', 64), ('100M', 256)])
def test_the_tokens_of_a_device_of_the_paper_share_the_slots(module, size, pool):
  c = module.get_config(size)
  assert c.model.moe.group_size == c.data.batch_size // c.optimizer.accumulation == pool
  assert module.get_config('laptop').model.moe.group_size == 8


@pytest.mark.parametrize('size', ['laptop', 'mini', 'small', 'medium', 'base', 'large'])
def test_compared_models_begin_with_the_same_scale(size):
  scale = dense.get_config(size).model.init_scale
  assert mot.get_config(size).model.init_scale == scale
  assert scale == (1.0 if size in ('laptop', 'mini') else 0.1)


@pytest.mark.parametrize(
  ('variants', 'message'),
  [
    ('ratio=4x3', 'expected MAMBAxEXPERT'),
    ('ratio=6x0', 'expected MAMBAxEXPERT'),
    ('ratio=2', 'expected MAMBAxEXPERT'),
    ('ratio=3x3x', 'expected MAMBAxEXPERT'),
    ('inner=conv+out,experts=9', 'split evenly among its 2 projections'),
    ('inner=conv,parallel', 'inner= has no Switch layers'),
    ('every_other', 'every_other needs experts inside Mamba'),
    ('inner=', "expected inner=<a string>, got ''"),
    ('paralel', "did you mean 'parallel'?"),
    ('parallel=1', "did you mean 'parallel'?"),
  ],
)
def test_bad_variants_of_moe_mamba(variants, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    moe_mamba.get_config(variants)


@pytest.mark.parametrize(
  ('module', 'variants', 'message'),
  [
    (fine_grained, 'granularity=0', "granularity=<a positive integer>, got '0'"),
    (fine_grained, 'expansion_rate=-1', "expansion_rate=<a positive integer>, got '-1'"),
    (mot, 'experts=0', "experts=<a positive integer>, got '0'"),
    (mot, 'mixtures=1.5', "mixtures=<a positive integer>, got '1.5'"),
    (mot, 'experts=4,experts=8', 'experts=8: experts is already 4'),
    (mot, 'small,experts=4,medium', 'medium: size is already small'),
    (moe_config, 'top_k=0', "top_k=<a positive integer>, got '0'"),
    (moe_config, 'dense,experts=4', 'dense has no experts'),
  ],
)
def test_bad_variants_are_rejected(module, variants, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    module.get_config(variants)


def test_unknown_variants_are_rejected():
  with pytest.raises(ValueError, match="did you mean 'experts='"):
    variants.parse_arg('expert=3', experts=1)


def test_a_users_older_file_finds_what_config_files_share(tmp_path):
  file = tmp_path / 'older.py'
  file.write_text(
    'from configs import common\n\n\ndef get_config(arg=None):\n'
    "  arg = common.parse_arg(arg)\n  return common.shrink(common.sized('laptop'))\n"
  )
  assert runpy.run_path(str(file))['get_config']().model.d_model == 16
