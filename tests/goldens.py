"""Numbers that a change of the maths, and nothing else, may change: tests/golden/*.json."""

import dataclasses
import json
import math
import pathlib
import platform

import jax


@dataclasses.dataclass(frozen=True)
class Goldens:
  """Compares with the files of a directory, or writes them if `update`."""

  directory: pathlib.Path
  update: bool

  def __call__(self, name, numbers, rtol=1e-5):
    """Fails unless `numbers`, nested dicts and sequences of them, are those recorded as `name`."""
    path = self.directory / f'{name}.json'
    numbers = jax.tree.map(float, numbers)
    if self.update:
      where = {'jax': jax.__version__, 'machine': platform.machine()}
      path.parent.mkdir(exist_ok=True)
      path.write_text(json.dumps({**where, 'numbers': numbers}, indent=2) + '\n')
      return
    assert path.exists(), f'{path} is not recorded yet: run pytest --update-golden'
    recorded = json.loads(path.read_text())
    wrong = differences(recorded['numbers'], numbers, rtol)
    assert not wrong, '\n'.join(
      [
        f'{path} was recorded with jax {recorded["jax"]} on {recorded["machine"]}, '
        f'this is jax {jax.__version__} on {platform.machine()}:',
        *wrong,
        'If the change is meant: pytest --update-golden, and say why in the commit.',
      ]
    )


def differences(recorded, got, rtol):
  """One line per number that is missing, new, or further off than `rtol`; NaN equals NaN."""
  recorded, got = _flatten(recorded), _flatten(got)
  lines = [f'{name}: recorded, but not there now' for name in recorded if name not in got]
  lines += [f'{name}: not recorded' for name in got if name not in recorded]
  for name in recorded.keys() & got.keys():
    before, now = recorded[name], got[name]
    same = math.isclose(before, now, rel_tol=rtol) or (math.isnan(before) and math.isnan(now))
    if not same:
      change = f' ({now / before - 1:+.1e})' if before else ''
      lines.append(f'{name}: {before!r} recorded, {now!r} now{change}')
  return sorted(lines)


def _flatten(tree):
  tree = json.loads(json.dumps(tree))  # sequences of any kind become lists
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
