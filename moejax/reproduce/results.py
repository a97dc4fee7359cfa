"""The finished runs of a design, by model and steps."""

import pathlib

from moejax import compare, report
from moejax.compare import table
from moejax.compare.runs import Model, Run
from moejax.reproduce import design as design_lib, stages
from moejax.reproduce.criteria import Missing

Key = tuple[str, int]  # name of a model, steps


class Results:
  """What is there; asks for runs that are missing raise Missing."""

  def __init__(self, design: design_lib.Design, workdir: pathlib.Path):
    self.design, self.workdir = design, workdir
    self.wanted = _wanted(design, stages.best_rates(design, workdir))
    done = {
      key: [name for name in names if report.has_finished(workdir / name)]
      for key, names in self.wanted.items()
    }
    self.missing = sum(len(names) - len(done[key]) for key, names in self.wanted.items())
    self.total = sum(map(len, self.wanted.values()))
    read = _read(workdir, [name for names in done.values() for name in names])
    self.models = {
      (name, steps): Model(f'{name}-{steps}', [read[run] for run in names])
      for (name, steps), names in done.items()
      if names
    }

  def losses(self, name: str, steps: int) -> dict[tuple, float]:
    """Final validation losses by seed."""
    return self._whole((name, steps)).losses

  def row(self, baseline: str, name: str, steps: int) -> table.Row:
    """A model beside a baseline of all its lengths."""
    lengths = [self._whole(key) for key in self.wanted if key[0] == baseline]
    lengths.sort(key=lambda model: model.tokens)
    return table.make_rows([*lengths, self._whole((name, steps))])[-1]

  def members(self, names) -> list[tuple[Key, Model]]:
    """What is there of a baseline and of others at its steps, the shortest runs first."""
    keys = sorted(self.models, key=lambda key: key[1])
    steps = {key[1] for key in self.wanted if key[0] == names[0]}
    return [(k, self.models[k]) for name in names for k in keys if k[0] == name and k[1] in steps]

  def _whole(self, key):
    model, wanted = self.models.get(key), self.wanted[key]
    found = len(model.runs) if model else 0
    if found < len(wanted):
      name, steps = key
      raise Missing(
        f'missing: {len(wanted) - found} of {len(wanted)} runs of {name}, {steps:,} steps'
      )
    assert model
    return model


def _wanted(design, rates) -> dict[Key, list[str]]:
  """The names of the folders of all runs; of models without a rate yet, ones that do not exist."""
  some, found = {model.name: model.rates[0] for model in design.models} | rates, {}
  known = lambda name, names: [n if name in rates else f'{name}: no rate' for n in names]
  for model in design.models:
    for steps, cells in design_lib.runs(design, some, model).items():
      found[model.name, steps] = known(model.name, (cell.name for cell in cells))
  for one in design.tuned:
    pairs = stages.tuned_runs(design, some, one)
    found[one.name, one.steps] = known(one.source, (name for name, _ in pairs))
  return found


def _read(workdir, names) -> dict[str, Run]:
  if not names:
    return {}
  runs = compare.read([workdir / name for name in names])
  return {run.folder.name: run for run in runs}
