"""Checks all files of a run's checkpoints against what was saved.

  python -m moejax.verify --workdir=runs/mot

A step that has lost its manifest may be whole, but nothing can tell. If no other step is intact,
`--accept=STEP` makes it one: its arrays are read once, and it gets a manifest of its files as they
are now. A bit that was flipped in it before remains, unnoticed.
"""

import contextlib
import pathlib

from absl import flags

from moejax import cli, files, manifest, run_folder
from moejax.checkpoint import Checkpoints, one_line_errors
from moejax.text import size, table


def verdicts(directory: pathlib.Path) -> dict[int, str]:
  """What is wrong with every saved step of a folder of checkpoints; '' if it is intact."""
  return {step: manifest.problem(directory / str(step)) for step in manifest.steps(directory)}


def accept(directory: pathlib.Path, step: int) -> None:
  """Makes an intact step of one that has lost its manifest, or the list of its arrays.

  Raises:
    ValueError: that is not what it lacks, its arrays cannot be read, or another step is intact.
  """
  folder = directory / str(step)
  if not manifest.is_unverifiable(folder):
    raise ValueError(f'--accept={step}: {manifest.problem(folder) or "it is intact"}.')
  intact, _ = manifest.newest(directory)
  if intact is not None:
    raise ValueError(f'--accept={step}: step {intact} is intact, and programs use it.')
  if not (folder / manifest.ARRAYS).exists():
    _merge(folder / 'state')
  with (
    contextlib.closing(Checkpoints(directory)) as checkpoints,
    one_line_errors(f'--accept={step}: {folder} cannot be read'),
  ):
    for _ in checkpoints.arrays(step):
      pass
  manifest.commit(folder)


def _merge(state):
  """Lists the arrays of all processes in one place, as orbax does at the end of a save."""
  import tensorstore as ts

  context = ts.Context()  # the same for all, or nothing is shared

  def opened(folder):
    base = {'driver': 'file', 'path': f'{folder.absolute()}/'}
    return ts.KvStore.open({'driver': 'ocdbt', 'base': base}, context=context).result()

  with ts.Transaction(atomic=True) as transaction:
    merged = opened(state).with_transaction(transaction)
    for part in sorted(state.glob('ocdbt.process_*')):
      opened(part).experimental_copy_range_to(merged).result()


def _describe(directory, step, why):
  if why:
    return f'damaged: {why}'
  entries = manifest.read(directory / str(step)).values()
  return f'intact: {len(entries)} files, {size(sum(entry["size"] for entry in entries))}'


def main():
  workdir = files.path(flags.FLAGS.workdir)
  directory, step = run_folder.checkpoint_dir(workdir), flags.FLAGS.accept
  if step is not None:
    with run_folder.lock(workdir):
      accept(directory, step)
  found = verdicts(directory)
  if not found:
    raise ValueError(f'--workdir={workdir}: there is no checkpoint in {directory}.')
  print(table([(f'step {step}', _describe(directory, step, why)) for step, why in found.items()]))
  return cli.FAILED if any(found.values()) else cli.OK


if __name__ == '__main__':
  cli.define_path('workdir', None, 'Folder of the run.', required=True, bucket=True)
  flags.DEFINE_integer('accept', None, 'A step to use although it has no manifest.', lower_bound=0)
  cli.run(main, needs_config=False)
