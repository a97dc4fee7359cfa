"""Values and gradients of every op and layer, compared with plain forms on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator import checks, tables
from moejax.sharding import platform

TITLE = 'Values and gradients'
ABOUT = (
  'Relative errors, |x - reference| / |reference| in the 2-norm, the largest of all outputs and of '
  'all gradients, of ops as layers use them here, against a plain form in float32 on the CPU. '
  'float32: products in full precision (by default, GPUs round their factors to TF32). bfloat16: '
  'activations are, and the reference has the same rounded ones. Integers (plans, sampled tokens) '
  'must be equal: their error is the fraction that differs.'
)

TOLERANCE = {'float32': 1e-4, 'bfloat16': 2e-2}


def cases(tiny):
  """By name, functions of a `limits.Limits` that return a row."""
  return {name: functools.partial(_case, make, tiny) for name, make in checks.by_name().items()}


def table(rows):
  def cell(row, dtype):
    errors = row['errors'][dtype]
    worst = max(errors.values())
    mark = '' if worst <= TOLERANCE[dtype] else ' **too large**'
    return ', '.join(f'{error:.1e}' for error in errors.values()) + mark

  lines = [[row['case'], *(cell(row, dtype) for dtype in TOLERANCE)] for row in rows]
  header = [f'{dtype}: outputs, gradients (at most {t:g})' for dtype, t in TOLERANCE.items()]
  return tables.markdown(['op', *header], lines)


def _case(make, tiny, limits):
  del limits
  rng = np.random.default_rng(0)
  with jax.default_device(_cpu()):
    check = make(rng, checks.TINY if tiny else checks.FULL)
  errors = {dtype: _errors(check, dtype) for dtype in TOLERANCE}
  good = all(e <= TOLERANCE[dtype] for dtype, by in errors.items() for e in by.values())
  return {'errors': errors, 'good': good}


def _cpu():
  return jax.devices('cpu')[0]


def _errors(check, dtype):
  """The largest error of the outputs, and of the gradients."""
  rounded = [a.astype(jnp.dtype(dtype)) for a in check.activations]
  args = [*rounded, *check.parameters]
  wide = [a.astype(np.float32) for a in args]
  with jax.default_matmul_precision('highest' if dtype == 'float32' else 'default'):
    got = _run(check.op, args, check.rest)
  with (
    jax.default_device(_cpu()),
    jax.default_matmul_precision('highest'),
    platform.compiling_for('cpu'),
  ):
    expected = _run(check.reference, wide, check.rest, dtypes=[a.dtype for a in got[0]])
  outputs = zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True)
  errors = {'outputs': max(_error(a, b) for a, b in outputs)}
  if got[2]:
    errors['gradients'] = max(map(_error, got[2], expected[2]))
  return errors


def _run(function, floats, rest, dtypes=()):
  """Outputs that are floats, those that are not, and gradients by the floats.

  The gradients of the outputs are random, and rounded to `dtypes`, by default those of the outputs.
  """

  def split(*floats):
    leaves = jax.tree.leaves(function(*floats, *rest))
    is_float = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
    return [a for a in leaves if is_float(a)], [a for a in leaves if not is_float(a)]

  @jax.jit
  def both(floats, cotangents):
    outputs, backward, others = jax.vjp(split, *floats, has_aux=True)
    return outputs, others, backward(cotangents)

  shapes, others = jax.eval_shape(split, *floats)
  rng = np.random.default_rng(1)
  draw = lambda leaf, dtype: rng.standard_normal(leaf.shape).astype(dtype).astype(leaf.dtype)
  dtypes = dtypes or [leaf.dtype for leaf in shapes]
  if not shapes:  # nothing to differentiate
    return jax.device_get(([], jax.jit(lambda floats: split(*floats)[1])(floats), []))
  return jax.device_get(both(floats, list(map(draw, shapes, dtypes))))


def _error(got, expected):
  if not jnp.issubdtype(expected.dtype, jnp.floating):
    return float(np.mean(got != expected))
  got, expected = (np.asarray(a, np.float64) for a in (got, expected))
  error = np.linalg.norm(got - expected) / (np.linalg.norm(expected) or 1.0)
  return float(error) if np.isfinite(error) else float('inf')
