"""The arithmetic of the laws, compared with the paper and with flops.py."""

import numpy as np
import pytest

from moejax import flops
from moejax.scaling_laws import laws
from tests import tiny


def test_a_figure_of_the_paper():
  """Figure 3: without its G term the loss of 64x25M after 16B tokens is 3.12."""
  law = laws.PUBLISHED['four_digits'][64]
  params = laws.total_params(512, 8, 64)
  assert laws.loss(law._replace(g=None), params, 16e9, 8) == pytest.approx(3.12, abs=0.005)


def test_sizes():
  assert laws.active_params(512, 8) == 25_165_824
  assert laws.total_params(512, 8, 64) == 43 * laws.active_params(512, 8)
  assert laws.total_params(512, 8, 1) == laws.active_params(512, 8)


def test_laws_broadcast():
  law = laws.PUBLISHED['printed'][64]
  loss = laws.loss(law, np.array([1e9, 2e9])[:, None], 1e10, np.array([[1, 2, 4]]))
  assert loss.shape == (2, 3)
  assert (np.diff(loss, axis=0) < 0).all() and (np.diff(loss, axis=1) < 0).all()
  assert loss[1, 2] == laws.loss(law, 2e9, 1e10, 4)


def test_dense_flops_match_the_model_without_attention_scores_and_head():
  config = tiny.model_config(blocks=tiny.DENSE, d_ff=4 * tiny.model_config().d_model)
  ours = flops.forward_flops_per_token(config, tiny.L)
  counted = ours['attention_projections'] + ours['mlp']
  blocks = sum(repeats for _, repeats in config.blocks)
  assert laws.flops_per_token(config.d_model, blocks, 1, laws.DENSE) == 3 * counted
