"""A run as a model of lm-evaluation-harness (`pip install 'moejax[eval]'`), and its command line.

  python -m moejax.eval_harness --model moejax --tasks lambada_openai,hellaswag \
    --model_args workdir=runs/mot,mode=mixed_with_corpus --batch_size 32

All arguments are those of the harness's own command, `lm_eval`; those of the model are the
arguments of `MoejaxLM`. In a program, `lm_eval.simple_evaluate(MoejaxLM('runs/mot'), tasks=[...])`.
"""

import functools
import logging
import sys
from typing import Any

import jax
import numpy as np
import tqdm

from moejax import cli, compilation_cache, decode, fields, model as model_lib
from moejax.evaluate import decoding, training_text
from moejax.generate import Sampling, complete
from moejax.run_folder import load_run

try:
  from lm_eval.api.model import TemplateLM
  from lm_eval.api.registry import register_model
  from lm_eval.models.utils import normalize_gen_kwargs
  from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
  message = f"moejax.eval_harness needs lm-evaluation-harness: pip install 'moejax[eval]' ({error})"
  if __name__ == '__main__':
    sys.exit(f'error: {message}')
  raise ImportError(message) from error

_HARNESS = ('do_sample', 'until', 'max_gen_toks')  # of a request to generate; others are Sampling's


@register_model('moejax')
class MoejaxLM(TemplateLM):
  """A trained run; prompts start a document, and nothing is dropped.

  Requests are sorted by length and answered in batches. In the mode `mixed`, those of a batch
  influence each other, as sequences do in training: results depend on batch size and neighbours.
  In `mixed_with_corpus` every request is mixed with the same sequences of training text instead, at
  the cost of a full group; in `unmixed`, and in models that do not mix, requests are independent.

  A context that does not fit is cut from the left; generation past the context continues from its
  newest half; a continuation to score that is longer than the context is scored in windows.

  Args:
    workdir: folder of the run.
    mode, group_size: as of moejax.evaluate.
    batch_size: requests per batch, rounded up to full groups.
    max_batch_size, device: given by the harness, not used.
    overrides: fields of the run's config, such as `data.files`.

  Raises:
    ValueError: there is no such run, mode or field, or `batch_size` is no number.
  """

  def __init__(
    self,
    workdir,
    mode='mixed',
    group_size=0,
    batch_size=1,
    max_batch_size=None,
    device=None,
    **overrides,
  ):
    super().__init__()
    del max_batch_size, device
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
      raise ValueError(f'--batch_size: expected a number of requests, got {batch_size!r}.')
    if jax.process_count() > 1:
      raise ValueError('moejax.eval_harness: evaluate in one process.')
    if unknown := [name for name in overrides if '.' not in name]:
      raise ValueError(
        f'--model_args: expected workdir, mode, group_size or SECTION.FIELD, got {unknown[0]!r}.'
      )
    overrides = {name: str(value) for name, value in overrides.items()}
    run_config, self._step, self._params, self._mesh = load_run(
      cli.path(str(workdir), bucket=True), overrides
    )
    self._workdir, self._mode = str(workdir), mode
    self._tokenizer = run_config.tokenizer
    model = decoding(run_config.model, mode, group_size)
    self._model = model.dropless() or model
    self._others = []
    if mode == 'mixed_with_corpus':
      self._others = training_text(run_config.data, self._model.mixed_sequences - 1)
    self._groups_of_one = bool(self._others) or self._model.mixed_sequences == 1
    groups = self._model.group_multiple
    rows = int(batch_size) * (1 + len(self._others))
    self._requests = -(-rows // groups) * groups // (1 + len(self._others))  # of a batch
    if self.leaks:
      logging.getLogger(__name__).warning(
        'mode=%s: the %d requests of a batch influence each other in groups of %d. '
        'mode=mixed_with_corpus scores each by itself.',
        mode,
        self._requests,
        self._model.mixed_sequences,
      )

  @property
  def leaks(self):
    """Whether one request influences another."""
    return not self._groups_of_one

  def get_model_info(self):
    """What the harness writes beside the results."""
    info = {'workdir': self._workdir, 'step': self._step, 'mode': self._mode}
    return info | {'group_size': self._model.mixed_sequences, 'leaks': self.leaks}

  @property
  def eot_token_id(self):
    return self._tokenizer.eos_id

  @property
  def max_length(self):
    return self._model.max_length

  @property
  def tokenizer_name(self):
    return self._tokenizer.fingerprint

  def tok_encode(self, string, add_special_tokens=None, **_):
    """The ids of a text; there are no special ones to add."""
    del add_special_tokens
    return self._tokenizer.encode(string).tolist()

  def _loglikelihood_tokens(self, requests, disable_tqdm=False):
    pairs = [(context, continuation) for _, context, continuation in requests]
    results = self._score(pairs, disable_tqdm)
    for (texts, _, _), result in zip(requests, results, strict=True):
      if texts is not None:
        self.cache_hook.add_partial('loglikelihood', texts, result)
    return results

  def loglikelihood_rolling(self, requests, disable_tqdm=False):
    texts = [text for (text,) in (request.args for request in requests)]
    prefix = [self.prefix_token_id]
    results = self._score([(prefix, self.tok_encode(text)) for text in texts], disable_tqdm)
    for text, (total, _) in zip(texts, results, strict=True):
      self.cache_hook.add_partial('loglikelihood_rolling', (text,), total)
    return [total for total, _ in results]

  def generate_until(self, requests, disable_tqdm=False):
    texts = [''] * len(requests)
    alike = {}
    for i, request in enumerate(requests):
      alike.setdefault(_settings(request.args[1]), []).append(i)
    with jax.set_mesh(self._mesh), _bar(len(requests), 'generate', disable_tqdm) as bar:
      for (sampling, length), indices in alike.items():
        indices.sort(key=lambda i: -len(requests[i].args[0]))
        for batch in self._batches(indices):
          prompts = [requests[i].args[0] for i in batch]
          how = self._model, self._params, self._tokenizer, prompts, length, sampling
          for i, done in zip(batch, complete(*how, others=self._others or None), strict=True):
            texts[i] = done.text
            self.cache_hook.add_partial('generate_until', requests[i].args, done.text)
          bar.update(len(batch))
    return texts

  def _batches(self, items):
    return (items[i : i + self._requests] for i in range(0, len(items), self._requests))

  def _score(self, pairs, disable_tqdm):
    """Log-probability of continuations and whether they are greedy; pairs of ids, in order."""
    windows = [
      (i, window)
      for i, (context, continuation) in enumerate(pairs)
      for window in self._windows(context, continuation)
    ]
    windows.sort(key=lambda window: -len(window[1][0]))
    totals, greedy = [0.0] * len(pairs), [True] * len(pairs)
    with jax.set_mesh(self._mesh), _bar(len(windows), 'score', disable_tqdm) as bar:
      for batch in self._batches(windows):
        arrays = self._arrays([window for _, window in batch])
        scores, likeliest = jax.device_get(_target_scores(self._model, self._params, arrays))
        for row, (i, (inputs, targets)) in enumerate(batch):
          here = row * (1 + len(self._others)), slice(len(inputs) - len(targets), len(inputs))
          totals[i] += float(scores[here].sum(dtype=np.float64))
          greedy[i] &= bool(likeliest[here].all())
        bar.update(len(batch))
    return list(zip(totals, greedy, strict=True))

  def _windows(self, context, continuation):
    """(inputs, their last targets) that together score a continuation."""
    size = self.max_length
    if len(continuation) <= size:
      return [((context + continuation)[-size - 1 : -1], continuation)]
    rolling = get_rolling_token_windows(continuation, context[-1], size, context_len=1)
    pairs = map(make_disjoint_window, rolling)
    return [((before + targets)[:-1], targets) for before, targets in pairs]

  def _arrays(self, windows):
    """A full batch: windows, repeated to fill it up, or each with the other texts of its group."""
    length = decode.padded(max(len(inputs) for inputs, _ in windows), self.max_length)
    rows = np.resize(np.arange(len(windows)), self._requests)
    number = 1 + len(self._others)
    names = ('inputs', 'targets', 'segments')
    batch = {name: np.zeros((len(rows) * number, length), np.int32) for name in names}
    for place, row in enumerate(rows):
      inputs, targets = windows[row]
      n = len(inputs)
      batch['inputs'][place * number, :n] = inputs
      batch['targets'][place * number, n - len(targets) : n] = targets
      batch['segments'][place * number, :n] = 1
      for other, ids in enumerate(self._others, place * number + 1):
        batch['inputs'][other] = ids[:length]
        batch['segments'][other] = 1
    positions_BL = np.broadcast_to(np.arange(length, dtype=np.int32), batch['inputs'].shape)
    return batch | {'positions': positions_BL}


@functools.partial(jax.jit, static_argnums=0)
def _target_scores(model_config, params, batch):
  return model_lib.bind(model_config, params).target_scores(batch)


def _settings(gen_kwargs):
  """The Sampling and the length of a request to generate."""
  asked: Any = normalize_gen_kwargs(gen_kwargs, default_max_gen_toks=256)
  known: dict[str, Any] = {f.name: f.type for f in fields.of(Sampling)}
  for name in asked.keys() - known.keys() - {*_HARNESS}:
    logging.getLogger(__name__).warning('generation: %s has no counterpart, ignored', name)
  values = {name: kind(asked[name]) for name, kind in known.items() if name in asked}
  values['stop'] = tuple(filter(None, asked['until']))
  return fields.make(Sampling, values), asked['max_gen_toks']


def _bar(total, what, is_hidden):
  return tqdm.tqdm(total=total, desc=f'moejax: {what}', disable=is_hidden)


def main():
  from lm_eval.__main__ import cli_evaluate

  compilation_cache.enable()
  try:
    cli_evaluate()
  except Exception as error:
    sys.exit(cli.exit_code(error))


if __name__ == '__main__':
  main()
