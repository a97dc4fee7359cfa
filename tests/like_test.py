"""Miniatures: published sizes, shapes kept, training, and the table of docs/miniatures.md."""

import pathlib

import jax
import numpy as np
import pytest

from configs import like
from moejax import config as config_lib, fields, flops, sharding, step as step_lib
from moejax.model_config import ModelConfig
from moejax.text import short

PAGE = pathlib.Path(__file__).parent.parent / 'docs' / 'miniatures.md'


def _model(variants):
  """The ModelConfig, with a vocabulary of bytes if none is given."""
  c = like.get_config(variants)
  vocabulary = c.model.vocab_size or 259
  changes = {'vocab_size': vocabulary, 'max_length': c.data.sequence_length}
  return fields.make(ModelConfig, {**c.model, **changes})


# Billions of parameters with embeddings, all and active ones: arXiv:2409.02060, the model cards of
# Mixtral-8x7B-v0.1 and Qwen3-30B-A3B, arXiv:2512.20848.
PUBLISHED = {
  'olmoe': (6.9, 1.3),
  'mixtral': (46.7, 12.9),
  'qwen3-30b-a3b': (30.5, 3.3),
  'nemotron-3-nano': (31.6, 3.6),
}


@pytest.mark.parametrize('name', like.MODELS)
def test_the_full_size_is_the_published_one(name):
  counts = flops.param_counts(_model(f'{name},full'))
  total, active = PUBLISHED[name]
  assert counts['total'] / 1e9 == pytest.approx(total, rel=0.01)
  assert (counts['active'] + counts['embedding']) / 1e9 == pytest.approx(active, rel=0.02)


def test_the_order_of_nemotron_is_the_published_one():
  letters = {'mamba2': 'M', 'moe': 'E', 'attention': '*'}
  order = lambda variants: ''.join(letters[kind] for kind in _model(variants).kinds)
  full = order('nemotron-3-nano,full')
  assert full == 'MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME'
  assert full.startswith(order('nemotron-3-nano')[:-2]) and full.endswith('ME')


def _kept(model):
  """What a miniature keeps exactly."""
  moe = model.moe
  return {
    'experts': (moe.num_experts, moe.top_k),
    'router': (moe.router, moe.scores, moe.renormalize, moe.capacity_factor),
    'losses': (moe.balance_loss, moe.balance_bias, moe.z_loss),
    'shared expert, in experts': moe.shared_width / model.d_ff,
    'norms': (model.norm, model.norm_eps, model.qk_norm, model.qk_norm_per_head, model.final_norm),
    'positions': (model.positions, model.rope_theta),
    'activation': model.activation,
    'tied': model.tie_embeddings,
    'queries per key': model.num_heads // (model.num_kv_heads or model.num_heads),
    'heads over width': model.num_heads * model.head_width / model.d_model,
    'channels over width': model.mamba2.expand,
  }


@pytest.mark.parametrize('name', like.MODELS)
def test_a_miniature_keeps_the_shape(name):
  full, miniature = _model(f'{name},full'), _model(name)
  assert _kept(miniature) == _kept(full)
  assert miniature.d_ff / miniature.d_model == pytest.approx(full.d_ff / full.d_model, rel=0.04)
  # Routers, D x E, are larger beside D x F in a narrow model.
  assert _active_share(miniature) == pytest.approx(_active_share(full), rel=0.15)
  assert flops.param_counts(miniature)['total'] < 6e6


def _active_share(model):
  counts = flops.param_counts(model)
  return counts['active'] / counts['non_embedding']


@pytest.mark.heavy
@pytest.mark.parametrize('name', like.MODELS)
def test_a_miniature_learns(name):
  run_config = config_lib.resolve(like.get_config(f'{name},debug'))
  mesh = sharding.make_mesh(run_config.mesh, jax.devices()[:1])
  rows, length = run_config.data.batch_size, run_config.data.sequence_length
  ids = np.random.default_rng(0).integers(3, 259, (rows, length + 1), dtype=np.int32)
  batch = {'inputs': ids[:, :-1], 'targets': ids[:, 1:]}
  batch |= {'segments': np.ones((rows, length), np.int32)}
  batch |= {'positions': np.tile(np.arange(length, dtype=np.int32), (rows, 1))}
  now, init = step_lib.make_clock(run_config), step_lib.fresh_state(run_config)
  losses = []
  with jax.set_mesh(mesh):
    abstract = sharding.abstract(init, mesh)
    step = step_lib.jit_train_step(run_config, abstract, mesh)
    state, batch = step_lib.make_state(init, abstract), sharding.place_batch(batch, mesh)
    for i in range(3):
      state, metrics = step(state, batch, now(i))
      losses.append(float(metrics['loss']))
  assert np.isfinite(losses).all() and losses[2] < losses[1] < losses[0]


def test_one_model_at_a_time():
  with pytest.raises(ValueError, match='a model is one of olmoe, mixtral'):
    like.get_config('olmoe,mixtral')
  with pytest.raises(ValueError, match="did you mean 'qwen3-30b-a3b'"):
    like.get_config('qwen3-30b')


def _row(name):
  full, miniature = _model(f'{name},full'), _model(name)

  def both(of):
    values = [str(of(model)) for model in (full, miniature)]
    return values[0] if values[0] == values[1] else ' / '.join(values)

  counts = {id(model): flops.param_counts(model) for model in (full, miniature)}
  heads = lambda m: f'{m.num_heads}:{m.num_kv_heads or m.num_heads} of {m.head_width}'
  width = lambda m, name: dict(m.widths)[name]
  expert = 'hidden units of an expert (model.d_ff / model.moe.granularity)'
  shared = 'hidden units of the shared expert (model.moe.shared_width)'
  cells = [
    f'`{name}`',
    both(lambda m: short(counts[id(m)]['total'])),
    both(lambda m: short(counts[id(m)]['active'])),
    both(lambda m: f'{100 * _active_share(m):.1f} %'),
    both(lambda m: len(m.kinds)),
    both(lambda m: m.d_model),
    both(heads),
    both(lambda m: f'{m.moe.top_k} of {m.moe.num_experts}'),
    both(lambda m: width(m, expert)),
    both(lambda m: width(m, shared) if m.moe.shared_width else '-'),
  ]
  return f'| {" | ".join(cells)} |'


def test_the_table_is_true(request):
  start, end = '<!-- table -->\n', '<!-- end of table -->'
  before, _, rest = PAGE.read_text().partition(start)
  _, _, after = rest.partition(end)
  head = '| | parameters | active, without embeddings | active share | sublayers | d_model |'
  head += ' heads : of keys, width | experts | expert width | shared |'
  table = '\n'.join([head, '|---' * 10 + '|', *map(_row, like.MODELS), ''])
  text = before + start + table + end + after
  if request.config.getoption('--update-golden'):
    PAGE.write_text(text)
  assert PAGE.read_text() == text, 'update it with pytest --update-golden'
