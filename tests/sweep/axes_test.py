"""The syntax of a sweep, its cells, and what is refused before anything is trained."""

import re

import pytest

from moejax import cli, runner
from moejax.sweep import axes
from moejax.text import split_values

pytestmark = pytest.mark.filterwarnings('ignore:the load_module')  # ml_collections calls it
DEBUG = 'configs/dense.py:debug'


def _cells(grid, zipped=(), overrides=None, config=DEBUG):
  return axes.make_cells(config, overrides or {}, axes.parse(list(grid), list(zipped)))


@pytest.mark.parametrize(
  ('text', 'values'),
  [
    ('1e-3,3e-3', ['1e-3', '3e-3']),
    ('1', ['1']),
    ("((('a','b'),2),), ((('c',),4),)", ["((('a','b'),2),)", "((('c',),4),)"]),
    ('(),(1,2)', ['()', '(1,2)']),
    ("'a,b',c", ['a,b', 'c']),
    ('"it\'s, well",\'\'', ["it's, well", '']),
    ("('a,(b',1),2", ["('a,(b',1)", '2']),
  ],
)  # fmt: skip
def test_values_are_split_outside_of_brackets_and_quotes(text, values):
  assert split_values(text) == values


def test_every_combination_of_the_grid_and_of_the_zipped_fields_together():
  cells = _cells(
    ['optimizer.peak_lr=1e-3,0.01', 'train.seed=0,1'],
    ['model.d_ff=32,64', 'optimizer.warmup_steps=2,4'],
    {'train.steps': '20'},
  )
  assert len(cells) == 8
  assert cells[1].name == 'peak_lr=0.001_seed=0_d_ff=64_warmup_steps=4'
  assert cells[1].values == {
    'optimizer.peak_lr': 0.001, 'train.seed': 0, 'model.d_ff': 64, 'optimizer.warmup_steps': 4,
  }  # fmt: skip
  assert cells[1].command == (
    'python -m moejax.main --config=configs/dense.py:debug --config.train.steps=20 '
    '--config.optimizer.peak_lr=1e-3 --config.train.seed=0 --config.model.d_ff=64 '
    '--config.optimizer.warmup_steps=4'
  )
  assert {cell.steps for cell in cells} == {20}
  assert cells[1].params > cells[0].params and cells[1].flops > cells[0].flops
  config = cli.config_of(cells[1].arguments[2:])
  assert (config.model.d_ff, config.optimizer.peak_lr, config.train.steps) == (64, 0.001, 20)


def test_tuples_and_strings_survive_a_shell():
  texts = [
    "model.blocks=((('mlp',),2),),((('attention','mlp'),1),)",
    "train.sample_prompt='a, b',c",
  ]
  cells = _cells(texts)
  assert [cell.values['model.blocks'] for cell in cells[1:3]] == [
    ((('mlp',), 2),),
    ((('attention', 'mlp'), 1),),
  ]
  assert cells[0].values['train.sample_prompt'] == 'a, b'
  for cell in cells:
    assert runner.arguments_of(cell.command) == (cell.config, cell.fields)
    assert re.fullmatch(r'[\w.+=-]+', cell.name)
  assert len({cell.name for cell in cells}) == 4


def test_fields_of_the_same_name_are_told_apart():
  assert _cells(['train.seed=0', 'data.seed=1'])[0].name == 'train.seed=0_data.seed=1'


@pytest.mark.parametrize(
  ('grid', 'zipped', 'message'),
  [
    ([], [], 'expected an axis, such as --grid'),
    (['seed=0,1'], [], "--grid seed: .* no such field; did you mean 'data.seed' or 'train.seed'?"),
    ([], ['model.d_modle=4'], "--zip model.d_modle: .*; did you mean 'model.d_model'?"),
    (['train.seed'], [], '--grid train.seed: expected values, as in FIELD=VALUE,VALUE'),
    (['train.seed='], [], 'expected values'),
    (['train.seed=,'], [], "train.seed=: train.seed must be an integer, got ''"),
    (['train.seed=0', 'train.seed=1'], [], '--grid train.seed: it is an axis already'),
    (['train.seed=0'], ['train.seed=1'], '--zip train.seed: it is an axis already'),
    ([], ['train.seed=0,1', 'model.d_ff=8'], '--zip: .*: train.seed has 2, model.d_ff has 1'),
    (['optimizer.peak_lr=1e-3,x'], [], "peak_lr=x: optimizer.peak_lr must be a finite.*, got 'x'"),
    (['data.batch_size=16,7'], [], 'data.batch_size=7: optimizer.accumulation = 2 must divide'),
    (['optimizer.peak_lr=1e-3,0.001'], [], 'peak_lr=0.001: give every value once'),
    (['train.steps=4,8'], [], '--config.train.steps: train.steps is an axis of the sweep'),
  ],
)
def test_what_is_refused(grid, zipped, message):
  with pytest.raises(ValueError, match=message):
    _cells(grid, zipped, {'train.steps': '4'})
