"""Incremental decoding with a cache: how sequences of tokens grow together.

All sequences of a batch advance position by position together, because layers that mix sequences do
so at equal positions, in decoding as in training.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax import model as model_lib, sharding
from moejax.layers.common import TokenInfo
from moejax.ops import sampling as sampling_ops

_SHORTEST = 16


def padded(length, limit):
  """The length that a program is compiled for: a power of two, or the limit; so few compile."""
  return min(limit, max(_SHORTEST, 1 << (length - 1).bit_length()))


def full_groups(model_config, num_sequences):
  """The number of sequences, rounded up to full groups."""
  M = model_config.mixed_sequences
  return -(-num_sequences // M) * M


def read_of(prompt, context):
  """The end of a prompt that is read: all, or if it exceeds the context, half a context."""
  return prompt if len(prompt) <= context else prompt[-max(1, context // 2) :]


class _Requests(NamedTuple):
  """What does not change while sequences grow within one context."""

  prompt_BS: np.ndarray  # int32, with zeros behind each prompt
  length_B: np.ndarray  # int32, of the prompts
  segment_B: np.ndarray  # int32: 1, or 0 for sequences that only fill up a group
  seed_B: np.ndarray  # uint32
  done_B: np.ndarray  # int32: tokens that were generated before this context


def stream(model_config, params, prompts, length, seeds, settings):
  """Grows sequences past the context if necessary; yields the new tokens of one position each time.

  When a sequence fills the context, its newest half becomes its prompt, and all fill it at the same
  position. A longer prompt is cut in the same way. Sequences that have their tokens, or have ended
  (which only the caller knows, who may stop at any time), go on: the others see them, as in
  training.

  Args:
    model_config, params: the model.
    prompts: sequences of token ids, at least one token each.
    length: tokens to generate after each prompt.
    seeds: of the sequences, one each.
    settings: keyword arguments of `ops.sampling.next_token`.

  Yields:
    Lists of (index of the prompt, token).
  """
  texts = [list(read_of(prompt, model_config.max_length)) for prompt in prompts]
  done = [0] * len(texts)
  while min(done) < length:
    texts = [list(read_of(text, model_config.max_length)) for text in texts]
    for position, token_B in _in_one_context(
      model_config, params, texts, length, seeds, done, settings
    ):
      new = []
      for i, text in enumerate(texts):
        if len(text) == position:
          text.append(int(token_B[i]))
          if done[i] < length:
            new.append((i, text[-1]))
          done[i] += 1
      if new:
        yield new


def _in_one_context(config, params, texts, length, seeds, done, settings):
  """Yields (position, the tokens there), from the end of the shortest text on."""
  lengths = np.array([len(text) for text in texts], np.int32)
  remaining = length - np.array(done, np.int32)
  common, end = int(lengths.min()), int(min(config.max_length, (lengths + remaining).max() - 1))
  room = padded(end, config.max_length)
  B = full_groups(config, len(texts))
  fill = lambda values, dtype, value=0: np.array([*values, *[value] * (B - len(texts))], dtype)
  prompt_BS = np.zeros((B, room), np.int32)
  for i, text in enumerate(texts):
    prompt_BS[i, : len(text)] = text
  requests = _Requests(
    prompt_BS,
    fill(lengths, np.int32, 1),
    fill(np.ones(len(texts)), np.int32),
    fill(seeds, np.uint32),
    fill(done, np.int32),
  )
  prefix = padded(common, room)
  now = _prefill(config, prefix, params, requests, np.int32(common), settings)
  yield common, sharding.fetch(now[0])
  prepared = model_lib.prepared(config, params)  # now: reading the prompt takes memory, too
  for position in range(common, end):
    now = _advance(config, params, prepared, *now, requests, np.int32(position), settings)
    yield position + 1, sharding.fetch(now[0])


def trace(config, params, prepared, prompt, length, settings):
  """The programs of `stream` for one prompt, traced, to be compiled ahead of time.

  Args:
    config, params, prepared: the model, and its `prepared` parameters; all may be abstract.
    prompt: tokens of the prompt.
    length, settings: of `stream`.

  Returns:
    The one that reads the prompt; and a function of what that returns, abstract or not, to the one
    that reads a position.
  """
  B, end = full_groups(config, 1), min(config.max_length, prompt + length - 1)
  room = padded(end, config.max_length)
  ones_B = np.ones(B, np.int32)
  requests = _Requests(
    np.zeros((B, room), np.int32), prompt * ones_B, ones_B, ones_B.astype(np.uint32), 0 * ones_B
  )
  position = np.int32(prompt)
  first = _prefill.trace(config, padded(prompt, room), params, requests, position, settings)
  then = lambda now: _advance.trace(config, params, prepared, *now, requests, position, settings)
  return first, then


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(config, prefix, params, requests, common, settings):
  """Reads the first `common` positions, which all prompts have; `prefix` is them and padding.

  Returns:
    The tokens at position `common`, the decoding state, and which tokens each sequence has seen.
  """
  model = model_lib.bind(config, params)
  B, S = requests.prompt_BS.shape
  V = config.vocab_size
  positions_BL = jnp.broadcast_to(jnp.arange(prefix, dtype=jnp.int32), (B, prefix))
  segments_BL = requests.segment_B[:, None] * (positions_BL < common)
  tokens = TokenInfo(segments_BL, positions_BL)
  logits_BV, state = model.prefill(requests.prompt_BS[:, :prefix], tokens, S)
  in_prompt_BS = jnp.arange(S)[None] < requests.length_B[:, None]
  ids_BS = jnp.where(in_prompt_BS, requests.prompt_BS, V)  # V is out of bounds: dropped
  seen_BV = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], ids_BS].set(True, mode='drop')
  return _choose(logits_BV, seen_BV, requests, common, settings), state, seen_BV


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(4, 5))
def _advance(config, params, prepared, token_B, state, seen_BV, requests, position, settings):
  """Reads the tokens of one position; returns those of the next, the state, and what was seen."""
  model = model_lib.bind(config, params)
  B = token_B.shape[0]
  tokens = TokenInfo(requests.segment_B, jnp.broadcast_to(position, (B,)))
  logits_BV, state = model.step(token_B, state, tokens, prepared)
  seen_BV = seen_BV.at[jnp.arange(B), token_B].set(True)
  return _choose(logits_BV, seen_BV, requests, position + 1, settings), state, seen_BV


def _choose(logits_BV, seen_BV, requests, position, settings):
  """The tokens at a position: of the prompt inside of it, sampled ones after it."""
  S = requests.prompt_BS.shape[1]
  index_B = requests.done_B + position - requests.length_B  # of the token in its continuation
  noise_BV = sampling_ops.noise(requests.seed_B, jnp.maximum(index_B, 0), logits_BV.shape[1])
  sampled_B = sampling_ops.next_token(logits_BV, seen_BV, noise_BV, **settings)
  given_B = requests.prompt_BS[:, jnp.minimum(position, S - 1)]
  return jnp.where(position < requests.length_B, given_B, sampled_B)
