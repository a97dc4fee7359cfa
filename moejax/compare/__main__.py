"""Compares models over seeds: one plot of their losses, tables of their results, and a CSV file.

python -m moejax.compare --runs=runs/dense,runs/mot --output=compare.png
"""

from absl import flags

from moejax import cli


def main():
  from moejax import compare  # importing JAX takes seconds

  runs = compare.read(flags.FLAGS.runs)  # once: one of them may be training
  tables = compare.tabulate(runs, flags.FLAGS.output)
  print(tables, compare.notes(runs), sep='\n\n')
  return cli.OK


if __name__ == '__main__':
  cli.define_paths(
    'runs',
    None,
    'Folders of runs, or folders of such; separated by commas.',
    required=True,
    bucket=True,
  )
  cli.define_path(
    'output', 'compare.png', 'The plot to write; the table is beside it as .csv.', bucket=True
  )
  cli.run(main, needs_config=False)
