"""The code in the documentation runs."""

import pathlib
import re

import jax
import numpy as np
import pytest

from configs import mot
from moejax import config as config_lib, convert, model as model_lib
from moejax.layers import moe
from tests import tiny

DOCS = pathlib.Path(__file__).parent.parent / 'docs'


@pytest.fixture
def routers(monkeypatch):
  monkeypatch.setattr(moe, 'ROUTERS', dict(moe.ROUTERS))


def _code(page):
  (code,) = re.findall(r'```python\n(.*?)```', (DOCS / page).read_text(), re.DOTALL)
  return compile(code, page, 'exec'), len(code.splitlines())


def test_what_leaks_in_a_group_and_that_groups_of_one_do_not():
  page = {}
  exec(_code('mixture_of_tokens.md')[0], page)
  in_a_group, alone = (page['change'](page['config'].with_mot(group_size=M)) for M in (4, 1))
  assert not in_a_group[:9].any() and (in_a_group[9:] > 0).all()
  assert not alone.any()


def test_the_router_of_the_page_routes_and_learns(routers):
  code, lines = _code('adding_a_router.md')
  assert lines <= 30
  exec(code, {})
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


def test_the_names_on_the_page_are_those_in_the_file(tmp_path, monkeypatch):
  config = mot.get_config('debug')
  stages = config_lib.resolve(config)
  abstract = convert.abstract_params(stages.model)
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
  convert.write_run(config, stages, params, tmp_path / 'run')
  convert.to_safetensors(tmp_path / 'run', tmp_path / 'mot.safetensors')
  page = (DOCS / 'convert.md').read_text()
  (code,) = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
  monkeypatch.chdir(tmp_path)
  found = {}
  exec(compile(code, 'convert.md', 'exec'), found)
  assert found['config']['model']['d_model'] == 16
  kinds = {re.sub(r'stack_\d\.\d\.\d', 'stack_S.B.I', name) for name in found['shapes']}
  (table,) = re.findall(r'\| name \| shape \|\n(.*?)\n\n', page, re.DOTALL)
  table = table.replace('KIND', 'mot')
  for name in kinds - {'position_embedding'}:
    parent, _, last = name.rpartition('.')
    in_full, beside = f'`{name}`', rf'`{re.escape(parent)}\.\w+`, `\.{last}`'
    assert in_full in table or re.search(beside, table) or name.endswith(('.scale', '.bias')), name
