"""Fitting a law to runs: Huber loss, many starts, held-out runs, bootstrap intervals.

The mean over runs of Huber(predicted - measured loss) is minimised. The scales c, a, b and g are
searched through their logarithms, the exponents as they are; N, D and G are divided by their
geometric means meanwhile, without which a scale and its exponent are nearly the same direction.
Levenberg-Marquardt with exact derivatives in float64 solves every start of every resampling, all at
once by `vmap`.
"""

import contextlib
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.scaling_laws import laws

SCALES = ('c', 'a', 'b', 'g')
INTERVAL = (10, 90)  # percentiles of the bootstrap repeats, as in Table 6
DRAWN = (
  0.8  # of the runs, with replacement, as in the paper: drawing all gives intervals too narrow
)
DIVERGED = 0.2  # nats above the law that the other runs follow
_ITERATIONS = 100
_NOISE_FLOOR = 1e-3  # nats; runs agree no better than this, however well a law fits them


@dataclasses.dataclass(frozen=True)
class Form:
  """What is fitted: the coefficients, and how far from the law a run may lie at full weight."""

  names: tuple[str, ...]
  huber: float  # where Huber's loss turns from square to linear
  log_loss: bool  # whether residuals are of log L rather than of L


_DENSE = ('c', 'a', 'alpha', 'b', 'beta')
FORMS = {
  'moe': Form((*_DENSE, 'g', 'gamma'), huber=0.1, log_loss=False),  # arXiv:2402.07871, Section 5
  'dense': Form(_DENSE, huber=0.1, log_loss=False),
  'chinchilla': Form(_DENSE, huber=1e-3, log_loss=True),  # arXiv:2203.15556, Section 3.3
}


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fitted law; losses and errors in nats per token."""

  form: str
  coefficients: laws.Coefficients
  intervals: dict[str, tuple[float, float]]  # of the coefficients that were free
  rmse: float  # over the runs that were used
  held_out_rmse: float | None  # of a fit without the runs of lowest loss, over those
  used: tuple[str, ...]  # names of runs
  excluded: dict[str, str]  # name of a run: why it was not used
  warnings: tuple[str, ...]


def fit(runs, form, *, c=None, starts=50, repeats=100, held_out=0.2, penalty=0.0, seed=0):
  """Fits one law.

  Args:
    runs: `collect.Run`s, all sparse with one expansion rate for `moe`, all dense otherwise.
    form: a key of FORMS.
    c: the value of c if it is known, None if it is fitted too.
    starts: random starting points of every optimisation; the best result counts.
    repeats: bootstrap resamplings. 0: no intervals.
    held_out: fraction of the runs, those of lowest loss, that the validation fit does not see.
    penalty: weight of the sum of squares of exponents and logarithms of scales. The paper's 5e-4
      would bias the coefficients by more than its error of fit: docs/scaling_laws.md.
    seed: of starts and resamplings.

  Raises:
    ValueError: there are too few runs.
  """
  law = FORMS[form]
  names = tuple(name for name in law.names if name != 'c' or c is None)
  _check_number(len(runs), form, names)
  problem = _problem(runs, law, names, c, penalty)
  rng = np.random.default_rng(seed)
  start = _starts(rng, names, starts, problem.loss.mean())

  def solve(kept):
    """For all runs kept, for all but those held out, and for every repeat: coefficients."""
    weights = np.stack([kept, _seen(problem.loss, kept, held_out), *_draw(rng, kept, repeats)])
    return _solve(law, names, problem, weights.astype(np.float64), start)

  natural = functools.partial(_coefficients, names, problem)
  kept = np.full(len(runs), True)
  thetas = solve(kept)
  excluded = _diverged(runs, errors(natural(thetas[0]), runs))
  if excluded:
    kept = np.array([run.name not in excluded for run in runs])
    _check_number(kept.sum(), form, names)
    thetas = solve(kept)
  theta, validation_theta, *others = thetas
  seen = _seen(problem.loss, kept, held_out)
  validated = seen.sum() > len(names) and (kept & ~seen).any()
  return Fit(
    form=form,
    coefficients=natural(theta),
    intervals=_intervals(names, [natural(other) for other in others]),
    rmse=_rms(errors(natural(theta), runs)[kept]),
    held_out_rmse=_rms(errors(natural(validation_theta), runs)[kept & ~seen])
    if validated
    else None,
    used=tuple(run.name for run in runs if run.name not in excluded),
    excluded=excluded,
    warnings=tuple(_unidentified(law, names, problem, theta, kept)),
  )


def _seen(loss, kept, held_out):
  """Of the kept runs those that the validation fit sees."""
  return kept & (loss > np.quantile(loss[kept], held_out)) if held_out else kept


def _draw(rng, kept, repeats):
  """[repeats, runs]: how often each run is in each bootstrap sample."""
  return rng.multinomial(round(DRAWN * kept.sum()), kept / kept.sum(), repeats)


@contextlib.contextmanager
def _float64():
  """`jax.enable_x64`, which jax has from 0.8 on."""
  before = jnp.result_type(float) == jnp.float64
  jax.config.update('jax_enable_x64', True)
  try:
    yield
  finally:
    jax.config.update('jax_enable_x64', before)


def fit_moe_and_dense(sparse, dense, *, c: float | None = None, **options):
  """The law of sparse runs and, if there are any, that of dense ones with the same c.

  Returns a dict of expansion rate to `Fit`; the arguments are those of `fit`.
  """
  moe = fit(sparse, 'moe', c=c, **options)
  fits = {sparse[0].expansion_rate: moe}
  if dense:
    fits[1] = fit(dense, 'dense', c=moe.coefficients.c, **options)
  return fits


def _check_number(number, form, names):
  if number <= len(names):
    raise ValueError(
      f'{number} runs are too few for the {len(names)} coefficients {", ".join(names)} of the '
      f'{form} law: give at least {len(names) + 1}, better five times as many'
      + (', or fix c.' if 'c' in names else '.')
    )


def errors(coefficients, runs):
  """[runs]: measured less predicted loss."""
  columns = ('params', 'tokens', 'granularity', 'loss')
  *sizes, loss = np.array([[getattr(run, name) for name in columns] for run in runs], float).T
  return loss - laws.loss(coefficients, *sizes)


def _diverged(runs, excess):
  """Why runs whose loss lies far above the law that the others follow are not used, by name."""
  limit = max(DIVERGED, 10 * np.median(np.abs(excess)))
  return {
    run.name: f'diverged: its loss of {run.loss:.3f} is {more:.3f} above the law of the others'
    for run, more in zip(runs, excess, strict=True)
    if more > limit
  }


def _intervals(names, repeats):
  """Percentiles of every free coefficient over the bootstrap repeats."""
  spread = {}
  for name in names if repeats else ():
    low, high = np.percentile([getattr(k, name) for k in repeats], INTERVAL)
    spread[name] = (float(low), float(high))
  return spread


def _unidentified(law, names, problem, theta, kept):
  """Yields a sentence per coefficient that these runs leave open.

  The measure is its standard error, from the slopes of the law at the optimum, were every loss
  wrong by the error of fit: more than half of an exponent, or more than a factor of e^(1/2).
  """
  with _float64():
    residuals = functools.partial(_residuals, law, names, problem)
    error, slope = np.asarray(residuals(theta))[kept], np.asarray(jax.jacfwd(residuals)(theta))
  length = np.maximum(np.linalg.norm(slope[kept], axis=0), 1e-9)
  _, size, directions = np.linalg.svd(slope[kept] / length, full_matrices=False)
  root = problem.raw @ (directions / length).T / np.maximum(size, 1e-9)  # of the covariance
  floor = _NOISE_FLOOR / problem.loss.mean() if law.log_loss else _NOISE_FLOOR
  deviation = max(_rms(error), floor) * np.linalg.norm(root, axis=1)
  for name, value, spread in zip(names, problem.raw @ theta, deviation, strict=True):
    if name in SCALES and spread > 0.5:
      factor = f'{np.exp(spread):.2g}' if spread < 5 else 'more than 100'
      yield f'{name} is known only to a factor of {factor}; {_REMEDY[name]}'
    elif name not in SCALES and spread > 0.5 * abs(value):
      yield f'{name} = {value:.3g} is known only to +-{spread:.2g}; {_REMEDY[name]}'


_REMEDY = {
  'c': 'fix it, or add longer runs of larger models.',
  'a': 'add runs of other sizes.',
  'alpha': 'add runs of other sizes.',
  'b': 'add runs of other durations.',
  'beta': 'add runs of other durations.',
  'g': 'add runs of other granularities.',
  'gamma': 'add runs of other granularities.',
}


class _Problem(NamedTuple):
  """The runs as arrays: logarithms less their means over the runs, and how to undo that."""

  params: np.ndarray
  tokens: np.ndarray
  granularity: np.ndarray
  loss: np.ndarray
  raw: np.ndarray  # times the centred coefficients: logarithms of scales, and exponents
  c: float  # used where c is not free
  penalty: float


def _problem(runs, law, names, c, penalty):
  def logs(values):
    log = np.log(np.array(values, np.float64))
    return log - log.mean(), log.mean()

  params, mean_params = logs([run.params for run in runs])
  tokens, mean_tokens = logs([run.tokens for run in runs])
  sparse = 'g' in law.names
  granularity, mean_granularity = logs([run.granularity if sparse else 1 for run in runs])
  raw = np.eye(len(names))
  for scale, exponent, mean in (
    ('a', 'alpha', mean_params),
    ('b', 'beta', mean_tokens),
    ('g', 'alpha', mean_params),
    ('g', 'gamma', mean_granularity),
  ):
    if scale in names:
      raw[names.index(scale), names.index(exponent)] = mean
  loss = np.array([run.loss for run in runs], np.float64)
  return _Problem(params, tokens, granularity, loss, raw, 0.0 if c is None else c, penalty)


def _residuals(law, names, problem, theta):
  """[runs]: predicted less measured, at centred coefficients."""
  k = dict(zip(names, theta, strict=True))
  c = jnp.exp(k['c']) if 'c' in k else problem.c
  predicted = c + jnp.exp(k['a'] - k['alpha'] * problem.params)
  predicted += jnp.exp(k['b'] - k['beta'] * problem.tokens)
  if 'g' in k:
    finer = k['alpha'] * problem.params + k['gamma'] * problem.granularity
    predicted += jnp.exp(k['g'] - finer)
  if law.log_loss:
    return jnp.log(predicted) - jnp.log(problem.loss)
  return predicted - problem.loss


def _starts(rng, names, number, mean_loss):
  """[starts, coefficients]: exponents in [0.03, 1], terms that share the mean loss at random."""
  columns = {}
  for name, shares in zip(SCALES, rng.dirichlet(np.ones(len(SCALES)), number).T, strict=True):
    columns[name] = np.log(mean_loss * shares)
  for name in ('alpha', 'beta', 'gamma'):
    columns[name] = np.exp(rng.uniform(np.log(0.03), 0.0, number))
  return np.stack([columns[name] for name in names], axis=1)


class _State(NamedTuple):
  """Of one optimisation."""

  theta: jax.Array
  cost: jax.Array
  damping: jax.Array
  iterations: jax.Array
  done: jax.Array


def _minimise(law, names, problem, weights, start):
  """Levenberg-Marquardt; Huber's loss as a square reweighted at every step."""
  share = weights / weights.sum()
  penalty = problem.penalty * problem.raw.T @ problem.raw
  residuals = functools.partial(_residuals, law, names, problem)

  def cost_at(theta):
    size = jnp.abs(residuals(theta))
    huber = jnp.where(size < law.huber, size**2 / 2, law.huber * (size - law.huber / 2))
    return share @ huber + theta @ penalty @ theta

  def iterate(state):
    theta = state.theta
    error, slope = residuals(theta), jax.jacfwd(residuals)(theta)
    weight = share * law.huber / jnp.maximum(jnp.abs(error), law.huber)
    gradient = (weight * error) @ slope + 2 * penalty @ theta
    curvature = (slope.T * weight[None]) @ slope + 2 * penalty
    # The constant holds coefficients still that the runs do not determine at all.
    damped = curvature + jnp.diag(state.damping * jnp.diag(curvature) + 1e-12)
    step = jnp.linalg.solve(damped, gradient)
    cost = cost_at(theta - step)
    better = cost < state.cost
    return _State(
      theta=jnp.where(better, theta - step, theta),
      cost=jnp.where(better, cost, state.cost),
      damping=jnp.where(better, state.damping / 5, state.damping * 4).clip(1e-9),
      iterations=state.iterations + 1,
      done=gradient @ step < 1e-10 * state.cost + 1e-24,
    )

  first = _State(start, cost_at(start), jnp.array(1e-2), jnp.array(0), jnp.array(False))
  last = jax.lax.while_loop(lambda s: ~s.done & (s.iterations < _ITERATIONS), iterate, first)
  return last.theta, last.cost


@functools.partial(jax.jit, static_argnames=('law', 'names'))
def _best(law, names, problem, weights, starts):
  one = functools.partial(_minimise, law, names, problem)
  theta, cost = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(weights, starts)
  best = jnp.nanargmin(cost, axis=1)
  return theta[jnp.arange(len(best)), best]


def _solve(law, names, problem, weights, starts):
  """[resamplings, coefficients]: the best centred coefficients for each row of `weights`."""
  with _float64():
    return np.asarray(_best(law, names, problem, weights, starts))


def _natural(names, raw):
  return [np.exp(v) if name in SCALES else v for name, v in zip(names, raw, strict=True)]


def _coefficients(names, problem, theta):
  values = dict(zip(names, map(float, _natural(names, problem.raw @ theta)), strict=True))
  return laws.Coefficients(**({'c': problem.c} | values))


def _rms(errors):
  return float(np.sqrt(np.mean(errors**2)))
