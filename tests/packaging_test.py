"""What is installed: one package, which includes the config files and needs no checkout."""

import ast
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib

import pytest
from packaging import requirements, utils

import moejax

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
EXTRAS = PROJECT['optional-dependencies']


def _run(*command, **options):
  done = subprocess.run(command, capture_output=True, text=True, **options)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def _build(kind, source, target):
  """The one file that setuptools makes of a source tree."""
  target.mkdir()
  code = f'from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})'
  _run(sys.executable, '-W', 'ignore', '-c', code, cwd=source)
  (built,) = target.iterdir()
  return built


@pytest.fixture(scope='module')
def checkout():
  """Names of the files of the checkout, but for those that only its host reads."""
  if not (ROOT / '.git').exists():
    pytest.skip('not a checkout')
  listed = _run('git', 'ls-files', '--cached', '--others', '--exclude-standard', cwd=ROOT)
  names = [name for name in listed.splitlines() if (ROOT / name).is_file()]
  return {name for name in names if not name.startswith('.')}


@pytest.fixture(scope='module')
def source(checkout, tmp_path_factory):
  """The unpacked source distribution of a clean checkout."""
  folder = tmp_path_factory.mktemp('source')
  for name in checkout:
    (folder / 'checkout' / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / name, folder / 'checkout' / name)
  built = _build('sdist', folder / 'checkout', folder / 'built')
  with tarfile.open(built) as archive:
    archive.extractall(folder, filter='data')
  return folder / f'moejax-{moejax.__version__}'


@pytest.fixture(scope='module')
def installed(source, tmp_path_factory):
  """A folder like site-packages with the wheel that is built from the source distribution."""
  wheel = _build('wheel', source, tmp_path_factory.mktemp('wheel') / 'built')
  folder = tmp_path_factory.mktemp('installed')
  pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check', 'install']
  _run(*pip, '--no-deps', '--no-index', f'--target={folder}', str(wheel))
  return folder


@pytest.fixture
def main(installed, tmp_path):
  """`main(*args)` runs the installed program in a folder with another package named configs."""
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / '__init__.py').write_text('')
  environment = {**os.environ, 'PYTHONPATH': str(installed)}

  def run(*args):
    command = [sys.executable, '-m', 'moejax.main', *args]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

  return run


@pytest.mark.heavy
def test_the_source_distribution_is_the_checkout(source, checkout):
  unpacked = {str(path.relative_to(source)) for path in source.rglob('*') if path.is_file()}
  made = {name for name in unpacked if name in ('PKG-INFO', 'setup.cfg') or '.egg-info/' in name}
  assert unpacked - made == checkout, 'MANIFEST.in lists what it includes'


@pytest.mark.heavy
def test_one_package_is_installed(installed, checkout):
  folders = {path.name for path in installed.iterdir()}
  assert folders == {'bin', 'moejax', f'moejax-{moejax.__version__}.dist-info'}
  files = {str(path.relative_to(installed)) for path in (installed / 'moejax').rglob('*.py')}
  sources = {re.sub('^configs/', 'moejax/configs/', name) for name in checkout}
  assert files == {name for name in sources if re.match(r'moejax/.*\.py$', name)}


@pytest.mark.heavy
def test_metadata(installed):
  (distribution,) = importlib.metadata.distributions(path=[str(installed)])
  assert distribution.version == moejax.__version__
  assert distribution.metadata['License-Expression'] == 'Apache-2.0'
  assert distribution.metadata.get_payload().startswith('# moejax')
  assert any(file.name == 'LICENSE' for file in distribution.files)


@pytest.mark.heavy
def test_the_installed_program_trains_without_a_checkout(main, tmp_path):
  done = main('--config=configs/mot.py:debug', '--workdir=run', '--config.train.steps=2')
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'run' / 'summary.json').exists()


@pytest.mark.heavy
def test_installed_bundled_configs_are_found(main, installed, tmp_path):
  printed = main('--config=mot.py:mini', '--print_config')
  assert printed.returncode == 0 and 'd_model: 256' in printed.stdout, printed.stderr
  (tmp_path / 'elsewhere').mkdir()
  environment = {**os.environ, 'PYTHONPATH': str(installed)}
  program = [sys.executable, str(installed / 'bin' / 'moejax')]
  flags = ['--config=configs/mot.py:mini', '--print_config']
  assert 'd_model: 256' in _run(*program, *flags, cwd=tmp_path / 'elsewhere', env=environment)


@pytest.mark.heavy
def test_a_file_of_that_name_elsewhere_is_not_the_bundled_one(main):
  failed = main('--config=my/mot.py', '--print_config')
  assert failed.returncode == 2 and '--config=my/mot.py: no such file' in failed.stderr


@pytest.mark.heavy
def test_a_users_own_file_needs_the_package_only(main, tmp_path):
  mine = tmp_path / 'mine.py'
  mine.write_text(
    'from moejax import config\n\n\ndef get_config():\n'
    '  c = config.baseline()\n  c.model.d_ff = 123\n  return c\n'
  )
  printed = main('--config=mine.py', '--print_config')
  assert printed.returncode == 0 and 'd_ff: 123' in printed.stdout, printed.stderr
  mine.write_text('from configs import older\n')
  failed = main('--config=mine.py')
  assert failed.returncode == 2 and failed.stderr.count('\n') == 1
  assert failed.stderr.startswith("error: --config: cannot import name 'older' from 'configs'")
  assert failed.stderr.endswith('; what config files share is in moejax.variants.\n')
  mine.write_text('')
  failed = main('--config=mine.py')
  assert failed.returncode == 2
  assert failed.stderr.startswith('error: --config: the file must have a function get_config')


def _names(needed):
  return {requirements.Requirement(one).name for one in needed}


def test_the_core_needs_no_tensorflow():
  tensorflow, core = _names(EXTRAS['seqio']), _names(PROJECT['dependencies'])
  assert tensorflow == {'seqio', 'tensorflow', 'tensorflow-datasets'}
  assert 'tokenizers' in core and not tensorflow & core


def _imported(source):
  """Names of the packages that source code imports, anywhere."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (alias.name.partition('.')[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module.partition('.')[0]


def test_what_is_imported_is_a_dependency_or_an_error_names_its_extra():
  core = set(map(utils.canonicalize_name, _names(PROJECT['dependencies'])))
  installed = importlib.metadata.packages_distributions()
  for path in (ROOT / 'moejax').rglob('*.py'):
    for name in {*_imported(path.read_text())} - sys.stdlib_module_names - {'moejax'}:
      if core.isdisjoint(map(utils.canonicalize_name, installed.get(name, []))):
        assert 'moejax[' in path.read_text(), f'{path} imports {name}'


def _pinned(name):
  """Requirements of a file of constraints/, by the name of their package."""
  lines = (ROOT / 'constraints' / f'{name}.txt').read_text().splitlines()
  pins = [requirements.Requirement(line) for line in lines if not line.lstrip().startswith('#')]
  return {pin.name: [p for p in pins if p.name == pin.name] for pin in pins}


def test_the_versions_that_were_tested_are_allowed_and_the_oldest_are_the_lower_bounds():
  newest, oldest = _pinned('newest'), _pinned('oldest')
  for needed in map(requirements.Requirement, PROJECT['dependencies'] + EXTRAS['test-core']):
    (low,) = oldest[utils.canonicalize_name(needed.name)]
    for pin in (low, *newest[utils.canonicalize_name(needed.name)]):
      (exact,) = pin.specifier
      assert needed.specifier.contains(exact.version), f'{needed}: {pin}'
    (bound,) = [one.version for one in needed.specifier if one.operator == '>=']
    (exact,) = low.specifier
    assert exact.version.startswith(bound), f'{needed}: constraints/oldest.txt has {low}'


def test_the_page_lists_the_versions_that_were_tested():
  page = (ROOT / 'docs' / 'installation.md').read_text()
  header, _, *rows = re.findall(r'^\|(.*)\|$', page.partition('## Versions')[2], re.MULTILINE)
  columns = [column.strip() for column in header.split('|')]
  assert len(rows) == 3
  for row in rows:
    versions = dict(zip(columns, [cell.strip() for cell in row.split('|')], strict=True))
    pins = _pinned(versions.pop('').split()[0])
    python = {'python_full_version': f'{versions.pop("Python")}.0'}
    assert versions.pop('command').strip('`').split()[0] == 'make'
    for name, version in versions.items():
      (pin,) = [p for p in pins[name] if p.marker is None or p.marker.evaluate(python)]
      assert str(pin.specifier) == f'=={version}', f'{row}: constraints have {pin}'


def test_extras_that_messages_and_pages_name_exist():
  places = ROOT / 'README.md', *(ROOT / 'launch').iterdir(), *(ROOT / 'moejax').rglob('*.py')
  for path in (*places, *(ROOT / 'docs').rglob('*.md')):
    for extras in re.findall(r"(?:moejax|'\.|CODE\})\[([\w,-]+)\]", path.read_text()):
      assert set(extras.split(',')) <= EXTRAS.keys(), f'{path}: [{extras}]'
