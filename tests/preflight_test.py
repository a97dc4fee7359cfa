"""What is checked here before another machine costs anything."""

import concurrent.futures
import multiprocessing
import os

import pytest

from tests import programs

pytestmark = pytest.mark.heavy

IN_A_BUCKET = [
  '--config.data.tokenizer=gpt2:gs://bucket/gpt2',
  '--config.data.tfds_data_dir=gs://bucket/tfds',
]


@pytest.fixture(scope='module')
def preflight(tmp_path_factory):
  """`preflight(*flags)` in a git repository that ignores runs/: the exit code, and the output."""
  folder = tmp_path_factory.mktemp('home')
  os.system(f'git init --quiet {folder}')
  (folder / '.gitignore').write_text('runs/')
  (folder / 'runs').mkdir()
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, context) as pool:

    def run(*flags):
      return pool.submit(programs.run, 'preflight', ['--estimate', *flags], folder).result()

    yield run


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--topology=v5litepod-17'], "no such v5e; did you mean 'v5litepod-1"),
    (['--topology=tpu7x-8'], 'on GKE only'),
    (['--topology=v5e-16', '--config=configs/mot.py:bsae'], "did you mean 'base'?"),
    (
      ['--topology=v5e-16', '--config=configs/mot.py:base'],
      'no gpt2/vocab.json and no gpt2/merges',
    ),
    (['--topology=v5e-16', '--config=configs/mot.py:base'], 'no prepared copy of C4'),
    (['--topology=v5e-16', '--config.data.files=no/*.txt'], 'there is no no/*.txt here'),
    (['--topology=v5e-16', '--config.data.files=runs'], 'git ignores it'),
    (['--topology=v5e-16', '--config.data.files=gs://b/x'], "data.source='stdlib' reads no files"),
    (['--topology=v5e-16', '--config.mesh.data=3'], 'does not fit 16 devices'),
    (
      ['--topology=v5e-4', '--config=configs/fine_grained.py:1B', *IN_A_BUCKET],
      'does not fit on v5e:2x2: expert 4; about 208 GiB of 16 GiB',
    ),
  ],
)
def test_mistakes_are_found(preflight, flags, message):
  code, output = preflight(*flags)
  assert code == 2 and message in output and 'Traceback' not in output
  assert 'error: ' in output


def test_what_can_run(preflight):
  code, output = preflight('--topology=v5e:4x4', '--config=configs/mot.py:base', *IN_A_BUCKET)
  assert code == 0 and 'v5e:4x4: expert 16; about 1.' in output
  assert output.splitlines()[-1] == 'v5litepod-16 v2-alpha-tpuv5-lite'
  code, output = preflight('--topology=v3-8', '--config=configs/mot.py')
  assert code == 0 and 'memory is not checked' in output
  code, output = preflight(
    '--topology=v5e-8',
    '--config=configs/mot.py',
    '--config.data.tokenizer=gs://bucket/tokenizer.json',
  )
  assert code == 0 and 'set model.vocab_size' in output
