"""What a run prints before it trains."""

import datetime
import os
import sys
import types

import jax
import pytest

from configs import fine_grained, mot
from moejax import config as config_lib, data, flops, sharding, start_page, step as step_lib, text


def _page(config, folder='runs/a'):
  run_config = config_lib.resolve(config)
  mesh = sharding.make_mesh(run_config.mesh)
  state = sharding.abstract(step_lib.fresh_state(run_config), mesh)
  loader = data.make_loader(run_config.data, 'train')
  return start_page.page(run_config, mesh, state, loader, folder), run_config, loader


def _config(module, **changes):
  config = module.get_config('debug')
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture
def texts(tmp_path):
  for i in range(30):
    (tmp_path / f'{i}.txt').write_text(f'text {i}, of a few words\n' * 20)
  return {'data.source': 'text', 'data.files': f'{tmp_path}/*.txt'}


def test_the_page_says_which_packages_an_environment_has():
  loader = types.SimpleNamespace(fingerprint='0123', num_sequences=2_000_000)
  what, size = start_page._corpus(data.DataConfig(source='environment'), loader)
  assert what == f"source code of Python's standard library and the packages in {sys.prefix}"
  assert size == '128M tokens, tokenizer bytes, fingerprint 0123'


def test_the_page_of_a_run_on_several_devices(texts):
  mesh = {'mesh.data': 2, 'mesh.expert': 4}
  printed, run_config, loader = _page(_config(fine_grained, **mesh, **texts))
  lines = printed.splitlines()
  assert len(lines) <= 20 and max(len(line) for line in lines if '.txt' not in line) <= 100
  assert lines[0].startswith('device  8 x CPU, ') and lines[1] == 'mesh    data 2, expert 4'
  counts = flops.param_counts(run_config.model)
  (total,) = (line.split() for line in lines if line.split()[0] == 'all')
  forward = flops.forward_flops_per_token(run_config.model, run_config.data.sequence_length)
  numbers = counts['total'], counts['active'], sum(forward.values())
  assert total[1:] == [text.short(number) for number in numbers]
  kinds = [line.split()[0] for line in lines if line.startswith(' ')][:-1]
  assert kinds == ['embedding', 'attention', 'moe', 'norm', 'head', 'all']
  size, length, steps = 16, 32, 6
  epochs = steps * size / loader.num_sequences
  steps_line, corpus, size_of_corpus, state, folder = lines[-5:]
  assert steps_line == f'steps   6 of 512 tokens (16 x 32): 3.07k tokens, {epochs:.2g} epochs'
  assert corpus == f'corpus  text {run_config.data.files}'
  size_in_tokens = text.short(loader.num_sequences * length)
  facts = f'{size_in_tokens} tokens, tokenizer bytes, fingerprint {loader.fingerprint}'
  assert size_of_corpus.strip() == facts
  assert folder == 'folder  runs/a'
  # Experts are sharded over four devices, so that a device holds less than the whole.
  assert state.startswith('state   ') and ' per device: parameters ' in state
  whole = text.size(4 * counts['total'])
  assert f'parameters {whole},' not in state


def test_the_state_of_one_device_is_all_of_it(texts):
  config = _config(mot, **texts, **{'mesh.data': 1, 'mesh.tensor': 1})
  run_config = config_lib.resolve(config)
  leaf = lambda *shape: jax.ShapeDtypeStruct(shape, 'float32')
  state = {'params': {'a': leaf(256, 2)}, 'optimizer': (leaf(256, 4),), 'step': leaf()}
  one = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  printed = start_page.page(
    run_config, one, state, types.SimpleNamespace(fingerprint='f'), 'runs/a'
  )
  assert 'state   6 KiB per device: parameters 2 KiB, optimizer 4 KiB' in printed
  assert 'mesh' not in printed and 'epochs' not in printed  # of a stream


def test_what_follows_from_a_config():
  lines = [*start_page.derived(config_lib.resolve(fine_grained.get_config('debug')))]
  assert lines[:2] == ['vocabulary: 259 ids', 'moe: 8 experts of width 32, 2 per token']
  assert lines[-1].startswith('steps: 6 of 512 tokens (16 x 32): 3.07k tokens, ')
  assert lines[-1].endswith(' training FLOPs')


@pytest.mark.parametrize(
  ('path', 'extra'), [('/dev/nvidia0', 'moejax[cuda]'), ('/dev/accel0', 'moejax[tpu]')]
)
def test_an_accelerator_that_jax_does_not_use_is_named(monkeypatch, path, extra):
  monkeypatch.setattr(os.path, 'exists', lambda tried: tried == path)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
  monkeypatch.delenv('JAX_PLATFORMS')
  assert extra in start_page.hidden_accelerator()
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert not start_page.hidden_accelerator()


def test_a_chosen_cpu_needs_no_hint(monkeypatch):
  monkeypatch.setattr(os.path, 'exists', lambda _: True)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert not start_page.hidden_accelerator()


def test_an_estimate_says_until_when(monkeypatch):
  now = datetime.datetime(2026, 1, 2, 3, 4, 5)
  clock = types.SimpleNamespace(now=lambda: now)
  patched = types.SimpleNamespace(datetime=clock, timedelta=datetime.timedelta)
  monkeypatch.setattr(start_page, 'datetime', patched)
  assert start_page.time_left(200) == 'time    about 3m20s, until 03:07'
  assert start_page.time_left(1e5) == 'time    about 1d03h, until 2026-01-03 06:50'
