"""Fitting a law to runs: Huber loss, several starts, held-out runs, bootstrap intervals.

scipy's least squares minimises the mean over runs of Huber(predicted - measured loss), with exact
slopes. The scales c, a, b and g are searched through their logarithms, the exponents as they are;
N, D and G are divided by their geometric means meanwhile, without which a scale and its exponent
are nearly the same direction.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from moejax.scaling_laws import laws

SCALES = ('c', 'a', 'b', 'g')
INTERVAL = (10, 90)  # percentiles of the bootstrap repeats, as in Table 6
DRAWN = 0.8  # of the runs, with replacement, as in the paper: of all, intervals are too narrow
DIVERGED = 0.2  # nats off the law that the others follow: five times what seeds differ by
_ZERO = math.log(1e-9)  # of a scale, whose logarithm is searched: none can be exactly 0
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


def fit(runs, form, *, c=None, starts=8, repeats=100, held_out=0.2, penalty=0.0, seed=0):
  """Fits one law.

  Args:
    runs: `collect.Run`s, all sparse with one expansion rate for `moe`, all dense otherwise.
    form: a key of FORMS.
    c: the value of c if it is known, None if it is fitted too.
    starts: random starting points of every optimisation; the best result counts. Nearly all end in
      the same place. (That of all runs is no start for a resampling: with a c near 0 it is flat.)
    repeats: bootstrap resamplings. 0: no intervals.
    held_out: fraction of the runs, those of lowest loss, that the validation fit does not see.
    penalty: weight of the sum of squares of exponents and logarithms of scales. The paper's 5e-4
      would bias the coefficients by more than its error of fit: docs/scaling_laws.md.
    seed: of starts and resamplings.

  Raises:
    ValueError: there are too few runs, or c is not below their losses.
  """
  law = FORMS[form]
  names = tuple(name for name in law.names if name != 'c' or c is None)
  _check_number(len(runs), form, names)
  if c is not None and not 0 <= c < min(run.loss for run in runs):
    lowest = min(run.loss for run in runs)
    raise ValueError(f'--c={c}: expected 0, or more and below the lowest loss, {lowest:.4g}.')
  problem = _problem(runs, law, names, c, penalty)
  start = _starts(names, starts, np.median(problem.loss), seed)

  def solve(draw):
    """Coefficients by the runs as often as they are in `draw`: centred, and natural."""
    theta = _minimise(problem, draw, start)
    return theta, _coefficients(problem, theta)

  kept = np.full(len(runs), True)
  theta, found = solve(kept)
  excluded = _off_the_law(runs, errors(found, runs))
  if excluded:
    kept = np.array([run.name not in excluded for run in runs])
    _check_number(kept.sum(), form, names)
    theta, found = solve(kept)
  seen = _seen(problem.loss, kept, held_out)
  validated = seen.sum() > len(names) and (kept & ~seen).any()
  others = [solve(draw)[1] for draw in _draw(kept, repeats, seed)]
  return Fit(
    form=form,
    coefficients=found,
    intervals=_intervals(names, others),
    rmse=_rms(errors(found, runs)[kept]),
    held_out_rmse=_rms(errors(solve(seen)[1], runs)[kept & ~seen]) if validated else None,
    used=tuple(run.name for run in runs if run.name not in excluded),
    excluded=excluded,
    warnings=tuple(_unidentified(problem, theta, kept)),
  )


def _seen(loss, kept, held_out):
  """Of the kept runs those that the validation fit sees."""
  return kept & (loss > np.quantile(loss[kept], held_out)) if held_out else kept


def _draw(kept, repeats, seed):
  """[repeats, runs]: how often each run is in each bootstrap sample."""
  rng = np.random.default_rng(seed)
  return rng.multinomial(round(DRAWN * kept.sum()), kept / kept.sum(), repeats)


def fit_moe_and_dense(sparse, dense, *, c: float | None = None, **options):
  """The law of sparse runs and, if there are any, that of dense ones with the same c.

  Returns a dict of expansion rate to `Fit`; the arguments are those of `fit`.
  """
  moe = fit(sparse, 'moe', c=c, **options)
  if dense and sparse[0].expansion_rate == 1:
    raise ValueError(
      'the sparse runs have expansion rate 1, which is that of dense models: fit one'
    )
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


def _off_the_law(runs, excess):
  """Why runs whose loss lies far from the law that the others follow are not used, by name."""
  limit = max(DIVERGED, 10 * np.median(np.abs(excess)))
  return {
    run.name: f'{"diverged" if more > 0 else "too good"}: its loss of {run.loss:.3f} is '
    f'{abs(more):.3f} {"above" if more > 0 else "below"} the law of the others'
    for run, more in zip(runs, excess, strict=True)
    if abs(more) > limit
  }


def _intervals(names, repeats):
  """Percentiles of every free coefficient over the bootstrap repeats."""
  spread = {}
  for name in names if repeats else ():
    low, high = np.percentile([getattr(k, name) for k in repeats], INTERVAL)
    spread[name] = (float(low), float(high))
  return spread


def _unidentified(problem, theta, kept):
  """Yields a sentence per coefficient that these runs leave open.

  The measure is its standard error, from the slopes of the law at the optimum, were every loss
  wrong by the error of fit: more than half of c or an exponent, more than a factor of e^(1/2) of
  the other scales.
  """
  values = problem.raw @ theta
  error, slope = (of_runs[kept] for of_runs in _residuals(problem, theta))
  if 'c' in problem.names:  # by c itself: near 0 its logarithm changes nothing
    column = problem.names.index('c')
    slope[:, column] /= np.exp(values[column])
    values[column] = _coefficients(problem, theta).c
  length = np.maximum(np.linalg.norm(slope, axis=0), 1e-9)
  _, size, directions = np.linalg.svd(slope / length, full_matrices=False)
  root = problem.raw @ (directions / length).T / np.maximum(size, 1e-9)  # of the covariance
  floor = _NOISE_FLOOR / problem.loss.mean() if problem.law.log_loss else _NOISE_FLOOR
  deviation = max(_rms(error), floor) * np.linalg.norm(root, axis=1)
  for name, value, spread in zip(problem.names, values, deviation, strict=True):
    if name in ('a', 'b', 'g') and spread > 0.5:
      factor = f'{np.exp(spread):.2g}' if spread < 5 else 'more than 100'
      yield f'{name} is known only to a factor of {factor}; {_REMEDY[name]}'
    elif name not in ('a', 'b', 'g') and spread > 0.5 * abs(value):
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

  law: Form
  names: tuple[str, ...]  # of the coefficients that are free
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
  return _Problem(
    law, names, params, tokens, granularity, loss, raw, 0.0 if c is None else c, penalty
  )


def _residuals(problem, theta):
  """[runs]: predicted less measured, at centred coefficients; [runs, coefficients]: its slopes."""
  k = dict(zip(problem.names, theta, strict=True))
  c = np.full_like(problem.loss, np.exp(k['c']) if 'c' in k else problem.c)
  of_size = np.exp(k['a'] - k['alpha'] * problem.params)
  of_tokens = np.exp(k['b'] - k['beta'] * problem.tokens)
  of_experts = np.zeros_like(c)
  if 'g' in k:
    finer = k['alpha'] * problem.params + k['gamma'] * problem.granularity
    of_experts = np.exp(k['g'] - finer)
  slopes = {
    'c': c,
    'a': of_size,
    'alpha': -(of_size + of_experts) * problem.params,
    'b': of_tokens,
    'beta': -of_tokens * problem.tokens,
    'g': of_experts,
    'gamma': -of_experts * problem.granularity,
  }
  slope = np.stack([slopes[name] for name in problem.names], axis=1)
  predicted = c + of_size + of_tokens + of_experts
  if problem.law.log_loss:
    return np.log(predicted / problem.loss), slope / predicted[:, None]
  return predicted - problem.loss, slope


def _starts(names, number, usual_loss, seed):
  """[starts, coefficients]: exponents in [0.03, 1], terms that share the usual loss at random."""
  rng = np.random.default_rng(seed)
  columns = {}
  for name, shares in zip(SCALES, rng.dirichlet(np.ones(len(SCALES)), number).T, strict=True):
    columns[name] = np.log(usual_loss * shares)
  for name in ('alpha', 'beta', 'gamma'):
    columns[name] = np.exp(rng.uniform(np.log(0.03), 0.0, number))
  return np.stack([columns[name] for name in names], axis=1)


def _minimise(problem, draw, starts):
  """[coefficients]: the best centred ones, where run i counts draw[i] times."""
  rows = np.repeat(np.arange(len(draw)), draw)
  penalty = np.sqrt(2 * problem.penalty * len(rows)) * problem.raw  # the cost is a sum of halves

  def residuals(theta):
    return np.append(_residuals(problem, theta)[0][rows], penalty @ theta)

  def slopes(theta):
    return np.vstack([_residuals(problem, theta)[1][rows], penalty])

  options: Any = {'jac': slopes, 'loss': functools.partial(_huber, len(rows))}
  options |= dict.fromkeys(('ftol', 'xtol', 'gtol'), 1e-10)  # seven digits of the coefficients
  with np.errstate(over='ignore', divide='ignore', invalid='ignore'):  # such steps are taken back
    found = [
      optimize.least_squares(residuals, start, f_scale=problem.law.huber, **options)
      for start in starts
    ]
  return min(found, key=lambda result: result.cost).x


def _huber(num_runs, squares):
  """As scipy's loss 'huber', but what follows the runs' residuals, a penalty, stays square."""
  size = np.sqrt(np.maximum(squares, 1))
  size[num_runs:] = 1
  values = np.where(size > 1, 2 * size - 1, squares)
  return np.stack([values, 1 / size, np.where(size > 1, -0.5 / size**3, 0)])


def _coefficients(problem, theta):
  values = {}
  for name, value in zip(problem.names, map(float, problem.raw @ theta), strict=True):
    values[name] = value if name not in SCALES else 0.0 if value < _ZERO else math.exp(value)
  return laws.Coefficients(**({'c': problem.c} | values))


def _rms(errors):
  return float(np.sqrt(np.mean(errors**2)))
