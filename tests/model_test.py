"""The language model: what it may see, how it decodes, and what configs it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.core import jaxprs_in_params  # public only since JAX 0.9

from moejax import evaluate, model as model_lib, parameters
from moejax.sharding import platform
from tests import tiny


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, inputs_BL, tokens):
  return model_lib.bind(config, params).logits(inputs_BL, tokens)


_init = jax.jit(model_lib.init_params, static_argnums=0)


@functools.lru_cache
def _random_params(config):
  """Parameters large enough that every path matters (the papers' initialisation is nearly zero)."""
  rng = np.random.default_rng(0)
  noise = lambda p: p + 0.3 * rng.standard_normal(p.shape, np.float32)
  return jax.tree.map(noise, jax.device_get(_init(config, jax.random.key(0))))


MODELS = pytest.mark.parametrize('model', tiny.MODELS)


@pytest.mark.parametrize('positions', ['learned', 'rope'])
@MODELS
def test_a_token_changes_nothing_before_it_in_any_example(model, positions):
  config = tiny.model_config(**tiny.MODELS[model], positions=positions)
  params = _random_params(config)
  batch = tiny.batch()
  before = _logits(config, params, batch['inputs'], tiny.tokens(batch))
  changed = batch['inputs'].copy()
  changed[2, 6] = changed[2, 6] % (tiny.V - 1) + 1
  after = _logits(config, params, changed, tiny.tokens(batch))
  assert np.array_equal(before[:, :6], after[:, :6])
  assert not np.array_equal(before[2, 6:], after[2, 6:])


def test_examples_see_each_other_only_inside_a_group():
  config = tiny.model_config()
  params = _random_params(config)
  batch = tiny.batch()
  changed = batch['inputs'].copy()
  changed[2, 6] = changed[2, 6] % (tiny.V - 1) + 1
  before = _logits(config, params, batch['inputs'], tiny.tokens(batch))
  after = _logits(config, params, changed, tiny.tokens(batch))
  touched = np.abs(before - after).max(axis=(1, 2)) > 0
  assert touched.tolist() == [True] * tiny.M + [False] * (tiny.B - tiny.M)


def test_permuting_the_examples_of_a_group_permutes_the_outputs():
  config = tiny.model_config()
  params = _random_params(config)
  batch = tiny.batch()
  order = np.array([2, 0, 3, 1, 4, 5, 6, 7])
  straight = _logits(config, params, batch['inputs'], tiny.tokens(batch))
  permuted = _logits(config, params, batch['inputs'][order], tiny.tokens(batch))
  np.testing.assert_allclose(permuted, straight[order], rtol=2e-5, atol=2e-5)


@pytest.mark.heavy
@pytest.mark.parametrize(
  'positions, split, changes',
  [('learned', 5, {}), ('none', 1, {'parameterization': 'completep', 'base': 'd_model=6'})],
)
@MODELS
def test_decoding_equals_the_forward_pass(model, positions, split, changes):
  changes = tiny.MODELS[model] | changes
  config = tiny.model_config(**changes, positions=positions, final_norm=True)
  config = config.dropless() or config  # decoding drops nobody
  params = _random_params(config)
  batch = tiny.batch()

  forward = _logits(config, params, batch['inputs'], tiny.tokens(batch))
  decoded = _decode(config, split, params, batch)
  np.testing.assert_allclose(decoded, forward[:, split - 1 :], rtol=2e-5, atol=2e-5)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(config, split, params, batch):
  """Logits of positions split - 1 and later: a prefill of `split` positions, then single steps."""
  model = model_lib.bind(config, params)
  inputs_BL, tokens = jnp.asarray(batch['inputs']), tiny.tokens(batch)

  def advance(state, position):
    at = jax.tree.map(lambda a_BL: a_BL[:, position], tokens)
    logits_BV, state = model.step(inputs_BL[:, position], state, at)
    return state, logits_BV

  prefix = jax.tree.map(lambda a_BL: a_BL[:, :split], tokens)
  length = inputs_BL.shape[1]
  first_BV, state = model.prefill(inputs_BL[:, :split], prefix, length)
  rest = jax.lax.scan(advance, state, jnp.arange(split, length))[1]
  return jnp.concatenate([first_BV[:, None], jnp.moveaxis(rest, 0, 1)], axis=1)


@pytest.mark.parametrize('mode', ['unmixed', 'discrete'])
def test_decoding_equals_the_forward_pass_in_every_mode(mode):
  config = evaluate.decoding(tiny.model_config(), mode)
  params, batch = _random_params(config), tiny.batch()
  forward = _logits(config, params, batch['inputs'], tiny.tokens(batch))
  decoded = _decode(config, 5, params, batch)
  np.testing.assert_allclose(decoded, forward[:, 4:], rtol=2e-5, atol=2e-5)


@pytest.mark.heavy
def test_the_forward_pass_can_give_way_to_steps_at_every_position():
  length = 3
  mixing = ((('moe', 'mot', 'attention'), 1),)
  config = tiny.model_config(blocks=mixing, moe_router='expert_choice', d_model=6, positions='rope')
  params, batch = _random_params(config), tiny.batch(length=length)
  forward = _logits(config, params, batch['inputs'], tiny.tokens(batch))
  for split in range(1, length + 1):
    decoded = _decode(config, split, params, batch)
    np.testing.assert_allclose(decoded, forward[:, split - 1 :], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('model, grows', [('dense', True), ('mamba', False)])
def test_only_attention_remembers_every_position(model, grows):
  config = tiny.model_config(**tiny.MODELS[model])

  def size(length):
    params = jax.eval_shape(lambda: model_lib.init_params(config, jax.random.key(0)))
    state = jax.eval_shape(lambda p: model_lib.bind(config, p).init_state(tiny.B, length), params)
    return sum(leaf.size for leaf in jax.tree.leaves(state))

  assert (size(64) > size(8)) == grows


def test_padding_has_no_influence_on_other_examples():
  config = tiny.model_config()
  params = _random_params(config)
  batch = tiny.batch()
  batch['segments'][1] = 0
  before = _logits(config, params, batch['inputs'], tiny.tokens(batch))
  changed = batch['inputs'].copy()
  changed[1] = changed[1] % (tiny.V - 1) + 1
  after = _logits(config, params, changed, tiny.tokens(batch))
  real = np.array([0, *range(2, tiny.B)])
  assert np.array_equal(before[real], after[real])


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_gradients(config, params, batch):
  def loss(params):
    nats, targets, aux = model_lib.bind(config, params).loss(batch)
    return nats / targets, aux

  return jax.value_and_grad(loss, has_aux=True)(params)


def test_gradients_reach_every_expert_and_the_controller():
  config = tiny.model_config()
  _, gradients = _loss_and_gradients(config, _random_params(config), tiny.batch())
  layer = gradients['stack_1']['1_mot']['layer']
  per_expert = np.abs(layer['experts']['w_in']).max(axis=(-1, -2))
  assert per_expert.shape == (2, tiny.E) and (per_expert > 0).all()
  assert (np.abs(layer['controller']).max(axis=-2) > 0).all()


@pytest.mark.heavy
@pytest.mark.parametrize('model', ['moe mamba', 'moe in mamba'])
def test_gradients_reach_every_parameter_of_mamba_with_experts(model):
  config = tiny.model_config(**tiny.MODELS[model])
  (_, aux), gradients = _loss_and_gradients(config, _random_params(config), tiny.batch())
  assert (aux['moe/load'] > 0).all()
  for path, gradient in jax.tree.leaves_with_path(gradients):
    per_expert = np.abs(gradient.reshape(*gradient.shape[:2], -1)).max(axis=-1)
    per_layer = per_expert if 'experts' in jax.tree_util.keystr(path) else per_expert.max()
    assert (per_layer > 0).all(), path


def test_every_part_with_experts_counts_once():
  config = tiny.model_config(**tiny.MODELS['moe in mamba'])
  (_, aux), _ = _loss_and_gradients(config, _random_params(config), tiny.batch())
  switches = 1 + 2  # one beside Mamba, two inside
  assert aux['auxiliary_loss'].shape == (switches,)
  assert aux['moe/load'].shape == (switches, tiny.E)


@pytest.mark.parametrize(
  'model, changes',
  [
    ('mot', {'remat': 'full'}),
    ('mot', {'remat': 'dots'}),
    ('mot', {'remat': 'save_moe'}),
    ('token choice', {'remat': 'save_moe'}),
    ('mot', {'loss_chunk': 4}),
  ],
)
def test_how_it_is_computed_does_not_change_the_loss(model, changes):
  plain = tiny.model_config(**tiny.MODELS[model])
  other = dataclasses.replace(plain, **changes)
  params = _random_params(plain)
  (loss, _), gradients = _loss_and_gradients(plain, params, tiny.batch())
  (other_loss, _), other_gradients = _loss_and_gradients(other, params, tiny.batch())
  np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, other_gradients, gradients)


@pytest.mark.parametrize(
  'target, changes, loops',
  [
    ('cpu', {}, 0),
    ('cpu', {'remat': 'full'}, 1),
    ('cpu', {'blocks': ((('mlp',), 9),)}, 1),
    ('tpu', {}, 1),
  ],
)
def test_few_blocks_are_unrolled_on_a_cpu(target, changes, loops):
  config = tiny.model_config(**{'blocks': ((('mlp',), 2),)} | changes)
  params = jax.eval_shape(lambda: model_lib.init_params(config, jax.random.key(0)))
  loss = lambda params: model_lib.bind(config, params).loss(tiny.batch())[0]
  with platform.compiling_for(target):
    program = jax.jit(loss).lower(params).as_text()
  assert program.count('stablehlo.while') == loops


@pytest.mark.parametrize('router', ['token choice', 'expert choice'])
def test_recomputation_keeps_the_chosen_experts(router):
  config = tiny.model_config(**tiny.MODELS[router], remat='full')
  loss = lambda params: model_lib.bind(config, params).loss(tiny.batch())[0]
  program = str(jax.make_jaxpr(jax.grad(loss))(_random_params(config)))
  assert program.count('top_k[') == 1  # of one scanned block: none in its backward pass


def test_groups_and_routing_change_without_the_parameters():
  config = tiny.model_config(mot_expert_width=0)
  other = config.with_mot(group_size=1, routing='discrete')
  assert other.mot.width(other.d_ff) == config.mot.width(config.d_ff) == 16
  assert (other.mot.group_size, other.mot.routing) == (1, 'discrete')
  assert config.with_mot().mot.group_size == tiny.M
  params, batch = _random_params(config), tiny.batch()
  changed = _logits(other, params, batch['inputs'], tiny.tokens(batch))
  assert np.abs(changed - _logits(config, params, batch['inputs'], tiny.tokens(batch))).max() > 0.1


def test_aux_has_one_number_per_mixing_block():
  (_, aux), _ = _loss_and_gradients(
    tiny.model_config(), _random_params(tiny.model_config()), tiny.batch()
  )
  assert aux['mot/entropy'].shape == (2,)
  assert ((0 < aux['mot/entropy']) & (aux['mot/entropy'] <= 1)).all()


def test_bfloat16_activations_keep_float32_parameters_and_loss():
  config = tiny.model_config(dtype='bfloat16')
  params = _random_params(config)
  (loss, _), gradients = _loss_and_gradients(config, params, tiny.batch())
  (exact, _), _ = _loss_and_gradients(tiny.model_config(), params, tiny.batch())
  assert loss.dtype == jnp.float32
  assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype('float32')}
  np.testing.assert_allclose(loss, exact, rtol=2e-2)


def test_a_model_in_bfloat16_alone_has_a_float32_loss_and_bfloat16_gradients():
  config = tiny.model_config(dtype='bfloat16', param_dtype='bfloat16')
  params = jax.tree.map(lambda p: p.astype('bfloat16'), _random_params(tiny.model_config()))
  both = functools.partial(_loss_and_gradients.__wrapped__, config)
  (loss, _), gradients = jax.eval_shape(both, params, tiny.batch())
  assert loss.dtype == jnp.float32
  assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype('bfloat16')}
  batch = tiny.batch()
  exact = _logits(
    tiny.model_config(), _random_params(tiny.model_config()), batch['inputs'], tiny.tokens(batch)
  )
  got = _logits(config, params, batch['inputs'], tiny.tokens(batch))
  assert np.abs(got - exact).mean() < 0.05 * np.abs(exact).mean()


def test_float64_is_float64(x64):
  """Parameters, loss, gradients and logits; the loss close to that of float32."""
  config = tiny.model_config(**tiny.MODELS['moe in mamba'], dtype='float64', param_dtype='float64')
  params, batch = _random_params(config), tiny.batch()
  (loss, _), gradients = _loss_and_gradients(config, params, batch)
  logits = _logits(config, params, batch['inputs'], tiny.tokens(batch))
  assert {a.dtype for a in jax.tree.leaves((params, loss, gradients, logits))} == {
    jnp.dtype('float64')
  }
  chunked = dataclasses.replace(config, loss_chunk=4)
  (again, _), _ = _loss_and_gradients(chunked, params, batch)
  np.testing.assert_allclose(again, loss, rtol=1e-13)
  narrow = tiny.model_config(**tiny.MODELS['moe in mamba'])
  (float32, _), _ = _loss_and_gradients(narrow, jax.tree.map(np.float32, params), batch)
  np.testing.assert_allclose(float32, loss, rtol=1e-5)


@pytest.mark.parametrize('final_norm', [False, True])
@pytest.mark.parametrize('sublayers', [('attention', 'mlp'), ('mamba',)])
@pytest.mark.parametrize('d_model', [64, 256])
def test_tied_embeddings_start_at_the_log_of_the_vocabulary(d_model, sublayers, final_norm):
  sizes = dict(vocab_size=259, max_length=64, d_model=d_model, num_heads=2, d_ff=4 * d_model)
  config = tiny.model_config(
    **sizes, blocks=((sublayers, 4),), final_norm=final_norm, tie_embeddings=True
  )
  ids = np.random.default_rng(0).integers(259, size=(2, 65), dtype=np.int32)
  batch = tiny.batch(rows=2, length=64) | {'inputs': ids[:, :-1], 'targets': ids[:, 1:]}

  @jax.jit
  def first_loss(key):
    nats, number, _ = model_lib.bind(config, model_lib.init_params(config, key)).loss(batch)
    return nats / number

  assert first_loss(jax.random.key(0)) == pytest.approx(np.log(259), rel=0.15)


def test_a_float32_residual_stream_keeps_what_bfloat16_rounds_away():
  params = _random_params(tiny.model_config())
  inputs, tokens = tiny.batch()['inputs'], tiny.tokens(tiny.batch())
  logits = lambda **changes: _logits(tiny.model_config(**changes), params, inputs, tokens)
  error = lambda **changes: np.abs(logits(dtype='bfloat16', **changes) - logits()).mean()
  assert 0 < error(residual_float32=True) < 0.9 * error()

  @jax.jit
  def activations(params):
    config = tiny.model_config(dtype='bfloat16', residual_float32=True)
    return model_lib.bind(config, params).activations(inputs, tokens)[0]

  assert activations(params).dtype == jnp.bfloat16


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'num_heads': 5}, 'model.num_heads = 5 must divide d_model = 12'),
    ({'dtype': 'float64'}, 'float64 needs JAX_ENABLE_X64=1'),
    ({'param_dtype': 'float64'}, 'float64 needs JAX_ENABLE_X64=1'),
    ({'activation': 'silu'}, 'model.activation must be one of relu, relu2, gelu, swiglu'),
    ({'blocks': ((('attention', 'mlpp'), 1),)}, "model.blocks: no sublayer 'mlpp'"),
    ({'blocks': ((('mamba+mo',), 1),)}, "model.blocks: no sublayer 'mo'"),
    ({'blocks': tiny.MOE_IN_MAMBA, 'mamba_moe_in': 'in+out'}, 'moe_in must be some of conv, gate'),
    ({'blocks': tiny.MOE_IN_MAMBA, 'mamba_moe_in': 'out+out'}, "got 'out.out'"),
    ({'blocks': tiny.MOE_IN_MAMBA, 'moe_shared_width': 3}, 'moe.shared_width = 3'),
    (
      {'blocks': tiny.MOE_IN_MAMBA, 'mamba_shared_router': True, 'moe_jitter': 0.1},
      'mamba.shared_router. has no noise',
    ),
    ({'blocks': ()}, 'model.blocks must hold at least one'),
    ({'blocks': (('attention', 'mlp'), 2)}, "and nothing else, as in .* got \\(\\('attention'"),
    ({'blocks': 'attention'}, "model.blocks must be a tuple, got 'attention'"),
    ({'blocks': ((('mlp',), 0),)}, 'must repeat once or more, got 0'),
    ({'blocks': ((('mlp',), 10**12),)}, 'at most 10000 sublayers, got 1000000000000'),
    ({'mot_group_size': 0}, 'model.mot.group_size must be at least 1'),
    ({'mot_routing': 'hard'}, 'model.mot.routing must be one of softmax, discrete, uniform'),
    ({'mot_emit': 'all'}, 'model.mot.emit must be one of same, softmax_over_experts, raw, top_1'),
    ({'mot_separate_temperatures': True}, 'needs temperature_mode = learned'),
    ({'mot_emit': 'raw', 'mot_separate_controllers': True}, 'nothing to act on with emit = raw'),
    ({'mot_temperature': 0.0}, 'model.mot.temperature must be positive'),
    ({'mot_num_experts': 7, 'mot_expert_width': 0}, 'must divide d_ff \\* group_size = 96'),
    ({'positions': 'rope', 'num_heads': 4}, 'even head width'),
    ({'positions': 'rope', 'head_dim': 5}, 'even head width, got model.head_dim = 5'),
    ({'qk_norm_per_head': True}, 'set that to True, too'),
    ({'loss_chunk': -2}, 'model.loss_chunk'),
    ({'d_ff': 0}, 'model.d_ff must be at least 1'),
    ({'moe_router': 'hash'}, 'model.moe.router must be one of token_choice, expert_choice'),
    ({'moe_experts_per_token': 7}, 'a token cannot choose 7 of 6 experts'),
    ({'moe_granularity': 5}, 'granularity = 5 must divide model.d_ff = 24'),
    ({'moe_capacity_factor': 0.01}, 'fewer than 1. Raise group_size'),
    (
      {'moe_capacity_factor': -1.0},
      'capacity_factor must be at least 0 and at most 1000000, got -1',
    ),
    ({'moe_group_size': 0}, 'model.moe.group_size must be at least 1'),
    ({'moe_scores': 'softmax_over_tokens'}, 'one of softmax, sigmoid with .* token_choice'),
    (
      {'moe_router': 'expert_choice', 'moe_scores': 'sigmoid'},
      'one of softmax, softmax_over_tokens with model.moe.router = expert_choice; got .sigmoid',
    ),
    ({'moe_router': 'expert_choice', 'moe_renormalize': True}, 'in which tokens choose'),
    ({'moe_router': 'expert_choice', 'moe_capacity_factor': 0.0}, 'must be positive'),
  ],
)
def test_impossible_configs_are_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    if any(name.startswith('moe_') for name in changes):
      changes = {'blocks': tiny.MOE} | changes
    tiny.model_config(**changes)


def test_sizes_of_what_a_model_does_not_use_are_free():
  """Mamba has no heads, whatever its width; attention alone no feed-forward to be cut."""
  tiny.model_config(blocks=tiny.MAMBA, d_model=16, num_heads=3)
  tiny.model_config(blocks=tiny.MOE_MAMBA, num_heads=5)
  tiny.model_config(blocks=tiny.DENSE, d_ff=7, moe_granularity=5, mot_expert_width=0)
  tiny.model_config(blocks=tiny.DENSE, moe_capacity_factor=0.01, mamba_moe_in='nothing')
  with pytest.raises(ValueError, match='num_heads = 5 must divide d_model = 12'):
    tiny.model_config(blocks=((('mamba+attention',), 1),), num_heads=5)


def _cast_shapes(jaxpr):
  """Shapes of all arrays whose dtype a program changes."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'convert_element_type':
      yield equation.invars[0].aval.shape
    for inner in jaxprs_in_params(equation.params):
      yield from _cast_shapes(inner)


@pytest.mark.parametrize('tied', [False, True])
@MODELS
def test_a_position_casts_no_matrix(model, tied):
  """Those that layers cast are given in their dtype, and those that they do not cast, in theirs."""
  config = tiny.model_config(**tiny.MODELS[model], dtype='bfloat16', tie_embeddings=tied)
  params = jax.eval_shape(lambda: model_lib.init_params(config, jax.random.key(0)))
  prepared = jax.eval_shape(lambda p: model_lib.prepared(config, p), params)
  shapes = {leaf.shape for leaf in jax.tree.leaves(prepared) if leaf.ndim > 1}
  shapes |= {params['embedding'].shape, params['embedding'].shape[::-1]}

  def step(params, prepared):
    model = model_lib.bind(config, params)
    tokens = model_lib.common.TokenInfo(jnp.ones(tiny.M, int), jnp.zeros(tiny.M, int))
    state = model.init_state(tiny.M, tiny.L)
    return model.step(jnp.zeros(tiny.M, int), state, tokens, prepared)

  cast = lambda prepared: {*_cast_shapes(jax.make_jaxpr(step)(params, prepared).jaxpr)} & shapes
  assert not cast(prepared)
  assert cast(None)
  for path, leaf in jax.tree_util.tree_leaves_with_path(prepared):
    if parameters.of(parameters.name_of(path)).kind in ('readout', 'vector'):
      assert leaf.dtype == jnp.float32
