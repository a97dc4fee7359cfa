"""The programs that benchmarks time compile, at sizes at which there is nothing to time."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

pytestmark = pytest.mark.heavy

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def importable(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
  flags.FLAGS.mark_as_parsed()


def test_of_sparse_layers():
  import moe_layer

  tiny = {'num_experts': 8, 'width': 4, 'tokens': 64, 'd_model': 8}
  for case in (moe_layer.ON_CPU[0], moe_layer.ON_CPU[-1]):
    changes = tiny | ({'k': 2, 'group': 16} if case.group else {})
    programs, _ = moe_layer.programs_of(dataclasses.replace(case, **changes))
    assert programs.keys() >= {'dense', 'sparse', 'router', 'plan', 'move'}


def test_of_mixing_layers(monkeypatch):
  import mot_layer

  for name, size in {'TOKENS': 64, 'LENGTH': 8, 'M': 4}.items():
    monkeypatch.setattr(mot_layer, name, size)
  assert mot_layer.programs_of(8, 8).keys() >= {'dense', 'controller', 'merge', 'emit', 'mot'}


def test_of_the_selective_scan():
  command = [sys.executable, 'benchmarks/selective_scan.py', '--shape=1,16,8', '--rounds=1']
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert result.returncode == 0, result.stderr
  assert 'layer' in result.stdout


def test_of_checkpoints(tmp_path):
  import checkpoint

  for flushed in (True, False):
    returned, complete = checkpoint.measure(tmp_path, 1 + flushed, {'w': np.zeros(8)}, flushed)
    assert 0 < returned < complete
  assert (tmp_path / '1' / 'manifest.json').exists()


def test_of_a_soak(tmp_path):
  import soak

  seconds, noise = np.arange(400.0), np.random.default_rng(0).normal(0, 0.01, 400)
  filling = np.where(seconds < 90, seconds / 90, 1)
  for values, found in (
    (np.full(400, 40), 'flat'),
    (1000 * filling * (1 + noise), 'flat'),
    (1000 * filling * (1 + noise) * (1 + seconds / 3000), 'grows'),
    (1 + 50 * noise, 'cannot be told'),
  ):
    _, low, high = soak.growth(seconds, values)
    assert soak.verdict(low, high) == found
  held = soak.look(os.getpid())
  assert 0 < soak._spent(os.getpid()) <= sum(os.times()[:2]) + 0.1
  assert held['memory_mb'] > 50 and held['open_files'] > 2 and held['threads'] >= 1
  soak.write([held | {'seconds': 1, 'step_seconds': 0.1}], tmp_path)
  lines = (tmp_path / 'soak.csv').read_text().splitlines()
  assert lines[0] == 'memory_mb,open_files,threads,seconds,step_seconds' and len(lines) == 2
  assert (tmp_path / 'soak.png').stat().st_size > 1000


def test_of_tokens(tmp_path):
  import tokens

  ids, open_file = tokens.write(tmp_path, 4096)
  for is_checked, source in ((False, ids), (True, ids), (True, open_file())):
    assert tokens.measure(source, np.arange(4).reshape(2, 2), 1024, is_checked) >= 0
