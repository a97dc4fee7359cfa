"""Models of transformers, without it: saved ones import exactly and are exported unchanged.

The folders in tests/reference were made by tests/reference/make_hf.py. tests/hf_package_test.py
compares with the package itself.
"""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import dense, fine_grained, like, mamba, moe, mot
from moejax import config as config_lib, convert, hf, model as model_lib, run_folder
from moejax.hf import folder as folder_lib
from moejax.layers.common import TokenInfo

pytestmark = pytest.mark.heavy

REFERENCE = pathlib.Path(__file__).parent / 'reference'
NAMES = ['gpt2', 'llama', 'mixtral', 'olmoe', 'qwen3_moe', 'mamba2']


def config(**changes):
  c = dense.get_config('debug')
  c.update_from_flattened_dict({'model.moe.group_size': 1} | changes)
  return c


def tensors(folder):
  return safetensors.numpy.load_file(folder / 'model.safetensors')


def options(folder):
  return json.loads((folder / 'config.json').read_text())


def load(workdir):
  """The model without drops, and the parameters, of a run."""
  run_config, _, params, _ = run_folder.load_run(workdir)
  return run_config.model.dropless() or run_config.model, params


def _at(ids, first=0):
  positions = np.broadcast_to(np.arange(first, first + ids.shape[1], dtype=np.int32), ids.shape)
  return TokenInfo(np.ones_like(ids), positions)


def logits(workdir, ids):
  model, params = load(workdir)
  return jax.jit(lambda p: model_lib.bind(model, p).logits(ids, _at(ids)))(params)


def greedy(workdir, ids, length=20):
  """The greedy continuation, with caches."""
  model, params = load(workdir)
  L = ids.shape[1]

  @jax.jit
  def decode(params):
    network = model_lib.bind(model, params)
    logits_BV, state = network.prefill(ids, _at(ids), L + length)

    def step(carry, position):
      ids_B, state = carry
      tokens = TokenInfo(jnp.ones_like(ids_B), jnp.full_like(ids_B, position))
      logits_BV, state = network.step(ids_B, state, tokens)
      return (logits_BV.argmax(-1).astype(jnp.int32), state), ids_B

    first_B = logits_BV.argmax(-1).astype(jnp.int32)
    return jax.lax.scan(step, (first_B, state), L + jnp.arange(length))[1].T

  return decode(params)


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name, array in found.items():
    assert array.dtype == expected[name].dtype, name
    np.testing.assert_array_equal(array, expected[name], name)


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
  """The saved models as runs, by name."""
  root = tmp_path_factory.mktemp('hf')
  for name in NAMES:
    convert.from_hf(config(), str(REFERENCE / f'hf_{name}'), root / name)
  return {name: root / name for name in NAMES}


@pytest.mark.parametrize('name', NAMES)
def test_logits_and_greedy_continuations_are_those_of_transformers(imported, name):
  reference = np.load(REFERENCE / f'hf_{name}' / 'logits.npz')
  assert np.abs(reference['logits']).max() > 1
  found = logits(imported[name], reference['ids'])
  np.testing.assert_allclose(found, reference['logits'], atol=1e-4)
  np.testing.assert_array_equal(greedy(imported[name], reference['ids']), reference['greedy'])


@pytest.mark.parametrize('name', NAMES)
def test_export_of_an_import_is_bitwise(imported, name, tmp_path):
  convert.to_hf(imported[name], tmp_path / 'back')
  there = REFERENCE / f'hf_{name}'
  assert_same(tensors(tmp_path / 'back'), tensors(there))
  theirs, ours = options(there), options(tmp_path / 'back')
  assert theirs['architectures'] == ours['architectures']
  # Dropout is off, default widths are said, positions end with the run's sequences, and special ids
  # are those of its tokenizer, as these models have none.
  changed = {'eos_token_id', 'pad_token_id'}
  changed |= {'resid_pdrop', 'embd_pdrop', 'attn_pdrop', 'n_inner', 'max_position_embeddings'}
  changed |= {'head_dim'} if name in ('mixtral', 'olmoe') else set()
  changed |= {'intermediate_size'} if name == 'qwen3_moe' else set()  # of dense layers, if any
  assert {n for n in theirs.keys() & ours.keys() if theirs[n] != ours[n]} <= changed


def _folder(tmp_path, name, change=lambda given: given, **new):
  """A copy of a saved model with other options and tensors."""
  folder = tmp_path / f'changed_{name}'
  shutil.copytree(REFERENCE / f'hf_{name}', folder)
  (folder / 'config.json').write_text(json.dumps(options(folder) | new))
  safetensors.numpy.save_file(change(tensors(folder)), folder / 'model.safetensors')
  return folder


def test_older_names_and_buffers_of_gpt2_are_read(imported, tmp_path):
  def older(given):
    found = {name.removeprefix('transformer.'): tensor for name, tensor in given.items()}
    found['h.0.attn.bias'] = np.ones((1, 1, 32, 32), np.float32)
    return found | {'lm_head.weight': found['wte.weight']}

  convert.from_hf(config(), str(_folder(tmp_path, 'gpt2', older)), tmp_path / 'run')
  flat = convert.to_tensors
  assert_same(flat(load(tmp_path / 'run')[1]), flat(load(imported['gpt2'])[1]))


def test_defaults_of_older_files_and_their_rotary_options(tmp_path):
  folder = _folder(tmp_path, 'llama', rope_theta=123.0)
  content = options(folder)
  for name in ('rope_parameters', 'attention_bias', 'mlp_bias', 'head_dim', 'rms_norm_eps'):
    content.pop(name)
  (folder / 'config.json').write_text(json.dumps(content))
  convert.from_hf(config(), str(folder), tmp_path / 'run')
  model, _ = load(tmp_path / 'run')
  assert (model.rope_theta, model.norm_eps, model.num_kv_heads) == (123, 1e-6, 2)


@pytest.mark.parametrize(
  'name, changes, message',
  [
    (
      'llama',
      {'model_type': 'bert'},
      'one of gpt2, llama, mixtral, olmoe, qwen3_moe, mamba, mamba2, nemotron_h; got bert',
    ),
    ('llama', {'attention_bias': True}, 'attention_bias = True is not supported, only False'),
    ('llama', {'head_dim': 8}, r'q_proj.weight: checkpoint \(16, 16\) vs config \(32, 16\)'),
    ('llama', {'head_dim': 5}, 'even head width, got model.head_dim = 5'),
    ('llama', {'intermediate_size': 42}, 'intermediate_size = 42 must be a multiple of 8'),
    (
      'llama',
      {'rope_parameters': {'rope_type': 'llama3'}},
      "rope_type = 'llama3' is not supported",
    ),
    (
      'llama',
      {'rope_scaling': {'type': 'linear'}, 'rope_parameters': None},
      "rope_type = 'linear'",
    ),
    ('llama', {'num_key_value_heads': 3}, 'num_kv_heads = 3 must divide num_heads = 4'),
    ('mixtral', {'hidden_size': 24}, r'checkpoint \(260, 16\) vs config \(260, 24\)'),
    ('llama', {'vocab_size': 10**9}, r'checkpoint \(260, 16\) vs config \(1000000000, 16\)'),
    ('llama', {'vocab_size': 2**40}, 'model.vocab_size must be at most 2147483647'),
    ('llama', {'quantization_config': {'bits': 4}}, 'quantized weights are not supported'),
    ('llama', {'hidden_size': 'wide'}, 'a value has a type or a size that it cannot have'),
    ('llama', {'vocab_size': 2.5}, 'config.json: model.vocab_size must be an integer, got 2.5'),
    ('mixtral', {'num_local_experts': 10**12}, 'num_local_experts = 1000000000000 must be 1 to'),
    ('llama', {'num_hidden_layers': 10**9}, 'expected at most 10000 sublayers, got 2000000000'),
    ('llama', {'num_hidden_layers': 3}, 'layers.2.input_layernorm.weight: not in the checkpoint'),
    ('mixtral', {'sliding_window': 16}, '--config.data.sequence_length=16'),
    ('mixtral', {'num_local_experts': 4}, r'experts.4.w1.weight: only in the checkpoint'),
    ('olmoe', {'clip_qkv': 8.0}, 'clip_qkv = 8.0 is not supported, only None'),
    ('gpt2', {'activation_function': 'gelu'}, "activation_function = 'gelu' is not supported"),
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'only False'),
    ('mamba2', {'head_dim': 8}, r'head_dim = 48 must be expand \* hidden_size = 24'),
    ('mamba2', {'time_step_limit': [0.0, 0.1]}, r'time_step_limit = \[0.0, 0.1\] is not supported'),
  ],
)
def test_unsupported_models_are_rejected_by_name(tmp_path, name, changes, message):
  folder = _folder(tmp_path, name, **changes)
  with pytest.raises(ValueError, match=message):
    convert.from_hf(config(), str(folder), tmp_path / 'run')
  assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_all_that_is_not_supported_is_said_at_once(tmp_path):
  folder = _folder(tmp_path, 'llama', attention_bias=True, mlp_bias=True, sliding_window=2)
  with pytest.raises(ValueError) as error:
    convert.from_hf(config(), str(folder), tmp_path / 'run')
  lines = str(error.value).splitlines()
  assert [line.split(': ')[1].split(' = ')[0] for line in lines] == [
    'attention_bias',
    'mlp_bias',
    'sliding_window',
  ]


VARIANTS = [
  (dense, 'llama'),
  (dense, 'gpt2'),
  (moe, 'mixtral'),
  (moe, 'mixtral,top_k=3'),
  (moe, 'olmoe'),
  (mamba, 'hf'),
  (mamba, 'hf,mamba2'),
  (like, 'olmoe'),
  (like, 'mixtral'),
  (like, 'qwen3-30b-a3b'),
  (like, 'nemotron-3-nano'),
]


@pytest.mark.parametrize('module, variant', VARIANTS)
def test_variants_of_configs_can_be_exported(module, variant):
  run_config = config_lib.resolve(module.get_config(f'debug,{variant}'))
  names = {'hf': 'mamba', 'hf,mamba2': 'mamba2', 'qwen3-30b-a3b': 'qwen3_moe'}
  names |= {'nemotron-3-nano': 'nemotron_h'}
  assert hf.of_run(run_config).name == names.get(variant, variant.split(',')[0])


@pytest.mark.parametrize(
  'module, fields',
  [
    (dense, {'positions', 'final_norm', 'biases', 'norm', 'activation'}),
    (
      moe,
      {'norm', 'final_norm', 'activation', 'moe.renormalize', 'qk_norm', 'qk_norm_per_head'},
    ),
    (mamba, {'norm', 'final_norm'}),
    (
      fine_grained,
      {'norm', 'final_norm', 'activation', 'moe.renormalize', 'qk_norm', 'moe.router'}
      | {'moe.output_norm', 'qk_norm_per_head'},
    ),
  ],
)
def test_models_without_counterpart_are_told_every_field(module, fields):
  with pytest.raises(ValueError) as error:
    hf.of_run(config_lib.resolve(module.get_config('debug')))
  lines = [line.strip() for line in str(error.value).splitlines()]
  named = {line.split(' must')[0] for line in lines if line.startswith('model.')}
  assert named == {f'model.{field}' for field in fields}
  assert 'to_safetensors' in lines[-1]


def test_mixture_of_tokens_is_told_what_can_be_done():
  with pytest.raises(ValueError, match='transition_tuning --router=token_choice') as error:
    hf.of_run(config_lib.resolve(mot.get_config('debug')))
  assert 'attention+moe (mixtral)' in str(error.value)


def test_large_models_are_written_in_several_files_with_an_index(imported, tmp_path):
  architecture, model = hf.ARCHITECTURES['llama'], load(imported['llama'])[0]
  expected = tensors(REFERENCE / 'hf_llama')
  folder_lib.write_tensors(expected, tmp_path, largest_file=20_000)
  assert len(list(tmp_path.glob('model-0000*-of-*.safetensors'))) > 2
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  assert index['metadata']['total_size'] == sum(t.nbytes for t in expected.values())
  abstract = {n: jax.ShapeDtypeStruct(t.shape, t.dtype) for n, t in expected.items()}
  assert_same(folder_lib.read_tensors(tmp_path, architecture, {}, abstract), expected)
  assert model.num_kv_heads == 2


def test_notes_name_what_is_different_there(tmp_path):
  c = moe.get_config('debug,mixtral')
  c.model.document_mask = True
  run_config = config_lib.resolve(c)
  params = model_lib.init_params(run_config.model, jax.random.key(0))
  convert.write_run(c, run_config, params, tmp_path / 'run')
  text = convert.to_hf(tmp_path / 'run', tmp_path / 'hf')
  card = (tmp_path / 'hf' / 'README.md').read_text()
  for note in ('model.moe.capacity_factor = 1.25 has no counterpart', 'model.document_mask has no'):
    assert note in text and note in card
  assert card.startswith('---\nlibrary_name: transformers\n')
  assert (
    "model.norm = 'rms_norm'" in card
    and 'MixtralForCausalLM' in card
    and "from_pretrained('hf')" in card
  )


def test_an_import_keeps_its_tokenizer(tmp_path):
  folder = _folder(tmp_path, 'llama')
  config_lib.resolve(dense.get_config('debug')).tokenizer.save_pretrained(folder)
  convert.from_hf(config(), str(folder), tmp_path / 'run')
  saved = run_folder.read(tmp_path / 'run')
  assert saved.data.tokenizer == str(tmp_path / 'run' / 'tokenizer')
  shutil.rmtree(folder)
  run_config, _, _, _ = run_folder.load_run(tmp_path / 'run')
  assert run_config.tokenizer.encode('héllo').tolist() == [b + 3 for b in 'héllo'.encode()]
  convert.to_hf(tmp_path / 'run', tmp_path / 'back')
  assert {p.name for p in (tmp_path / 'back').iterdir()} > {'tokenizer.json', 'README.md'}
