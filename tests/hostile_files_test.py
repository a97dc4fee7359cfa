"""Damaged files of other people give one error, or none: `benchmarks/hostile_files`, in short.

That program makes 10 MB of them for each of its loaders, with limits of time and memory.
"""

import json
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies

from benchmarks.hostile_files import damage, loaders
from moejax import convert, data
from moejax.data import tokenizer_json

TRIES = 25


@pytest.mark.parametrize('name', loaders.LOADERS)
def test_damaged_files_give_one_error_or_none(name, tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_STATE_HOME', str(tmp_path / 'state'))
  loader, good, bad = loaders.LOADERS[name], tmp_path / 'good', tmp_path / 'bad'
  good.mkdir()
  loader.write(good)
  loader.read(good)

  @settings(
    max_examples=TRIES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
  )
  @given(strategies.randoms(use_true_random=False))
  def attempt(random):
    damage.damage_one(loader, good, bad, random)
    loaders.attempt(loader, bad)  # raises what is not for the user

  attempt()


def _refused(load, match):
  """Whether an error comes at once: without memory for what a file claims to hold."""
  tracemalloc.start()
  try:
    with pytest.raises(ValueError, match=match) as raised:
      load()
    assert tracemalloc.get_traced_memory()[1] < 10**7
  finally:
    tracemalloc.stop()
  assert '\n' not in str(raised.value)


@pytest.mark.parametrize('size', [10**12, 2**63, 10**400])
def test_sizes_are_not_believed(size, tmp_path):
  tokens = loaders.LOADERS['token index']
  tokens.write(tmp_path)
  index = json.loads((tmp_path / 'index.json').read_text())
  index['splits']['train']['tokens'] = size
  (tmp_path / 'index.json').write_text(json.dumps(index))
  _refused(lambda: tokens.read(tmp_path), r'train\.bin has \d+ bytes, its index says')
  spec = tokenizer_json.of_bytes()
  spec['model']['vocab']['x'] = size
  (tmp_path / 'tokenizer.json').write_text(json.dumps(spec))
  config = data.DataConfig(tokenizer=str(tmp_path / 'tokenizer.json'))
  _refused(lambda: data.make_tokenizer(config), 'expected ids from 0 to')


@pytest.mark.parametrize(
  'header',
  [
    b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}',
    b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "O", "shape": [1], "data_offsets": [0, 4]}}',
  ],
)
@pytest.mark.parametrize('length', [None, 10**12])
def test_headers_of_safetensors_are_not_believed(header, length, tmp_path):
  path = tmp_path / 'model.safetensors'
  size = struct.pack('<Q', len(header) if length is None else length)
  path.write_bytes(size + header + np.zeros(1, '<f4').tobytes())
  _refused(lambda: convert._read(path), r'cannot read .*model\.safetensors as safetensors')


def test_a_text_that_a_tokenizer_cannot_encode(tmp_path):
  spec = loaders._unigram()
  spec['model']['unk_id'] = None
  tokenizer_json.write(tmp_path, spec, eos_id=1)
  tokenizer = data.make_tokenizer(data.DataConfig(tokenizer=str(tmp_path)))
  assert len(tokenizer.encode('the'))
  with pytest.raises(ValueError, match=r'data\.tokenizer: it cannot encode a text: .*unk_id'):
    tokenizer.encode('é')
