"""What happens inside a model: the outputs of all sublayers, the stream between them, scores."""

import contextlib
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import model as model_lib
from moejax.ops import routing


class _Observed(nnx.Module):
  """A residual sublayer that also returns, in aux, what goes in and what comes out."""

  def __init__(self, residual, name):
    self.residual = residual
    self.name = name

  def __call__(self, x_BLD, tokens):
    y_BLD, aux = self.residual(x_BLD, tokens)
    return y_BLD, aux | {f'{self.name}/input': x_BLD, f'{self.name}/stream': y_BLD}


class _ObservedLayer(nnx.Module):
  """A sublayer that also returns, in aux, its output and the scores of its routers, as Products."""

  def __init__(self, layer, name):
    self.layer = layer
    self.name = name

  def __call__(self, x_BLD, tokens):
    with _recorded_scores() as scores:
      y_BLD, aux = self.layer(x_BLD, tokens)
    seen = {f'{self.name}/output': y_BLD}
    for i, product in enumerate(scores):
      name = f'{self.name}/scores {i}' if len(scores) > 1 else f'{self.name}/scores'
      seen |= {f'{name}/x': product.x, f'{name}/w': product.w}
    return y_BLD, aux | seen


@contextlib.contextmanager
def _recorded_scores():
  """Yields a list to which the Products are added that give router scores in this context.

  Scores are a layer's own affair: no layer returns them, for in training they would cost memory.
  """
  original, found = routing.router_logits, []

  def recording(x, w_DE):
    found.append(Product(x, w_DE))
    return original(x, w_DE)

  routing.router_logits = recording
  try:
    yield found
  finally:
    routing.router_logits = original


class Product(NamedTuple):
  """An activation that is a sum over the width: x [R, ..., D] times a matrix w [R, D, outputs]."""

  x: jax.Array
  w: jax.Array

  def value(self):
    """The activation [R, ..., outputs]."""
    return jnp.einsum('r...d,rde->r...e', self.x, self.w.astype(self.x.dtype))


def layers(blocks):
  """(number, kind, stack i, 'j_kind', repeat) of every sublayer of `model.blocks`, from below."""
  number = itertools.count()
  for i, (pattern, repeats) in enumerate(blocks):
    for repeat in range(repeats):
      for j, kind in enumerate(pattern):
        yield next(number), kind, i, f'{j}_{kind}', repeat


@functools.partial(jax.jit, static_argnums=0)
def observe(model_config, params, batch, key=None):
  """The values inside a model for a batch; with the noise of training, if there is a `key`.

  Returns:
    A dict by place, of arrays with the repeats of the place in front: 'embedding' [1, B, L, D]; for
    every sublayer j of the pattern of stack i, 'i/j_kind/output', that of the sublayer, and
    'i/j_kind/stream', the sum after it, [R, B, L, D]. As Products, the scores of a router or
    Mixture-of-Tokens controller, 'i/j_kind/scores', and 'logits'.
  """
  model = model_lib.bind(model_config, params)
  for i, stack in enumerate(model.stacks):
    block = getattr(model, stack)
    for part in block.names:
      residual = getattr(block, part)
      residual.layer = _ObservedLayer(residual.layer, f'{i}/{part}')
      setattr(block, part, _Observed(residual, f'{i}/{part}'))
  x_BLD, aux = model._activations_of(batch, key)
  seen = {name: values for name, values in aux.items() if name[0].isdigit()}
  inputs = [seen.pop(name) for name in [*seen] if name.endswith('/input')]
  products = [name.removesuffix('/w') for name in seen if name.endswith('/w')]
  scores = {name: Product(seen.pop(f'{name}/x'), seen.pop(f'{name}/w')) for name in products}
  logits = Product(x_BLD[None], model._head()[None])
  return {'embedding': inputs[0][:1], **seen, **scores, 'logits': logits}


def mean_square(seen):
  """The mean square [R] of what `observe` returns for a place."""
  values = seen.value() if isinstance(seen, Product) else seen
  wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
  return jnp.square(wide).mean(range(1, values.ndim))
