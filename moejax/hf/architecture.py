"""How a model of transformers corresponds to one of ours: options, tensors and their layouts.

An `Architecture` is data: every file of this package but `folder` and `card` describes one.
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Layout(NamedTuple):
  """How one array of ours is stored there; `to_ours` gets the shape of ours."""

  to_theirs: Callable[[Any], Any]
  to_ours: Callable[[Any, tuple[int, ...]], Any]


def layout(flatten, transposed):
  """An array that is flattened, then transposed where their matrices are [out, in]."""
  turn = (lambda a: a.T) if transposed else (lambda a: a)
  return Layout(lambda a: turn(flatten(a)), lambda t, shape: turn(t).reshape(shape))


SAME = layout(lambda a: a, transposed=False)
INPUT = layout(lambda w: w.reshape(w.shape[0], -1), transposed=True)  # [in, ...] -> [out, in]
OUTPUT = layout(lambda w: w.reshape(-1, w.shape[-1]), transposed=True)  # [..., out] -> [out, in]


class Row(NamedTuple):
  """Tensors that correspond.

  `{}` in their names is the number of the layer; in a layer, ours begin with the kind of sublayer.
  Several of ours are concatenated along their last axis. Several of theirs are the slices of ours
  along `axis`.
  """

  theirs: tuple[str, ...]
  ours: tuple[str, ...]
  layout: Layout = SAME
  axis: int | None = None

  def to_theirs(self, arrays):
    """Converts arrays of ours to tensors of theirs."""
    joined = jnp.concatenate(arrays, axis=-1) if len(arrays) > 1 else arrays[0]
    parts = [joined]
    if self.axis is not None:
      parts = [joined.take(i, axis=self.axis) for i in range(len(self.theirs))]
    return [self.layout.to_theirs(part) for part in parts]

  def to_ours(self, tensors, shapes):
    """The inverse of `to_theirs`, on numpy arrays; `shapes` are those of ours."""
    ends = np.cumsum([shape[-1] for shape in shapes])
    shape = (*shapes[0][:-1], int(ends[-1]))
    if self.axis is None:
      (tensor,) = tensors
      joined = self.layout.to_ours(tensor, shape)
    else:
      part = shape[: self.axis] + shape[self.axis + 1 :]
      joined = np.stack([self.layout.to_ours(tensor, part) for tensor in tensors], self.axis)
    return np.split(joined, ends[:-1], axis=-1)


def row(theirs, ours, layout=SAME, axis=None):
  """A Row of names or tuples of names."""
  names = lambda given: (given,) if isinstance(given, str) else tuple(given)
  return Row(names(theirs), names(ours), layout, axis)


_SPECIAL = ('bos', 'eos', 'pad')


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Architecture:
  """A kind of model that transformers and moejax both have."""

  name: str  # their model_type
  class_name: str  # of transformers
  config: str  # a config of ours that makes such models
  layer: tuple[str, ...]  # our sublayers in one of their layers
  mixed: bool = False  # each of these is a layer, in any order
  depth: str = 'num_hidden_layers'  # their option
  needs: dict[str, Any]  # our fields with one value there, or a tuple of values
  same: dict[str, str]  # their options -> our fields with the same values
  only: dict[str, Any]  # their options with one value here
  defaults: dict[str, Any]  # of transformers, for options that a file may lack
  fields: Callable[[dict], dict]  # their options -> our other fields
  options: Callable[[Any], dict]  # our ModelConfig -> their other options
  unsupported: Callable[[dict, int], Iterable[str]]  # their options, our positions -> sentences
  inexpressible: Callable[[Any], Iterable[str]] = lambda model: ()  # besides `needs`
  top: Callable[[Any], Iterable[Row]]  # our ModelConfig -> Rows outside of layers
  rows: Callable[[Any], Iterable[Row]]  # and of one layer
  renamed: tuple[str, str] | None = None  # older names of tensors: a pattern, its replacement
  ignored: str = r'\.rotary_emb\.inv_freq$'  # a pattern of tensors that are no parameters
  zero: str = '$^'  # a pattern of tensors that are 0 where a file lacks them

  def read(self, options, length):
    """Fields of our config for the content of their config.json.

    Args:
      options: the content.
      length: positions of our sequences.

    Raises:
      ValueError: the model is not supported, with all reasons.
    """
    given = {f'{name}_token_id': None for name in _SPECIAL} | self.only | self.defaults | options
    missing = [name for name in (*self.same, self.depth) if name not in given]
    problems = [f'{", ".join(missing)} must be given.'] if missing else []
    problems += [
      f'{name} = {given[name]!r} is not supported, only {value!r}.'
      for name, value in self.only.items()
      if given[name] != value
    ]
    if given.get('quantization_config'):
      problems.append('quantization_config: quantized weights are not supported.')
    try:
      problems += [] if missing else self.unsupported(given, length)
      others = {} if problems else self.fields(given)
    except (ArithmeticError, AttributeError, TypeError) as error:
      raise ValueError(f'a value has a type or a size that it cannot have ({error}).') from error
    if problems:
      raise ValueError('\n'.join(problems))
    chosen = {name: v[0] if isinstance(v, tuple) else v for name, v in self.needs.items()}
    chosen |= {ours: given[theirs] for theirs, ours in self.same.items()}
    chosen |= others
    chosen.setdefault('model.blocks', ((self.layer, given[self.depth]),))
    return chosen | {f'data.{name}_id': _first(given[f'{name}_token_id']) for name in _SPECIAL}

  def problems(self, run_config):
    """Yields why this architecture is not that of a RunConfig."""
    for name, needed in self.needs.items():
      value = operator.attrgetter(name)(run_config)
      choices = needed if isinstance(needed, tuple) else (needed,)
      if value not in choices:
        yield f'{name} must be {" or ".join(map(str, choices))}, got {value}.'
    if run_config.model.parameterization != 'standard':
      yield (
        f'model.parameterization = {run_config.model.parameterization} scales scores and outputs, '
        'which transformers does not; only standard can be converted.'
      )
    yield from self.inexpressible(run_config.model)

  def fits(self, model):
    """Whether the sublayers of a ModelConfig are those of such layers."""
    kinds = [kind for names in model.sublayers for kind in names]
    if self.mixed:
      return {*kinds} == {*self.layer}
    return kinds == [*self.layer] * (len(kinds) // len(self.layer))

  def write(self, run_config):
    """The content of their config.json for a RunConfig without `problems`."""
    same = {name: operator.attrgetter(ours)(run_config) for name, ours in self.same.items()}
    model = run_config.model
    return {
      'architectures': [self.class_name],
      'model_type': self.name,
      'dtype': model.param_dtype,
      **self.only,
      **same,
      self.depth: len(list(self._layers(model))),
      **self.options(model),
      **_special_ids(run_config),
    }

  def to_theirs(self, tensors, model):
    """Converts our tensors by name, as `convert.to_tensors` returns them, to theirs."""
    found = {}
    for row in self._table(model):
      found |= zip(row.theirs, row.to_theirs([tensors[name] for name in row.ours]), strict=True)
    return found

  def to_ours(self, tensors, expected, model):
    """The inverse of `to_theirs`; `expected` has the shapes of our tensors."""
    found = {}
    for row in self._table(model):
      arrays = row.to_ours([tensors[n] for n in row.theirs], [expected[n].shape for n in row.ours])
      found |= zip(row.ours, arrays, strict=True)
    return found

  def current_name(self, name, options):
    """The name of a tensor in a file, or '' if it is no parameter."""
    if self.renamed:
      name = re.sub(*self.renamed, name)
    tied = options.get('tie_word_embeddings', self.defaults.get('tie_word_embeddings'))
    return '' if re.search(self.ignored, name) or (tied and name == 'lm_head.weight') else name

  def _table(self, model):
    """Yields the Rows of a whole model, with full names."""
    yield from self.top(model)
    for i, prefixes in enumerate(self._layers(model)):
      for row in self.rows(model):
        if row.ours[0].partition('.')[0] not in prefixes:  # of another kind of layer
          continue
        theirs = tuple(name.format(i) for name in row.theirs)
        split = (name.partition('.') for name in row.ours)
        yield row._replace(
          theirs=theirs, ours=tuple(f'{prefixes[k]}.{rest}' for k, _, rest in split)
        )

  def _layers(self, model):
    """Yields our names of the sublayers of each of their layers, by kind."""
    names = [
      (kind, f'stack_{stack}.{block}.{i}_{kind}')
      for stack, (pattern, repeats) in enumerate(model.blocks)
      for block in range(repeats)
      for i, kind in enumerate(pattern)
    ]
    size = 1 if self.mixed else len(self.layer)
    yield from (dict(names[i : i + size]) for i in range(0, len(names), size))


def _first(ids):
  """The first of several special ids, or the only one; -1: none."""
  first = ids[0] if isinstance(ids, list) and ids else ids
  return -1 if first in (None, []) else first


def _special_ids(run_config):
  """Their options for special ids: those of an imported model, or of the tokenizer."""
  kept = {name: getattr(run_config.data, f'{name}_id') for name in _SPECIAL}
  if set(kept.values()) == {-1}:
    kept |= {'eos': run_config.tokenizer.eos_id, 'pad': run_config.tokenizer.pad_id}
  return {f'{name}_token_id': None if i < 0 else i for name, i in kept.items()}
