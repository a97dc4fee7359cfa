"""Every test runs on 8 simulated CPU devices, with JAX at its strictest.

Programs are compiled once and less optimized: the numbers differ by a few 1e-7, and compiling, most
of what tests cost, takes an eighth of the time. `XLA_FLAGS= pytest` compiles as users do.
"""

import collections
import gc
import importlib.metadata
import os
import pathlib

_ROOT = pathlib.Path(__file__).parent.parent

# In the environment, so that programs started by a test have them too. Before JAX is imported.
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('WANDB_MODE', 'offline')  # nothing is uploaded
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_ROOT / '.jax_cache'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
_QUICKLY = ['--xla_backend_optimization_level=0']
if importlib.metadata.version('jax').startswith(('0.7.', '0.8.', '0.9.', '0.10.')):
  _QUICKLY.append('--xla_cpu_use_fusion_emitters=false')  # gone since, with what it turned off
if os.environ['JAX_PLATFORMS'] == 'cpu':
  os.environ.setdefault('XLA_FLAGS', ' '.join(_QUICKLY))

import jax  # noqa: E402
import pytest  # noqa: E402

from tests import goldens  # noqa: E402

gc.set_threshold(20_000)  # as programs have it
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_addoption(parser):
  parser.addoption(
    '--update-golden', action='store_true', help='record the numbers of tests/golden/ anew'
  )


def pytest_collection_modifyitems(items):
  """Files with the most heavy tests come first, so that none is left to one worker at the end."""
  heavy = collections.Counter(item.path for item in items if item.get_closest_marker('heavy'))
  items.sort(key=lambda item: -heavy[item.path])


def pytest_runtest_setup(item):
  for platform in ('gpu', 'tpu'):
    if item.get_closest_marker(platform) and jax.default_backend() != platform:
      pytest.skip(f'needs a {platform.upper()}; set JAX_PLATFORMS where there is one')


@pytest.fixture(scope='module', autouse=True)
def _forget_programs():
  """Thousands of compiled programs would take all 65,530 memory maps that Linux gives a process."""
  yield
  jax.clear_caches()


@pytest.fixture
def key():
  return jax.random.key(0)


@pytest.fixture
def x64():
  """Makes float64 available to one test."""
  jax.config.update('jax_enable_x64', True)
  yield
  jax.config.update('jax_enable_x64', False)


@pytest.fixture
def golden(request):
  """`golden(name, numbers, rtol=...)` compares nested numbers with tests/golden/NAME.json."""
  return goldens.Goldens(
    _ROOT / 'tests' / 'golden', update=request.config.getoption('--update-golden')
  )


@pytest.fixture(scope='session')
def texts(tmp_path_factory):
  """A pattern of small files, which a tiny model learns in 90 steps."""
  folder = tmp_path_factory.mktemp('texts')
  for i in range(30):
    (folder / f'{i}.txt').write_text(f'text {i}, of a few words\n' * 20)
  return f'{folder}/*.txt'
