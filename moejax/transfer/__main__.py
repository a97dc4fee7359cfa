r"""Does a learning rate transfer between sizes of a model?

python -m moejax.transfer check --config=configs/mot.py --widths=32,64,128 --output=check \
  --config.model.parameterization=mup
python -m moejax.transfer sweep --config=configs/mot.py --widths=32,64,128 --workdir=sweeps/mot \
  --rates=3e-3,6e-3,1.2e-2 --grid model.parameterization=standard,mup --config.train.steps=500
"""

import functools
import pathlib

from absl import flags

from moejax import cli

_FLAGS = flags.FLAGS
_AXIS = 'FIELD=VALUE,VALUE,...'


def _define_sizes():
  flags.DEFINE_string('config', 'configs/mot.py', 'FILE or FILE:VARIANTS, a file of configs/.')
  flags.DEFINE_list('widths', [], 'Values of model.d_model; hidden widths stay in proportion.')
  flags.DEFINE_list('depths', [], 'Or numbers of blocks.')
  flags.DEFINE_multi_string('zip', [], f'{_AXIS}: or any field; all --zip change together.')
  flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of initialisation.')


def _sizes(overrides):
  """The axis of sizes, and overrides whose base shape is the first of them unless one is given."""
  from moejax.transfer import sizes

  axis = sizes.make_axis(_FLAGS.config, overrides, _FLAGS.widths, _FLAGS.depths, _FLAGS.zip)
  return axis, {'model.base': sizes.base_of(axis)} | overrides


def _define_check():
  _define_sizes()
  flags.DEFINE_integer('steps', 5, 'Training steps, all on one small batch.', lower_bound=1)
  cli.define_path('output', 'transfer_check', 'Folder for check.csv and check.png.')


def check(overrides):
  """Checks that activations, and what training changes in them, do not depend on a model's size.

  It exits with 0 if so, and with 1 if not.
  """
  from moejax.transfer import coordinates  # importing JAX takes seconds

  axis, overrides = _sizes(overrides)
  overrides = coordinates.small_steps(_FLAGS.config, overrides, _FLAGS.steps)
  seeds = cli.integers('seeds', _FLAGS.seeds)
  measured = coordinates.measure(_FLAGS.config, overrides, axis, seeds)
  slopes = coordinates.slopes(measured)
  folder = pathlib.Path(_FLAGS.output)
  coordinates.write_csv(measured, folder / 'check.csv')
  coordinates.plot(measured, slopes, folder / 'check.png')
  print(coordinates.describe(measured, slopes))
  print(f'written to {folder}: check.csv, check.png')
  return cli.OK if all(slope.is_good for slope in slopes) else cli.FAILED


def _define_sweep():
  _define_sizes()
  flags.DEFINE_list('rates', [], 'Learning rates (optimizer.peak_lr), at least three.')
  flags.DEFINE_multi_string('grid', [], f'{_AXIS}: variants of the model, each with all sizes.')
  flags.DEFINE_integer('add', 4, 'The most rates to add to a model.', lower_bound=0)
  cli.define_path('workdir', None, 'Folder for all runs.', required=True, bucket=True)


def sweep(overrides):
  """Finds the best learning rate at every size, and what transferring the first one costs.

  The first seed sees all rates; if the best is the smallest or largest, further ones are added. The
  other seeds see the best rate and its two neighbors.
  """
  from moejax import files
  from moejax.sweep import axes, results
  from moejax.transfer import rates as rates_lib, search

  axis, overrides = _sizes(overrides)
  seeds = cli.integers('seeds', _FLAGS.seeds)
  rates = search.numbers('rates', _FLAGS.rates)
  variants = axes.parse(_FLAGS.grid, []) if _FLAGS.grid else []
  curves = search.make_curves(axis, variants, rates, seeds)
  workdir = files.absolute(_FLAGS.workdir)
  make = functools.partial(search.cell, _FLAGS.config, overrides)
  code = search.search(make, curves, workdir, _FLAGS.add)
  if code == cli.OK:
    cells = search.cells(_FLAGS.config, overrides, curves)
    found = {cell.name: search.summary(cell, workdir) for cell in cells}
    results.write_csv(cells, found, workdir / 'sweep.csv')
    rates_lib.plot(curves, workdir / 'sweep.png')
    print(rates_lib.describe(curves))
    print(f'written to {workdir}: sweep.csv, sweep.png, and a folder for every run')
  return code


COMMANDS = {
  'check': cli.Command(_define_check, check, takes_overrides=True),
  'sweep': cli.Command(_define_sweep, sweep, takes_overrides=True),
}


if __name__ == '__main__':
  cli.run_command(COMMANDS)
