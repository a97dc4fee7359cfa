"""moejax as a library: what docs/library.md shows, and what people try first."""

import inspect
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import cli, layers, model as model_lib, step, train
from moejax.layers import common, moe
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / 'docs/library.md').read_text()
LAYERS = {
  'MixtureOfTokens': {'num_experts': 6, 'group_size': 4},
  'MixtureOfExperts': {'expansion_rate': 3, 'group_size': 4},
  'Mamba': {'state_size': 5},
  'Mamba2': {'state_size': 5, 'head_width': 4},
  'Attention': {'num_heads': 3},
  'MLP': {'activation': 'swiglu'},
}
X_BLD = jax.random.normal(jax.random.key(0), (tiny.B, tiny.L, tiny.D))


def _make(name, **changes):
  return getattr(layers, name)(d_model=tiny.D, rngs=nnx.Rngs(0), **LAYERS[name] | changes)


def test_importing_it_is_light():
  program = 'import sys, moejax; print(moejax.__all__, "jax" in sys.modules, "absl" in sys.modules)'
  done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
  assert done.stdout.endswith('False False\n'), done.stdout + done.stderr


def test_the_public_names_are_those_of_the_page_and_documented():
  listed = re.findall(r'^\| `moejax\.(\w+)', PAGE, re.M)
  assert sorted(listed) == sorted(moejax.__all__)
  assert set(moejax.__all__) <= {*dir(moejax)}
  (row,) = re.findall(r'^\| `moejax\.layers` \| (.*) \|', PAGE, re.M)
  assert sorted(re.findall(r'`(\w+)`', row)) == sorted(layers.__all__)
  for module in (moejax, layers):
    for name in module.__all__:
      documented = getattr(module, name)
      assert inspect.getdoc(documented), name
      for method, function in inspect.getmembers(documented, inspect.isfunction):
        own = function.__module__.startswith('moejax') and not method.startswith('_')
        assert not (own and documented is moejax.Run) or function.__doc__, f'{name}.{method}'


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  """The names that the page's examples leave, and the folder of its run."""
  blocks = re.findall(r'```python\n(.*?)```', PAGE, re.S)
  assert len(blocks) == 3 and all(len(re.findall(r'^\S', b, re.M)) <= 10 for b in blocks)
  found = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder := tmp_path_factory.mktemp('library'))
    exec(compile('\n'.join(blocks), 'library.md', 'exec'), found)
    yield found, folder / 'runs/small'


@pytest.mark.heavy
def test_the_examples_of_the_page(page):
  found, folder = page
  run, V = found['run'], found['model'].config.vocab_size
  assert found['y_BLD'].shape == (8, 16, 64)
  assert found['logits_BLV'].shape == (4, 33, V) and found['logits_BLV'].dtype == jnp.float32
  assert abs(found['value'] - math.log(V)) < 2
  assert found['logits_LV'].shape == (9, V) and found['logits_LV'].dtype == np.float32
  assert isinstance(found['text'], str) and isinstance(found['second'], str)
  assert run.step == run.config.train.steps == 6 and 'step 6 of 6' in repr(run)
  np.testing.assert_array_equal(run.model.head[...], run.params['head'])
  with pytest.raises(AttributeError):
    run.step = 7
  assert moejax.fit(found['config'], folder).step == 6  # finished: it is only loaded


@pytest.mark.heavy
def test_a_run_scores_text_as_its_model_does(page):
  run = page[0]['run']
  text = 'def f(x):\n  return x + 1\n'
  ids = run.tokenizer.encode(text)
  alone = run.model.config.mot.group_size
  inputs_BL = np.tile(np.concatenate([[run.tokenizer.eos_id], ids[:-1]])[None], (alone, 1))
  logits_LV = np.asarray(run.model(inputs_BL))[0]
  nats = jax.nn.logsumexp(logits_LV, axis=1) - logits_LV[np.arange(len(ids)), ids]
  np.testing.assert_allclose(run.loss(text), nats.mean(), rtol=1e-5)
  np.testing.assert_allclose(run.logits(inputs_BL[0]), logits_LV, atol=2e-5)
  np.testing.assert_allclose(run.logits(inputs_BL)[1], logits_LV, atol=2e-5)
  context = run.model.config.max_length
  long = text * 9
  assert len(run.tokenizer.encode(long)) > 2 * context
  assert abs(run.loss(long) - run.loss(text)) < 1
  assert run.generate('a', 4, temperature=0) == run.generate(['a', 'a'], 4, temperature=0)[1]


@pytest.mark.heavy
@pytest.mark.parametrize(
  ('bad', 'message'),
  [
    (lambda run: run.loss(''), "expected a text that is not empty, got ''"),
    (lambda run: run.loss(['a', 'b']), r"expected a text .* got \['a', 'b'\]"),
    (lambda run: run.logits([3, 999]), 'ids from 0 to 258, got 3 to 999'),
    (lambda run: run.generate([5, 6], 4), r'a list of texts, got \[5, 6\]'),
    (lambda run: run.generate([], 4), r'a list of texts, got \[\]'),
    (lambda run: run.logits(''), r'1 to 32 .* got int32\[0\]'),
    (lambda run: run.logits('x' * 33), r'got int32\[33\]'),
    (lambda run: run.logits([0.5]), r'integer ids.* got float64\[1\]'),
    (lambda run: run.generate('a', 4, temprature=1), 'temprature.*did you mean'),
  ],
)
def test_a_run_refuses_bad_input(page, bad, message):
  with pytest.raises(ValueError, match=message):
    bad(page[0]['run'])


@pytest.mark.parametrize('name', LAYERS)
def test_a_layer_takes_activations_alone(name):
  layer = _make(name)
  tokens = common.TokenInfo.unpadded(X_BLD.shape)
  np.testing.assert_array_equal(tokens.positions[2], np.arange(tiny.L))
  forward = jax.jit(lambda layer, *args: layer(*args))
  y_BLD, aux = forward(layer, X_BLD)
  assert y_BLD.shape == X_BLD.shape and isinstance(aux, dict)
  np.testing.assert_array_equal(y_BLD, forward(layer, X_BLD, tokens)[0])


def test_the_defaults_of_layers_are_those_of_a_run():
  default = {f.name: f.default for f in model_lib.ModelConfig.__dataclass_fields__.values()}
  name, scale, dtype = common.Initializer()
  assert (name, scale) == (default['init'], default['init_scale'])
  assert jnp.dtype(dtype) == default['param_dtype']
  for name in LAYERS:
    for argument, parameter in inspect.signature(getattr(layers, name).__init__).parameters.items():
      if argument in default and parameter.default not in (parameter.empty, None):
        assert parameter.default == default[argument], f'{name}: {argument}'
  assert _make('MixtureOfTokens').experts.w_in.shape[2] == 4 * tiny.D * 4 // 6


def test_keywords_are_fields_of_the_config():
  by_keyword = _make('MixtureOfExperts', router='expert_choice')
  config = moe.MoEConfig(expansion_rate=3, group_size=4, router='expert_choice')
  by_config = layers.MixtureOfExperts(config, d_model=tiny.D, rngs=nnx.Rngs(0))
  assert by_keyword.config == by_config.config
  np.testing.assert_array_equal(by_keyword(X_BLD)[0], by_config(X_BLD)[0])
  both = layers.MixtureOfExperts(config, granularity=2, d_model=tiny.D, rngs=nnx.Rngs(0))
  assert both.config.num_experts == 6


@pytest.mark.parametrize('init', ['kaiming_uniform', common.kaiming_uniform])
def test_init_may_be_a_name(init):
  explicit = _make('MLP', init=layers.Initializer('kaiming_uniform', 1.0, jnp.float32))
  np.testing.assert_array_equal(_make('MLP', init=init).w_in[...], explicit.w_in[...])
  assert _make('MLP', init=layers.Initializer(dtype=jnp.bfloat16)).w_in.dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ('bad', 'message'),
  [
    (lambda: _make('MixtureOfTokens', num_expert=3), "'num_expert'; did you mean 'num_experts'"),
    (lambda: _make('MixtureOfExperts', activaton='relu'), "did you mean 'activation'"),
    (lambda: _make('Mamba', state_size=0), r'model\.mamba\.state_size must be at least 1'),
    (lambda: _make('MixtureOfTokens', num_experts=5), 'num_experts = 5 must divide d_ff'),
    (lambda: _make('MixtureOfExperts', granularity=5), 'granularity = 5 must divide'),
    (lambda: _make('Attention', num_heads=5), 'num_heads = 5 must divide d_model = 12'),
    (lambda: _make('MLP', activation='silu'), "activation must be one of relu, .*; got 'silu'"),
    (lambda: _make('MLP', init='normal'), "init must be one of .* got 'normal'"),
    (lambda: _make('MLP', init=jax.nn.initializers.zeros), 'init must be one of'),
    (lambda: layers.MixtureOfTokens(64, d_model=64, rngs=nnx.Rngs(0)), 'must be a MoTConfig'),
    (lambda: _make('MixtureOfTokens')(X_BLD[:3]), 'group_size = 4 must divide'),
    (lambda: _make('MixtureOfTokens')(X_BLD[0]), r'd_model = 12\]; got float32\[\d+, 12\]'),
    (lambda: _make('MixtureOfExperts')(X_BLD.astype(int)), r'd_model = 12\]; got int32\['),
    *(
      (lambda name=name: _make(name)(X_BLD[..., 1:]), r'd_model = 12\]; got')
      for name in LAYERS
      if name != 'MLP'
    ),
    (lambda: moejax.LanguageModel({}, nnx.Rngs(0)), r'moejax\.build\(config\)'),
    (
      lambda: moejax.LanguageModel(moejax.ModelConfig(max_length=8), nnx.Rngs(0)),
      'vocab_size = 0: a model needs',
    ),
    (lambda: moejax.get_config('mott'), 'mott: no such file; bundled files are'),
    (lambda: moejax.get_config('mot:meduim'), "did you mean 'medium'"),
    (lambda: moejax.load('/no/such/folder'), 'holds no run'),
  ],
)
def test_bad_input_is_one_sentence(bad, message):
  with pytest.raises(ValueError, match=message):
    bad()


def test_a_layer_that_is_not_here_is_found():
  with pytest.raises(AttributeError, match=r'did you mean moejax\.layers\.MixtureOfExperts'):
    _ = moejax.MixtureOfExperts
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    _ = moejax.nothing


def test_an_interrupt_is_raised_once_everything_is_saved(monkeypatch, tmp_path):
  monkeypatch.setattr(train, 'train', lambda *_: cli.INTERRUPTED)
  with pytest.raises(KeyboardInterrupt, match='saved in .*run; the same call resumes it'):
    moejax.fit('mot:debug', tmp_path / 'run')


def test_configs_by_name():
  by_name = moejax.get_config('mot:debug')
  assert by_name == moejax.get_config('configs/mot.py:debug') == moejax.get_config('mot.py:debug')
  assert by_name.model.mot.group_size == 4


@pytest.fixture(scope='module')
def model():
  return moejax.build('mot:debug')


def test_a_model_begins_as_a_run_does(model):
  config = moejax.get_config('mot:debug')
  state = jax.jit(step.fresh_state(moejax.config.resolve(config)))()
  ours = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  jax.tree.map(np.testing.assert_array_equal, ours, state['params'])


def test_the_vocabulary_of_a_tokenizer_that_is_not_here_is_known():
  config = moejax.get_config('mot:mini,debug')
  config.data.tokenizer = 'gpt2:nowhere'
  assert moejax.build(config).config.vocab_size == 50_260


def test_a_model_takes_ids(model):
  ids_BL = np.arange(4 * 9).reshape(4, 9) + 3
  logits_BLV = model(ids_BL)
  tokens = common.TokenInfo.unpadded(ids_BL.shape)
  np.testing.assert_array_equal(logits_BLV, model.logits(jnp.asarray(ids_BL), tokens))
  batch = {'inputs': ids_BL, 'targets': ids_BL}
  whole = batch | {'segments': tokens.segments, 'positions': tokens.positions}
  np.testing.assert_array_equal(model.loss(batch)[0], model.loss(whole)[0])
  for bad in (ids_BL[0], ids_BL * 1.0):
    with pytest.raises(ValueError, match='takes integer ids'):
      model(bad)


def test_a_model_with_learned_positions_has_no_more_than_these():
  config = tiny.model_config(blocks=tiny.DENSE)
  model = moejax.LanguageModel(config, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='12 positions exceed the 11'):
    model(jnp.ones((2, tiny.L + 1), int))
