"""moejax: pre-training of mixture-of-experts language models in JAX.

A layer, from keyword arguments that have defaults (`moejax.layers`):

  layer = moejax.layers.MixtureOfTokens(d_model=64, num_experts=32, group_size=8, rngs=nnx.Rngs(0))
  y_BLD, aux = layer(x_BLD)

The model of a config, by the config's name or its file:

  config = moejax.get_config('mot:debug')
  model = moejax.build(config)
  logits_BLV = model(ids_BL)

A run: training, as `python -m moejax.main` does it, and what it leaves in its folder:

  run = moejax.fit(config, 'runs/mot')
  run = moejax.load('runs/mot')
  run.generate('def ', 50), run.loss('def f(x):'), run.logits('def ').shape

docs/library.md has complete examples. `import moejax` is quick: names are imported on first use.
"""

import importlib
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from moejax import layers
  from moejax.library import Run, build, fit, get_config, load
  from moejax.model import LanguageModel, ModelConfig

STARTED = time.monotonic()  # about when the program was
__version__ = '0.1.0'
__all__ = [
  'LanguageModel',
  'ModelConfig',
  'Run',
  'build',
  'fit',
  'get_config',
  'layers',
  'load',
]

_MODULES = {
  'LanguageModel': 'moejax.model',
  'ModelConfig': 'moejax.model',
  'Run': 'moejax.library',
  'build': 'moejax.library',
  'fit': 'moejax.library',
  'get_config': 'moejax.library',
  'load': 'moejax.library',
}


def __getattr__(name):
  if name == 'layers':
    return importlib.import_module('moejax.layers')
  if name in _MODULES:
    return getattr(importlib.import_module(_MODULES[name]), name)
  hint = ''
  if name[0].isupper() and hasattr(importlib.import_module('moejax.layers'), name):
    hint = f'; did you mean moejax.layers.{name}?'
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}{hint}')


def __dir__():
  return sorted([*globals(), *__all__])
