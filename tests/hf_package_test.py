"""Both directions of moejax.convert against the package transformers; make test-hf installs it."""

import jax
import numpy as np
import pytest

from configs import dense, like, mamba, moe
from moejax import config as config_lib, convert, model as model_lib, run_folder
from tests import hf_test

pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from tests.reference import make_hf  # noqa: E402  (needs both)

pytestmark = [
  pytest.mark.heavy,
  # transformers and its dependencies warn about themselves.
  pytest.mark.filterwarnings('default'),
]

IDS = np.random.default_rng(1).integers(3, 259, (3, 9), dtype=np.int32)
TEXT = 'def f(x):\n  return "héllo 🦊" * x\n'


def _equal(workdir, network):
  """The run in a folder and a model of transformers compute the same."""
  expected = make_hf.logits(network, IDS)
  assert np.abs(expected).max() > 0.5
  np.testing.assert_allclose(hf_test.logits(workdir, IDS), expected, atol=1e-4)
  np.testing.assert_array_equal(hf_test.greedy(workdir, IDS), make_hf.greedy(network, IDS))


def _loaded(folder):
  network, info = transformers.AutoModelForCausalLM.from_pretrained(
    folder, output_loading_info=True
  )
  assert not any(info.values()), info
  return network.eval()


RUNS = {
  'llama': dense.get_config('debug,llama'),
  'shared heads': dense.get_config('debug,llama'),
  'gpt2': dense.get_config('debug,gpt2'),
  'gpt2 relu': dense.get_config('debug,gpt2'),
  'mixtral': moe.get_config('debug,mixtral,top_k=3'),
  'olmoe': moe.get_config('debug,olmoe,top_k=2'),
  'mamba': mamba.get_config('debug,hf'),
  'mamba2': mamba.get_config('debug,hf,mamba2'),
  **{f'like {name}': like.get_config(name) for name in like.MODELS},
}
RUNS['shared heads'].model.update(num_heads=4, num_kv_heads=2, rope_theta=300.0, norm_eps=1e-2)
RUNS['gpt2 relu'].model.update(activation='relu', tie_embeddings=True)
RUNS['olmoe'].model.moe.update(granularity=2, renormalize=True)


@pytest.mark.parametrize('name', RUNS)
def test_an_exported_run_is_loaded_and_computes_the_same(name, tmp_path):
  config = RUNS[name]
  config.model.moe.group_size, config.data.batch_size = 1, 2
  run_config = config_lib.resolve(config)
  draw = np.random.default_rng(0).standard_normal
  initial = model_lib.init_params(run_config.model, jax.random.key(0))
  # Norms and biases, too, have values at which they matter.
  params = jax.tree.map(lambda p: p + (0.2 * draw(p.shape)).astype(p.dtype), initial)
  convert.write_run(config, run_config, params, tmp_path / 'run')
  convert.to_hf(tmp_path / 'run', tmp_path / 'hf')
  network = _loaded(tmp_path / 'hf')
  network.generation_config.eos_token_id = None
  _equal(tmp_path / 'run', network)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
  ids = tokenizer(TEXT)['input_ids']
  assert ids == run_config.tokenizer.encode(TEXT).tolist()
  assert tokenizer.decode(ids) == TEXT
  assert tokenizer.eos_token_id == network.config.eos_token_id == 1


CHANGES = {
  'gpt2': {'tie_word_embeddings': False, 'n_inner': 24, 'activation_function': 'relu'},
  'llama': {'num_key_value_heads': 4, 'tie_word_embeddings': True, 'rms_norm_eps': 0.1},
  'mixtral': {'num_experts_per_tok': 1, 'num_key_value_heads': 1, 'sliding_window': 32},
  'olmoe': {'norm_topk_prob': True, 'num_key_value_heads': 4, 'num_experts_per_tok': 2},
  'qwen3_moe': {'norm_topk_prob': False, 'num_key_value_heads': 4, 'head_dim': 2},
  'mamba': {'use_conv_bias': False, 'layer_norm_epsilon': 1e-2, 'tie_word_embeddings': False},
  'mamba2': {'n_groups': 3, 'layer_norm_epsilon': 1e-2, 'tie_word_embeddings': True},
}


@pytest.mark.parametrize('name', CHANGES)
def test_a_saved_model_is_imported_and_computes_the_same(name, tmp_path):
  network = make_hf.random_model(name, seed=3, **CHANGES[name])
  network.save_pretrained(tmp_path / 'hf', max_shard_size='20kB')
  assert len(list((tmp_path / 'hf').glob('*.safetensors'))) > 1
  convert.from_hf(hf_test.config(), str(tmp_path / 'hf'), tmp_path / 'run')
  _equal(tmp_path / 'run', network)
  convert.to_hf(tmp_path / 'run', tmp_path / 'back')
  back = _loaded(tmp_path / 'back')
  if name != 'mamba':  # ours always has the bias, here 0
    mine, theirs = back.state_dict(), network.state_dict()
    assert mine.keys() == theirs.keys() and all((mine[n] == theirs[n]).all() for n in mine)
  np.testing.assert_array_equal(make_hf.logits(back, IDS), make_hf.logits(network, IDS))


@pytest.mark.parametrize('name', ['llama', 'mixtral'])
def test_bfloat16_weights_are_kept(name, tmp_path):
  network = make_hf.random_model(name).bfloat16()
  network.save_pretrained(tmp_path / 'hf')
  config = hf_test.config(**{'model.param_dtype': 'bfloat16'})
  convert.from_hf(config, str(tmp_path / 'hf'), tmp_path / 'run')
  convert.to_hf(tmp_path / 'run', tmp_path / 'back')
  back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'back', dtype='auto')
  mine, theirs = back.state_dict(), network.state_dict()
  assert all(mine[n].dtype == theirs[n].dtype and (mine[n] == theirs[n]).all() for n in theirs)


def test_a_model_comes_with_its_tokenizer(tmp_path):
  """Saved by transformers: the run encodes, decodes and stops as its tokenizer does."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

  library = Tokenizer(models.BPE())
  library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  library.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=260, special_tokens=['<|end|>'], initial_alphabet=alphabet, show_progress=False
  )
  library.train_from_iterator([TEXT] * 5, trainer)
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token='<|end|>')
  tokenizer.save_pretrained(tmp_path / 'hf')
  network = make_hf.random_model('llama')
  network.config.eos_token_id = 0
  network.save_pretrained(tmp_path / 'hf')
  convert.from_hf(hf_test.config(), str(tmp_path / 'hf'), tmp_path / 'run')
  mine = run_folder.load_run(tmp_path / 'run')[0].tokenizer
  assert mine.encode(TEXT).tolist() == tokenizer(TEXT)['input_ids']
  assert mine.eos_id == 0 and mine.decode(mine.encode(TEXT)) == TEXT
  convert.to_hf(tmp_path / 'run', tmp_path / 'back')
  again = transformers.AutoTokenizer.from_pretrained(tmp_path / 'back')
  assert again(TEXT)['input_ids'] == tokenizer(TEXT)['input_ids']
  assert again.eos_token == '<|end|>'
