r"""Sweeps over config fields: trains every combination, and compares them.

  python -m moejax.sweep --config=configs/dense.py --workdir=sweeps/lr \
    --grid optimizer.peak_lr=1e-3,3e-3,1e-2 --grid train.seed=0,1,2 --config.train.steps=500
  python -m moejax.sweep --config=configs/mot.py --workdir=sweeps/experts \
    --zip model.mot.num_experts=8,16,32 --zip model.mot.group_size=8,16,32

Every --grid is an axis, combined with all others. The fields of all --zip change together and are
one axis. Commas separate values, except within brackets or quotes. train.seed is an axis like any
other, over which the table averages.
"""

from absl import flags

from moejax import cli


def main(overrides):
  from moejax import files, runner  # importing JAX takes seconds
  from moejax.sweep import axes as axes_lib, results

  args = flags.FLAGS
  axes = axes_lib.parse(args.grid, args.zip)
  cells = axes_lib.make_cells(args.config, overrides, axes)
  if args.launch is not None:
    print('\n'.join(runner.launch_commands(cells, args.workdir, args.launch)))
    return cli.OK
  workdir = files.absolute(cli.path(args.workdir, bucket=True))
  code = runner.run(cells, workdir)
  found = results.summaries(cells, workdir)
  if found:
    groups = results.groups(cells, found)
    results.write_csv(cells, found, workdir / 'sweep.csv')
    results.plot(axes, groups, workdir / 'sweep.png')
    print(results.describe(axes, groups))
    print(f'written to {workdir}: sweep.csv, sweep.png, and a folder for every run')
  return code


if __name__ == '__main__':
  axis = 'FIELD=VALUE,VALUE,...'
  flags.DEFINE_multi_string('grid', [], f'{axis}: an axis, combined with all others.')
  flags.DEFINE_multi_string('zip', [], f'{axis}: changes together with the other --zip.')
  flags.DEFINE_string('config', 'configs/mot.py', 'FILE or FILE:VARIANTS, a file of configs/.')
  flags.DEFINE_string('workdir', None, 'Folder for all runs.', required=True)
  flags.DEFINE_string(
    'launch',
    None,
    'Train nothing; print this template for each run, with its {name} and quoted {command}.',
  )
  cli.run(main, needs_config=False, takes_overrides=True)
