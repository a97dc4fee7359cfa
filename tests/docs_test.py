"""The code in the documentation runs."""

import concurrent.futures
import gzip
import json
import multiprocessing
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest

from configs import mot
from moejax import config as config_lib, convert, model as model_lib
from moejax.layers import moe
from tests import commands, programs, tiny

pytestmark = pytest.mark.heavy

ROOT = pathlib.Path(__file__).parent.parent
DOCS, README = ROOT / 'docs', ROOT / 'README.md'


@pytest.fixture
def routers(monkeypatch):
  monkeypatch.setattr(moe, 'ROUTERS', dict(moe.ROUTERS))


def _python(page):
  return re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL)


def _code(page):
  (code,) = _python(DOCS / page)
  return compile(code, page, 'exec'), len(code.splitlines())


@pytest.mark.heavy
def test_what_leaks_in_a_group_and_that_groups_of_one_do_not():
  page = {}
  exec(_code('concepts/mixture_of_tokens.md')[0], page)
  in_a_group, alone = (page['change'](page['config'].with_mot(group_size=M)) for M in (4, 1))
  assert not in_a_group[:9].any() and (in_a_group[9:] > 0).all()
  assert not alone.any()


@pytest.mark.parametrize('ragged', ['ragged', 'packed'])  # its name in version 0.1
def test_the_router_of_the_page_routes_and_learns(ragged, routers):
  _, lines = _code('adding_a_router.md')
  assert lines <= 30
  (text,) = _python(DOCS / 'adding_a_router.md')
  exec(text.replace('ragged', ragged), {})
  changes = tiny.MODELS['token choice'] | {'moe_capacity_factor': 1.0}
  config = tiny.model_config(**changes, moe_router='round_robin')

  @jax.jit
  def loss(params):
    nats, _, aux = model_lib.bind(config, params).loss(tiny.batch())
    return nats, aux

  params = jax.jit(lambda: model_lib.init_params(config, jax.random.key(0)))()
  (_, aux), gradients = jax.value_and_grad(loss, has_aux=True)(params)
  experts = tiny.L * tiny.M * 2 / tiny.E
  np.testing.assert_allclose(aux['moe/load'], 1, atol=1 / experts)
  assert (aux['moe/dropped'] == 0).all()
  assert np.abs(gradients['stack_0']['1_moe']['layer']['router']).max() > 0


def test_the_names_on_the_page_are_those_in_the_file(tmp_path, monkeypatch):
  config = mot.get_config('debug')
  run_config = config_lib.resolve(config)
  abstract = convert.abstract_params(run_config.model)
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
  convert.write_run(config, run_config, params, tmp_path / 'run')
  convert.to_safetensors(tmp_path / 'run', tmp_path / 'mot.safetensors')
  page = (DOCS / 'convert.md').read_text()
  (code,) = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
  monkeypatch.chdir(tmp_path)
  found = {}
  exec(compile(code, 'convert.md', 'exec'), found)
  assert found['config']['model']['d_model'] == 16
  kinds = {re.sub(r'stack_\d\.\d\.\d', 'stack_S.B.I', name) for name in found['shapes']}
  (table,) = re.findall(r'\| name \| shape \|\n(.*?)\n\n', page, re.DOTALL)
  table = table.replace('KIND', 'mot')
  for name in kinds - {'position_embedding'}:
    parent, _, last = name.rpartition('.')
    in_full, beside = f'`{name}`', rf'`{re.escape(parent)}\.\w+`, `\.{last}`'
    assert in_full in table or re.search(beside, table) or name.endswith(('.scale', '.bias')), name


# Programs of other people, and why their commands are not run; ours are run or checked below.
OTHERS = {
  'pip': 'installs',
  '.venv/bin/pip': 'installs',
  'gcloud': 'needs a cloud; tests/launch_test.py has a false one',
  'docker': 'builds an image',
  'xpk': 'needs a cluster',
  'hf': 'downloads',
  'sbatch': 'needs a cluster; tests/launch_test.py has a false one',
}
# Commands of ours, as regular expressions, of which only the flags are checked.
UNAFFORDABLE = {
  r'moejax\.main .*--config\.mesh\.fsdp=': 'needs several devices: tests/sharding',
  r'-m moejax\.aot ': 'compiles for TPUs: tests/aot',
  r'configs/mot\.py:mini ': "trains a paper's model",
  r'mesh\.fsdp=2 ': 'needs eight devices: tests/sharding_test.py',
  r'--coordinator_address=': 'needs several processes: tests/distributed_test.py',
  r'scaling_laws run (?!.*--launch)': 'trains 60 models: tests/scaling_laws',
  r'moejax\.transfer (check|sweep)': 'trains models of several sizes: tests/transfer',
  r'moejax\.drill ': 'trains dozens of times: tests/drill',
  r'moejax\.reroute ': 'trains and evaluates many models: tests/reroute_test.py',
  r'moejax\.drops ': 'evaluates eleven models: tests/drops_test.py',
  r'moejax\.privacy ': 'needs trained models: tests/privacy_test.py',
  r'moejax\.reproduce ': 'trains dozens of models: tests/reproduce',
  r'scaling_laws plan .*--runtime=v5e': 'traces 12 models: tests/scaling_laws/runtime_test.py',
  r'scaling_laws plan .*--runtime=runs/grid': 'needs 60 models: tests/scaling_laws',
  r'scaling_laws judge ': 'needs trained models: tests/scaling_laws/predictions_test.py',
  r'moejax\.sweep (?!.*--launch)': 'trains a dozen models: tests/sweep',
  r'compare --runs=runs/dense_seeds': 'compares what a sweep trained: tests/compare',
}
# What a command is given here, so that it takes a second: the small models of `debug`, little text,
# and in place of runs that are not trained here their results.
TEXT = ['--config.data.source=text', '--config.data.files=text/*.txt']
SMALLER = {
  'moejax.main': ['--config.train.eval_batches=1', '--config.train.final_eval_batches=1'],
  'moejax.tokenizer': ['--vocab_size=300', *TEXT],
  'moejax.tokenize': TEXT,
  'fit': ['--starts=2', '--repeats=2'],
  'plan': ['--estimate'],
}


def _smaller(words):
  """The same command at a smaller scale."""
  words = [re.sub(r'^(--config=configs/(?!run)[^:]*\.py)$', r'\1:', word) for word in words]
  words = [
    re.sub(r'^(--config=configs/(?!run|.*debug)[^:]*:.*)$', r'\1,debug', word) for word in words
  ]
  words = [re.sub(r'(sequence_length|train.steps)=\d+$', r'\1=32', word) for word in words]
  words = [word.replace('=docs/', f'={DOCS}/') for word in words]
  words = [str(DOCS / 'laptop_grid/runs.csv') if word == 'runs/grid' else word for word in words]
  added = [flag for name, flags in SMALLER.items() if name in words for flag in flags]
  own = any(word.startswith('--config.data.source=') for word in words)
  return words + [flag for flag in added if not (own and flag in TEXT)]


@pytest.fixture(scope='module')
def go(tmp_path_factory):
  """`go('moejax.main', argument, ...)` in a folder with what a reader has; code and output."""
  folder = tmp_path_factory.mktemp('docs')
  for page in DOCS.glob('adding_*.md'):  # what the reader saved
    (name,) = set(re.findall(r'--imports=(\S+)', page.read_text()))
    (folder / name).write_text(*_python(page))
  (folder / 'text').mkdir()
  for i in range(40):
    (folder / 'text' / f'{i}.txt').write_text(f'def function_{i}(x):\n  return x * {i}\n' * 20)
  (folder / 'prompts.txt').write_text('def \nimport ')
  shutil.copytree(ROOT / 'tests/data/bpe', folder / 'gpt2')
  (folder / 'c4' / 'en').mkdir(parents=True)
  for name in ('train.00000-of-01024', 'validation.00000-of-00008'):
    lines = '\n'.join(json.dumps({'text': f'document {i} of {name} ' * 20}) for i in range(40))
    (folder / 'c4' / 'en' / f'c4-{name}.json.gz').write_bytes(gzip.compress(lines.encode()))
  context = multiprocessing.get_context('spawn')
  with (
    mock.patch.dict(os.environ, XDG_STATE_HOME=str(folder / 'state')),
    concurrent.futures.ProcessPoolExecutor(1, context) as pool,
  ):

    def run(module, *arguments):
      program = module.removeprefix('moejax.')
      return pool.submit(programs.run, program, arguments, folder).result()

    yield run


# Every program or command of one, and its flags that hold paths.
PATHS = {
  'main': ['workdir'],
  'evaluate': ['workdir', 'files', 'by_position'],
  'generate': ['workdir', 'prompts'],
  'verify': ['workdir'],
  'drill': ['workdir'],
  'transition_tuning': ['from', 'workdir'],
  'reroute': ['runs', 'output'],
  'drops': ['workdir', 'output'],
  'privacy': ['runs', 'output'],
  'compare': ['runs', 'output'],
  'passports': ['workdir', 'output'],
  'tokenize': ['output'],
  'tokenizer': ['output'],
  'aot': ['json'],
  'preflight': [],
  'convert to_safetensors': ['workdir', 'output'],
  'convert from_safetensors': ['input', 'workdir'],
  'convert to_hf': ['workdir', 'output'],
  'convert from_hf': ['model', 'workdir'],
  'scaling_laws plan': ['coefficients', 'runtime', 'chart'],
  'scaling_laws grid': ['coefficients', 'output'],
  'scaling_laws run': ['grid'],  # its workdir may be another machine's
  'scaling_laws fit': ['output'],
  'scaling_laws judge': ['predictions', 'page'],
  'reproduce moe_mamba': ['workdir'],
  'reproduce mot': ['workdir'],
  'reproduce fine_grained': ['workdir'],
  'replay': ['workdir'],
  'sweep': [],  # its workdir may be another machine's
  'transfer check': ['output'],
  'transfer sweep': ['workdir'],
  'scaling_laws plot': ['coefficients', 'runs', 'output'],
}


def test_every_program_has_help_and_refuses_other_urls(go):
  for program, paths in PATHS.items():
    code, output = go(*program.split(), '--help')
    assert code == 0 and f'python -m moejax.{program} ' in output, f'{program}: {output}'
    assert all(f'--{name}: ' in output for name in paths), f'{program}: {output}'
    assert output.count('--config.SECTION.FIELD=VALUE: ') <= 1, program
    for name in paths:
      others = [f'--{other}=x' for other in paths if other != name]
      code, output = go(*program.split(), *others, f'--{name}=az://bucket/x')
      assert code == 2 and 'expected a local path' in output, f'{program}: {output}'
  code, output = go('scaling_laws', '--help')
  assert code == 0 and re.search('^  fit +Fits a law to runs.$', output, re.M)
  code, output = go('evaluate', '--help')
  assert '--workdir: Folder of the run to evaluate. Required.\n' in output
  assert output.index('--batches: ') < output.index('--process_id: ')
  code, output = go('evaluate')
  assert code == 2 and output.startswith('error: --workdir is required: Folder of the run')


MAMBA = ['--config=configs/mamba.py:debug,hf', '--config.train.steps=1', '--workdir=runs/model']


def test_the_commands_of_the_pages_run_one_after_the_other(go):
  for words in (['main', *MAMBA], ['convert', 'to_hf', '--workdir=runs/model', '--output=FOLDER']):
    code, output = go(*words)
    assert code == 0, output
  done = set()
  for page in commands.PAGES:
    for words in commands.of(page):
      if words[0] not in OTHERS and str(words) not in done:
        done.add(str(words))
        code, output = _do(go, words)
        assert code == 0, f'{page.name}: {shlex.join(words)}\n{output}'
    for text, is_commands in commands.blocks(page):
      for line in text.splitlines() if text.startswith('--config.') else ():
        words = ['--config=configs/mot.py', *shlex.split(line, comments=True), '--print_config']
        code, output = go('main', *words)
        assert code == 0, f'{page.name}: {line}\n{output}'
      assert is_commands or 'python -m moejax' not in text.partition('\n')[2], text


def _do(go, words):
  """Does what words of a page say, or as much of it as can be done here."""
  program, *arguments = words
  if program == 'make':
    return _finished(['make', '--dry-run', *arguments])
  if program == 'launch/tpu_run.sh':
    return _finished([ROOT / program, *arguments, '--dry_run', '--estimate'])
  assert program == 'python', words
  if arguments[1] in ('venv', 'moejax.eval_harness'):
    return 0, ''  # benchmarks are downloaded; tests/eval_harness_test.py has one of its own
  if any(re.search(expression, shlex.join(words)) for expression in UNAFFORDABLE):
    arguments.append('--only_check_args')
  elif arguments[1] != 'moejax.preflight':  # which trains nothing
    arguments = _smaller(arguments)
  return go(*arguments[1:])


def _finished(command, **options):
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
  return done.returncode, done.stdout + done.stderr


def test_the_first_commands_of_the_readme(tmp_path):
  """At their own sizes, by programs of their own; only training is cut short."""
  words = [words for words in commands.of(README) if words[0] == 'python'][:3]
  assert [w[2] for w in words] == ['moejax.main', 'moejax.evaluate', 'moejax.generate']
  words[0] += ['--config.train.steps=1', *SMALLER['moejax.main']]
  for _, *arguments in words:
    arguments = [a.replace('=runs/', f'={tmp_path}/') for a in arguments]
    code, output = _finished([sys.executable, *arguments])
    assert code == 0, output
  assert 'def ' in output and '-' * 40 in output
  assert 'exceed the context of 64' in output


def test_the_site_has_every_page():
  pages = {str(page.relative_to(DOCS)) for page in DOCS.glob('**/*.md')}
  listed = re.findall(r'[\w/]+\.md', (ROOT / 'mkdocs.yml').read_text())
  assert sorted(listed) == sorted(pages)


def test_links_between_pages_lead_somewhere():
  for page in [README, *DOCS.glob('**/*.md')]:
    for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
      path, _, anchor = target.partition('#')
      if '://' in target or not path:
        continue
      assert (page.parent / path).exists(), f'{page.name}: {target}'
      if anchor and path.endswith('.md'):
        headings = re.findall(r'^#+ (.*)', (page.parent / path).read_text(), re.M)
        slugs = [re.sub(r'[^\w -]', '', h).strip().lower().replace(' ', '-') for h in headings]
        assert anchor in slugs, f'{page.name}: {target}'


@pytest.mark.parametrize('page', ['reliability.md', 'security.md'])
def test_the_tests_that_a_page_names_exist(page):
  """`file_test.py`: `test_one`, `test_the_beginning_of_several_…`."""
  file = None
  for name in re.findall(r'`([\w/]+_test\.py|test_\w+…?)`', (DOCS / page).read_text()):
    if name.endswith('.py'):
      (file,) = [*(ROOT / 'tests').glob(f'**/{name}')]
    else:
      assert file and re.search(rf'^def {name.rstrip("…")}', file.read_text(), re.M), name
