"""The notebooks run from top to bottom, and are what their sources say."""

import re
import subprocess
import sys
import types

import pytest

nbclient = pytest.importorskip('nbclient')
pytest.importorskip('jupytext')

from notebooks import build  # noqa: E402

# Sizes at which a notebook takes seconds on a CPU, in place of those in its cell `parameters`.
SMALL = {
  'follow_a_batch': {},
  'train_and_sample': {
    'STEPS': 4,
    'D_MODEL': 16,
    'BLOCKS': 2,
    'BATCH': 16,
    'CONTEXT': 32,
    'SAMPLE': 8,
  },
  'scaling_laws': {'STEPS': 2, 'D_MODEL': 16, 'STARTS': 2, 'SAMPLES': 2},
}


@pytest.mark.parametrize('source', build.SOURCES, ids=lambda source: source.stem)
def test_the_notebook_is_made_from_its_source(source):
  assert source.with_suffix('.ipynb').read_text() == build.text(source), 'run make notebooks'


@pytest.mark.parametrize('source', build.SOURCES, ids=lambda source: source.stem)
def test_the_notebooks_begin_alike(source):
  _, install = build.notebook(source).cells[:2]
  _, expected = build.notebook(build.SOURCES[0]).cells[:2]
  assert install.source == expected.source


@pytest.mark.heavy
@pytest.mark.parametrize('name', SMALL)
@pytest.mark.filterwarnings('default')  # of the client's own dependencies
def test_a_notebook_runs(name, tmp_path, monkeypatch):
  monkeypatch.setenv('PYDEVD_DISABLE_FILE_VALIDATION', '1')
  book = build.notebook(build.FOLDER / f'{name}.py')
  values = SMALL[name] | {'FOLDER': str(tmp_path / 'runs')}
  for cell in book.cells:
    if 'parameters' in cell.metadata.get('tags', ()):
      for field, value in values.items():
        cell.source, number = re.subn(rf'(?m)^{field} = .*', f'{field} = {value!r}', cell.source)
        assert number == 1, field
  resources = {'metadata': {'path': str(build.FOLDER)}}
  nbclient.NotebookClient(book, timeout=300, kernel_name='python3', resources=resources).execute()
  drawn = [
    o for cell in book.cells for o in cell.get('outputs', ()) if 'image/png' in o.get('data', {})
  ]
  assert drawn


@pytest.mark.parametrize('devices, extra', [(['/dev/vfio/0'], '[tpu]'), ([], '')])
def test_the_first_cell_installs_in_colab_before_jax(devices, extra, monkeypatch):
  _, install = build.notebook(build.SOURCES[0]).cells[:2]
  commands = []
  monkeypatch.setitem(sys.modules, 'google.colab', types.ModuleType('google.colab'))
  monkeypatch.setattr('glob.glob', lambda pattern: [d for d in devices if 'vfio' in pattern])
  monkeypatch.setattr(subprocess, 'run', lambda command, check: commands.append(command))
  exec(install.source.replace('OWNER', 'me'), {})
  assert commands == [
    [sys.executable, '-m', 'pip', 'install', '--quiet']
    + [f'moejax{extra} @ git+https://github.com/me/moejax']
  ]
