"""The same experts under other routers: what is kept, what is measured, and what repairs it."""

import csv
import itertools

import jax
import numpy as np
import pytest

from configs import dense, fine_grained, moe, mot
from moejax import (
  cli,
  config as config_lib,
  evaluate,
  flops,
  model as model_lib,
  reroute,
  run_folder,
  same_experts,
  train,
)
from moejax.same_experts import ROUTERS


def _params(config):
  return jax.jit(model_lib.init_params, static_argnums=0)(config.model, jax.random.key(0))


def _rerouted(config, router):
  config = config.copy_and_resolve_references()
  same_experts.with_router(config, router)
  return config


@pytest.mark.parametrize(
  ('module', 'router'),
  [*itertools.product([mot, moe], ROUTERS), (fine_grained, 'token_choice')],
)
def test_every_router_has_the_same_experts_and_flops(module, router):
  config = module.get_config('debug')
  before, changed = config_lib.resolve(config), _rerouted(config, router)
  assert same_experts.router_of(changed) == router
  after = config_lib.resolve(changed)
  a, b = (flops.training_flops_per_token(c.model, 64)['model'] for c in (before, after))
  assert a == pytest.approx(b, rel=1e-9)
  params = _params(before)
  there = same_experts.convert(
    {'params': params}, {'params': jax.eval_shape(lambda: _params(after))}
  )
  back = same_experts.convert(there, {'params': params})['params']
  jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize(
  ('module', 'changes', 'router', 'message'),
  [
    (dense, {}, 'mot', 'expected a model with mot layers or with moe layers'),
    (moe, {'moe.shared_width': 8}, 'mot', 'Mixture-of-Tokens layer has no model.moe.shared_width'),
    (moe, {'moe.scores': 'sigmoid'}, 'discrete', 'has no model.moe.scores = sigmoid'),
    (
      moe,
      {'moe.experts_per_token': 3},
      'mot',
      '3 of 4 experts per token are the FLOPs of no whole',
    ),
    (moe, {'moe.router': 'relu'}, 'mot', 'experts of model.moe.router = relu fit no other router'),
    (mot, {'mot.emit': 'raw'}, 'token_choice', 'sparse layer has no model.mot.emit = raw'),
  ],
)
def test_experts_that_no_such_layer_has_are_named(module, changes, router, message):
  config = module.get_config('debug')
  config.model.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    same_experts.with_router(config, router)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Two runs of 2 steps, Mixture of Tokens and token choice."""
  folder = tmp_path_factory.mktemp('runs')
  for module in (mot, moe):
    config = module.get_config('debug')
    config.mesh.update({'data': 1, 'tensor': -1})
    config.model.num_heads = 8
    config.train.update({'steps': 2, 'sample_length': 0})
    config.data.batch_size = 32
    assert train.train(config, folder / module.__name__.split('.')[-1]) == cli.OK
  return folder


@pytest.mark.heavy
def test_losses_under_other_routers(runs):
  for name, own in (('mot', 'mot'), ('moe', 'token_choice')):
    cells = {cell.router: cell for cell in reroute.measure(runs / name, ROUTERS, 1)}
    assert list(cells) == list(ROUTERS) and {cell.trained for cell in cells.values()} == {own}
    assert len({round(cell.loss, 6) for cell in cells.values()}) == len(ROUTERS)
    run_config, _, params, mesh = run_folder.load_run(runs / name)
    (row,) = evaluate.compare_modes(run_config, params, mesh, ['mixed'], [0], 1)
    loss = row.get('loss_dropless', row['loss'])
    assert cells[own].loss == pytest.approx(loss, abs=1e-6)


@pytest.mark.heavy
def test_training_further_repairs_a_switch(runs, tmp_path, capsys):
  own, other = reroute.measure(runs / 'mot', ['mot', 'token_choice'], 2)
  repaired = [reroute.repair(runs / 'mot', cell, tmp_path, 4) for cell in (own, other)]
  cells = [cell for cell in repaired if cell]  # none was interrupted
  assert [cell.steps for cell in cells] == [4, 4]
  for cell in cells:
    assert cell.after < cell.at
  assert cells[0].repaired == 0  # nothing was switched
  reroute.write(cells, tmp_path)
  rows = list(csv.DictReader((tmp_path / 'reroute.csv').read_text().splitlines()))
  assert [row['router'] for row in rows] == ['mot', 'token_choice']
  assert all((tmp_path / f'{name}.png').stat().st_size > 10_000 for name in ('matrix', 'reroute'))
  shown = reroute.tables(cells)
  assert 'after 4 steps of training' in shown and '0 steps' in shown
