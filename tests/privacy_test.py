"""How much one request changes another's output: against NumPy, and where it is exactly nothing."""

import csv
import functools
import math

import jax
import numpy as np
import pytest

from configs import moe, mot
from moejax import config as config_lib, convert, evaluate, model as model_lib, privacy, sharding
from tests import tiny


@functools.cache
def _params(config):
  """Random ones, large enough for requests to matter."""
  init = functools.partial(model_lib.init_params, config, jax.random.key(0))
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype), jax.eval_shape(init)
  )


def _batches():
  batches = [tiny.batch(seed=seed) for seed in range(2)]
  for batch in batches:
    batch['counted'] = np.ones((tiny.B, tiny.L), bool)
  batches[0]['counted'][0, 7:] = False
  return batches


def _exchange(config, params, group, rank_B=None):
  """Changes by block and number of exchanged requests; the last of a group are exchanged first."""
  if rank_B is None:
    rank_B = np.arange(tiny.B) % group
  return dict(privacy.exchange(config, params, *_batches(), rank_B, group))


ALONE = {
  'dense': {'blocks': tiny.DENSE},
  'token choice without drops': {'blocks': tiny.MOE, 'moe_capacity_factor': 0.0},
}


@pytest.mark.parametrize('kind', [*ALONE, 'unmixed'])
def test_without_mixing_nobody_changes_anything(kind):
  mixed = tiny.model_config(**ALONE.get(kind, {}))
  config = evaluate.decoding(mixed, 'unmixed') if kind == 'unmixed' else mixed
  found = _exchange(config, _params(mixed), tiny.B)
  assert {number for _, number in found} == {1, 2, 4, 7}
  for (_, number), changes in found.items():
    assert not changes.nats_B.any() and not changes.flipped_B.any() and not changes.largest_B.any()
    assert changes.tokens_B.tolist() == [7, *[tiny.L] * (7 - number), *[0] * number]


@pytest.mark.parametrize('kind', ['expert choice', 'token choice'])
def test_experts_that_are_short_of_slots_let_requests_change_each_other(kind):
  config = tiny.model_config(**tiny.MODELS[kind])
  found = _exchange(config, _params(config), tiny.M)
  assert found[privacy.ALL, 3].nats_B.sum() > 1e-4


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, batch):
  return model_lib.bind(config, params).logits(batch['inputs'], tiny.tokens(batch))


def test_the_divergence_is_that_of_the_whole_model():
  config = tiny.model_config(loss_chunk=4)
  params, (batch, other) = _params(config), _batches()
  rank_B = np.array([2, 0, 3, 1, 1, 3, 0, 2])
  found = _exchange(config, params, tiny.M, rank_B)
  assert [key for key in found if key[0] == privacy.ALL] == [(privacy.ALL, n) for n in (1, 2, 3)]
  for number in (1, 2, 3):
    kept_B = rank_B < tiny.M - number
    exchanged = {name: np.where(kept_B[:, None], batch[name], other[name]) for name in batch}
    before, after = (np.asarray(_logits(config, params, b), np.float64) for b in (batch, exchanged))
    p, q = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (before, after))
    counted_BL = batch['counted'] & kept_B[:, None]
    nats_BL = (p * np.log(p / q)).sum(-1) * counted_BL
    changes = found[privacy.ALL, number]
    np.testing.assert_allclose(changes.nats_B, nats_BL.sum(1), rtol=1e-3)
    np.testing.assert_allclose(changes.largest_B, nats_BL.max(1), rtol=1e-3)
    flipped_BL = (p.argmax(-1) != q.argmax(-1)) & counted_BL
    np.testing.assert_array_equal(changes.flipped_B, flipped_BL.sum(1))
    assert (changes.nats_B[kept_B] > 0).all() and not changes.nats_B[~kept_B].any()


def test_requests_of_another_group_change_nothing():
  config = tiny.model_config(loss_chunk=4)
  found = _exchange(config, _params(config), tiny.B)  # both groups of 4 as one of 8
  assert not found[privacy.ALL, 4].nats_B.any()  # the second one
  assert found[privacy.ALL, 7].nats_B[0] > 0


def test_a_single_block_that_mixes_is_all_of_it():
  blocks = ((('attention', 'mlp'), 1), (('attention', 'mot'), 1))
  config = tiny.model_config(blocks=blocks)
  found = _exchange(config, _params(config), tiny.M)
  assert not found['0', 1].nats_B.any()
  assert found['1', 1].nats_B.sum() > 0
  for ours, whole in zip(found['1', 1], found[privacy.ALL, 1], strict=True):
    np.testing.assert_array_equal(ours, whole)


def test_devices_that_share_a_group_find_the_same():
  config = tiny.model_config(loss_chunk=4)
  params, rank_B = _params(config), np.arange(tiny.B) % tiny.M
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 4, 1, 1), jax.devices()[:4])
  with jax.set_mesh(mesh):
    batches = sharding.place_batch(_batches(), mesh)
    there = dict(privacy.exchange(config, params, *batches, rank_B, tiny.M))
  here = _exchange(config, params, tiny.M)
  for key in here:
    for a, b in zip(here[key], there[key], strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-7)


@pytest.mark.heavy
def test_runs_in_several_modes(tmp_path, texts):
  rows, notes = [], []
  for module, modes in (
    (mot, ['mixed', 'mixed_with_corpus', 'dropless']),
    (moe, ['unmixed', 'dropless']),
  ):
    config = module.get_config('debug')
    config.data.update({'source': 'text', 'files': texts, 'batch_size': 8, 'sequence_length': 16})
    config.optimizer.accumulation = 1
    run_config, name = config_lib.resolve(config), module.__name__.split('.')[-1]
    convert.write_run(config, run_config, _params(run_config.model), tmp_path / name)
    for found in privacy.measure(tmp_path / name, modes, [0], 2):
      (notes if isinstance(found, str) else rows).append(found)
  assert notes[0] == 'mot, dropless: this model drops no token.' and len(notes) == 2
  assert notes[1].startswith('moe, unmixed: mode unmixed: no layer of this model mixes')
  of = {(r.run, r.mode): r for r in rows if r.block == privacy.ALL and r.exchanged == 1}
  assert list(of) == [('mot', 'mixed'), ('mot', 'mixed_with_corpus'), ('moe', 'dropless')]
  assert [row.nats > 0 for row in of.values()] == [True, False, False]
  assert [row.temperature for row in of.values()] == [1, 1, pytest.approx(math.nan, nan_ok=True)]
  assert all(row.low <= row.nats <= row.high and row.loss > 1 for row in rows)
  assert len([row for row in rows if row.mode == 'mixed' and row.block != privacy.ALL]) == 2
  again = [row._replace(run='again', nats=2 * row.nats) for row in rows]
  mean = privacy.over_seeds(rows + again)
  assert len(mean) == len(rows) and mean[0].nats == pytest.approx(1.5 * rows[0].nats)
  shown = privacy.tables(rows)
  assert 'never' in shown and 'by the block that alone' in shown
  privacy.write(rows, tmp_path)
  written = list(csv.DictReader((tmp_path / 'privacy.csv').read_text().splitlines()))
  assert [float(row['nats']) for row in written] == [row.nats for row in rows]
  assert (tmp_path / 'privacy.png').stat().st_size > 10_000


def test_a_single_batch_has_no_requests_to_exchange(texts):
  config = mot.get_config('debug')
  config.data.update({'source': 'text', 'files': texts})
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1, -1))
  run_config = config_lib.resolve(config)
  with pytest.raises(ValueError, match='there is only one: raise --batches'):
    privacy._influence(evaluate.decoding(run_config.model, 'mixed', 16), run_config, None, mesh, 1)
