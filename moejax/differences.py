"""Where two sets of arrays, or two configs, differ, in lines for people."""

import json

import jax
from flax import traverse_util

_SHOWN = 10  # differing arrays that are listed


def by_name(tree):
  """The leaves of a pytree by path, 'params/blocks/0/w'; named tuples look like dicts."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def differences(stored, wanted):
  """Lines of `_differences`, at most _SHOWN, and how many more there are."""
  lines = list(_differences(stored, wanted))
  more = len(lines) - _SHOWN
  return lines[:_SHOWN] + ([f'... and {more} more'] if more > 0 else [])


def _differences(stored, wanted):
  """Yields a line for every array whose shape or dtype differs between two dicts by name."""
  for name in sorted(stored.keys() | wanted.keys()):
    old, new = stored.get(name), wanted.get(name)
    if new is None:
      yield f'{name}: only in the checkpoint, {tuple(old.shape)}'
    elif old is None:
      yield f'{name}: not in the checkpoint, config {tuple(new.shape)}'
    elif tuple(old.shape) != tuple(new.shape):
      yield f'{name}: checkpoint {tuple(old.shape)} vs config {tuple(new.shape)}'
    elif old.dtype != new.dtype:
      yield f'{name}: checkpoint {old.dtype} vs config {new.dtype}'


def changed_fields(old, new):
  """Fields that differ between two nested dicts of a config: (old value, new value) by name."""
  old, new = (
    traverse_util.flatten_dict(json.loads(json.dumps(config)), sep='.') for config in (old, new)
  )
  names = sorted(old.keys() | new.keys())
  return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def misfit(folder, lines, changed):
  """The message for a checkpoint whose arrays differ, and the fields of whose config do."""
  text = (
    f'checkpoint {folder} does not fit the model of this config. Use the config that it was '
    'trained with, or another --workdir. Arrays that differ:'
  )
  fields = [f'{name}: checkpoint {old} vs config {new}' for name, (old, new) in changed.items()]
  heading = ['Config fields that differ:'] if fields else []
  return '\n'.join([text, *lines, *heading, *fields])
