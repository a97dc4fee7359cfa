"""Fits a law to runs: Huber loss, several starts, held-out runs, bootstrap intervals.

scipy's least squares minimises the mean over runs of Huber(predicted - measured loss), with exact
Jacobians. The scales c, a, b and g are optimized as logarithms. N, D and G are divided by their
geometric means: otherwise a scale and its exponent are nearly collinear.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from moejax.scaling_laws import laws

SCALES = ('c', 'a', 'b', 'g')
INTERVAL = (10, 90)  # percentiles of the bootstrap samples, as in Table 6
SAMPLED = 0.8  # runs per bootstrap sample, as in the paper; 1 gives too narrow intervals
OUTLIER = 0.2  # nats from the law of the other runs: five times the spread of seeds
_ZERO = math.log(1e-9)  # log of a scale that counts as 0
_SHORT = 2  # tokens per parameter
_NOISE_FLOOR = 1e-3  # nats; the least error of a loss, however well a law fits


class Form(NamedTuple):
  """What is fitted: the coefficients and the loss function.

  The loss is a sum of c and of terms whose logarithms are linear in the exponents and in the
  logarithms of the scales.
  """

  names: tuple[str, ...]
  terms: Callable  # logarithms of N, D, G and effective experts -> per term, factors by coefficient
  huber: float  # residual at which the Huber loss becomes linear
  log_loss: bool = False  # residuals of log L instead of L
  coefficients: type = laws.Coefficients


def _dense_terms(n, d, g, x):
  return {'a': 1, 'alpha': -n}, {'b': 1, 'beta': -d}


def _moe_terms(n, d, g, x):
  return *_dense_terms(n, d, g, x), {'g': 1, 'alpha': -n, 'gamma': -g}


def _joint_terms(n, d, g, x):
  size = {'a': 1, 'alpha': n, 'delta': x, 'gamma': x * n}
  return size, {'b': 1, 'beta': d, 'omega': x, 'zeta': x * d}


_DENSE = ('c', 'a', 'alpha', 'b', 'beta')
_JOINT = (*_DENSE, 'delta', 'gamma', 'omega', 'zeta')
FORMS = {
  'moe': Form((*_DENSE, 'g', 'gamma'), _moe_terms, 0.1),  # arXiv:2402.07871, Section 5
  'dense': Form(_DENSE, _dense_terms, 0.1),
  'chinchilla': Form(_DENSE, _dense_terms, 1e-3, log_loss=True),  # arXiv:2203.15556, Section 3.3
  'joint': Form(_JOINT, _joint_terms, 1e-2, True, laws.Joint),  # arXiv:2502.05172, Appendix B
}


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fitted law; losses and errors in nats per token."""

  form: str
  coefficients: laws.Coefficients | laws.Joint
  intervals: dict[str, tuple[float, float]]  # of the free coefficients
  rmse: float  # over the used runs
  held_out_rmse: float | None  # over the runs of lowest loss, by a fit without them
  used: tuple[str, ...]  # names of runs
  excluded: dict[str, str]  # name of a run -> reason
  warnings: tuple[str, ...]
  expansion_rates: tuple[float, ...] = ()  # of the used runs
  samples: tuple[tuple, ...] = ()  # coefficients of the bootstrap samples


def fit(runs, form, *, c=None, starts=8, repeats=100, held_out=0.2, penalty=0.0, seed=0):
  """Fits one law.

  Args:
    runs: `collect.Run`s: sparse ones of one expansion rate for `moe`, dense ones and those of G = 1
      and any number of experts for `joint`, and dense ones otherwise.
    form: a key of FORMS.
    c: a fixed value of c; None fits it.
    starts: random starting points per optimization; the best result is used. Nearly all reach the
      same optimum. (It is a poor start for bootstrap samples: with c near 0 it is flat.)
    repeats: bootstrap samples. 0: no intervals.
    held_out: fraction of the runs, those of lowest loss, held out from the validation fit.
    penalty: weight of the sum of squares of exponents and logarithms of scales. The paper's 5e-4
      would bias the coefficients by more than its fitting error: docs/scaling_laws.md.
    seed: of starts and bootstrap samples.

  Raises:
    ValueError: too few runs, or c is not below their losses.
  """
  law = FORMS[form]
  names = tuple(name for name in law.names if name != 'c' or c is None)
  _check_number(len(runs), form, names)
  if c is not None and not 0 <= c < min(run.loss for run in runs):
    lowest = min(run.loss for run in runs)
    raise ValueError(f'--c={c}: expected at least 0 and below the lowest loss, {lowest:.4g}.')
  problem = _problem(runs, law, names, c, penalty)
  start = _starts(names, starts, np.median(problem.loss), seed)

  def solve(counts):
    """Coefficients, centred and natural, with run i counted counts[i] times."""
    theta = _minimise(problem, counts, start)
    return theta, _coefficients(problem, theta)

  kept = np.full(len(runs), True)
  theta, found = solve(kept)
  excluded = _outliers(runs, errors(found, runs))
  if excluded:
    kept = np.array([run.name not in excluded for run in runs])
    _check_number(kept.sum(), form, names)
    theta, found = solve(kept)
  train = _train_split(problem.loss, kept, held_out)
  validated = train.sum() > len(names) and (kept & ~train).any()
  samples = [solve(counts)[1] for counts in _bootstrap(kept, repeats, seed)]
  used = [run for run in runs if run.name not in excluded]
  return Fit(
    form=form,
    coefficients=found,
    intervals=_intervals(names, samples),
    rmse=_rms(errors(found, runs)[kept]),
    held_out_rmse=_rms(errors(solve(train)[1], runs)[kept & ~train]) if validated else None,
    used=tuple(run.name for run in used),
    excluded=excluded,
    warnings=(*_unidentified(problem, theta, kept), *_doubts(form, found, used)),
    expansion_rates=tuple(sorted({run.expansion_rate for run in used})),
    samples=tuple(map(tuple, samples)),
  )


def _train_split(loss, kept, held_out):
  """The kept runs that the validation fit uses."""
  return kept & (loss > np.quantile(loss[kept], held_out)) if held_out else kept


def _bootstrap(kept, repeats, seed):
  """[repeats, runs]: the count of each run in each bootstrap sample."""
  rng = np.random.default_rng(seed)
  return rng.multinomial(round(SAMPLED * kept.sum()), kept / kept.sum(), repeats)


def fit_moe_and_dense(sparse, dense, *, c: float | None = None, **options):
  """Fits the law of the sparse runs and, if there are dense runs, theirs with the same c.

  Returns a dict of expansion rate to `Fit`; the arguments are those of `fit`.
  """
  moe = fit(sparse, 'moe', c=c, **options)
  if dense and sparse[0].expansion_rate == 1:
    raise ValueError(
      'the sparse runs have expansion rate 1, as the dense runs do: fit them separately'
    )
  fits = {sparse[0].expansion_rate: moe}
  if dense:
    fits[1] = fit(dense, 'dense', c=moe.coefficients.c, **options)
  return fits


def _check_number(number, form, names):
  if number <= len(names):
    raise ValueError(
      f'{number} runs are too few for the {len(names)} coefficients {", ".join(names)} of the '
      f'{form} law: give at least {len(names) + 1}, preferably five times as many'
      + (', or fix c.' if 'c' in names else '.')
    )


def errors(coefficients, runs):
  """[runs]: measured minus predicted loss."""
  return np.array([run.loss - laws.loss_of(_at(coefficients, run), run) for run in runs])


def _at(coefficients, run):
  """The coefficients for the number of experts of a run."""
  if isinstance(coefficients, laws.Joint):
    return coefficients.at(run.expansion_rate)
  return coefficients


def _outliers(runs, excess):
  """Runs far from the law of the others: name -> reason to exclude it."""
  limit = max(OUTLIER, 10 * np.median(np.abs(excess)))
  return {
    run.name: f'{"diverged" if more > 0 else "too good"}: loss {run.loss:.3f} is '
    f'{abs(more):.3f} {"above" if more > 0 else "below"} the law of the others'
    for run, more in zip(runs, excess, strict=True)
    if abs(more) > limit
  }


def _intervals(names, samples):
  """Percentiles of every free coefficient over the bootstrap samples."""
  intervals = {}
  for name in names if samples else ():
    low, high = np.percentile([getattr(k, name) for k in samples], INTERVAL)
    intervals[name] = (float(low), float(high))
  return intervals


def _unidentified(problem, theta, kept):
  """Yields a warning per coefficient that the runs do not determine.

  The criterion is its standard error, from the Jacobian at the optimum and the error of the fit:
  more than half of c or an exponent, more than a factor of e^(1/2) of the other scales.
  """
  values = problem.raw @ theta
  error, jacobian = (array[kept] for array in _residuals(problem, theta))
  if 'c' in problem.names:  # of c itself: near 0 its logarithm has no effect
    column = problem.names.index('c')
    jacobian[:, column] /= np.exp(values[column])
    values[column] = _coefficients(problem, theta).c
  length = np.maximum(np.linalg.norm(jacobian, axis=0), 1e-9)
  _, size, directions = np.linalg.svd(jacobian / length, full_matrices=False)
  root = problem.raw @ (directions / length).T / np.maximum(size, 1e-9)  # of the covariance
  floor = _NOISE_FLOOR / problem.loss.mean() if problem.law.log_loss else _NOISE_FLOOR
  deviation = max(_rms(error), floor) * np.linalg.norm(root, axis=1)
  remedy = _REMEDY | (_JOINT_REMEDY if 'delta' in problem.names else {})
  for name, value, spread in zip(problem.names, values, deviation, strict=True):
    if name in ('a', 'b', 'g') and spread > 0.5:
      factor = f'{np.exp(spread):.2g}' if spread < 5 else 'more than 100'
      yield f'{name} is known only to a factor of {factor}; {remedy[name]}'
    elif name not in ('a', 'b', 'g') and spread > 0.5 * abs(value):
      yield f'{name} = {value:.3g} is known only to +-{spread:.2g}; {remedy[name]}'


_REMEDY = {
  'c': 'fix it, or add longer runs of larger models.',
  'a': 'add runs of other sizes.',
  'alpha': 'add runs of other sizes.',
  'b': 'add runs of other durations.',
  'beta': 'add runs of other durations.',
  'g': 'add runs of other granularities.',
  'gamma': 'add runs of other granularities.',
}
_JOINT_REMEDY = dict.fromkeys(
  ('delta', 'gamma', 'omega', 'zeta'), 'add runs of other numbers of experts.'
)


def _doubts(form, found, runs):
  """Yields warnings: a loss that rises with size, or runs too short for a law."""
  if form == 'joint':
    reduced = [(f' for {run.expansion_rate:g} experts', _at(found, run)) for run in runs]
  else:
    reduced = [('', found)]
  for where, law in dict(reduced).items():
    for name, grows_with in (('alpha', 'size'), ('beta', 'tokens'), ('gamma', 'granularity')):
      value = getattr(law, name)
      if value is not None and value <= 0:
        yield (
          f'the loss rises with {grows_with}{where}: an exponent {name} of {-value:.3g} of the '
          'wrong sign. Do not extrapolate; look for runs of a bad learning rate.'
        )
  short = [run for run in runs if run.tokens < _SHORT * run.params]
  if len(short) > len(runs) / 2:
    yield (
      f'{len(short)} of {len(runs)} runs have fewer than {_SHORT} tokens per parameter, where laws '
      'extrapolate badly (the paper has 7.8 and more): add longer runs.'
    )


class _Problem(NamedTuple):
  """The runs as factors of the coefficients, and how to undo their centring."""

  law: Form
  names: tuple[str, ...]  # of the free coefficients
  factors: np.ndarray  # [terms, runs, coefficients], of centred logarithms
  loss: np.ndarray
  raw: np.ndarray  # maps centred coefficients to logarithms of scales, and exponents
  c: float  # used if c is fixed
  penalty: float


def _problem(runs, law, names, c, penalty):
  joint = law.coefficients is laws.Joint
  sizes = [
    (
      run.active_params if joint else run.params,
      run.tokens,
      run.granularity if 'g' in law.names else 1,
      laws.effective_experts(run.expansion_rate),
    )
    for run in runs
  ]
  logs = np.log(np.array(sizes, np.float64)).T
  means = logs.mean(axis=1, keepdims=True)
  # Any sizes tell how coefficients of centred logarithms become those of logarithms.
  some = np.random.default_rng(0).normal(size=(len(logs), 64))
  natural, centred = (
    _factors(law, names, values).reshape(-1, len(names)) for values in (some, some - means)
  )
  raw = np.linalg.lstsq(natural, centred)[0]
  loss = np.array([run.loss for run in runs], np.float64)
  factors = _factors(law, names, logs - means)
  return _Problem(law, names, factors, loss, raw, 0.0 if c is None else c, penalty)


def _factors(law, names, logs):
  """[terms, runs, coefficients]: the logarithms of the terms are these times the coefficients."""
  terms = law.terms(*logs)
  if 'c' in names:
    terms = ({'c': 1}, *terms)
  factors = np.zeros((len(terms), logs.shape[1], len(names)))
  for term, by_name in zip(factors, terms, strict=True):
    for name, values in by_name.items():
      term[:, names.index(name)] = values
  return factors


def _residuals(problem, theta):
  """[runs]: predicted minus measured; [runs, coefficients]: its Jacobian."""
  terms = np.exp(problem.factors @ theta)
  jacobian = (terms[..., None] * problem.factors).sum(axis=0)
  predicted = problem.c + terms.sum(axis=0)
  if problem.law.log_loss:
    return np.log(predicted / problem.loss), jacobian / predicted[:, None]
  return predicted - problem.loss, jacobian


def _starts(names, number, median_loss, seed):
  """[starts, coefficients]: scales that split the median loss randomly, exponents in [0.03, 1].

  In the joint law those are negative, and those of the number of experts are 0.
  """
  joint = 'delta' in names
  rng = np.random.default_rng(seed)
  columns = {}
  for name, shares in zip(SCALES, rng.dirichlet(np.ones(len(SCALES)), number).T, strict=True):
    columns[name] = np.log(median_loss * shares)
  for name in ('alpha', 'beta', 'gamma'):
    columns[name] = np.exp(rng.uniform(np.log(0.03), 0.0, number)) * (-1 if joint else 1)
  if joint:
    columns |= dict.fromkeys(_JOINT_REMEDY, np.zeros(number))
  return np.stack([columns[name] for name in names], axis=1)


def _minimise(problem, counts, starts):
  """[coefficients]: the best centred ones, with run i counted counts[i] times."""
  rows = np.repeat(np.arange(len(counts)), counts)
  penalty = np.sqrt(2 * problem.penalty * len(rows)) * problem.raw  # scipy halves squares

  def residuals(theta):
    return np.append(_residuals(problem, theta)[0][rows], penalty @ theta)

  def jacobian(theta):
    return np.vstack([_residuals(problem, theta)[1][rows], penalty])

  options: Any = {'jac': jacobian, 'loss': functools.partial(_huber, len(rows))}
  options |= dict.fromkeys(('ftol', 'xtol', 'gtol'), 1e-10)  # seven digits of the coefficients
  with np.errstate(over='ignore', divide='ignore', invalid='ignore'):  # such steps are rejected
    found = [
      optimize.least_squares(residuals, start, f_scale=problem.law.huber, **options)
      for start in starts
    ]
  return min(found, key=lambda result: result.cost).x


def _huber(num_runs, squares):
  """scipy's loss 'huber', but quadratic for the penalty, which follows the runs' residuals."""
  size = np.sqrt(np.maximum(squares, 1))
  size[num_runs:] = 1
  values = np.where(size > 1, 2 * size - 1, squares)
  return np.stack([values, 1 / size, np.where(size > 1, -0.5 / size**3, 0)])


def _coefficients(problem, theta):
  values = {}
  for name, value in zip(problem.names, map(float, problem.raw @ theta), strict=True):
    values[name] = value if name not in SCALES else 0.0 if value < _ZERO else math.exp(value)
  return problem.law.coefficients(**({'c': problem.c} | values))


def _rms(errors):
  return float(np.sqrt(np.mean(errors**2)))
