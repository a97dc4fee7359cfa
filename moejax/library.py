"""What `import moejax` offers: configs by name, models, runs from Python (docs/library.md)."""

import dataclasses
import functools
import math
import os
from typing import Any

import jax
import numpy as np

from moejax import (
  cli,
  config as config_lib,
  decode,
  evaluate,
  files,
  generate,
  imports,
  model as model_lib,
  report,
  run_folder,
  sharding,
  step as step_lib,
  train,
)
from moejax.aot.step import without_data
from moejax.layers.common import TokenInfo


def get_config(name: str) -> Any:
  """The config that `--config=NAME` names: a ConfigDict of sections, to be changed and passed on.

  Args:
    name: 'mot', 'mot:debug', 'configs/mot.py:medium,experts=32', or your own file; after the
      colon are variants, which the file defines.

  Raises:
    ValueError: there is no such file or variant.
  """
  return cli.config_of([f'--config={name}'])


def build(config: Any) -> model_lib.LanguageModel:
  """The model of a config or of its name, with the parameters that a run of it begins with.

  Only `config.model` and `config.train.seed` matter, and `config.data` for the context and the
  vocabulary; the corpus need not exist, and GPT-2's vocabulary is known.

  Raises:
    ValueError: the config is invalid, or its vocabulary unknown.
  """
  config = get_config(config) if isinstance(config, str) else config
  run_config = config_lib.resolve(without_data(config))
  init = functools.partial(model_lib.init_params, run_config.model)
  return model_lib.bind(run_config.model, jax.jit(init)(jax.random.key(run_config.train.seed)))


def fit(config: Any, workdir: str | os.PathLike) -> 'Run':
  """Trains a config, or the one of this name, as `python -m moejax.main` does.

  It resumes from the last checkpoint in the folder, and returns at once if the run is finished.

  Args:
    config: a ConfigDict or its name.
    workdir: the folder of the run, new or with a run of this config.

  Returns:
    The trained run.

  Raises:
    ValueError: the config, the data or the folder cannot be used; nothing was written.
    RuntimeError: training diverged, and the last good checkpoint is kept; or the disk is full.
    KeyboardInterrupt: after Ctrl-C or SIGTERM, with everything saved: the same call resumes.
  """
  config = get_config(config) if isinstance(config, str) else config
  workdir = files.absolute(cli.path(os.fspath(workdir), bucket=True))
  if train.train(config, workdir) == cli.INTERRUPTED:
    raise KeyboardInterrupt(f'saved in {workdir}; the same call resumes it')
  return load(workdir)


def load(workdir: str | os.PathLike, allow_imports: bool = False) -> 'Run':
  """The run in a folder, at its newest checkpoint.

  Args:
    workdir: the folder.
    allow_imports: whether code that the run needs may be imported although you have not run it
      before (docs/library.md); needed for folders of other people that have such code.

  Raises:
    ValueError: there is no run or no checkpoint, its tokenizer is missing, or its code is not
      allowed.
  """
  workdir = cli.path(os.fspath(workdir), bucket=True)
  with imports.allowed(allow_imports):
    run_config, step, params, mesh = run_folder.load_run(workdir)
    config = run_folder.read(workdir)
  model = model_lib.bind(run_config.model, params)
  return Run(config, model, params, run_config.tokenizer, step, mesh, workdir)


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
  """A trained model, read from the folder of its run. Its methods need no mesh around them.

  Models that mix sequences (Mixture of Tokens, expert choice) see groups as large as in training: a
  text fills up its group with repetitions of itself. Tokens are never dropped.
  """

  config: Any  # the ConfigDict of the run
  model: model_lib.LanguageModel  # with the parameters inside; `model.config` is its ModelConfig
  params: Any  # nested dict of arrays, sharded over `mesh`
  tokenizer: Any  # `encode(text)` -> int32 ids, `decode(ids)` -> text
  step: int  # optimizer steps it was trained for
  mesh: jax.sharding.Mesh  # all devices
  workdir: str  # the run's folder

  def __repr__(self):
    return f'<moejax.Run: step {self.step} of {self.config.train.steps}>'

  @property
  def summary(self) -> dict:
    """The run's summary.json: parameters, FLOPs, losses, seconds; {} before its end."""
    return report.read_summary(self.workdir)

  def evaluate(
    self, modes: Any = ('mixed',), group_sizes: Any = (0,), batches: int | None = None
  ) -> list[dict]:
    """Evaluates held-out text in every mode at every group size (docs/evaluation.md).

    Args:
      modes: of `moejax.evaluate.MODES`.
      group_sizes: sequences that are mixed with each other; 0: as many as in training.
      batches: how many of the validation split; None: all.

    Returns:
      One dict per combination: `mode`, `group_size`, `leaks`, `loss` (nats per token), ...

    Raises:
      ValueError: the model does not support a mode, or a group size does not divide the batch.
    """
    run_config = config_lib.resolve(self.config)
    choices = list(modes), list(group_sizes)
    with jax.set_mesh(self.mesh):
      return evaluate.compare_modes(run_config, self.params, self.mesh, *choices, batches)

  def logits(self, text: Any) -> np.ndarray:
    """The logits of every next token: row i predicts the token after token i.

    Args:
      text: a string of L tokens; or integer ids [L] or [B, L].

    Returns:
      float32 [L, V], for ids [B, L] float32 [B, L, V].

    Raises:
      ValueError: there is no token, more than the context has (data.sequence_length), or an id
        that the vocabulary has not.
    """
    ids = self.tokenizer.encode(text) if isinstance(text, str) else np.asarray(text)
    ids_BL = np.atleast_2d(ids)
    (B, L), context = ids_BL.shape, self.model.config.max_length
    if not B or not 0 < L <= context or not np.issubdtype(ids.dtype, np.integer):
      raise ValueError(
        f'logits: expected a text or integer ids, 1 to {context} (data.sequence_length) of them; '
        f'got {ids.dtype}{list(ids.shape)}.'
      )
    if ids.min() < 0 or ids.max() >= self.model.config.vocab_size:
      vocab = f'0 to {self.model.config.vocab_size - 1}'
      raise ValueError(f'logits: expected ids from {vocab}, got {ids.min()} to {ids.max()}.')
    padded_BL = np.pad(ids_BL.astype(np.int32), ((0, 0), (0, decode.padded(L, context) - L)))
    segments_BL = np.broadcast_to(np.arange(padded_BL.shape[1]) < L, padded_BL.shape)
    rows = self._full_groups(np.arange(B))
    with jax.set_mesh(self.mesh):
      logits_BLV = _logits(
        self._scored, self.params, padded_BL[rows], segments_BL[rows].astype(np.int32)
      )
      logits_BLV = sharding.fetch(logits_BLV)[:B, :L]
    return logits_BLV if ids.ndim == 2 else logits_BLV[0]

  def loss(self, text: str) -> float:
    """The mean cross-entropy of a text's tokens, in nats.

    The first token is predicted from the end of a document before it. A text longer than the
    context is cut into pieces, which do not see each other.

    Raises:
      ValueError: the text is empty, or no string.
    """
    if not isinstance(text, str) or not len(ids := self.tokenizer.encode(text)):
      raise ValueError(f'loss: expected a text that is not empty, got {text!r}.')
    L = decode.padded(len(ids), self.model.config.max_length)
    number = math.ceil(len(ids) / L)
    stream = np.zeros(number * L + 1, np.int32)
    stream[0], stream[1 : len(ids) + 1] = self.tokenizer.eos_id, ids
    pieces = {
      'inputs': stream[:-1],
      'targets': stream[1:],
      'segments': (np.arange(number * L) < len(ids)).astype(np.int32),
      'positions': np.arange(number * L, dtype=np.int32) % L,
    }
    pieces = {name: values.reshape(number, L) for name, values in pieces.items()}
    nats, at_once = 0.0, self.config.data.batch_size
    with jax.set_mesh(self.mesh):
      for first in range(0, number, at_once):
        here = np.arange(first, min(first + at_once, number))
        rows = self._full_groups(here)
        batch = {name: values[rows] for name, values in pieces.items()}
        counted = np.arange(len(rows)) < len(here)
        batch['counted'] = np.broadcast_to(counted[:, None], batch['inputs'].shape)
        nats += float(step_lib.eval_step(self._scored, 1, self.params, batch)[0])
    return nats / len(ids)

  def generate(self, prompts: Any, length: int, **sampling) -> Any:
    """Continues prompts, past the context if necessary.

    Args:
      prompts: a text, or a list of texts, which a model that mixes sequences mixes.
      length: the most tokens to generate; the end of a document ends earlier.
      **sampling: as `moejax.generate.continuations` takes them, such as temperature=0.8, seed=0.

    Returns:
      The continuation without its prompt; for a list a list.

    Raises:
      ValueError: there is no prompt, one is no text, or an option is invalid.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(isinstance(text, str) for text in texts):
      raise ValueError(f'generate: expected a text or a list of texts, got {prompts!r}.')
    arguments = self.model.config, self.params, self.tokenizer, texts, length
    with jax.set_mesh(self.mesh):
      continued = generate.continuations(*arguments, **sampling)
    return continued[0] if isinstance(prompts, str) else continued

  @property
  def _scored(self):
    """The ModelConfig that scores texts."""
    return self.model.config.dropless() or self.model.config

  def _full_groups(self, rows):
    """Indices of rows, repeated in turn to fill up the last group."""
    group = self.model.config.group_multiple
    return np.resize(rows, -(-len(rows) // group) * group)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, inputs_BL, segments_BL):
  tokens = TokenInfo.unpadded(inputs_BL.shape)._replace(segments=segments_BL)
  return model_lib.bind(config, params).logits(inputs_BL, tokens)
