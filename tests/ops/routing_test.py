"""Plans: who goes where, who is dropped, what balances, and the statistics of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import routing
from tests import shapes
from tests.ops import oracles

G, T, E = 2, 7, 5
ALL = np.ones((1, 3), bool)
# Compiled as a whole: one by one, the operations take several times as long to compile.
token_choice = jax.jit(
  routing.token_choice,
  static_argnames=('k', 'capacity', 'scores', 'renormalize', 'ragged'),
)
expert_choice = jax.jit(routing.expert_choice, static_argnames=('capacity', 'softmax_over'))


@jax.jit
def metrics_of(plan, logits_GTE, valid_GT):
  number_GT = plan.rows_per_token_T.reshape(valid_GT.shape)
  return routing.router_metrics(plan.counts_GE, number_GT, logits_GTE, valid_GT)


def _logits(seed=0, shape=(G, T, E)):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _valid():
  return np.random.default_rng(1).random((G, T)) < 0.8


def _rows(plan):
  """{(token, expert): weight} of all rows in use."""
  used = np.asarray(plan.used)
  if plan.ragged:
    ends = np.cumsum(plan.sizes_E)
    expert = np.searchsorted(ends, np.arange(used.size), side='right')
  else:
    expert = np.broadcast_to(np.arange(used.shape[0])[:, None], used.shape)
  tokens = np.asarray(plan.token)[used].tolist()
  rows = dict(
    zip(
      zip(tokens, expert[used].tolist(), strict=True),
      np.asarray(plan.weight)[used].tolist(),
      strict=True,
    )
  )
  assert len(rows) == used.sum(), 'an expert holds a token twice'
  return rows


def _check_consistent(plan):
  """The list by token is the inverse of the rows; empty rows weigh nothing; sizes are true."""
  plan = jax.device_get(plan)
  used, token = np.asarray(plan.used).reshape(-1), np.asarray(plan.token).reshape(-1)
  found = []
  for t, (first, n) in enumerate(
    zip(plan.row_start_T.tolist(), plan.rows_per_token_T.tolist(), strict=True)
  ):
    rows = np.asarray(plan.rows_by_token)[first : first + n]
    assert n <= plan.max_per_token
    assert np.all(token[rows] == t) and np.all(used[rows])
    found += rows.tolist()
  assert sorted(found) == np.flatnonzero(used).tolist()
  assert not np.any(np.asarray(plan.weight).reshape(-1)[~used])
  assert plan.sizes_E.sum() == used.sum()
  if not plan.ragged:
    np.testing.assert_array_equal(plan.sizes_E, plan.used.sum(axis=1))
  assert token.min() >= 0 and token.max() < plan.row_start_T.shape[0]


# Three tokens, two experts. Token 0 prefers expert 0, tokens 1 and 2 expert 1.
THREE = jnp.log(jnp.array([[[0.8, 0.2], [0.3, 0.7], [0.4, 0.6]]]))


@pytest.mark.parametrize('ragged', [False, True])
def test_who_is_dropped(ragged):
  """Later tokens, whatever their preference: no token has an influence on earlier ones."""
  choose = functools.partial(token_choice, THREE, ragged=ragged, valid_GT=ALL)
  # One choice each, one slot: token 2 comes after token 1.
  assert _rows(choose(1, 1)) == pytest.approx({(0, 0): 0.8, (1, 1): 0.7})
  # Expert 1 is the first choice of token 2 and the second of token 0, which comes first.
  assert _rows(choose(2, 2)) == pytest.approx({(0, 0): 0.8, (0, 1): 0.2, (1, 1): 0.7, (1, 0): 0.3})
  assert _rows(choose(2, 3)).keys() == {(t, e) for t in range(3) for e in range(2)}


def test_capacity_is_counted_per_group():
  logits_GTE = jnp.zeros((2, 3, 2)).at[..., 0].set(1)
  plan = token_choice(logits_GTE, 1, 2, valid_GT=np.ones((2, 3), bool))
  assert {token for token, _ in _rows(plan)} == {0, 1, 3, 4}
  np.testing.assert_array_equal(plan.counts_GE, [[3, 0], [3, 0]])
  np.testing.assert_array_equal(plan.token[0], [0, 1, 3, 4])  # slots of group 0, then of group 1


def test_padding_is_not_routed_and_takes_no_slot():
  valid_GT = np.array([[True, False, True]])
  plan = token_choice(THREE, 1, 1, valid_GT=valid_GT)
  assert _rows(plan).keys() == {(0, 0), (2, 1)}
  np.testing.assert_array_equal(plan.counts_GE, [[1, 1]])
  plan = expert_choice(THREE, 3, valid_GT=valid_GT)
  assert {token for token, _ in _rows(plan)} == {0, 2}
  _check_consistent(plan)


def test_ties_go_to_the_lowest_index():
  plan = token_choice(jnp.zeros((1, 3, 4)), 2, None, valid_GT=ALL)
  assert _rows(plan).keys() == {(t, e) for t in range(3) for e in (0, 1)}
  plan = expert_choice(jnp.zeros((1, 3, 4)), 2, valid_GT=ALL)
  assert _rows(plan).keys() == {(t, e) for t in (0, 1) for e in range(4)}


ROUTERS = {
  'k1': dict(k=1),
  'k3': dict(k=3, renormalize=True),
  'all experts': dict(k=E),
  'sigmoid': dict(k=3, scores='sigmoid', renormalize=True),
}


@pytest.mark.parametrize(
  ('capacity', 'ragged'), [(1, False), (1, True), (4, False), (4, True), (100, False), (None, True)]
)
@pytest.mark.parametrize('name', ROUTERS)
def test_token_choice_is_the_loops(name, capacity, ragged):
  logits_GTE, valid_GT = _logits(), _valid()
  options = dict(scores='softmax', renormalize=False) | ROUTERS[name]
  plan = token_choice(logits_GTE, capacity=capacity, ragged=ragged, valid_GT=valid_GT, **options)
  _check_consistent(plan)
  kept, num_choices, _ = oracles.token_choice(
    np.asarray(logits_GTE, np.float64), capacity=capacity, valid_GT=valid_GT, bias_E=None, **options
  )
  expected = {(g * T + t, e): weight for g, _, t, e, weight in kept}
  assert _rows(plan) == pytest.approx(expected)
  metrics = metrics_of(plan, logits_GTE, valid_GT)
  assert metrics['dropped'] == pytest.approx(1 - len(kept) / num_choices, abs=1e-6)
  routed = {token for token, _ in expected}
  assert metrics['unrouted'] == pytest.approx(1 - len(routed) / valid_GT.sum(), abs=1e-6)
  if ragged:
    assert plan.ragged
    loads = np.bincount([e for _, e in expected], minlength=E)
    np.testing.assert_array_equal(plan.sizes_E, loads)


@pytest.mark.parametrize('softmax_over', ['experts', 'tokens'])
@pytest.mark.parametrize('capacity', [1, 3, T])
def test_expert_choice_is_the_loops(softmax_over, capacity):
  logits_GTE, valid_GT = _logits(), _valid()
  valid_GT[1] = False
  plan = expert_choice(logits_GTE, capacity, valid_GT=valid_GT, softmax_over=softmax_over)
  _check_consistent(plan)
  logits = np.asarray(logits_GTE, np.float64)
  kept, _, _ = oracles.expert_choice(logits, capacity, valid_GT, softmax_over)
  assert _rows(plan) == pytest.approx({(g * T + t, e): weight for g, _, t, e, weight in kept})


@pytest.mark.parametrize('scores', routing.SCORES)
@pytest.mark.parametrize('level', [0.0, -50, -1e3, 1e3])
def test_renormalized_weights_where_all_scores_underflow(scores, level):
  """In float64 by hand: a softmax of log-sigmoids, which far below 0 are the logits themselves."""
  logits_GTE = _logits(shape=(1, 3, E)).at[0, 1].add(level)
  bias_E = jnp.array([3.0, 0, 3, 0, 0])  # of a softmax, too, the chosen ones are not the largest

  def weights(logits_GTE):
    options = dict(bias_E=bias_E, scores=scores, renormalize=True)
    return routing.token_choice(logits_GTE, 2, None, valid_GT=ALL, **options).weight

  x = np.asarray(logits_GTE, np.float64)[0][:, [0, 2]]
  log = -np.logaddexp(0, -x) if scores == 'sigmoid' else x
  p = oracles.softmax(log, 1)
  np.testing.assert_allclose(weights(logits_GTE), p.T.reshape(-1), rtol=1e-5)
  slope = np.exp(-np.logaddexp(0, x)) if scores == 'sigmoid' else 1  # of the logarithm
  expected = np.zeros((3, E))
  expected[:, [0, 2]] = (np.array([1.0, 0]) - p) * p[:, :1] * slope
  gradient = jax.jit(jax.grad(lambda logits_GTE: weights(logits_GTE)[:3].sum()))(logits_GTE)
  np.testing.assert_allclose(gradient[0], expected, rtol=1e-4, atol=1e-7)


def test_weights_of_a_token_are_conserved():
  plan = token_choice(_logits(), 3, None, valid_GT=_valid(), renormalize=True)
  sums = np.bincount(plan.token, plan.weight, minlength=G * T)
  np.testing.assert_allclose(sums, _valid().reshape(-1), rtol=1e-6, atol=1e-7)


def test_the_bias_chooses_but_does_not_weigh():
  bias_E = jnp.array([0.0, 100, 0, 0, 0])
  plan = token_choice(_logits(), 1, None, valid_GT=_valid(), bias_E=bias_E, scores='sigmoid')
  rows = _rows(plan)
  assert {e for _, e in rows} == {1}
  scores = jax.nn.sigmoid(_logits()).reshape(G * T, E)
  assert rows == pytest.approx({(t, 1): float(scores[t, 1]) for t, _ in rows})


def test_the_bias_balances():
  logits_GTE = _logits(shape=(1, 400, E)) + jnp.arange(E)[None, None]
  valid_GT = np.ones((1, 400), bool)

  @jax.jit
  def step(bias_E):
    plan = routing.token_choice(
      logits_GTE, 2, None, valid_GT=valid_GT, bias_E=bias_E, scores='sigmoid'
    )
    counts_E = plan.counts_GE.sum(axis=0)
    return bias_E - 0.01 * jnp.sign(counts_E - counts_E.mean()), counts_E

  bias_E = jnp.zeros(E)
  _, before = step(bias_E)
  for _ in range(150):
    bias_E, counts = step(bias_E)
  assert before.max() / before.mean() > 1.5
  assert counts.max() / counts.mean() < 1.2


@pytest.mark.parametrize('k', [1, 2, E])
def test_uniform_routing_has_a_balance_loss_of_one(k):
  counts_GE = jnp.full((G, E), T * k / E)
  valid_GT = np.ones((G, T), bool)
  loss = routing.load_balancing_loss(jnp.zeros((G, T, E)), counts_GE, valid_GT, k=k)
  assert loss == pytest.approx(1)


def test_balance_of_sigmoids_is_that_of_their_shares(x64):
  """DeepSeek-V3's, as loops in numpy; the gradient against differences of it."""
  logits_GTE, valid_GT = np.asarray(_logits(), np.float64), _valid()
  plan = token_choice(logits_GTE, 2, None, valid_GT=valid_GT, scores='sigmoid')
  counts = np.asarray(plan.counts_GE, np.float64).sum(axis=0)

  def by_hand(logits_GTE):
    scores = 1 / (1 + np.exp(-logits_GTE[valid_GT]))
    shares = scores / scores.sum(axis=1, keepdims=True)
    return E / 2 * (counts / valid_GT.sum()) @ shares.mean(axis=0)

  def loss(logits_GTE):
    logits_GTE = routing.normalizing_logits(logits_GTE, 'sigmoid')
    return routing.load_balancing_loss(logits_GTE, plan.counts_GE, valid_GT, k=2)

  value, gradient = jax.value_and_grad(loss)(logits_GTE)
  assert value == pytest.approx(by_hand(logits_GTE), rel=1e-12)
  for at in np.ndindex(G, T, E):
    step = np.zeros((G, T, E))
    step[at] = 1e-5
    slope = (by_hand(logits_GTE + step) - by_hand(logits_GTE - step)) / 2e-5
    assert gradient[at] == pytest.approx(slope, abs=1e-9)


def test_a_load_that_is_the_mean_does_not_pull():
  """Also where rounding, or a sum over parts of a batch, makes the mean a hair off."""
  pull = jax.jit(jax.grad(lambda b, c, scale: scale * routing.balance_pull(b, c).astype('float32')))
  for mean in (3, 49, 1_000_003):
    parts = [np.array([[mean, mean + 3, mean - 3, mean, mean, mean, mean]]) + i for i in (0, 1, -1)]
    parts[1][0, :3] += [1, -4, 3]
    parts[2][0, :3] -= [1, -4, 3]
    total = sum(pull(jnp.zeros(7), jnp.asarray(part, jnp.int32), 1 / 3) for part in parts)
    np.testing.assert_array_equal(np.sign(total), [0, 1, -1, 0, 0, 0, 0])
  assert np.sign(pull(jnp.zeros(3), jnp.array([[2, 1, 1]]), 1.0)).tolist() == [1, -1, -1]


def test_all_to_one_expert_has_a_balance_loss_of_the_number_of_experts():
  logits_GTE = jnp.zeros((G, T, E)).at[..., 2].set(100)
  plan = token_choice(logits_GTE, 1, 1, valid_GT=_valid())
  loss = routing.load_balancing_loss(logits_GTE, plan.counts_GE, _valid(), k=1)
  assert loss == pytest.approx(E)


def test_statistics_see_valid_tokens_only():
  valid_GT = _valid()
  logits_GTE = _logits()
  other_GTE = jnp.where(valid_GT[..., None], logits_GTE, 50.0)

  def statistics(logits_GTE):
    plan = token_choice(logits_GTE, 2, 1, valid_GT=valid_GT)
    balance = routing.load_balancing_loss(logits_GTE, plan.counts_GE, valid_GT, k=2)
    metrics = metrics_of(plan, logits_GTE, valid_GT)
    return balance, routing.z_loss(logits_GTE, valid_GT), metrics

  jax.tree.map(np.testing.assert_array_equal, statistics(logits_GTE), statistics(other_GTE))
  expected = np.mean(jax.nn.logsumexp(logits_GTE, axis=-1)[valid_GT] ** 2)
  assert routing.z_loss(logits_GTE, valid_GT) == pytest.approx(expected)


def test_router_metrics():
  logits_GTE = jnp.zeros((1, 3, 4)).at[0, :, 1].set(100)
  plan = token_choice(logits_GTE, 1, 2, valid_GT=ALL)
  metrics = metrics_of(plan, logits_GTE, ALL)
  expected = dict(
    load_max=4, load_cv=np.sqrt(3), dead=0.75, dropped=1 / 3, unrouted=1 / 3, entropy=0
  )
  assert {k: float(v) for k, v in metrics.items()} == pytest.approx(expected, abs=1e-6)
  uniform = metrics_of(plan, jnp.zeros((1, 3, 4)), ALL)
  assert uniform['entropy'] == pytest.approx(1)


def test_nothing_but_padding():
  nothing_GT = np.zeros((G, T), bool)
  for plan in (
    token_choice(_logits(), 2, 3, valid_GT=nothing_GT),
    token_choice(_logits(), 2, None, valid_GT=nothing_GT),
    expert_choice(_logits(), 3, valid_GT=nothing_GT, softmax_over='tokens'),
  ):
    assert not _rows(plan)
    metrics = metrics_of(plan, _logits(), nothing_GT)
    balance = routing.load_balancing_loss(_logits(), plan.counts_GE, nothing_GT, k=2)
    assert np.all(np.isfinite([*metrics.values(), balance]))


def test_experts_can_be_renamed():
  order = np.array([3, 0, 4, 1, 2])
  for route in (
    lambda logits: token_choice(logits, 2, 2, valid_GT=_valid()),
    lambda logits: expert_choice(logits, 3, valid_GT=_valid()),
  ):
    renamed = {(t, int(order[e])): w for (t, e), w in _rows(route(_logits()[..., order])).items()}
    assert renamed == pytest.approx(_rows(route(_logits())))


@pytest.mark.parametrize(
  ('num_tokens', 'k', 'num_experts', 'factor', 'slots'),
  [
    (256, 1, 64, 1.0, 4),
    (10, 1, 10, 1.1, 2),
    (100, 1, 10, 1.1, 11),
    (4, 1, 64, 1.0, 1),
    (8, 4, 4, 9.0, 8),
  ],
)
def test_capacity(num_tokens, k, num_experts, factor, slots):
  assert routing.expert_capacity(num_tokens, k, num_experts, factor) == slots


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: token_choice(_logits(), E + 1, 1, valid_GT=_valid()), 'between 1 and 5'),
    (lambda: token_choice(_logits(), 1, 0, valid_GT=_valid()), 'at least 1 slot'),
    (lambda: token_choice(_logits(), 1, 1, valid_GT=_valid(), scores='relu'), 'relu'),
    (lambda: expert_choice(_logits(), T + 1, valid_GT=_valid()), 'all 7 tokens'),
    (
      lambda: expert_choice(_logits(), 1, valid_GT=_valid(), softmax_over='x'),
      'experts or',
    ),
  ],
)
def test_impossible_values(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_sorts_with_and_without_room_for_the_index_in_the_key():
  keys = np.random.default_rng(0).integers(0, 9, 50).astype(np.int32)
  expected = np.argsort(keys, kind='stable')
  np.testing.assert_array_equal(routing._argsort(keys, 10), expected)
  np.testing.assert_array_equal(routing._argsort(keys, 2**30), expected)


def test_names_are_true():
  with shapes.checked():
    for route in (
      lambda logits: routing.token_choice(logits, 2, 3, valid_GT=_valid()),
      lambda logits: routing.token_choice(logits, 2, 3, valid_GT=_valid(), ragged=True),
      lambda logits: routing.expert_choice(logits, 3, valid_GT=_valid()),
    ):
      plan = jax.eval_shape(route, _logits())
      jax.eval_shape(metrics_of, plan, _logits(), _valid())
