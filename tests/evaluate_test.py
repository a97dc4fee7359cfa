"""What sequences that are evaluated together see of each other."""

import functools
import json
import types

import jax
import numpy as np
import pytest
import sentencepiece

from configs import mot as mot_config
from moejax import (
  cli,
  config as config_lib,
  data,
  eval_report,
  evaluate,
  model as model_lib,
  sharding,
  step as step_lib,
  tokenize,
  tokenizer as tokenizer_program,
)
from moejax.data import tokenizer
from tests import tiny


@functools.cache
def _params():
  config = tiny.model_config(init_scale=1.0)
  return jax.jit(model_lib.init_params, static_argnums=0)(config, jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def _logits_of(config, params, inputs_BL):
  return model_lib.bind(config, params).logits(inputs_BL, tiny.tokens(tiny.batch()))


def _logits(config, inputs_BL):
  return _logits_of(config, _params(), inputs_BL)


@pytest.mark.parametrize(
  'mode, group_size, touched',
  [('mixed', 0, tiny.M), ('mixed', 2, 2), ('discrete', 0, tiny.M), ('unmixed', 0, 1)],
)
def test_a_request_influences_its_group_alone(mode, group_size, touched):
  config = evaluate.decoding(tiny.model_config(), mode, group_size)
  assert config.mixed_sequences == touched
  inputs = tiny.batch()['inputs']
  changed = inputs.copy()
  changed[0] = changed[0] % (tiny.V - 1) + 1
  difference = np.abs(_logits(config, inputs) - _logits(config, changed)).max(axis=(1, 2))
  assert (difference[touched:] == 0).all() and (difference > 0).sum() > (touched > 1)


def test_discrete_is_the_limit_of_low_temperature():
  inputs = tiny.batch()['inputs']
  cold = tiny.model_config(mot_temperature=1e-6)
  discrete = evaluate.decoding(tiny.model_config(), 'discrete')
  np.testing.assert_allclose(_logits(cold, inputs), _logits(discrete, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  'changes, mode, group_size, message',
  [
    ({'blocks': tiny.DENSE}, 'unmixed', 0, 'no layer of this model mixes'),
    ({'blocks': tiny.DENSE}, 'mixed', 4, 'no layer of this model mixes'),
    ({'blocks': tiny.MOE}, 'mixed_with_corpus', 0, 'no layer of this model mixes'),
    (tiny.MODELS['expert choice'], 'discrete', 0, 'mode discrete is for Mixture of Tokens'),
    (tiny.MODELS['expert choice'], 'mixed', 1, 'fewer than 1. Raise group_size'),
    ({}, 'unmixed', 4, 'mode unmixed has groups of 1'),
    ({}, 'blended', 0, "expected one of mixed, unmixed, .*, got 'blended'"),
  ],
)
def test_modes_that_a_model_cannot_have_are_refused(changes, mode, group_size, message):
  with pytest.raises(ValueError, match=message):
    evaluate.decoding(tiny.model_config(**changes), mode, group_size)


def test_groups_that_a_batch_cannot_be_cut_into_are_refused():
  run_config = types.SimpleNamespace(
    model=tiny.model_config(), data=types.SimpleNamespace(batch_size=8)
  )
  with pytest.raises(ValueError, match='--group_size=16 must divide the 8 sequences'):
    evaluate.compare_modes(run_config, None, None, ['mixed_with_corpus'], [16], 1)
  with pytest.raises(ValueError, match='--modes: expected at least one of mixed'):
    evaluate.compare_modes(run_config, None, None, [], [0], 1)


def test_expert_choice_chooses_in_other_groups():
  config = evaluate.decoding(tiny.model_config(**tiny.MODELS['expert choice']), 'mixed', 8)
  assert config.mixed_sequences == config.moe.group_size == 8


def _loader(seed):
  batches = [tiny.batch(seed=seed + i) for i in range(2 * tiny.M)]
  return types.SimpleNamespace(batch=batches.__getitem__, tokenizer=tokenizer.BytesTokenizer())


def test_every_sequence_stands_once_among_sequences_of_the_corpus():
  validation, corpus = _loader(0), _loader(100)
  mine = np.concatenate([validation.batch(i)['inputs'] for i in range(2)])
  batches = list(evaluate._among_others(map(validation.batch, range(2)), corpus, tiny.M))
  counted = [batch['counted'][:, 0] for batch in batches]
  found = np.concatenate([b['inputs'][c] for b, c in zip(batches, counted, strict=True)])
  np.testing.assert_array_equal(found, mine)
  for step, batch in enumerate(batches):
    assert (batch['counted'].reshape(-1, tiny.M, tiny.L).sum(1) == 1).all()
    np.testing.assert_array_equal(
      batch['inputs'][~counted[step]], corpus.batch(step)['inputs'][~counted[step]]
    )


def test_the_loss_among_the_corpus_is_of_the_own_sequences():
  config, mesh = tiny.model_config(), sharding.make_mesh(sharding.MeshConfig(1, 1, 1, -1))
  with jax.set_mesh(mesh):
    done = evaluate.evaluation(config, _params(), _loader(0), 1, mesh, corpus=_loader(100))
  result = done.result
  assert result['tokens'] == tiny.B * tiny.L and done.extent['batches'] == 1
  nats = 0.0
  for batch in evaluate._among_others(iter([_loader(0).batch(0)]), _loader(100), tiny.M):
    logits = jax.nn.log_softmax(_logits(config, batch['inputs']))
    picked = np.take_along_axis(np.asarray(logits), batch['targets'][..., None], axis=-1)[..., 0]
    nats -= picked[batch['counted']].sum()
  np.testing.assert_allclose(result['loss'], nats / result['tokens'], rtol=1e-5)


def _evaluate_text(num_batches, **changes):
  """The loss over the validation split of a folder of texts, and its loader."""
  section = mot_config.get_config('debug').data.to_dict() | {'batch_size': 4, 'sequence_length': 8}
  loader = data.make_loader(data.DataConfig(**section | changes), 'validation')
  vocab_size = loader.tokenizer.vocab_size
  config = tiny.model_config(vocab_size=vocab_size, blocks=tiny.DENSE)
  params = jax.jit(model_lib.init_params, static_argnums=0)(config, jax.random.key(0))
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1, -1))
  with jax.set_mesh(mesh):
    return evaluate.evaluate(config, params, loader, num_batches, mesh)[0], loader


@pytest.mark.parametrize('source', ['text', 'tokens'])
def test_bits_per_byte_are_of_the_text_that_was_evaluated(tmp_path, source):
  for i in range(80):
    (tmp_path / f'{i}.txt').write_text(
      f'in the house of {i}, naïve\n' * (1 + i % 5) + 'x ' * (i % 7)
    )
  documents = [f'in the house of {i}, naïve\n' * 5 for i in range(40)]
  model = tokenizer_program.train_sentencepiece([d.encode() for d in documents], 300)
  (tmp_path / 'tok.model').write_bytes(model)
  text = {'source': 'text', 'files': f'{tmp_path}/*.txt', 'tokenizer': f'{tmp_path}/tok.model'}
  changes = text
  if source == 'tokens':
    config = mot_config.get_config('debug').data.to_dict() | text
    tokenize.write(data.DataConfig(**config), tmp_path / 'tokens')
    changes = text | {'source': 'tokens', 'files': str(tmp_path / 'tokens')}
  result, loader = _evaluate_text(2, **changes)
  batches = [loader.batch(step) for step in range(2)]
  ids = np.concatenate([batch['targets'][batch['segments'] > 0] for batch in batches])
  pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
  num_bytes = sum(  # sequences begin anywhere, so that a character may be cut
    1 if pieces.is_byte(i) else len(pieces.id_to_piece(i).replace('\u2581', ' ').encode())
    for i in ids.tolist()
    if not pieces.is_control(i)
  )
  assert (ids == 1).any() and 56 < result['tokens'] == len(ids) < num_bytes
  bits = result['loss'] * len(ids) / np.log(2)
  np.testing.assert_allclose(result['bits_per_byte'], bits / num_bytes, rtol=1e-6)


def test_no_row_is_evaluated_twice(tmp_path):
  for i in range(60):
    (tmp_path / f'{i}.txt').write_text(''.join(chr(97 + (i * 7 + j) % 26) for j in range(11)))
  text = {'source': 'text', 'files': f'{tmp_path}/*.txt', 'batch_size': 2}
  one, loader = _evaluate_text(2, **text)
  whole, more, everything = (
    _evaluate_text(n, **text)[0] for n in (loader.num_batches, loader.num_batches + 3, None)
  )
  assert loader.num_batches > 2 and 24 < one['tokens'] <= 32
  batches = map(loader.batch, range(loader.num_batches))
  padded = sum((~batch['counted'] | (batch['segments'] == 0)).sum() for batch in batches)
  assert padded and whole['tokens'] == loader.num_batches * 16 - padded
  assert whole == more == everything


def _main(monkeypatch, results=(), final=0, **args):
  """What the program asks of `evaluations`, after it has printed these results."""
  args = {'workdir': 'run', 'batches': 0, 'modes': ['mixed'], 'group_size': [0]} | args
  args = {'files': None, 'by_position': None, 'json': False} | args
  data_config = data.DataConfig(**mot_config.get_config('debug').data.to_dict())
  run_config = types.SimpleNamespace(
    train=types.SimpleNamespace(final_eval_batches=final), data=data_config
  )
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1, -1))
  asked = []
  monkeypatch.setattr(evaluate.flags, 'FLAGS', types.SimpleNamespace(**args))
  monkeypatch.setattr(evaluate.cli, 'join_processes', lambda: None)
  monkeypatch.setattr(evaluate.config_lib, 'check_batch', lambda *_: None)
  monkeypatch.setattr(evaluate, 'load_run', lambda *_: (run_config, 6, None, mesh))
  monkeypatch.setattr(evaluate, 'evaluations', lambda *args, **_: asked.append(args) or results)
  evaluate.main({})
  (asked,) = asked
  return {'num_batches': asked[5], 'text': asked[6]}


@pytest.mark.parametrize(
  'batches, final, files, expected',
  [
    (0, 0, None, None),
    (-1, 7, None, None),
    (0, 7, None, 7),
    (3, 7, None, 3),
    (0, 7, '*.txt', None),
    (3, 7, '*.txt', 3),
  ],
)
def test_how_many_batches(monkeypatch, batches, final, files, expected):
  asked = _main(monkeypatch, batches=batches, files=files, final=final)
  assert asked['num_batches'] == expected


@pytest.mark.parametrize(
  'files, source',
  [
    ('books/*.txt', 'text'),
    ('c4/*.json.gz', 'jsonl'),
    ('a.jsonl', 'jsonl'),
    ('a.parquet', 'parquet'),
    ('.', 'tokens'),
  ],
)
def test_which_text(monkeypatch, files, source):
  text = _main(monkeypatch, files=files)['text']
  assert (text.source, text.files, text.validation_files) == (source, files, files)


def _evaluation():
  """Two batches of two sequences of 3, the second half empty."""
  done = evaluate.Evaluation()
  nats = np.array([[[1.0, 2, 3], [4, 5, 6]], [[2, 2, 2], [0, 0, 0]]])
  for nats_BL, counts_BL in zip(nats, nats > 0, strict=True):
    parts = (nats_BL, counts_BL)
    sums = step_lib.Sums(*(p.sum(axis) for axis in (1, 0) for p in parts))
    done.add(nats_BL.sum(), counts_BL.sum(), 4, sums, {'mot/entropy': np.array([0.5])})
  return done


def test_the_standard_error_is_that_of_sequences():
  result = _evaluation().result
  assert result['loss'] == 27 / 9 and result['tokens'] == 9
  means = np.array([2.0, 5.0, 2.0])  # sequences of equal length
  np.testing.assert_allclose(result['standard_error'], means.std(ddof=1) / np.sqrt(3))


def test_a_table_for_a_terminal_and_json_for_a_pipe(monkeypatch, capsys, tmp_path):
  results = [({'mode': 'mixed', 'group_size': 2, 'leaks': True}, _evaluation())]
  path = tmp_path / 'by' / 'positions.csv'
  _main(monkeypatch, results, by_position=str(path))
  row = json.loads(capsys.readouterr().out)
  assert row['step'] == 6 and row['loss'] == 3 and row['leaks'] and row['mot/entropy/00'] == 0.5
  assert row['perplexity'] == pytest.approx(np.exp(3)) and (row['batches'], row['bytes']) == (2, 8)
  assert row['by_position'] == [
    {'first': 0, 'last': 0, 'loss': 7 / 3, 'tokens': 3},
    {'first': 1, 'last': 1, 'loss': 3, 'tokens': 3},
    {'first': 2, 'last': 2, 'loss': 11 / 3, 'tokens': 3},
  ]
  assert path.read_text().splitlines()[1] == '"mixed, group 2",0,2.333333,3'
  assert path.with_suffix('.png').stat().st_size > 1000
  monkeypatch.setattr(evaluate.sys.stdout, 'isatty', lambda: True)
  _main(monkeypatch, results, by_position=str(path))
  lines = capsys.readouterr().out.splitlines()
  assert (
    lines[1].split() == 'mode group leaks nats/token perplexity bits/byte tokens batches'.split()
  )
  assert lines[2].startswith('mixed  2      yes    3.0000 ± 1.0000')
  assert lines[4:6] == ['position  mixed, group 2', '0         2.3333']
  _main(monkeypatch, results, json=True)
  assert json.loads(capsys.readouterr().out)['loss'] == 3
  with pytest.raises(ValueError, match='--by_position: expected a .csv file, got positions'):
    _main(monkeypatch, by_position='positions')


def test_buckets_of_positions_are_powers_of_two():
  nats, tokens = np.arange(11.0), np.ones(11)
  found = eval_report.buckets(nats, tokens)
  assert [(b['first'], b['last']) for b in found] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 10)]
  assert [b['loss'] for b in found] == [0, 1, 2.5, 5.5, 9]


@pytest.mark.parametrize('kind', ['dense', 'mot'])
def test_parts_of_an_evaluated_batch_add_up(kind):
  config = tiny.model_config(**tiny.MODELS[kind], loss_chunk=4)
  params = (
    _params()
    if kind == 'mot'
    else jax.jit(model_lib.init_params, static_argnums=0)(config, jax.random.key(0))
  )
  batch = tiny.batch() | {'segments': tiny.batch()['segments'].copy()}
  batch['segments'][-1] = 0
  batch['segments'][0, 7:] = 0
  nats, targets, _, sums = step_lib.eval_step(config, 1, params, batch)
  logits = jax.nn.log_softmax(
    jax.jit(lambda p: model_lib.bind(config, p).logits(batch['inputs'], tiny.tokens(batch)))(params)
  )
  nats_BL = -np.take_along_axis(np.asarray(logits), batch['targets'][..., None], axis=-1)[..., 0]
  nats_BL *= batch['segments'] > 0
  np.testing.assert_allclose(nats, nats_BL.sum(), rtol=1e-5)
  np.testing.assert_allclose(sums.nats_B, nats_BL.sum(1), rtol=1e-5)
  np.testing.assert_allclose(sums.nats_L, nats_BL.sum(0), rtol=1e-5)
  assert sums.targets_B.tolist() == [7] + [11] * 6 + [0] and targets == sums.targets_L.sum() == 73


def test_fields_of_a_run_are_flags():
  overrides = {}
  argv = ['evaluate', '--config.model.mot.group_size=4', '--workdir=a', '--config.data.files=b=c']
  assert cli._without_overrides(argv, overrides) == ['evaluate', '--workdir=a']
  assert overrides == {'model.mot.group_size': '4', 'data.files': 'b=c'}


def test_fields_of_a_run_can_be_set_anew():
  config = mot_config.get_config()
  width = config_lib.resolve(config).model.mot.width(config.model.d_ff)
  texts = {'model.mot.group_size': '4', 'optimizer.peak_lr': '1', 'model.final_norm': 'true'}
  config_lib.override(config, texts)
  model = config_lib.resolve(config).model
  assert model.mot.group_size == 4 and model.mot.width(model.d_ff) == width
  assert config.optimizer.peak_lr == 1.0 and config.model.final_norm is True


@pytest.mark.parametrize(
  'name, text, message',
  [
    ('model.mot.group_sise', '4', "no such field; did you mean 'model.mot.group_size'"),
    ('model.mot.group_size', '4.5', "group_size must be an integer, got '4.5'"),
    ('model.mot.group_size', 'x', "group_size must be an integer, got 'x'"),
  ],
)
def test_fields_that_cannot_be_set_are_named(name, text, message):
  with pytest.raises(ValueError, match=message):
    config_lib.override(mot_config.get_config(), {name: text})
