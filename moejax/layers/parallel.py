"""Sublayers in parallel."""

from flax import nnx

from moejax.layers import common


class Parallel(nnx.Module):
  """y = f(x) + g(x) + ...: `branches`, sublayers by name, share their input and its norm."""

  def __init__(self, branches):
    self.names = tuple(branches)
    for name, branch in branches.items():
      setattr(self, name, branch)

  def __call__(self, x_BLD, tokens):
    outputs, auxes = zip(
      *(branch(x_BLD, tokens.for_part(i)) for i, branch in enumerate(self._branches().values())),
      strict=True,
    )
    return sum(outputs), common.join_aux(auxes)

  def init_state(self, batch_size, max_length, dtype):
    branches = self._branches()
    return {name: f.init_state(batch_size, max_length, dtype) for name, f in branches.items()}

  def prefill(self, x_BLD, tokens):
    return _add_up({name: f.prefill(x_BLD, tokens) for name, f in self._branches().items()})

  def step(self, x_BD, state, tokens):
    branches = self._branches()
    return _add_up({name: f.step(x_BD, state[name], tokens) for name, f in branches.items()})

  def _branches(self):
    return {name: getattr(self, name) for name in self.names}


def _add_up(results):
  """The sum of outputs, and the states by name."""
  return sum(y for y, _ in results.values()), {name: state for name, (_, state) in results.items()}
