"""What devices send each other in a whole training step, read from the compiled program."""

import math

import jax
import numpy as np
import optax
import pytest

from moejax import model as model_lib, sharding, step as step_lib
from moejax.aot import hlo
from tests import tiny

pytestmark = pytest.mark.heavy

ROWS, BLOCKS, D, F, E = 64, 3, 16, 40, 8
SIZES = {
  'd_model': D,
  'num_heads': 4,
  'd_ff': 80,
  'remat': 'full',
  'loss_chunk': 4,
  'moe_expansion_rate': E // 2,
  'moe_group_size': 4,
  'moe_impl': 'rows',
  'mot_num_experts': E,
  'mot_group_size': 4,
  'mot_expert_width': F,
}
BYTES = 4
TOKENS = ROWS * tiny.L * D * BYTES  # of the whole batch, between two layers
EXPERTS = E * D * F * BYTES  # of one of the two matrices of all experts of a layer


def _config(model):
  blocks = {
    'dense': ('attention', 'mlp'),
    'mot': ('attention', 'mot'),
    'mamba': ('mamba', 'mlp'),
    'moe mamba': ('mamba', 'moe'),
  }.get(model, ('attention', 'moe'))
  changes = {'moe_router': 'expert_choice'} if model == 'expert choice' else {}
  return tiny.model_config(**SIZES | changes | {'blocks': ((blocks, BLOCKS),)})


def _collectives(model, sizes):
  """Of one training step: [(kind, mesh axes, bytes, how often)]."""
  config = _config(model)
  mesh = sharding.make_mesh(sharding.MeshConfig(*sizes))
  optimizer = optax.adamw(1e-2)

  def init():
    return step_lib.init_state(config, optimizer, jax.random.key(0))

  def step(state, batch):
    return step_lib.train_step(
      state,
      batch,
      model_config=config,
      optimizer=optimizer,
      schedule=lambda step: 1e-2,
      accumulation=1,
      key=jax.random.key(0),
    )

  with jax.set_mesh(mesh):
    state = sharding.abstract(init, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    leaf = jax.ShapeDtypeStruct(
      (ROWS, tiny.L), np.int32, sharding=jax.sharding.NamedSharding(mesh, sharding.BATCH)
    )
    batch = dict.fromkeys(('inputs', 'targets', 'segments', 'positions'), leaf)
    program = jax.jit(step, out_shardings=(shardings, None)).lower(state, batch)
    program = program.compile()
  found = []
  for collective, count in hlo.cost(program.as_text()).collectives.items():
    groups = hlo.device_groups(collective.groups, 8)
    places = np.array(np.unravel_index(groups[0], sizes))
    varies = (places != places[:, :1]).any(axis=1)
    axes = tuple(axis for axis, v in zip(sharding.AXES, varies, strict=True) if v)
    found.append((collective.kind, axes, collective.bytes, count))
  return found


def _largest(found, kind):
  return max((num_bytes for k, _, num_bytes, _ in found if k == kind), default=0)


# The largest parameter outside of experts: of the feed-forward, qkv or the head.
OTHERS = BYTES * max(D * 80, 3 * D * D, D * tiny.V)


@pytest.mark.parametrize('model', ['mot', 'token choice', 'expert choice', 'moe mamba'])
def test_tokens_travel_by_all_to_all_and_experts_stay(model):
  found = _collectives(model, (2, 1, 4, 1))
  exchanges = [n for kind, axes, _, n in found if kind == 'all-to-all' and axes == ('expert',)]
  assert sum(exchanges) >= 4 * BLOCKS  # to the experts and back, forwards and backwards
  # What is gathered are other parameters, one at a time: neither experts nor tokens.
  assert _largest(found, 'all-gather') <= OTHERS < min(EXPERTS, TOKENS / 2)


@pytest.mark.parametrize('model', ['dense', 'mot', 'token choice', 'mamba'])
def test_parameters_are_gathered_a_block_at_a_time(model):
  found = _collectives(model, (1, 8, 1, 1))
  largest = OTHERS if model in ('dense', 'mamba') else EXPERTS
  assert _largest(found, 'all-gather') <= largest
  gathered = sum(num * n for kind, _, num, n in found if kind == 'all-gather')
  params = jax.eval_shape(lambda: model_lib.init_params(_config(model), jax.random.key(0)))
  total = BYTES * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  # Every parameter at most once forwards and once backwards.
  assert total < gathered <= 2 * total


def test_the_head_is_gathered_once():
  found = _collectives('dense', (1, 8, 1, 1))
  table = BYTES * D * tiny.V
  # The embedding's is as large. By chunks of the loss it would be six more.
  assert sum(n for kind, _, num, n in found if kind == 'all-gather' and num == table) == 2
