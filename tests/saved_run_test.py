"""A run that the first version saved before its last step still opens, and goes on to the same end.

tests/data/saved_run holds what that version wrote: the debug size of configs/mot.py with two blocks
and 8 sequences, stopped at step 4 of 6.
"""

import pathlib
import shutil

import numpy as np
import pytest

from moejax import cli, evaluate, generate, metrics, run_folder, train

SAVED = pathlib.Path(__file__).parent / 'data' / 'saved_run'
WORDS = ('the', 'of', 'mixture', 'tokens', 'expert', 'router', 'and', 'a')
# What the version that saved it came to at step 6.
LOSS, GRAD_NORM = 5.156724135080974, 2.197900374730428
VALIDATION_LOSS = 4.770272731781006  # in the order in which validation visits its split now


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """The text of the run: 12 files, as a pattern."""
  folder = tmp_path_factory.mktemp('texts')
  for i in range(12):
    lines = (' '.join(WORDS[(i + j * k) % 8] for k in range(1, 9)) for j in range(40))
    (folder / f'{i:02d}.txt').write_text('\n'.join(lines) + '\n')
  return f'{folder}/*.txt'


def test_it_opens_evaluates_and_generates(files):
  run_config, step, params, mesh = run_folder.load_run(SAVED, {'data.files': files})
  assert step == 4
  (row,) = evaluate.compare_modes(run_config, params, mesh, ['mixed'], [0], 1)
  assert 4 < row['loss'] < 6 and row['tokens'] == 8 * 32
  text, again = generate.continuations(
    run_config.model, params, run_config.tokenizer, ['the '] * 2, 8
  )
  assert isinstance(text, str) and isinstance(again, str)


def test_it_goes_on_to_the_same_numbers(files, tmp_path):
  run = shutil.copytree(SAVED, tmp_path / 'run')
  config = run_folder.read(run)
  config.data.files = files
  config.mesh.update({'data': 4, 'tensor': 2})  # the 8 devices of the tests, for 4 sequences
  assert train.train(config, run) == cli.OK
  (_, first), (step, loss) = metrics.loss_curve(run)
  assert step == 6 and first == 6.118653456370036  # the line that was there
  np.testing.assert_allclose(loss, LOSS, rtol=1e-6)  # steps 4 to 6: totals were taken up
  np.testing.assert_allclose(metrics.loss_curve(run, 'grad_norm')[-1][1], GRAD_NORM, rtol=1e-5)
  validation = metrics.loss_curve(run, 'validation/loss')[-1]
  np.testing.assert_allclose(validation, (6, VALIDATION_LOSS), rtol=1e-6)
