"""The code in the documentation runs."""

import pathlib
import re

import jax
import numpy as np
import pytest

from moejax import model as model_lib
from moejax.layers import moe
from tests import tiny

DOCS = pathlib.Path(__file__).parent.parent / 'docs'


@pytest.fixture
def routers(monkeypatch):
  monkeypatch.setattr(moe, 'ROUTERS', dict(moe.ROUTERS))


def test_the_router_of_the_page_routes_and_learns(routers):
  page = (DOCS / 'adding_a_router.md').read_text()
  (code,) = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
  assert len(code.splitlines()) <= 30
  exec(compile(code, 'adding_a_router.md', 'exec'), {})
  changes = tiny.MODELS['token choice'] | {'moe_capacity_factor': 1.0}
  config = tiny.model_config(**changes, moe_router='round_robin')

  @jax.jit
  def loss(params):
    nats, _, aux = model_lib.bind(config, params).loss(tiny.batch())
    return nats, aux

  params = jax.jit(lambda: model_lib.init_params(config, jax.random.key(0)))()
  (_, aux), gradients = jax.value_and_grad(loss, has_aux=True)(params)
  experts = tiny.L * tiny.M * 2 / tiny.E
  np.testing.assert_allclose(aux['moe/load'], 1, atol=1 / experts)
  assert (aux['moe/dropped'] == 0).all()
  assert np.abs(gradients['stack_0']['1_moe']['layer']['router']).max() > 0
