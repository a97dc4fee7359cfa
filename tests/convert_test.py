"""Conversions are exact both ways, and failed ones leave nothing behind."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import dense, fine_grained, mamba, moe, mot, run
from moejax import (
  cli,
  config as config_lib,
  convert,
  decode,
  generate,
  hf,
  model as model_lib,
  run_folder,
  train,
)
from moejax.hf import folder
from moejax.layers.common import TokenInfo

pytestmark = pytest.mark.heavy

ROOT = pathlib.Path(__file__).parent.parent
FILES = {'README.md', 'config.json', 'model.safetensors'}
FILES |= {'tokenizer.json', 'tokenizer_config.json'}
HF = ROOT / 'tests' / 'reference' / 'hf_mamba'


def _config(module=mamba, **changes):
  config = module.get_config('debug')
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config


def _params(workdir):
  return jax.device_get(run_folder.load_run(workdir)[2])


def _assert_same(tree, other):
  assert jax.tree.structure(tree) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


# ---- transformers


def _hf_folder(folder, tensors=None, shards=0, **options):
  """A copy of the reference with other tensors, in `shards` files, and other options."""
  folder.mkdir()
  options = json.loads((HF / 'config.json').read_text()) | options
  (folder / 'config.json').write_text(json.dumps(options))
  tensors = tensors or _hf_tensors()
  parts = [dict(list(tensors.items())[i :: shards or 1]) for i in range(shards or 1)]
  names = [f'model-{i}.safetensors' for i in range(shards)] or ['model.safetensors']
  for name, part in zip(names, parts, strict=True):
    safetensors.numpy.save_file(part, folder / name, {'format': 'pt'})
  if shards:
    index = {'weight_map': {t: n for n, part in zip(names, parts, strict=True) for t in part}}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  return folder


def _hf_tensors(folder=HF):
  return safetensors.numpy.load_file(folder / 'model.safetensors')


@pytest.fixture(scope='module')
def from_hf(tmp_path_factory):
  """The reference as a run."""
  workdir = tmp_path_factory.mktemp('convert') / 'run'
  convert.from_hf(_config(), str(HF), workdir)
  return workdir


def _logits(workdir, dtype, ids):
  run_config, _, params, _ = run_folder.load_run(workdir)
  config = dataclasses.replace(run_config.model, dtype=dtype, param_dtype=dtype)
  params = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), dtype), params)
  positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
  tokens = TokenInfo(np.ones_like(ids), positions)

  @jax.jit
  def logits(params):
    x_BLD, _ = model_lib.bind(config, params).activations(ids, tokens)
    return x_BLD @ params['embedding'].T  # LanguageModel.logits is float32

  return logits(params)


def test_logits_match_transformers(from_hf):
  reference = np.load(HF / 'logits.npz')
  logits = _logits(from_hf, 'float32', reference['ids'])
  assert np.abs(reference['logits']).max() > 1
  np.testing.assert_allclose(logits, reference['logits'], atol=2e-6)


def test_logits_match_in_float64(from_hf, x64):
  reference = np.load(HF / 'logits.npz')
  logits = _logits(from_hf, 'float64', reference['ids'])
  np.testing.assert_allclose(logits, reference['logits_float64'], rtol=1e-12, atol=1e-13)


def test_export_is_bitwise(from_hf, tmp_path):
  convert.to_hf(from_hf, tmp_path / 'hf')
  assert {path.name for path in (tmp_path / 'hf').iterdir()} == FILES
  theirs, ours = (json.loads((f / 'config.json').read_text()) for f in (HF, tmp_path / 'hf'))
  assert ours == {name: theirs[name] for name in ours}
  _assert_same(_hf_tensors(tmp_path / 'hf'), _hf_tensors())


@pytest.mark.parametrize(
  'theirs, ours',
  [
    ({'bos': 5, 'eos': 7, 'pad': 0}, {'bos': 5, 'eos': 7, 'pad': 0}),
    ({'bos': None, 'eos': [3, 0], 'pad': None}, {'bos': None, 'eos': 3, 'pad': None}),
    ({}, {'bos': 0, 'eos': 0, 'pad': 0}),  # the defaults of transformers
  ],
)
def test_special_ids_are_kept(tmp_path, theirs, ours):
  options = json.loads((HF / 'config.json').read_text())
  for name in ours:
    options.pop(f'{name}_token_id')
  options |= {f'{name}_token_id': i for name, i in theirs.items()}
  (tmp_path / 'config.json').write_text(json.dumps(options))
  config = _config()
  fields = hf.MAMBA.read(json.loads((tmp_path / 'config.json').read_text()), 32)
  config.update_from_flattened_dict(fields)
  run_config = config_lib.resolve(config)
  assert run_config.tokenizer.eos_id == ours['eos']
  back = hf.MAMBA.write(run_config)
  assert {name: back[f'{name}_token_id'] for name in ours} == ours


def test_our_own_run_exports_its_tokenizers_ids():
  config = _config(**{'model.norm': 'rms_norm', 'model.final_norm': True})
  run_config = config_lib.resolve(config)
  options = hf.of_run(run_config).write(run_config)
  ids = [options[f'{name}_token_id'] for name in ('bos', 'eos', 'pad')]
  assert ids == [None, 1, 0]


def test_generation_of_an_imported_model_ends_at_its_own_eos_id(from_hf, monkeypatch):
  run_config, _, params, _ = run_folder.load_run(from_hf)
  said = ([(0, token)] for token in (70, 1, 71, 0, 72))  # 1 is our eos_id, 0 is theirs
  monkeypatch.setattr(decode, 'stream', lambda *args: said)
  (text,) = generate.continuations(run_config.model, params, run_config.tokenizer, ['x'], 5)
  assert text == 'CD'


def test_shards_and_old_names_are_read(from_hf, tmp_path):
  tensors = _hf_tensors()
  tensors['backbone.embedding.weight'] = tensors.pop('backbone.embeddings.weight')
  tensors['lm_head.weight'] = tensors['backbone.embedding.weight']
  convert.from_hf(_config(), _hf_folder(tmp_path / 'hf', tensors, shards=3), tmp_path / 'run')
  _assert_same(_params(tmp_path / 'run'), _params(from_hf))


def test_a_head_of_its_own_and_no_convolution_bias(tmp_path):
  tensors = {name: t for name, t in _hf_tensors().items() if not name.endswith('conv1d.bias')}
  tensors['lm_head.weight'] = 2 * tensors['backbone.embeddings.weight']
  options = {'tie_word_embeddings': False, 'use_conv_bias': False}
  convert.from_hf(_config(), _hf_folder(tmp_path / 'hf', tensors, **options), tmp_path / 'run')
  params = _params(tmp_path / 'run')
  np.testing.assert_array_equal(params['head'], tensors['lm_head.weight'].T)
  assert not params['stack_0']['0_mamba']['layer']['conv_bias'].any()
  convert.to_hf(tmp_path / 'run', tmp_path / 'back')
  back = _hf_tensors(tmp_path / 'back')
  assert json.loads((tmp_path / 'back' / 'config.json').read_text())['use_conv_bias']
  _assert_same({name: back[name] for name in tensors}, tensors)
  assert len(back) == len(tensors) + 2


@pytest.mark.parametrize('param_dtype', ['float32', 'bfloat16'])
def test_bfloat16_keeps_its_values(tmp_path, param_dtype):
  tensors = {name: t.astype(jnp.bfloat16) for name, t in _hf_tensors().items()}
  config = _config(**{'model.param_dtype': param_dtype})
  convert.from_hf(config, _hf_folder(tmp_path / 'hf', tensors, dtype='bfloat16'), tmp_path / 'run')
  convert.to_hf(tmp_path / 'run', tmp_path / 'back')
  _assert_same(
    _hf_tensors(tmp_path / 'back'), {name: t.astype(param_dtype) for name, t in tensors.items()}
  )
  assert json.loads((tmp_path / 'back' / 'config.json').read_text())['dtype'] == param_dtype


@pytest.mark.parametrize(
  'options, message',
  [
    ({'use_bias': True}, 'use_bias = True is not supported, only False'),
    ({'hidden_act': 'gelu'}, "hidden_act = 'gelu' is not supported"),
    ({'time_step_rank': 3}, 'time_step_rank = 3 is not supported, only 2'),
    ({'model_type': 'jamba'}, 'model_type must be one of .*, nemotron_h; got jamba'),
    ({'vocab_size': 100}, 'model.vocab_size = 100 is smaller than the 259 ids'),
    ({'expand': 3}, r'mixer.A_log: checkpoint \(40, 5\) vs config \(60, 5\)'),
    ({'num_hidden_layers': 1}, 'layers.1.mixer.A_log: only in the checkpoint'),
    ({'tie_word_embeddings': False}, 'lm_head.weight: not in the checkpoint'),
  ],
)
def test_unsupported_mambas_are_rejected(tmp_path, options, message):
  folder = _hf_folder(tmp_path / 'hf', **options)
  with pytest.raises(ValueError, match=message):
    convert.from_hf(_config(), folder, tmp_path / 'run')
  assert [path.name for path in tmp_path.iterdir()] == ['hf']


def _no_config(folder):
  (folder / 'config.json').unlink()


def _no_width(folder):
  (folder / 'config.json').write_text('{"model_type": "mamba", "vocab_size": 264}')


def _only_pytorch(folder):
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')


def _missing_shard(folder):
  index = {'weight_map': {'backbone.norm_f.weight': 'model-7.safetensors'}}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))


@pytest.mark.parametrize(
  'damage, message',
  [
    (_no_config, 'cannot read .*config.json'),
    (_no_width, 'hidden_size, num_hidden_layers must be given'),
    (_only_pytorch, 'has no model.safetensors. A pytorch_model.bin cannot be read without PyTorch'),
    (_missing_shard, 'cannot read .*model-7.safetensors'),
  ],
)
def test_incomplete_folders_are_rejected(tmp_path, damage, message):
  damage(_hf_folder(tmp_path / 'hf'))
  with pytest.raises(ValueError, match=message):
    convert.from_hf(_config(), str(tmp_path / 'hf'), tmp_path / 'run')


def test_a_name_on_the_hub(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(ValueError, match=r"--model=some/mamba: no such folder.*'moejax\[hf\]'"):
    folder.find('some/mamba')
  hub = types.SimpleNamespace(snapshot_download=lambda name, allow_patterns: f'/hub/{name}')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
  assert folder.find('some/mamba') == pathlib.Path('/hub/some/mamba')

  def offline(name, allow_patterns):
    raise OSError('no network\nand much more')

  hub.snapshot_download = offline
  with pytest.raises(ValueError, match='the download from the hub failed: no network$'):
    folder.find('some/mamba')


@pytest.mark.parametrize('kind', ['mamba', 'mamba2'])
def test_mambas_that_transformers_cannot_express_are_rejected(kind):
  changes = {'model.blocks': (((kind,), 2),), f'model.{kind}.expand': 1.5}
  run_config = config_lib.resolve(_config(**changes))
  with pytest.raises(ValueError) as error:
    hf.of_run(run_config)
  problems = [line.strip() for line in str(error.value).splitlines() if ' must ' in line]
  fields = ['norm', 'final_norm', f'{kind}.expand']
  assert [p.split(' must')[0] for p in problems] == [f'model.{field}' for field in fields]


# ---- one file

RUNS = {
  'mot': _config(mot, **{'model.param_dtype': 'bfloat16', 'model.tie_embeddings': True}),
  'token choice': _config(moe, **{'model.moe.balance_bias': True, 'model.moe.shared_width': 8}),
  'expert choice': _config(fine_grained, **{'model.positions': 'learned'}),
  'mamba': _config(mamba, **{'model.norm': 'rms_norm', 'model.final_norm': True}),
}


def _make_run(config, workdir):
  """A run of random parameters; returns them."""
  run_config = config_lib.resolve(config)
  draw = np.random.default_rng(0).standard_normal
  params = jax.tree.map(
    lambda leaf: draw(leaf.shape).astype(leaf.dtype), convert.abstract_params(run_config.model)
  )
  convert.write_run(config, run_config, params, workdir)
  return params


@pytest.fixture(scope='module')
def mot_file(tmp_path_factory):
  folder = tmp_path_factory.mktemp('mot')
  _make_run(RUNS['mot'], folder / 'run')
  convert.to_safetensors(folder / 'run', folder / 'model.safetensors')
  return folder / 'model.safetensors'


@pytest.mark.parametrize('kind', RUNS)
def test_round_trip_is_bitwise(kind, tmp_path):
  params = _make_run(RUNS[kind], tmp_path / 'run')
  convert.to_safetensors(tmp_path / 'run', tmp_path / 'model.safetensors')
  convert.from_safetensors(tmp_path / 'model.safetensors', tmp_path / 'new')
  _assert_same(_params(tmp_path / 'new'), params)
  assert run_folder.read(tmp_path / 'new') == run_folder.read(tmp_path / 'run')


def test_the_file_names_every_block(mot_file):
  tensors = safetensors.numpy.load_file(mot_file)
  params = _params(mot_file.parent / 'run')
  assert params['stack_0']['1_mot']['layer']['controller'].shape == (2, 16, 8)
  for block in range(2):
    controller_DE = tensors[f'stack_0.{block}.1_mot.layer.controller']
    expected_DE = params['stack_0']['1_mot']['layer']['controller'][block]
    _assert_same(controller_DE, expected_DE)
  assert {'embedding', 'stack_0.1.0_attention.layer.qkv'} < set(tensors)
  with safetensors.safe_open(mot_file, 'np') as file:
    metadata = file.metadata()
  assert metadata['step'] == '0' and json.loads(metadata['config'])['model']['d_model'] == 16


def _change(name, value=None):
  def change(tensors, metadata):
    tensors.pop(name)
    if value is not None:
      tensors[name] = value

  return change


def _forget(tensors, metadata):
  metadata.clear()


def _new_field(tensors, metadata):
  config = json.loads(metadata['config'])
  config['model']['unheard_of'] = 1
  metadata['config'] = json.dumps(config)


def _other_tokenizer(tensors, metadata):
  metadata['tokenizer'] = '0' * 16


@pytest.mark.parametrize(
  'change, message',
  [
    (_change('embedding'), r'embedding: not in the checkpoint, config \(259, 16\)'),
    (_change('stack_0.1.1_mot.norm.bias', np.zeros(3)), r'checkpoint \(3,\) vs config \(16,\)'),
    (_change('embedding', np.zeros((259, 16), 'f')), 'checkpoint float32 vs config bfloat16'),
    (_forget, 'has no config in its metadata'),
    (_new_field, 'unheard_of.* is not known to this version of moejax'),
    (_other_tokenizer, 'data.tokenizer: the checkpoint was trained with tokenizer 0000'),
  ],
)
def test_files_that_do_not_match_their_config_are_rejected(mot_file, tmp_path, change, message):
  tensors = safetensors.numpy.load_file(mot_file)
  with safetensors.safe_open(mot_file, 'np') as file:
    metadata = file.metadata()
  change(tensors, metadata)
  safetensors.numpy.save_file(tensors, tmp_path / 'changed', metadata)
  with pytest.raises(ValueError, match=message):
    convert.from_safetensors(tmp_path / 'changed', tmp_path / 'run')
  assert [path.name for path in tmp_path.iterdir()] == ['changed']


def test_files_that_are_not_safetensors_are_rejected(mot_file, tmp_path):
  (tmp_path / 'cut').write_bytes(mot_file.read_bytes()[:-1])
  for path in (tmp_path / 'cut', tmp_path / 'nothing'):
    with pytest.raises(ValueError, match=f'cannot read {path} as safetensors'):
      convert.from_safetensors(path, tmp_path / 'run')


def test_the_tokenizer_flag_replaces_a_moved_tokenizer(mot_file, tmp_path):
  tensors = safetensors.numpy.load_file(mot_file)
  with safetensors.safe_open(mot_file, 'np') as file:
    metadata = file.metadata()
  metadata['config'] = metadata['config'].replace('"bytes"', '"elsewhere.model"')
  safetensors.numpy.save_file(tensors, tmp_path / 'moved', metadata)
  with pytest.raises(ValueError, match="data.tokenizer: .*'elsewhere.model'"):
    convert.from_safetensors(tmp_path / 'moved', tmp_path / 'run')
  convert.from_safetensors(tmp_path / 'moved', tmp_path / 'run', 'bytes')
  assert run_folder.read(tmp_path / 'run').data.tokenizer == 'bytes'


def test_nothing_is_overwritten(mot_file, tmp_path):
  run_folder = mot_file.parent / 'run'
  with pytest.raises(ValueError, match='already exists and is not overwritten'):
    convert.from_safetensors(mot_file, run_folder)
  with pytest.raises(ValueError, match='already exists and is not overwritten'):
    convert.to_safetensors(run_folder, mot_file)
  with pytest.raises(ValueError, match='holds no run'):
    convert.to_safetensors(tmp_path, tmp_path / 'model.safetensors')
  shutil.copy(run_folder / 'config.json', tmp_path)
  with pytest.raises(ValueError, match='has not written a checkpoint'):
    convert.to_safetensors(tmp_path, tmp_path / 'model.safetensors')


def test_a_full_disk_leaves_nothing(mot_file, tmp_path, monkeypatch):
  def fail(*args):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(run_folder, 'write', fail)
    with pytest.raises(RuntimeError, match='cannot write .*run: .*No space left'):
      convert.from_safetensors(mot_file, tmp_path / 'run')
  with monkeypatch.context() as patch:
    patch.setattr(safetensors.numpy, 'save_file', fail)
    with pytest.raises(RuntimeError, match='cannot write .*new: .*No space left'):
      convert.to_safetensors(mot_file.parent / 'run', tmp_path / 'new')
  assert not list(tmp_path.iterdir())


def test_a_converted_run_trains_like_a_fresh_one(tmp_path):
  changes = {'mesh.tensor': 8, 'model.num_heads': 8, 'optimizer.accumulation': 1}
  changes |= {'train.steps': 2, 'train.eval_batches': 1, 'train.sample_length': 0}
  config = _config(dense, **changes)
  assert train.train(config, tmp_path / 'fresh') == cli.OK
  run_config = config_lib.resolve(config)
  init = lambda: model_lib.init_params(run_config.model, jax.random.key(run_config.train.seed))
  convert.write_run(config, run_config, jax.jit(init)(), tmp_path / 'converted')
  assert train.train(run.get_config(tmp_path / 'converted'), tmp_path / 'converted') == cli.OK
  _assert_same(_params(tmp_path / 'converted'), _params(tmp_path / 'fresh'))


def test_the_program(from_hf, tmp_path):
  def call(*args):
    command = [sys.executable, '-m', 'moejax.convert', *args]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

  args = [f'--model={HF}', '--workdir=run', '--config=configs/mamba.py', '--config.data.seed=7']
  done = call('from_hf', *args)
  assert done.returncode == cli.OK and 'a run at step 0' in done.stdout, done.stderr
  assert run_folder.read(tmp_path / 'run').data.seed == 7
  _assert_same(_params(tmp_path / 'run'), _params(from_hf))
  again = call('from_hf', *args)
  assert again.returncode == cli.USAGE and 'already exists and is not overwritten' in again.stderr
  assert all(line.startswith('error: ') for line in again.stderr.splitlines())
