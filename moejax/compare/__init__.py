"""Compares models over seeds: a plot of their losses, and tables of what they reached.

`compare` is the program as a function; `runs`, `speedup` and `table` are its parts.
"""

from moejax import files, report
from moejax.compare import plot, table
from moejax.compare.explain import notes
from moejax.compare.runs import models, read
from moejax.compare.speedup import steps_to_reach

__all__ = ['FORMATS', 'compare', 'models', 'notes', 'read', 'steps_to_reach', 'tabulate']
FORMATS = ('.png', '.pdf', '.svg')


def compare(folders, output):
  """Plots the losses of runs and returns the tables of their results.

  Runs that differ in train.seed or data.seed alone are one model. The first run's model is the
  baseline; its runs of other lengths (train.steps) are what matched schedules are measured with.
  Runs may be unfinished, interrupted or still training: the table shows their newest checkpoint
  and evaluation, and claims no lead.

  Args:
    folders: of the runs, or folders of such folders. A run's name is the shortest end of its path
      that is unique; a run that is given twice counts once.
    output: the file to write; its name ends in one of FORMATS. The table is beside it as .csv.

  Raises:
    ValueError: a folder holds no run with a checkpoint and an evaluation, the runs are on different
      data, or `output` names no file of this kind.
  """
  return tabulate(read(folders), output)


def tabulate(runs, output):
  """`compare` for runs that `read` returned."""
  output = files.path(output)
  if output.suffix not in FORMATS:
    raise ValueError(f'--output={output}: expected a name that ends in {", ".join(FORMATS)}.')
  found = models(runs)
  rows = table.make_rows(found)
  report.save_figure(plot.draw(found), output)
  table.write_csv(rows, output.with_suffix('.csv'))
  return table.describe(rows)
