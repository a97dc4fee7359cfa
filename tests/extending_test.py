"""A sublayer, a router, an optimizer: added as docs/ say, by one file or entry, and all works."""

import contextlib
import functools
import math
import pathlib
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax import (
  evaluate,
  flops,
  model as model_lib,
  optimizer as optimizer_lib,
  parameters,
  step as step_lib,
  transition_tuning,
)
from moejax.layers import moe
from moejax.sharding import rules
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent


TABLES = (
  model_lib.SUBLAYERS,
  moe.ROUTERS,
  optimizer_lib.OPTIMIZERS,
  parameters._DECLARED,
)


@pytest.fixture(autouse=True)
def tables():
  """Leaves the tables as they were."""
  with contextlib.ExitStack() as stack:
    for table in TABLES:
      stack.enter_context(mock.patch.dict(table))
    yield


def _run_code_of(page):
  (code,) = re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / page).read_text(), re.DOTALL)
  exec(compile(code, page, 'exec'), {})


def _optimizer(**changes):
  return optimizer_lib.make_optimizer(optimizer_lib.OptimizerConfig(**changes), 100)


def _losses(config, optimizer, num_steps):
  """Of steps on one batch, and the state after them."""
  step = tiny.train_step(config, optimizer)
  state = jax.jit(lambda: step_lib.init_state(config, optimizer, jax.random.key(0)))()
  step, losses = jax.jit(step), []
  for _ in range(num_steps):
    state, measured = step(state, tiny.batch())
    losses.append(float(measured['loss']))
  return losses, state


def test_a_sublayer_is_a_file_and_a_line():
  _run_code_of('adding_a_sublayer.md')
  config = tiny.model_config(blocks=((('shift', 'mlp'), 2),), positions='none')
  assert config.widths['outputs of a token shift (model.d_model)'] == tiny.D
  losses, state = _losses(config, _optimizer(warmup_steps=0), 8)
  assert losses[-1] < 0.8 * losses[0]

  params = state['params']
  counts = flops.param_counts(config)
  assert counts['total'] == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  assert counts['by_kind']['shift'] == 2 * (tiny.D**2 + tiny.D)
  assert flops.forward_flops_per_token(config, tiny.L)['shift'] == 4 * tiny.D**2
  size = lambda *axes: 2 ** len(axes)
  w_shift = 'stack_0/0_shift/layer/w_shift'
  assert rules.spec(w_shift, (2, tiny.D, tiny.D), size) == P(None, ('fsdp', 'expert'), 'tensor')

  optimizer = _optimizer(decay='matrices', warmup_steps=0)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  layer = updates['stack_0']['0_shift']['layer']
  assert jnp.any(layer['w_shift']) and not jnp.any(layer['share'])

  batch = tiny.batch()
  batch['positions'] = np.concatenate([batch['positions'][:, :6], batch['positions'][:, :5]], 1)
  got, decoded = _forward_and_decoded(config, params, batch, split=4)
  np.testing.assert_allclose(decoded, got[:, 3:], rtol=2e-5, atol=2e-5)
  changed = batch | {'inputs': batch['inputs'].copy()}
  changed['inputs'][:, 5] = 1
  other, _ = _forward_and_decoded(config, params, changed, split=4)
  differs = np.abs(got - other).max(axis=(0, 2)) > 0
  assert differs.tolist() == [position == 5 for position in range(tiny.L)]  # a document ends there


@functools.partial(jax.jit, static_argnames=('config', 'split'))
def _forward_and_decoded(config, params, batch, split):
  """Logits of all positions; those from split - 1 on of a prefill and single steps."""
  model, inputs_BL = model_lib.bind(config, params), jnp.asarray(batch['inputs'])
  tokens = tiny.tokens(batch)
  prefix = jax.tree.map(lambda a: a[:, :split], tokens)
  logits_BV, state = model.prefill(inputs_BL[:, :split], prefix, tiny.L)
  decoded = [logits_BV]
  for position in range(split, tiny.L):
    at = jax.tree.map(lambda a, l=position: a[:, l], tokens)
    logits_BV, state = model.step(inputs_BL[:, position], state, at)
    decoded.append(logits_BV)
  return model.logits(inputs_BL, tokens), jnp.stack(decoded, axis=1)


def test_a_router_is_an_entry_whatever_it_is_called():
  """Expert choice under another name: nothing goes by the name."""
  moe.ROUTERS['mine'] = moe.ROUTERS['expert_choice']
  for group_by in ('auto', 'sequence'):
    changes = {'blocks': tiny.MOE, 'moe_group_by': group_by, 'moe_balance_loss': 0.0}
    theirs, ours = (tiny.model_config(**changes, moe_router=r) for r in ('expert_choice', 'mine'))
    assert bool(ours.leaks()) == bool(theirs.leaks()) == (group_by == 'sequence')
    assert ours.mixed_sequences == theirs.mixed_sequences == tiny.M
    assert ours.dropless() is theirs.dropless() is None
    assert ours.whole_groups == theirs.whole_groups
    assert flops.param_counts(ours) == flops.param_counts(theirs)
    assert evaluate.decoding(ours, 'mixed', 8).mixed_sequences == 8
    with pytest.raises(ValueError, match='mine.* need a group to choose from'):
      evaluate.decoding(ours, 'unmixed')
  with pytest.raises(ValueError, match='capacity_factor must be positive for mine'):
    tiny.model_config(blocks=tiny.MOE, moe_router='mine', moe_capacity_factor=0.0)
  plain = moe.token_choice
  moe.ROUTERS['plain'] = plain  # a function alone is one in which tokens choose
  config = tiny.model_config(blocks=tiny.MOE, moe_router='plain')
  assert config.mixed_sequences == 1 and not config.leaks()
  assert config.dropless().moe.capacity_factor == 0


def test_nothing_asks_for_the_name_of_a_router():
  names = '|'.join(moe.ROUTERS)
  asks = re.compile(rf"[!=]= '({names})'|\buses\('")
  sources = [path for path in (ROOT / 'moejax').rglob('*.py') if asks.search(path.read_text())]
  assert not sources


def test_an_optimizer_is_an_entry():
  _run_code_of('adding_an_optimizer.md')
  config = tiny.model_config(**tiny.MODELS['token choice'], moe_balance_bias=True)
  optimizer = _optimizer(name='lion', peak_lr=3e-3, warmup_steps=0, decay='matrices')
  losses, state = _losses(config, optimizer, 8)
  assert losses[-1] < 0.9 * losses[0]
  names = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state['optimizer'])}
  assert any("'lion'" in name and '.mu' in name for name in names)
  biases = state['params']['stack_0']['1_moe']['layer']['balance_bias']
  rate = optimizer_lib.OptimizerConfig().balance_bias_rate
  np.testing.assert_allclose(biases / rate, np.round(biases / rate), atol=1e-3)
  assert np.abs(biases).max() >= rate
  again = transition_tuning.fresh_moments(optimizer, state['params'], state['step'])
  assert jax.tree.structure(again) == jax.tree.structure(state['optimizer'])
  with pytest.raises(ValueError, match='optimizer.name must be one of adamw, muon, lion'):
    optimizer_lib.OptimizerConfig(name='sgd')


def test_parameters_of_one_name_are_declared_alike():
  parameters.declare('toy/w_in', P('tensor'), decays=False)
  parameters.declare('toy/w_in', P('tensor'), decays=False)
  assert parameters.of('stack_0/0_x/layer/toy/w_in').specs == (P('tensor'),)
  assert parameters.of('stack_0/0_x/layer/w_in').decays
  assert parameters.of('stack_0/0_x/layer/unknown') == parameters.Parameter()
  with pytest.raises(ValueError, match="'toy/w_in' is declared twice"):
    parameters.declare('toy/w_in', P('tensor'))
