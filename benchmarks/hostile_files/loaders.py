"""Whatever reads files that people pass on: how such files are written, and read."""

import contextlib
import functools
import gzip
import importlib.util
import io
import json
import lzma
import pathlib
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import safetensors.numpy

import moejax
from moejax import (
  cli,
  compare,
  config as config_lib,
  convert,
  data,
  fields,
  goodput,
  hf,
  manifest,
  metrics,
  report,
  run_folder,
  runner,
  tokenize,
  tokenizer,
)
from moejax.compare import table
from moejax.data import text_files, tokenizer as tokenizer_lib, tokenizer_json
from moejax.hf import folder as hf_folder
from moejax.scaling_laws import collect, grid, laws, predictions, report as law_report, runtime


class Loader(NamedTuple):
  """Something that reads files."""

  write: Callable[[pathlib.Path], object]  # writes good files into a folder that exists
  read: Callable[[pathlib.Path], object]  # reads the folder, without writing into it
  damaged: str = '*'  # a glob of the files that are damaged


def attempt(loader: Loader, folder: pathlib.Path) -> bool:
  """Reads a folder; whether that gave no error. Raises an error that is not for the user."""
  try:
    loader.read(folder)
  except Exception as error:
    with contextlib.redirect_stderr(io.StringIO()):
      cli.exit_code(error)
    return False
  return True


TEXT = 'The quick brown fox\n  jumps over 13 lazy dogs: naïve 🎉.\n'


def _tokens(folder, **changes):
  return data.DataConfig(
    **{'source': 'tokens', 'files': str(folder), 'batch_size': 2, 'sequence_length': 8} | changes
  )


def _write_tokens(folder):
  texts = folder.parent / 'texts.txt'
  texts.write_text(TEXT * 50)
  tokenize.write(_tokens(folder, source='text', files=str(texts)), folder / 'tokens')
  for path in (folder / 'tokens').iterdir():
    path.rename(folder / path.name)
  (folder / 'tokens').rmdir()


def _write_old_tokens(folder):
  """Of the format without checksums."""
  _write_tokens(folder)
  index = json.loads((folder / 'index.json').read_text())
  (folder / 'index.json').write_text(json.dumps(index | {'format': 1}))


def _read_tokens(folder):
  for split in ('train', 'validation'):
    data.make_loader(_tokens(folder), split).batch(0)


def _write_json_tokenizer(spec, folder):
  tokenizer_json.write(folder, spec, eos_id=1)


def _byte_level():
  characters = tokenizer_json.gpt2_alphabet()
  pairs = [('t', 'h'), ('th', 'e'), ('o', 'x')]
  tokens = [*characters, *map(''.join, pairs), '<|endoftext|>']
  merges = '\n'.join(['#version: 0.2', *map(' '.join, pairs)])
  return json.dumps({t: i for i, t in enumerate(tokens)}).encode(), merges.encode()


def _unigram():
  pieces = [['<unk>', 0.0], ['</s>', 0.0], ['\u2581', -2.0], ['\u2581the', -3.0]]
  pieces += [[c, -4.0] for c in 'abcdefghijklmnopqrstuvwxyz']
  space = {'type': 'Metaspace', 'replacement': '\u2581', 'prepend_scheme': 'always', 'split': True}
  options = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  added = [{'id': 1, 'content': '</s>', 'special': True} | options]
  model = {'type': 'Unigram', 'unk_id': 0, 'vocab': pieces, 'byte_fallback': False}
  spec = dict.fromkeys(('truncation', 'padding', 'normalizer', 'post_processor'))
  steps = {'pre_tokenizer': space, 'decoder': space}
  return {'version': '1.0', **spec, **steps, 'added_tokens': added, 'model': model}


def _write_gpt2(folder):
  for name, content in zip(tokenizer_json.GPT2_FILES, _byte_level(), strict=True):
    (folder / name).write_bytes(content)


@functools.cache
def _sentencepiece():
  return tokenizer.train_sentencepiece([TEXT.encode()] * 20, 300)


def _read_tokenizer(name, folder):
  read = tokenizer_lib.make_tokenizer(data.DataConfig(tokenizer=name.format(folder)))
  ids = read.encode(TEXT)
  read.decode(ids)
  read.num_bytes(ids[:-1], ids[1:])
  with tempfile.TemporaryDirectory() as output, contextlib.suppress(ValueError):
    read.save_pretrained(pathlib.Path(output))


_TENSORS = {'a.b': np.ones((3, 2), np.float32), 'c': np.zeros(5, np.int32), 'd': np.float32([])}


def _write_safetensors(folder):
  safetensors.numpy.save_file(_TENSORS, folder / 'model.safetensors', {'format': 'moejax'})


def _write_sharded(folder):
  hf_folder.write_tensors(_TENSORS, folder, largest_file=20)


def _read_sharded(folder):
  architecture = SimpleNamespace(current_name=lambda name, options: name, zero='^$')
  expected = {n: jax.ShapeDtypeStruct(t.shape, t.dtype) for n, t in _TENSORS.items()}
  hf_folder.read_tensors(folder, architecture, {}, expected)


def _write_lines(compress, name, folder):
  lines = ''.join(json.dumps({'text': TEXT, 'n': i}) + '\n' for i in range(20))
  (folder / name).write_bytes(compress(lines.encode()))


def _write_zstd(folder):
  import pyarrow

  with pyarrow.output_stream(str(folder / 'text.zst'), compression='zstd') as file:
    file.write(TEXT.encode() * 20)


def _write_parquet(folder):
  import pyarrow.parquet

  table = pyarrow.table({'text': [TEXT * i for i in range(20)], 'n': list(range(20))})
  pyarrow.parquet.write_table(table, folder / 'text.parquet')


def _read_text(source, folder):
  for path in folder.iterdir():
    for _ in text_files.texts(source, path, 'text'):
      pass


def _write_run(folder):
  """A finished run, without checkpoints."""
  config = moejax.get_config('moe:debug')
  run_folder.write(config, folder)
  summary = {
    **dict.fromkeys(('corpus', 'tokenizer', 'date'), '2026'),
    **{'config': config.to_dict(), 'tokens_seen': 9.0, 'seconds': 3.0, 'steps': 8},
    'parameters': {'total': 9, 'active': 8, 'by_kind': {'attention': 3, 'experts': 5}},
    'flops_per_token': {'model': 6.0, 'total': 7.0},
    'validation': {'loss': 1.5},
    'training': {'loss': 1.6, 'clipped': 0.1},
    'history': [{'from_step': 3, 'changes': {'train.steps': [4, 8]}}],
    'origin': None,
  }
  (folder / 'summary.json').write_text(json.dumps(summary))
  names = ('loss', 'validation/loss', 'tokens_per_second', 'wall_seconds')
  lines = [{'step': step} | dict.fromkeys(names, 9.0 / step) for step in range(1, 9)]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  goodput.Ledger().write(folder, 5)


def _read_run(folder):
  config = config_lib.resolve(run_folder.read(folder))
  report.has_finished(folder)
  goodput.Ledger().resume(folder, 5, {})
  for name in ('loss', 'validation/loss'):
    curve = metrics.loss_curve(folder, name)
    metrics.smoothed_loss(curve, config.train.steps)
    metrics.mean_over_steps(curve, config.train.log_interval)


def _compare(folder):
  models = compare.models(compare.read([folder]))
  table.make_rows(models)


def _write_manifest(folder):
  for name in ('metadata.json', 'state'):
    (folder / name).write_text('{}')
  manifest.commit(folder)


def _read_manifest(folder):
  manifest.problem(folder)
  manifest.is_unverifiable(folder)
  manifest.read(folder)


def _write_table(folder):
  sizes = ((1e6 * i, 1e8 * i, i % 3, 8.0 if i % 3 else 1.0, 1e15, 3 - i / 10) for i in range(1, 7))
  runs = [
    collect.Run(f'run{i}', *size, active_params=5e5, data='d') for i, size in enumerate(sizes)
  ]
  collect.write_table(runs, folder / 'runs.csv')


def _write_grid(folder, has_commands=False):
  cells = grid.make('laptop')[:4]
  entries = [vars(cell) for cell in cells]
  if has_commands:  # of older versions
    for entry, cell in zip(entries, cells, strict=True):
      entry['command'] = cell.command
      del entry['config'], entry['fields']
  (folder / 'grid.json').write_text(json.dumps(entries))


def _read_grid(folder):
  cells = grid.read(folder / 'grid.json')
  list(map(runner.settings_of, cells))
  list(runner.launch_commands(cells, 'gs://bucket/grid', 'ssh {name} {command}'))


def _write_fit(folder):
  law = laws.PUBLISHED['printed'][64]
  one = {'coefficients': law._asdict(), 'used': ['a'], 'rmse': 0.01, 'held_out_rmse': None}
  (folder / 'fit.json').write_text(json.dumps({'64': one | {'samples': [law] * 3}}))


def _read_fit(folder):
  path = str(folder / 'fit.json')
  coefficients = law_report.load(path)
  rate = law_report.choose_rate(coefficients)
  cell = grid.make_cell(grid.PAPER, (256, 4, 4), rate, 4, 1000, coefficients)
  with tempfile.TemporaryDirectory() as output:
    predictions.write([cell], path, pathlib.Path(output, 'predictions.json'), '')


def _write_predictions(folder):
  entry = {'cell': vars(grid.make('laptop')[0]), 'low': 1.0, 'loss': 2.0, 'high': 3.0}
  record = {'fit_sha256': '0', 'commit': None, 'date': '2026'}
  record['predictions'] = [entry | {'fitted': False}]
  (folder / 'predictions.json').write_text(json.dumps(record))


def _read_predictions(folder):
  predictions.judge(folder / 'predictions.json', [folder.parent], folder.parent / 'page.md')


def _write_speed(folder):
  command = 'python -m moejax.aot --config=configs/dense.py:debug --topology=v5e:2x2'
  speed = {'fits': True, 'command': command, 'step_seconds': 1.0, 'tokens': 9, 'topology': 'v5e'}
  (folder / 'speed.json').write_text(json.dumps(speed))


def _write_llama(folder):
  options = {'model_type': 'llama', 'vocab_size': 300, 'hidden_size': 64, 'num_hidden_layers': 2}
  options |= {'num_attention_heads': 4, 'intermediate_size': 64, 'eos_token_id': [1, 2]}
  (folder / 'config.json').write_text(json.dumps(options))


def _read_llama(folder):
  options, known = hf_folder.read_options(folder), config_lib.flat_fields()
  values = hf.of_options(options).read(options, 64)
  values = {name: fields.checked(name, known[name], value) for name, value in values.items()}
  config = moejax.get_config('dense:debug')
  config.update_from_flattened_dict(values)
  config_lib.resolve(config)


def _tokenizer(write, name='{}'):
  return Loader(write, functools.partial(_read_tokenizer, name))


def _text(source, write, *arguments):
  return Loader(functools.partial(write, *arguments), functools.partial(_read_text, source))


# Whatever reads files that people pass on has a line here, and with it a test.
LOADERS = {
  'token index': Loader(_write_tokens, _read_tokens, 'index.json'),
  'tokens': Loader(_write_tokens, _read_tokens, '*.[bc]*'),
  'old token index': Loader(_write_old_tokens, _read_tokens, 'index.json'),
  'old tokens': Loader(_write_old_tokens, _read_tokens, '*.bin'),
  'tokenizer.json of bytes': _tokenizer(
    lambda f: _write_json_tokenizer(tokenizer_json.of_bytes(), f)
  ),
  'tokenizer.json of BPE': _tokenizer(
    lambda f: _write_json_tokenizer(tokenizer_json.gpt2(*_byte_level(), 3), f)
  ),
  'tokenizer.json of SentencePiece': _tokenizer(
    lambda f: _write_json_tokenizer(tokenizer_json.of_sentencepiece(_sentencepiece(), 0), f)
  ),
  'tokenizer.json of Unigram': _tokenizer(lambda f: _write_json_tokenizer(_unigram(), f)),
  'vocab.json and merges.txt': _tokenizer(_write_gpt2, 'gpt2:{}'),
  'SentencePiece model': _tokenizer(
    lambda f: (f / 'small.model').write_bytes(_sentencepiece()), '{}/small.model'
  ),
  'safetensors': Loader(_write_safetensors, lambda f: convert._read(f / 'model.safetensors')),
  'sharded safetensors': Loader(_write_sharded, _read_sharded),
  'config of a run': Loader(_write_run, _read_run, 'config.json'),
  'metrics of a run': Loader(_write_run, _read_run, '*[ms].json*'),
  'compared run': Loader(_write_run, _compare, '[ms]*'),
  'run of a law': Loader(_write_run, lambda f: collect.collect([f]), 'summary.json'),
  'speed of a run': Loader(_write_run, lambda f: runtime.read([f]), '[cm]*'),
  'manifest': Loader(_write_manifest, _read_manifest, 'manifest.json'),
  'table of runs': Loader(_write_table, lambda f: collect.collect([f / 'runs.csv'])),
  'grid': Loader(_write_grid, _read_grid),
  'grid of commands': Loader(lambda f: _write_grid(f, has_commands=True), _read_grid),
  'fit': Loader(_write_fit, _read_fit),
  'predictions': Loader(_write_predictions, _read_predictions),
  'report of moejax.aot': Loader(_write_speed, lambda f: runtime.read([f / 'speed.json'])),
  'config of transformers': Loader(_write_llama, _read_llama),
  'text': _text('text', lambda f: (f / 'a.txt').write_text(TEXT)),
  'JSON lines': _text('jsonl', _write_lines, bytes, 'text.jsonl'),
  'JSON lines, gzip': _text('jsonl', _write_lines, gzip.compress, 'text.jsonl.gz'),
  'JSON lines, xz': _text('jsonl', _write_lines, lzma.compress, 'text.jsonl.xz'),
}
if importlib.util.find_spec('pyarrow'):
  LOADERS |= {'text, zstd': _text('text', _write_zstd), 'Parquet': _text('parquet', _write_parquet)}
