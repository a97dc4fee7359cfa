"""One pass over validation text: what every expert of a model did with which token."""

import collections
import functools
import itertools
import math
from typing import NamedTuple

import jax
import numpy as np
import tqdm

from moejax import model as model_lib, sharding, step as step_lib
from moejax.evaluate import validation_batches

KEPT, ALIKE = 60, 3  # places with the highest weights of an expert; of one token id
_DOUBT = 10  # tokens of the average mixed into every lift, so that rare ones do not lead by chance


class Places(NamedTuple):
  """Where an expert weighs most: ids, places in the pass, and weights, the highest first.

  Few are of one token id, which would hide all others where a router reads little else.
  """

  ids: np.ndarray = np.zeros(0, np.int32)
  places: np.ndarray = np.zeros(0, np.int64)
  weights: np.ndarray = np.zeros(0, np.float32)

  def with_more(self, ids_T, place_T, weights_T):
    """The Places of these tokens, too."""
    more = weights_T > (self.weights[-1] if len(self.weights) == KEPT else 0)
    if not more.any():
      return self
    new = ids_T[more], place_T[more], weights_T[more]
    ids, places, weights = map(np.concatenate, zip(self, new, strict=True))
    by_id = np.lexsort((places, -weights, ids))
    index = np.arange(len(ids))
    is_first = np.diff(ids[by_id], prepend=-1) != 0
    rank = index - np.maximum.accumulate(np.where(is_first, index, 0))
    kept = by_id[rank < ALIKE]
    kept = kept[np.lexsort((places[kept], -weights[kept]))][:KEPT]
    return Places(ids[kept], places[kept], weights[kept])


class Layer:
  """The experts of one layer: their part in the tokens of a pass, added up.

  A token is a part of 1 of every expert that it is routed to; of an expert that mixes tokens, its
  weight in the mixture.

  Attributes:
    kind: 'moe' or 'mot'; an expert of 'mot' reads mixtures.
    index: among the layers of its kind, as in the names of metrics.
    name: for people.
    mixed: how many tokens a mixture has, of 'mot'.
    tokens: how many the pass had.
    parts_VE, tokens_V: of every token id.
    weights_E: what outputs are multiplied by, added up.
    scores_E: shares of the softmax of all scores, added up.
    closest_E: the largest log of a share over the best expert's; 0: it was the best of some token.
    places: the `Places` of every expert.
    products_EE: see `layers.experts.Experts.products`.
  """

  def __init__(self, kind, index, name, num_ids, num_experts, mixed):
    self.kind, self.index, self.name, self.mixed = kind, index, name, mixed
    self.tokens, E = 0, num_experts
    self.parts_VE, self.tokens_V = np.zeros((num_ids, E), np.float32), np.zeros(num_ids)
    self.weights_E, self.scores_E = np.zeros(E), np.zeros(E)
    self.closest_E, self.products_EE = np.full(E, -np.inf), np.zeros((E, E))
    self.places = [Places()] * E
    self._entropy_E = np.zeros(E)

  def add(self, ids_T, place_T, logits_TE, weights_TE, products_EE):
    """Adds tokens, with their places in the pass."""
    parts_TE = weights_TE if self.kind == 'mot' else (weights_TE > 0).astype(np.float32)
    np.add.at(self.parts_VE, ids_T, parts_TE)
    np.add.at(self.tokens_V, ids_T, 1)
    self.tokens += len(ids_T)
    self.weights_E += weights_TE.sum(axis=0)
    self.products_EE += products_EE
    below_TE = logits_TE - logits_TE.max(axis=1, keepdims=True)
    share_TE = np.exp(below_TE)
    share_TE /= share_TE.sum(axis=1, keepdims=True)
    self.scores_E += share_TE.sum(axis=0)
    self.closest_E = np.maximum(self.closest_E, below_TE.max(axis=0, initial=-np.inf))
    if self.kind == 'mot':
      self._entropy_E += _entropy(weights_TE).sum(axis=0)
    else:
      self._entropy_E += _entropy(share_TE).sum(axis=1) @ parts_TE
    self.places = [
      places.with_more(ids_T, place_T, weights_T)
      for places, weights_T in zip(self.places, weights_TE.T, strict=True)
    ]

  @property
  def num_experts(self):
    return len(self.weights_E)

  @property
  def parts_E(self):
    """The parts that every expert has in all tokens."""
    return self.parts_VE.sum(axis=0, dtype=np.float64)

  @property
  def load_E(self):
    """Shares of all parts, times E: 1 is fair."""
    return self.parts_E * self.num_experts / max(self.parts_E.sum(), 1e-9)

  @property
  def entropy_E(self):
    """Mean entropy over its maximum.

    Of the scores of the tokens that an expert got, or of its mixtures; nan: it got none.
    """
    most = math.log(self.mixed if self.kind == 'mot' else self.num_experts) or 1.0
    with np.errstate(invalid='ignore', divide='ignore'):
      return self._entropy_E / self.parts_E / most

  @property
  def cosine_EE(self):
    """Cosines between the outputs of experts for the same inputs, all in one row of numbers."""
    size_E = np.sqrt(np.diag(self.products_EE))
    with np.errstate(invalid='ignore', divide='ignore'):
      return np.nan_to_num(self.products_EE / np.outer(size_E, size_E))

  @property
  def size_E(self):
    """Root mean square of outputs for the same inputs, over the median of all experts."""
    size_E = np.sqrt(np.diag(self.products_EE))
    return size_E / (np.median(size_E) or 1.0)

  def lifts(self, expert, number):
    """The tokens of an expert: up to `number` of (id, lift, part in what the expert got).

    The lift is how many times as large the expert's part in this token is as its part in any.
    """
    parts_V, parts = self.parts_VE[:, expert].astype(np.float64), self.parts_E[expert]
    if not parts:
      return []
    fair = parts / self.tokens
    lift_V = (parts_V + _DOUBT * fair) / (self.tokens_V + _DOUBT) / fair
    best = [i for i in np.argsort(-lift_V, kind='stable')[:number] if lift_V[i] > 1]
    return [(int(i), float(lift_V[i]), float(parts_V[i] / parts)) for i in best]


def _entropy(share):
  return -share * np.log(np.maximum(share, 1e-30))


class Text:
  """The tokens of a pass, one batch after the other: sequences of `length` ids."""

  def __init__(self, tokenizer, rows):
    self.tokenizer, self.ids, self.length = tokenizer, rows.reshape(-1), rows.shape[1]
    lengths = tokenizer.num_bytes(self.ids[:-1], self.ids[1:])
    self._bytes_per_token = max(1.0, float(lengths.mean())) if len(lengths) else 1.0

  def around(self, place, before=44, after=20):
    """The text before a token, its own, and that after it; about so many bytes."""
    start = place - place % self.length
    first = max(start, place - round(before / self._bytes_per_token))
    end = min(start + self.length, place + 1 + round(after / self._bytes_per_token))
    parts = self.ids[first:place], self.ids[place : place + 1], self.ids[place + 1 : end]
    return tuple(map(self.tokenizer.decode, parts))

  def different(self, places, number):
    """The first `number` of places that are not alike.

    A token with the same ones beside it is shown once, and any token twice, unless there are no
    others.
    """
    seen, chosen, more = collections.Counter(), [], []
    for place in places:
      token, beside = self.ids[place], tuple(self.ids[max(0, place - 1) : place + 2])
      if not seen[beside]:
        (chosen if seen[token] < 2 else more).append(place)
        seen.update([token, beside])
    return (chosen + more)[:number]


def layers_of(model):
  """(kind, name) of every layer with experts of a ModelConfig, in the order of its metrics."""
  found, block = [], 0
  for pattern, repeats in model.blocks:
    for _ in range(repeats):
      for part in itertools.chain.from_iterable(kind.split('+') for kind in pattern):
        where = f'block {block}, {part}'
        if part in ('moe', 'mot'):
          found.append((part, where))
        elif part.startswith('moe_in_'):
          mamba = getattr(model, part.removeprefix('moe_in_'))
          projections = mamba.projections(model.d_model)
          found += [
            ('moe', f'{where}: {name}') for name in projections if name in mamba.sparse_projections
          ]
      block += 1
  return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _observe(model_config, microbatches, params, batch):
  """`LanguageModel.observe` of a batch, in microbatches: [layers, B, L, E], [layers, E, E]."""
  split = jax.tree.map(lambda a: a.reshape(microbatches, -1, *a.shape[1:]), batch)
  seen = jax.lax.map(lambda part: model_lib.bind(model_config, params).observe(part), split)
  whole = lambda a: a.swapaxes(0, 1).reshape(a.shape[1], -1, *a.shape[3:])
  return {
    kind: {name: a.sum(axis=0) if name == 'products' else whole(a) for name, a in of_kind.items()}
    for kind, of_kind in seen.items()
  }


def observe(run_config, params, mesh, num_batches=None):
  """Runs the model over validation batches; no token is dropped, as in decoding.

  Args:
    run_config, params, mesh: of `run_folder.load_run`.
    num_batches: at most; None: all.

  Returns:
    The `Layer`s, and the `Text`.

  Raises:
    ValueError: no layer has experts, or the split is smaller than one batch.
  """
  model = run_config.model.dropless() or run_config.model
  names = layers_of(model)
  if not names:
    raise ValueError(
      '--workdir: expected a model with experts (moe, mot, moe_in_mamba); model.blocks of this run '
      f'has {", ".join(sorted({*model.kinds}))}.'
    )
  layers, rows, place = [], [], 0
  batches = validation_batches(run_config, mesh, num_batches)
  for batch in tqdm.tqdm(batches, unit=' batches', delay=5, leave=False, disable=None):
    number = step_lib.microbatches(model, len(batch['inputs']), run_config.optimizer.accumulation)
    seen = sharding.fetch(_observe(model, number, params, batch))
    layers = layers or _empty(model, names, seen)
    rows.append(sharding.fetch(batch['inputs']))
    ids_T, counted = rows[-1].reshape(-1), sharding.fetch(batch['counted']).reshape(-1)
    for layer in layers:
      logits, weights, products = (
        seen[layer.kind][name][layer.index] for name in ('logits', 'weights', 'products')
      )
      flat = (a.reshape(len(ids_T), -1)[counted] for a in (logits, weights))
      layer.add(ids_T[counted], place + np.flatnonzero(counted), *flat, products)
    place += len(ids_T)
  if not rows:
    raise ValueError('data.batch_size: the validation split is smaller than one batch; lower it.')
  return layers, Text(run_config.tokenizer, np.concatenate(rows))


def _empty(model, names, seen):
  """Layers without tokens, in the order of the model."""
  layers, of_kind = [], dict.fromkeys(seen, 0)
  for kind, name in names:
    mixed = model.mot.group_tokens(model.max_length)
    E = seen[kind]['logits'].shape[-1]
    layers.append(Layer(kind, of_kind[kind], name, model.vocab_size, E, mixed))
    of_kind[kind] += 1
  return layers
