"""What a checkpoint loses under other routers, and how many steps of training repair it.

  python -m moejax.reroute --runs=runs/mot,runs/moe --output=reroute
  python -m moejax.reroute --runs=runs/mot --routers=token_choice --steps=500 --output=reroute

Every run is evaluated under every router, with the same experts and the same matrix of scores: the
matrix of losses by router trained with and router evaluated with. With --steps, every run is also
trained so many steps further under every router, its own included, which shows what more training
brings by itself (`moejax.transition_tuning`); "repaired" is the first evaluation that is no worse
than the loss before the switch. No token is dropped in evaluations, as in decoding. OUTPUT has the
tables (reroute.csv), plots of the matrix (matrix.png) and of the losses after the switch
(reroute.png), and the runs; the same command resumes them.
"""

import math
from typing import NamedTuple

import jax
from absl import flags

from moejax import (
  another_router,
  cli,
  config as config_lib,
  data,
  files,
  metrics,
  report,
  run_folder,
  sharding,
  step as step_lib,
  text,
  transition_tuning,
)
from moejax.compare import runs
from moejax.distributed import is_process_0
from moejax.evaluate import evaluate

_EVALUATIONS = 20  # while a run is repaired


class Cell(NamedTuple):
  """A run under one router."""

  run: str
  trained: str  # the router that it was trained with
  router: str  # the one that it is evaluated, and trained further, with
  loss: float  # nats per token, validation; nan: it cannot have this router
  standard_error: float
  why_not: str = ''
  steps: int = 0  # of further training
  before: float = math.nan  # losses before the switch, right after it, after further training, on
  at: float = math.nan  # the batches of evaluations during training
  after: float = math.nan
  repaired: int | None = None  # after how many of them the loss was as before the switch


def measure(folder, routers, num_batches=None, name=''):
  """Yields the Cell of a run under every router, without further training.

  Args:
    folder: of the run.
    routers: of `another_router.ROUTERS`; that of the run is always evaluated.
    num_batches: of validation; None: all.
    name: of the run; default: that of its folder.
  """
  config = run_folder.read(folder)
  trained = another_router.router_of(config)
  source, _, params, mesh = run_folder.load_run(folder)
  for router in routers if trained in routers else (trained, *routers):
    cell = Cell(name or files.path(folder).name, trained, router, math.nan, math.nan)
    try:
      run_config = _rerouted(config, router)
      config_lib.check_batch(run_config, mesh)
    except ValueError as error:
      yield cell._replace(why_not=str(error).removeprefix('--from: '))
      continue
    part = sharding.process_part(mesh, run_config.data.batch_size)
    loader = data.make_loader(run_config.data, 'validation', **part)
    with jax.set_mesh(mesh):
      converted = _convert(source, run_config, params, mesh)
      accumulation = run_config.optimizer.accumulation
      result, _ = evaluate(run_config.model, converted, loader, num_batches, mesh, accumulation)
    loss = result.get('loss_dropless', result['loss'])
    yield cell._replace(loss=loss, standard_error=result.get('standard_error', math.nan))


def _rerouted(config, router):
  config = config.copy_and_resolve_references()
  another_router.with_router(config, router)
  return config_lib.resolve(config)


def _convert(old, new, params, mesh):
  """Parameters of the run_config `old` as those of `new`."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, run_folder.abstract_params(new.model, mesh))

  def switch(params):
    fresh = {'params': step_lib.fresh_state(new)()['params']}
    return another_router.convert({'params': params}, fresh, old.model, new.model)['params']

  return jax.jit(switch, out_shardings=shardings)(params)


def repair(folder, cell, output, steps):
  """Trains a run further under the router of a Cell, in a folder of `output`.

  Returns:
    The Cell with what that brought, or None if it was interrupted.
  """
  workdir = files.path(output) / f'{cell.run}-{cell.router}'
  fields = {'train.eval_interval': max(1, steps // _EVALUATIONS)}
  if transition_tuning.tune(folder, workdir, cell.router, steps=steps, fields=fields) != cli.OK:
    return None
  begin, before = _curve(workdir, 'before')[0]
  curve = _curve(workdir, 'validation')
  repaired = next((step - begin for step, loss in curve if loss <= before), None)
  losses = {'before': before, 'at': curve[0][1], 'after': curve[-1][1]}
  return cell._replace(steps=steps, repaired=repaired, **losses)


def _curve(workdir, prefix):
  """Losses without drops, by step."""
  dropless = metrics.loss_curve(workdir, f'{prefix}/loss_dropless')
  return dropless or metrics.loss_curve(workdir, f'{prefix}/loss')


def tables(cells) -> str:
  """The matrix of losses, and what further training brought, as text."""
  routers = list(dict.fromkeys(cell.router for cell in cells))
  by_run = {}
  for cell in cells:
    by_run.setdefault((cell.run, cell.trained), {})[cell.router] = cell
  show = lambda cell: '-' if cell.why_not else f'{cell.loss:.4f}'
  rows = [['run', 'trained with', *routers]]
  rows += [[*run, *(show(row[router]) for router in routers)] for run, row in by_run.items()]
  parts = ['validation loss (nats per token), by the router that a run is evaluated with', '']
  parts.append(text.table(rows))
  parts += [f'{c.run} under {c.router}: {c.why_not}' for c in cells if c.why_not]
  if trained := [cell for cell in cells if cell.steps]:
    parts += ['', f'after {trained[0].steps} steps of training with that router', '']
    rows = [['run', 'trained with', 'then', 'before', 'at the switch', 'after', 'repaired after']]
    for c in trained:
      repaired = 'not yet' if c.repaired is None else f'{c.repaired} steps'
      losses = (f'{loss:.4f}' for loss in (c.before, c.at, c.after))
      rows.append([c.run, c.trained, c.router, *losses, repaired])
    parts.append(text.table(rows))
  return '\n'.join(parts)


def write(cells, output) -> None:
  """Writes reroute.csv, matrix.png and, of runs that were trained further, reroute.png."""
  output = files.path(output)
  files.write_csv(output / 'reroute.csv', [Cell._fields, *cells])
  report.save_figure(_figure(cells), output / 'matrix.png')
  curves = {}
  for cell in cells:
    if cell.steps:
      curve = _curve(output / f'{cell.run}-{cell.router}', 'validation')
      label = f'{cell.run} ({cell.trained}) with {cell.router} validation'
      curves[label] = [(step - curve[0][0], loss) for step, loss in curve]
  if curves:
    report.plot_losses(curves, output / 'reroute.png')


def _figure(cells):
  """The losses of all runs by router, a colour for every router that they were trained with."""
  figure, axes = report.new_figure(
    xlabel='evaluated with', ylabel='validation loss (nats per token)', yscale='log'
  )
  routers = list(dict.fromkeys(cell.router for cell in cells))
  for i, trained in enumerate(dict.fromkeys(cell.trained for cell in cells)):
    shown = [cell for cell in cells if cell.trained == trained and not cell.why_not]
    places = [routers.index(cell.router) for cell in shown]
    losses = [cell.loss for cell in shown]
    axes.scatter(places, losses, color=f'C{i}', label=f'trained with {trained}', alpha=0.7)
  axes.set_xticks(range(len(routers)), routers)
  axes.yaxis.set_major_formatter('{x:g}')
  axes.yaxis.set_minor_formatter('{x:g}')
  axes.legend(frameon=False)
  return figure


def main():
  args = flags.FLAGS
  cli.join_processes()
  for router in args.routers:
    if router not in another_router.ROUTERS:
      raise ValueError(
        f'--routers: expected some of {", ".join(another_router.ROUTERS)}, got {router!r}'
        f'{text.did_you_mean(router, another_router.ROUTERS)}'
      )
  cells = []
  for run in runs.read(args.runs):
    for cell in measure(run.folder, args.routers, args.batches or None, run.name):
      if args.steps and not cell.why_not:
        cell = repair(run.folder, cell, args.output, args.steps)
        if cell is None:
          cli.say_how_to_resume()
          return cli.INTERRUPTED
      cells.append(cell)
  if is_process_0():
    write(cells, args.output)
    print(f'{tables(cells)}\nwritten to {args.output}: reroute.csv, matrix.png', flush=True)
  return cli.OK


if __name__ == '__main__':
  cli.define_process_flags()
  cli.define_paths(
    'runs', None, 'Folders of runs with experts, or folders of such runs.', required=True
  )
  cli.define_path('output', None, 'Folder for the tables and the runs.', required=True)
  flags.DEFINE_list('routers', list(another_router.ROUTERS), 'Routers to evaluate with.')
  flags.DEFINE_integer('steps', 0, 'Steps of further training with every router.', lower_bound=0)
  flags.DEFINE_integer('batches', 0, 'Batches of validation; 0: all.', lower_bound=0)
  cli.run(main, needs_config=False)
