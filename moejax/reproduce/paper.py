"""The papers' own runs: their settings, commands, and what they would take on a chip."""

from collections.abc import Iterator

from moejax import cli, config as config_lib, flops, text
from moejax.aot import step
from moejax.scaling_laws import machine

_NONE = 'none of {} fits: another --chip, or a run with a smaller model.moe.group_size'


def describe(configs: tuple[str, ...], chip: str) -> Iterator[str]:
  """Lines for every config, as --config takes it; trains nothing.

  Raises:
    ValueError: no machine has this chip.
  """
  kind = machine.kind_of(chip)
  for name in configs:
    config = cli.config_of([f'--config={name}'])
    run_config = config_lib.resolve(step.without_data(config))
    counts, data = flops.param_counts(run_config.model), run_config.data
    tokens = run_config.train.steps * data.tokens_per_step
    with cli.waiting_for(f'estimating {name}'):
      found = machine.find(config, kind, compiles=False)
    sizes = f'{text.short(counts["total"])} parameters, {text.short(counts["active"])} active'
    batch = f'{data.batch_size} x {data.sequence_length}'
    steps = f'{run_config.train.steps:,} steps of {batch}, {text.short(tokens)} tokens'
    rows = [
      ('model', sizes),
      ('training', f'{steps}, peak rate {run_config.optimizer.peak_lr:g}'),
      *(machine.describe(found, kind) if found else [('machine', _NONE.format(kind))]),
    ]
    yield name
    yield from (f'  {what:9} {value}' for what, value in rows)
    if found:
      mesh = f' {found["mesh"]}' if found['mesh'] else ''
      if found['type'] != found['topology']:  # a TPU, for which the step can be compiled here
        yield f'  python -m moejax.aot --config={name} --topology={found["topology"]}'
      yield f'  python -m moejax.main --config={name}{mesh} --workdir=runs/{_folder(name)}'
    yield ''


def _folder(name):
  return name.removeprefix('configs/').translate(str.maketrans(':,=', '---')).replace('.py', '')
