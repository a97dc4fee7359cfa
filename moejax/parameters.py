"""Properties of a parameter by its name: its sharding, what updates it and how, how it scales.

Layers declare their parameters where they define them. Sharding and optimizers look them up by the
end of a path.
"""

from typing import NamedTuple

from jax.sharding import PartitionSpec as P


class Parameter(NamedTuple):
  """Properties of a parameter; the defaults are those of a replicated matrix."""

  specs: tuple[P, ...] = (P(),)  # of the last dimensions; the first whose mesh axes all divide
  decays: bool = True  # under optimizer.decay = matrices: norms, biases and the like do not
  moved_by: str = ''  # one of UPDATES; '': the optimizer, by the gradient
  kind: str = 'matrix'  # of parameterization.KINDS; layers compute with a matrix in x's dtype
  inputs: tuple[int, ...] = (-2,)  # dimensions that a product with it sums over
  outputs: tuple[int, ...] = (-1,)  # of the product's entries; all others count matrices

  def is_matrix(self, shape):
    """Whether an array of this shape, stacked blocks included, holds hidden matrices."""
    is_hidden = self.kind in ('matrix', 'readout') and not self.moved_by
    return is_hidden and bool(self.outputs) and len(shape) > len(self.inputs + self.outputs)


_DECLARED = {}

# What updates the parameters that layers declare not to be the optimizer's, by name: a function of
# the OptimizerConfig and the `optimizer.Schedules` that returns an optax transformation, which sees
# the gradients of all parameters that it moves.
UPDATES = {}


def declare(names, *specs, decays=True, moved_by='', kind='', inputs=(-2,), outputs=(-1,)):
  """Declares properties of parameters.

  Args:
    names: separated by spaces; each is the end of a path, joined by /.
    *specs: PartitionSpecs of the last dimensions of the array, without the leading axis of stacked
      blocks. Of several, the first whose mesh axes all divide is used; none: replicated.
    decays, moved_by, inputs, outputs: see `Parameter`.
    kind: see `Parameter`; default: a matrix, or a vector if it does not decay.

  Raises:
    ValueError: a name has other properties already.
  """
  kind = kind or ('matrix' if decays else 'vector')
  new = Parameter(specs or (P(),), decays, moved_by, kind, inputs, outputs)
  for name in names.split():
    if _DECLARED.setdefault(name, new) != new:
      raise ValueError(
        f'parameter {name!r} is declared twice, as {_DECLARED[name]} and as {new}. Choose another '
        'name for one of them.'
      )


def of(path):
  """The Parameter at a path, such as 'stack_0/0_moe/layer/experts/w_in'; the longest name wins."""
  parts = path.split('/')
  ends = ('/'.join(parts[i:]) for i in range(len(parts)))
  return next((_DECLARED[end] for end in ends if end in _DECLARED), Parameter())


def name_of(path):
  """A path of a pytree, joined by /."""
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', '')))) for k in path)
