"""Counts of parameters and FLOPs: against the papers' numbers, the real parameters, and XLA."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import dense, fine_grained, mamba, moe, moe_mamba, mot
from moejax import flops, model as model_lib
from moejax.layers import attention, moe as moe_layer
from tests import tiny


def _paper_config(module, arg):
  """A run of the MoT paper: GPT-2's vocabulary, context 256."""
  fields = module.get_config(arg).model.to_dict()
  return model_lib.ModelConfig(**fields | {'vocab_size': 50257, 'max_length': 256})


@pytest.mark.parametrize(
  ('module', 'arg', 'millions'),
  [
    (dense, 'medium', '76.8'),
    (mot, 'medium,experts=8', '135.5'),
    (mot, 'medium,experts=32', '336.9'),
    (mot, 'medium,experts=128', '1142'),
    (mot, 'medium,experts=32,mixtures=8', '337.4'),
    (mot, 'medium,experts=32,mixtures=16', '337.9'),
    (mot, 'medium,experts=32,mixtures=32', '338.9'),
    (dense, 'base', '162.4'),
    (mot, 'base,experts=32', '1040'),
    (mot, 'base,experts=64,mixtures=16', '1951'),
  ],
)
def test_totals_of_the_papers_models(module, arg, millions):
  config = _paper_config(module, arg)
  dense_layers = sum(names.count('mlp') for names in config.sublayers)
  biases = dense_layers * (config.d_ff + config.d_model)  # the papers' code has them, we do not
  total = flops.param_counts(config)['total'] + biases
  digits = len(millions.partition('.')[2])
  assert f'{total / 1e6:.{digits}f}' == millions


def test_active_parameters_of_equal_flop_models():
  width, blocks = 512, 8
  norms = 2 * blocks * 2 * width
  counts = flops.param_counts(_paper_config(dense, 'medium'))
  assert counts['non_embedding'] == counts['active'] == 12 * width**2 * blocks + norms
  mixing = flops.param_counts(_paper_config(mot, 'medium,experts=32,mixtures=8'))
  assert mixing['active'] == counts['active'] + blocks // 2 * width * 256  # the controllers


def test_sizes_of_the_scaling_laws():
  """arXiv:2402.07871, section 5: N = d^2 (8E + 4) blocks, and 12 d^2 blocks of them are active."""
  for granularity in (1, 8):
    arg = f'25M,expansion_rate=64,granularity={granularity}'
    config = _paper_config(fine_grained, arg)
    counts = flops.param_counts(config)['by_kind']
    assert counts['experts'] + counts['attention'] == 512**2 * (8 * 64 + 4) * 8
    kinds = flops.forward_flops_per_token(config, 256)
    assert kinds['experts'] + kinds['attention_projections'] == 2 * 12 * 512**2 * 8
    assert kinds['router'] == 2 * 512 * 64 * granularity * 8


@pytest.mark.parametrize(('size', 'total', 'active'), [('25M', 545, 25), ('100M', 2454, 114)])
def test_sizes_of_transformer_moe(size, total, active):
  """arXiv:2401.04081, table 1, without embeddings."""
  counts = flops.param_counts(_paper_config(moe, size))
  assert round(counts['non_embedding'] / 1e6) == total
  assert round(counts['active'] / 1e6) == active


@pytest.mark.parametrize(
  ('mixtures', 'percent'), [(1, '2.3'), (8, '18.8'), (16, '37.5'), (32, '75.0')]
)
def test_routing_as_a_share_of_the_experts(mixtures, percent):
  config = _paper_config(mot, f'medium,experts=32,mixtures={mixtures}')
  kinds = flops.forward_flops_per_token(config, 256)
  routing = kinds['controller'] + kinds['merge'] + kinds['emit']
  assert f'{100 * routing / kinds["experts"]:.1f}' == percent
  assert kinds['experts'] == kinds['mlp'] == 4 * 16 * 512**2


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'blocks': tiny.DENSE},
    {'blocks': ((('mlp',), 2), (('mot', 'attention', 'mot'), 3))},
    {'positions': 'rope', 'tie_embeddings': True},
    {'positions': 'none', 'norm': 'rms_norm'},
    {'activation': 'swiglu', 'final_norm': True},
    {'activation': 'swiglu', 'd_ff': 10},
    {'blocks': tiny.DENSE, 'num_heads': 6, 'num_kv_heads': 2, 'qk_norm': True, 'biases': True},
    {'blocks': tiny.DENSE, 'biases': True, 'qk_norm': True, 'activation': 'swiglu'},
    {'blocks': tiny.DENSE, 'head_dim': 7, 'biases': True, 'qk_norm': True},
    {'blocks': tiny.DENSE, 'num_kv_heads': 1, 'qk_norm': True, 'qk_norm_per_head': True},
    {'norm': 'rms_norm', 'final_norm': True, 'tie_embeddings': True},
    {'mot_expert_width': 0},
    {'mot_expert_width': 5, 'mot_group_size': 3},
    {'mot_grouping': 'all_positions', 'mot_emit': 'softmax_over_experts'},
    {'mot_separate_controllers': True, 'mot_expert_norm': True},
    {'mot_temperature_mode': 'annealed'},
    {'mot_temperature_mode': 'learned_per_expert', 'mot_separate_temperatures': True},
    {'blocks': tiny.MOE, 'moe_shared_width': 5, 'moe_balance_bias': True},
    {'blocks': tiny.MOE, 'moe_router': 'expert_choice', 'moe_output_norm': True},
    {'blocks': tiny.MOE, 'moe_router': 'relu'},
    {'blocks': tiny.MOE_IN_MAMBA2, 'mamba2_shared_router': True},
    {'blocks': tiny.MOE_IN_MAMBA, 'mamba_shared_router': True, 'moe_output_norm': True},
    {'blocks': tiny.MAMBA, 'mamba_expand': 1.5},
    {'blocks': ((('mamba', 'mot+moe+mlp'), 2), (('mamba+moe',), 3)), 'moe_output_norm': True},
    {'blocks': tiny.MOE_IN_MAMBA2, 'mamba2_expand': 1.5},
    {'blocks': tiny.MOE_IN_MAMBA, 'moe_output_norm': True, 'moe_balance_bias': True},
    {'blocks': tiny.MOE_IN_MAMBA, 'mamba_moe_in': 'out', 'activation': 'swiglu'},
    {'blocks': tiny.MOE, 'activation': 'swiglu', 'd_ff': 20, 'moe_shared_width': 5},
  ],
)
def test_counts_are_those_of_the_parameters(changes):
  config = tiny.model_config(**changes)
  params = jax.eval_shape(lambda: model_lib.init_params(config, jax.random.key(0)))
  counts = flops.param_counts(config)
  size = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
  embeddings = {name: params[name] for name in params if 'embedding' in name or name == 'head'}
  assert counts['total'] == size(params)
  assert counts['embedding'] == size(embeddings)
  assert counts['non_embedding'] == counts['total'] - counts['embedding']
  assert sum(counts['by_kind'].values()) == counts['total']
  assert isinstance(counts['active'], int) and 0 < counts['active'] <= counts['non_embedding']


@pytest.mark.parametrize('group_by', ['auto', 'sequence', 'position'])
@pytest.mark.parametrize('router', moe_layer.ROUTERS)
def test_active_parameters_are_those_of_the_rows_that_experts_get(router, group_by):
  options = {'moe_router': router, 'moe_group_by': group_by, 'moe_balance_loss': 0.0}
  factor = 1.3 if router == 'expert_choice' else 0.0  # who is dropped counts, too
  config = tiny.model_config(blocks=tiny.MOE, moe_capacity_factor=factor, **options)
  length = 1 if config.moe.by_position else tiny.L
  K = config.moe.top_k
  logits_GTE = np.random.default_rng(0).random((3, tiny.M * length, tiny.E))
  logits_GTE = jnp.asarray(logits_GTE - np.sort(logits_GTE)[..., -K - 1 : -K])  # K are positive
  plan = functools.partial(
    config.moe.rule.plan,
    config=config.moe,
    capacity=config.moe.capacity(tiny.M * length),
    valid_GT=np.ones(logits_GTE.shape[:2], bool),
    bias_E=None,
    ragged=False,
  )
  plan = jax.jit(plan)(logits_GTE)  # as a whole: its operations compile faster
  rows_per_token = plan.used.sum() / logits_GTE[..., 0].size
  counts = flops.param_counts(config)
  experts = counts['by_kind']['experts']
  unused = experts * (1 - rows_per_token / tiny.E)
  assert counts['active'] == pytest.approx(counts['non_embedding'] - unused, abs=0.5)
  forward = flops.forward_flops_per_token(config, tiny.L)
  assert forward['experts'] == pytest.approx(2 * experts * rows_per_token / tiny.E)


@pytest.mark.parametrize(
  ('size', 'width', 'layers', 'layer', 'millions'),
  [('25M', 512, 16, 1_694_720, 27), ('100M', 768, 32, 3_770_880, 121)],
)
def test_mamba_of_the_paper(size, width, layers, layer, millions):
  counts = flops.param_counts(_paper_config(mamba, size))
  assert counts['by_kind']['mamba'] == layers * layer
  assert counts['active'] == counts['non_embedding'] == layers * (layer + 2 * width)
  assert round(counts['active'] / 1e6) == millions


def test_mamba2_is_as_large_as_mamba():
  kinds = {words: _paper_config(mamba, words) for words in ('25M', '25M,mamba2')}
  old, new = (flops.param_counts(config)['non_embedding'] for config in kinds.values())
  assert 1 < new / old < 1.02
  old, new = (flops.forward_flops_per_token(config, 1024) for config in kinds.values())
  assert new['mamba_scan'] == 8 * old['mamba_scan']  # 128 states instead of 16


@pytest.mark.parametrize(
  ('words', 'total', 'active'),
  [
    # arXiv:2401.04081, tables 1 and 4.
    ('25M', 542, 26),
    ('100M', 2439, 117),
    ('25M,experts=1', 26, 26),
    ('25M,experts=4', 64, 26),
    ('25M,experts=8', 114, 26),
    ('25M,experts=16', 215, 26),
    ('25M,experts=32', 416, 26),
    # Table 2. Its caption says 542M for all, but 3x3 has as many parameters as 32 experts above.
    # Active ones differ a little, because a Mamba layer has more than 6 d^2.
    ('25M,ratio=1x5', 403, 26),
    ('25M,ratio=2x4', 412, 26),
    ('25M,ratio=3x3', 416, 26),
    ('25M,ratio=4x2', 421, 27),
    ('25M,ratio=5x1', 426, 27),
  ],
)
@pytest.mark.parametrize('parallel', ['', ',parallel'])
def test_moe_mamba_of_the_paper(words, parallel, total, active):
  counts = flops.param_counts(_paper_config(moe_mamba, words + parallel))
  norms = counts['by_kind']['norm']  # without them the 117.52M of 100M round to the paper's 117M
  assert round((counts['non_embedding'] - norms) / 1e6) == total
  assert round((counts['active'] - norms) / 1e6) == active


@pytest.mark.parametrize('every_other', ['', ',every_other'])
@pytest.mark.parametrize(
  'inner', ['conv', 'gate', 'out', 'conv+gate', 'conv+out', 'gate+out', 'conv+gate+out']
)
def test_experts_inside_mamba_keep_its_active_parameters(inner, every_other):
  """arXiv:2401.04081, table 3: 24 experts per layer, 512 to 352 to 1024 or back."""
  config = _paper_config(moe_mamba, f'25M,inner={inner}{every_other}')
  counts, plain = flops.param_counts(config), flops.param_counts(_paper_config(mamba, '25M'))
  assert counts['by_kind']['experts'] == 16 * 24 * (512 + 1024) * 352
  assert plain['active'] < counts['active'] < 1.04 * plain['active']
  kinds = flops.forward_flops_per_token(config, 256)
  layers = 8 if every_other else 16
  switches = layers * len(inner.split('+'))
  assert kinds['experts'] == 2 * switches * (512 + 1024) * 352
  dense = flops.forward_flops_per_token(_paper_config(mamba, '25M'), 256)
  removed = dense['mamba_projections'] - kinds['mamba_projections']
  assert removed == 2 * switches * 512 * 1024
  assert kinds['mamba_scan'] == dense['mamba_scan']


def _xla_flops(config, rows, length):
  """XLA's count of one loss and its gradient."""

  def loss(params, batch):
    return model_lib.bind(config, params).loss(batch)[0]

  params = jax.eval_shape(lambda: model_lib.init_params(config, jax.random.key(0)))
  batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tiny.batch(rows=rows, length=length)))
  compiled = jax.jit(jax.value_and_grad(loss)).lower(params, batch).compile()
  return compiled.cost_analysis()['flops']


@pytest.mark.parametrize(
  ('blocks', 'activation', 'length'),
  [
    # XLA counts the body of a scan once, however often it runs: one repeat each.
    (((('attention', 'mlp'), 1),), 'swiglu', 32),
    (((('attention', 'mlp'), 1),), 'relu', 256),  # a quarter of it attention scores
    (((('attention', 'mlp'), 1), (('attention', 'mot'), 1)), 'relu', 32),
  ],
)
def test_training_flops_agree_with_xla(blocks, activation, length, monkeypatch):
  monkeypatch.setattr(attention, '_BLOCKS', {'cpu': length})  # no scan over blocks
  config = tiny.model_config(
    blocks=blocks,
    activation=activation,
    max_length=length,
    vocab_size=389,
    d_model=96,
    d_ff=384,
    mot_num_experts=64,
    mot_expert_width=20,
  )
  rows = 4
  counted = _xla_flops(config, rows, length) / (rows * length)
  # XLA also counts norms, softmax and activations.
  assert 0.97 * counted < flops.training_flops_per_token(config, length)['total'] < counted


@pytest.mark.parametrize(
  'changes',
  [
    {'mot_routing': 'uniform'},
    {'mot_routing': 'discrete'},
    {'mot_emit': 'top_1'},
    {'mot_emit': 'softmax_over_experts', 'mot_separate_controllers': True},
  ],
  ids=str,
)
def test_variants_of_mixing_agree_with_xla(changes):
  """The layer alone, by its input and its parameters."""
  config = tiny.model_config(
    blocks=((('mot',), 1),), d_model=96, mot_num_experts=64, mot_expert_width=20, **changes
  )

  def projected(params, x_BLD, dy_BLD):
    block = model_lib.bind(config, params).stack_0
    layer = getattr(jax.tree.map(lambda leaf: leaf[0], block), '0_mot').layer
    return jnp.sum(layer(x_BLD, tiny.tokens(tiny.batch()))[0] * dy_BLD)

  params = jax.eval_shape(lambda: model_lib.init_params(config, jax.random.key(0)))
  x_BLD = jax.ShapeDtypeStruct((tiny.B, tiny.L, 96), 'float32')
  gradients = jax.jit(jax.value_and_grad(projected, argnums=(0, 1)))
  compiled = gradients.lower(params, x_BLD, x_BLD).compile()
  counted = compiled.cost_analysis()['flops'] / (tiny.B * tiny.L)
  forward = flops.forward_flops_per_token(config, tiny.L)
  expected = flops.training_flops_per_token(config, tiny.L)['total'] - 3 * forward['head']
  assert 0.96 * counted < expected < counted


def test_training_is_three_times_the_forward_pass():
  config = tiny.model_config()
  kinds = flops.forward_flops_per_token(config, 7)
  training = flops.training_flops_per_token(config, 7)
  routing = ('controller', 'merge', 'emit')
  assert training['routing'] == 3 * sum(kinds[name] for name in routing)
  assert training['model'] == 3 * sum(v for name, v in kinds.items() if name not in routing)
  assert training['total'] == training['model'] + training['routing']
  assert flops.training_flops_per_token(tiny.model_config(blocks=tiny.DENSE), 7)['routing'] == 0


@pytest.mark.parametrize(
  ('kind', 'teraflops'),
  [
    ('TPU v3', 61.5),
    ('TPU v4', 275),
    ('TPU v5 lite', 197),
    ('TPU v5', 459),
    ('TPU v6 lite', 918),
    ('TPU7x', 1153.5),
    ('Tesla V100-SXM2-16GB', 125),
    ('Tesla V100-PCIE-16GB', 112),
    ('Tesla T4', 65),
    ('NVIDIA A100-SXM4-80GB', 312),
    ('NVIDIA L4', 121),
    ('NVIDIA H100 PCIe', 756),
    ('NVIDIA H100 80GB HBM3', 989),
    ('NVIDIA H200', 989),
    ('NVIDIA B200', 2250),
  ],
)
def test_stated_peaks(kind, teraflops):
  device = types.SimpleNamespace(device_kind=kind)
  for dtype in ('bfloat16', 'float16'):
    assert flops.peak_flops(device, dtype) == teraflops * 1e12
  assert flops.peak_flops(device, 'float32') is None


@pytest.mark.parametrize('kind', ['cpu', 'NVIDIA L40S', 'NVIDIA A100-SXM4-40GB MIG 1g.5gb'])
def test_unknown_devices_have_no_stated_peak(kind):
  assert flops.peak_flops(types.SimpleNamespace(device_kind=kind), 'bfloat16') is None


@pytest.mark.parametrize('model', tiny.MODELS)
def test_kinds_of_layers_add_up(model):
  config = tiny.model_config(**tiny.MODELS[model])
  rows = flops.by_layer(config, 9)
  assert {'embedding', 'norm', 'head'} < {*rows} == {'embedding', *config.kinds, 'norm', 'head'}
  counts = flops.param_counts(config)
  total = {name: sum(row[name] for row in rows.values()) for name in ('params', 'active', 'flops')}
  assert total['params'] == counts['total'] and round(total['active']) == counts['active']
  assert total['flops'] == sum(flops.forward_flops_per_token(config, 9).values())
