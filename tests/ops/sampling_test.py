"""Transformations of logits against plain loops over tokens, and against transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import sampling

B, V = 3, 37


def _logits(seed=0):
  return np.random.default_rng(seed).normal(size=(B, V), scale=3).astype(np.float32)


def _probabilities(row):
  weights = np.exp(row - row.max())
  return weights / weights.sum()


def _kept(row, allowed):
  return np.where([token in allowed for token in range(V)], row, -np.inf)


def _top_k(row, k):
  return _kept(row, sorted(range(V), key=lambda token: (-row[token], token))[: k or V])


def _top_p(row, p):
  chosen, mass, probabilities = [], 0.0, _probabilities(row)
  for token in sorted(range(V), key=lambda token: (-row[token], token)):
    if mass < p:
      chosen.append(token)
    mass += probabilities[token]
  return _kept(row, chosen)


def _min_p(row, p):
  probabilities = _probabilities(row)
  return _kept(
    row, [token for token in range(V) if probabilities[token] >= p * probabilities.max()]
  )


@pytest.mark.parametrize(
  'function, reference, values',
  [
    (sampling.keep_top_k, _top_k, (0, 1, 5, V, V + 3)),
    (sampling.keep_top_p, _top_p, (1e-6, 0.3, 0.9, 1.0)),
    (sampling.keep_min_p, _min_p, (0.0, 0.05, 0.5, 1.0)),
  ],
)
def test_filters_keep_what_a_loop_keeps(function, reference, values):
  logits = _logits()
  tied = np.round(logits)
  for value in values:
    for x_BV in (logits, tied):
      want = np.stack([reference(row, value) for row in x_BV])
      np.testing.assert_array_equal(jax.jit(function)(x_BV, value), want, err_msg=str(value))


def test_a_penalty_is_for_tokens_that_were_seen():
  logits, seen = _logits(), np.random.default_rng(1).random((B, V)) < 0.5
  want = np.where(seen, np.where(logits < 0, logits * 2, logits / 2), logits)
  np.testing.assert_array_equal(sampling.penalize_repetition(logits, seen, 2.0), want)


def test_the_coldest_temperature_is_finite():
  cold = sampling.divide_by_temperature(jnp.asarray(_logits() * 1e30), 1e-30)
  assert (cold.max(axis=1) == 0).all() and not jnp.isnan(cold).any()


NEUTRAL = {'repetition_penalty': 1.0, 'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0}
_next = jax.jit(sampling.next_token)


def _sampled(number, **settings):
  """Frequencies of the first row's next tokens."""
  noise = np.random.default_rng(3).gumbel(size=(number, V)).astype(np.float32)
  rows = np.tile(_logits()[:1], (number, 1))
  tokens = _next(rows, np.zeros((number, V), bool), noise, **NEUTRAL | settings)
  return np.bincount(tokens, minlength=V) / number


def test_tokens_come_as_often_as_their_probability():
  row = _logits()[0]
  for settings, want in (
    ({}, _probabilities(row)),
    ({'temperature': 0.5, 'top_k': 4}, _probabilities(_top_k(row / 0.5, 4))),
    ({'top_p': 0.7, 'min_p': 0.1}, _probabilities(_min_p(_top_p(row, 0.7), 0.1))),
  ):
    np.testing.assert_allclose(_sampled(20000, **settings), want, atol=0.015)


def test_temperature_0_and_top_k_1_take_the_likeliest_and_of_equals_the_first():
  logits = np.array([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]], np.float32)
  noise = np.random.default_rng(0).gumbel(size=(2, 3)).astype(np.float32)
  for settings in ({'temperature': 0.0}, {'temperature': 1e-38}, {'top_k': 1}, {'top_p': 1e-9}):
    tokens = _next(logits, np.zeros((2, 3), bool), noise, **NEUTRAL | settings)
    assert tokens.tolist() == [1, 0]


def test_noise_is_that_of_the_seed_and_the_token_alone():
  one = sampling.noise(np.uint32([5]), np.int32([2]), V)
  three = sampling.noise(np.uint32([4, 5, 5]), np.int32([2, 2, 3]), V)
  np.testing.assert_array_equal(three[1], one[0])
  assert len(np.unique(np.asarray(three)[:, 0])) == 3


@pytest.mark.heavy
def test_transformers_does_the_same():
  transformers = pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  logits, ids = _logits(), np.random.default_rng(1).integers(0, V, (B, 6))
  seen = np.zeros((B, V), bool)
  seen[np.arange(B)[:, None], ids] = True
  theirs = transformers.LogitsProcessorList(
    [
      transformers.RepetitionPenaltyLogitsProcessor(1.3),
      transformers.TemperatureLogitsWarper(0.7),
      transformers.TopKLogitsWarper(20),
      transformers.TopPLogitsWarper(0.9),
      transformers.MinPLogitsWarper(0.02),
    ]
  )
  steps = [
    functools.partial(sampling.penalize_repetition, seen_BV=seen, penalty=1.3),
    functools.partial(sampling.divide_by_temperature, temperature=0.7),
    functools.partial(sampling.keep_top_k, k=20),
    functools.partial(sampling.keep_top_p, p=0.9),
    functools.partial(sampling.keep_min_p, p=0.02),
  ]
  ours_BV, theirs_BV = jnp.asarray(logits), torch.tensor(logits)
  for ours, processor in zip(steps, theirs, strict=True):
    ours_BV, theirs_BV = ours(ours_BV), processor(torch.tensor(ids), theirs_BV)
    p, q = jax.nn.softmax(ours_BV), torch.softmax(theirs_BV, dim=-1).numpy()
    np.testing.assert_array_equal(p == 0, q == 0)
    np.testing.assert_allclose(p, q, rtol=1e-5)
