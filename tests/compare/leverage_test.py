"""Efficiency leverage: the FLOPs of dense with the loss of a sparse model over its own."""

import re

import pytest

from moejax import compare
from tests.compare.compare_test import _run, _seeds

DENSE = ((('attention', 'mlp'), 2),)
SPARSE = ((('attention', 'moe'), 2),)


def _leverages(folders):
  lines = compare.notes(compare.read(folders)).splitlines()
  return [line for line in lines if line.startswith('efficiency leverage')]


def _dense(tmp_path, number=2):
  steps_and_losses = ((20, 2.0), (40, 1.5), (80, 1.2))[:number]
  for steps, loss in steps_and_losses:
    _run(
      tmp_path / f'dense{steps}', loss=loss, config={'model.blocks': DENSE, 'train.steps': steps}
    )
  return [tmp_path / f'dense{steps}' for steps, _ in steps_and_losses]


def test_between_dense_runs(tmp_path):
  sparse = tmp_path / 'sparse'
  _run(sparse, loss=1.75, config={'model.blocks': SPARSE, 'train.steps': 20})
  (line,) = _leverages([*_dense(tmp_path), sparse])
  assert line.startswith('efficiency leverage of sparse: 1.41, ')  # halfway to twice the FLOPs


def test_a_dense_model_in_parallel_is_dense(tmp_path):
  parallel = tmp_path / 'parallel'
  _run(parallel, loss=1.75, config={'model.blocks': ((('attention+mlp',), 2),)})
  assert not _leverages([*_dense(tmp_path), parallel])


@pytest.mark.parametrize(('number', 'loss'), [(2, 1.4), (2, 2.1), (1, 1.75), (0, 1.75)])
def test_not_beyond_what_was_measured(tmp_path, number, loss):
  _run(tmp_path / 'sparse', loss=loss, config={'model.blocks': SPARSE})
  assert not _leverages([*_dense(tmp_path, number), tmp_path / 'sparse'])


def test_it_has_an_interval_over_seeds(tmp_path):
  folders = []
  for name, blocks, steps, loss in (
    ('dense', DENSE, 20, 2.0),
    ('longer', DENSE, 40, 1.5),
    ('sparse', SPARSE, 20, 1.75),
  ):
    config = {'model.blocks': blocks, 'train.steps': steps}
    folders += _seeds(tmp_path / name, [loss - 0.02, loss, loss + 0.02], config)
  (line,) = _leverages(folders)
  value, low, high = map(float, re.findall(r'(?<=[ (])\d\.\d\d', line))
  assert value == 1.41 and 1.2 < low < 1.38 and 1.45 < high < 1.7
