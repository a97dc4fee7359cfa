"""Hugging Face datasets as shards of texts: from the hub by name, streamed, or from a folder.

The only module that imports the library `datasets`, on first use.
"""

import contextlib
import hashlib
import importlib
import pathlib
from collections.abc import Iterator
from typing import Any

from moejax.data import config as config_lib, text_files

_ON_DISK = ('dataset_dict.json', 'state.json')  # written by save_to_disk


class Split:
  """One split of a dataset: `num_shards` files of texts, each read in order."""

  def __init__(self, dataset: Any, field: str, place: str):
    """`dataset` is an IterableDataset; `place` names it in errors."""
    self.num_shards = dataset.num_shards
    self._dataset, self._field, self._place = dataset, field, place

  def texts(self, shard: int, first: int = 0) -> Iterator[bytes]:
    """Yields the texts of a shard, from number `first` on.

    Raises ValueError if the shard cannot be read or a document has no such field.
    """
    place = f'{self._place}, shard {shard} of {self.num_shards}'
    documents = self._dataset.shard(num_shards=self.num_shards, index=shard).skip(first)
    with _clear_errors(f'cannot read {place}'):
      for number, document in enumerate(documents, first):
        if self._field not in document:
          raise ValueError(
            f'data.field: {place} has no field {self._field!r}, only '
            f'{", ".join(map(repr, document))}.'
          )
        where = f'{place}, document {number}'
        yield text_files.text_of(document[self._field], self._field, where)


def open_splits(config: config_lib.DataConfig) -> dict[str, Split]:
  """Returns the splits of the dataset that `data.task` names: train, and validation if it has one.

  Raises ValueError if there is none, or no network.
  """
  name, _, subset = config.task.partition(':')
  if name == 'pandas':  # no dataset: the library would read pickles of the working directory
    raise ValueError("data.task: 'pandas': pickles can run code, and are not read.")
  try:
    datasets = importlib.import_module('datasets')
  except ModuleNotFoundError as error:
    raise ValueError(
      f"data.source: 'datasets' needs the package {error.name}: pip install 'moejax[datasets]'."
    ) from error
  folder = pathlib.Path(name).expanduser()
  with _clear_errors(
    f'cannot open {config.task!r}',
    '. Give NAME or NAME:SUBSET of the hub, or a folder of files; without a network, download it '
    'elsewhere (docs/data.md)',
  ):
    if any((folder / file).is_file() for file in _ON_DISK):
      found = datasets.load_from_disk(str(folder))
      found = {'train': found} if isinstance(found, datasets.Dataset) else found
      found = {split: dataset.to_iterable_dataset() for split, dataset in found.items()}
    else:
      path = str(folder) if folder.is_dir() else name
      found = datasets.load_dataset(path, subset or None, streaming=True)
  if 'train' not in found:
    raise ValueError(f"data.task: {config.task!r} has the splits {sorted(found)}, but no 'train'.")
  return {
    split: Split(found[split], config.field, f'{config.task}, split {split}')
    for split in ('train', 'validation')
    if split in found
  }


def fingerprint(config: config_lib.DataConfig) -> str:
  """Identifies the text: by its name on the hub, or by the names and sizes of a folder's files."""
  folder = pathlib.Path(config.task.partition(':')[0]).expanduser()
  if not folder.is_dir():
    return config.task
  files = sorted((p.relative_to(folder).as_posix(), p) for p in folder.rglob('*') if p.is_file())
  listed = '\n'.join(f'{name}\0{path.stat().st_size}' for name, path in files)
  return hashlib.sha256(listed.encode('utf-8', 'surrogateescape')).hexdigest()


@contextlib.contextmanager
def _clear_errors(what: str, remedy: str = '') -> Iterator[None]:
  """Turns errors of the libraries that find and read files into one sentence."""
  try:
    yield
  except ValueError as error:
    if str(error).startswith('data.'):
      raise
    raise _one_sentence(what, error, remedy) from error
  except Exception as error:  # of several libraries, without a common kind
    raise _one_sentence(what, error, remedy) from error


def _one_sentence(what: str, error: Exception, remedy: str) -> ValueError:
  reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip('.')
  return ValueError(f'data.task: {what}: {reason[:200]}{remedy}.')
