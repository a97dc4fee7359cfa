"""The ledger of dropped tokens: what it counts, what it costs, and what it says."""

import csv
import math

import jax
import pytest

from configs import dense, fine_grained, moe
from moejax import config as config_lib, data, drops, evaluate, model as model_lib, sharding


def _run(module, **fields):
  config = module.get_config('debug')
  config.data.update({'batch_size': 16, 'sequence_length': 16})
  config.update_from_flattened_dict(fields)
  run_config = config_lib.resolve(config)
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=-1, expert=1, tensor=1))
  params = jax.jit(model_lib.init_params, static_argnums=0)(run_config.model, jax.random.key(0))
  return run_config, params, mesh


@pytest.fixture(scope='module')
def ledger():
  """Of random parameters, and what `evaluate` says of them."""
  run = _run(moe, **{'model.moe.capacity_factor': 0.75})
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(drops, 'FACTORS', (0.001, 100.0))
    found = drops.measure(*run, num_batches=2)
  loader = data.make_loader(run[0].data, 'validation')
  with jax.set_mesh(run[2]):
    return found, *evaluate.evaluate(run[0].model, run[1], loader, 2, run[2])


@pytest.mark.heavy
def test_drops_and_losses_are_those_of_an_evaluation(ledger):
  found, result, aux = ledger
  own, all_fit = found.points  # a factor with which experts have no slot is left out
  assert (own.factor, all_fit.factor) == (0.75, 100.0)
  assert own.loss == pytest.approx(result['loss'], abs=1e-5)
  assert found.dropless == pytest.approx(result['loss_dropless'], abs=1e-5)
  assert own.cost == pytest.approx(own.loss - found.dropless, abs=1e-6) and own.cost_error > 0
  assert all_fit.dropped == 0 and all_fit.cost == pytest.approx(0, abs=1e-6)
  by_layer = [row.dropped for row in found.rows if row.by == 'layer']
  assert by_layer == pytest.approx(aux['moe/dropped'].tolist(), abs=1e-6)
  assert own.dropped == pytest.approx(sum(by_layer) / len(by_layer), abs=1e-6) and own.dropped > 0.1
  assert abs(found.random - found.dropless) > 1e-6 and drops._RANDOM not in drops.moe.ROUTERS


@pytest.mark.heavy
def test_every_token_is_in_one_class_of_each_kind(ledger):
  found, result, _ = ledger
  kinds = {row.by for row in found.rows} - {'layer'}
  assert len(kinds) == 4
  for by in kinds:
    rows = [row for row in found.rows if row.by == by]
    assert sum(row.share for row in rows) == pytest.approx(1)
    mean = lambda name, rows=rows: sum(row.share * getattr(row, name) for row in rows)
    assert mean('dropped') == pytest.approx(found.points[0].dropped, abs=1e-6)
    assert mean('loss') == pytest.approx(result['loss'], abs=1e-5)
    assert mean('loss_without') == pytest.approx(result['loss_dropless'], abs=1e-5)
  by_name = {(row.by, row.tokens): row for row in found.rows}
  # Earlier tokens are served first.
  assert by_name['position', '0'].dropped < by_name['position', '8 to 15'].dropped
  assert by_name['layers that dropped it', '0'].dropped == 0


@pytest.mark.heavy
def test_tables_and_plots(ledger, tmp_path):
  found = ledger[0]
  drops.write(found, tmp_path)
  rows = list(csv.DictReader((tmp_path / 'tokens.csv').read_text().splitlines()))
  assert len(rows) == len(found.rows) and float(rows[0]['dropped']) == found.rows[0].dropped
  assert all((tmp_path / f'{name}.png').stat().st_size > 8_000 for name in ('capacity', 'tokens'))
  shown = drops.tables(found, math.inf)
  assert 'Capacity factor 0.75 is the smallest one' in shown and 'chosen at random' in shown
  assert 'No capacity factor here is' in drops.tables(found, -math.inf)


@pytest.mark.parametrize(
  ('module', 'fields'), [(dense, {}), (fine_grained, {}), (moe, {'model.moe.router': 'relu'})]
)
def test_models_that_drop_no_token_are_refused(module, fields):
  with pytest.raises(ValueError, match='layers that can drop tokens'):
    drops.measure(*_run(module, **fields))


@pytest.mark.parametrize(
  ('piece', 'kind'),
  [(' the', 'letters'), ('é', 'letters'), ('42', 'digits'), (' (', 'punctuation'), ('  ', 'space')]
  + [('\n  ', 'end of line'), ('', 'other'), ('\ufffd', 'other'), ('\x00', 'other')],
)
def test_kinds_of_text(piece, kind):
  assert drops._kind(piece) == kind
