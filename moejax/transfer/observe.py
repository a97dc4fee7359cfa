"""What happens inside a model: the outputs of all sublayers, the stream between them, scores."""

import contextlib
import functools

import jax
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
  """A sublayer that also returns, in aux, its output and the scores of its routers."""

  def __init__(self, layer, name):
    self.layer = layer
    self.name = name

  def __call__(self, x_BLD, tokens):
    with _recorded_scores() as scores:
      y_BLD, aux = self.layer(x_BLD, tokens)
    numbered = {f'{self.name}/scores {i}': values for i, values in enumerate(scores)}
    one = {f'{self.name}/scores': scores[0]} if len(scores) == 1 else numbered
    return y_BLD, aux | {f'{self.name}/output': y_BLD} | one


@contextlib.contextmanager
def _recorded_scores():
  """Yields a list to which all router scores are added that are computed in this context.

  Scores are a layer's own affair: no layer returns them, for in training they would cost memory.
  """
  original, found = routing.router_logits, []

  def recording(*args, **options):
    found.append(original(*args, **options))
    return found[-1]

  routing.router_logits = recording
  try:
    yield found
  finally:
    routing.router_logits = original


@functools.partial(jax.jit, static_argnums=0)
def observe(model_config, params, batch):
  """The values inside a model for a batch, without noise.

  Returns:
    A dict of arrays: 'embedding' [1, B, L, D] and 'logits' [1, B, L, V]; for every sublayer of the
    pattern of stack i, with the repeats of the pattern in front, 'i/j_kind/output', that of the
    sublayer, 'i/j_kind/stream', the sum after it, and 'i/j_kind/scores', those of a router or
    Mixture-of-Tokens controller.
  """
  model = model_lib.bind(model_config, params)
  for i, stack in enumerate(model.stacks):
    block = getattr(model, stack)
    for part in block.names:
      residual = getattr(block, part)
      residual.layer = _ObservedLayer(residual.layer, f'{i}/{part}')
      setattr(block, part, _Observed(residual, f'{i}/{part}'))
  x_BLD, aux = model._activations_of(batch)
  inputs = [name for name in aux if name.endswith('/input')]
  inside = {n: values for n, values in aux.items() if n[0].isdigit() and n not in inputs}
  logits_BLV = model._project(x_BLD)
  return {'embedding': aux[inputs[0]][:1], **inside, 'logits': logits_BLV[None]}
