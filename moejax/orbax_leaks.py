"""Memory that every checkpoint would keep: what orbax asks of TensorStore, and TensorStore leaks.

TensorStore (0.1.86) never frees the objects that it makes of JSON. A save by orbax (0.12.8) has it
describe the same folder once per array, and all its counters twice, to log how fast the disk is.
"""

import copy
import functools

import tensorstore
from orbax.checkpoint._src.serialization import tensorstore_utils

_FOLDERS = 16  # of the last saves


class _Store:
  """The spec of a store; equal to others of the same text, which those of TensorStore are not."""

  def __init__(self, spec):
    self.spec, self.text = spec, repr(spec)

  def __eq__(self, other):
    return self.text == other.text

  def __hash__(self):
    return hash(self.text)


def stop() -> None:
  """Has orbax ask for the description of a folder once, and for no counters, in this process."""
  describe = tensorstore.KvStore.Spec.to_json
  if not hasattr(describe, '__wrapped__'):
    described = functools.lru_cache(_FOLDERS)(
      lambda store, defaults: describe(store.spec, defaults)
    )

    @functools.wraps(describe)
    def to_json(self, include_defaults=False):
      return copy.deepcopy(described(_Store(self), include_defaults))

    tensorstore.KvStore.Spec.to_json = to_json
  if hasattr(tensorstore_utils, 'get_tensorstore_raw_bytes'):  # since orbax 0.12.5
    tensorstore_utils.get_tensorstore_raw_bytes = lambda *_: 0
