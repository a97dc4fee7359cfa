"""The runs that a law is fitted to, from summary.json files or from a table."""

import csv
import dataclasses
import hashlib
import json
import math
import pathlib

from moejax import files
from moejax.scaling_laws import laws


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run, in the laws' own measures: see laws.py."""

  name: str
  params: float
  tokens: float
  granularity: int  # laws.DENSE for a dense model
  expansion_rate: float  # 1 for a dense model
  flops: float  # of training
  loss: float  # validation, nats per token
  data: str = ''  # what the corpus and the tokenizer were
  config_hash: str = ''


_COLUMNS = [field.name for field in dataclasses.fields(Run)]
_NEEDED = ('params', 'tokens', 'granularity', 'loss')
_WEIGHTS = ('attention', 'mlp', 'experts')  # kinds of parameters that the law's N counts


def collect(paths, expansion_rate=0.0):
  """Reads runs.

  Args:
    paths: folders of runs, folders of such folders, and CSV files as `write_table` writes them (of
      their columns params, tokens, granularity and loss are enough).

  Returns:
    The runs, and a dict of those that cannot be used, with the reason.

  Raises:
    ValueError: a path holds no run, two have the same name, or not all are on the same data.
  """
  runs, excluded = [], {}
  for path in map(pathlib.Path, paths):
    for name, found in _read(path, expansion_rate):
      if isinstance(found, str):
        excluded[name] = found
      elif not math.isfinite(found.loss):
        excluded[name] = 'diverged: its loss is not finite'
      else:
        runs.append(found)
  _check_names(runs)
  _check_data(runs)
  return runs, excluded


def _read(path, expansion_rate):
  """Yields (name, Run or the reason why there is none)."""
  if path.suffix == '.csv':
    yield from _read_table(path, expansion_rate)
    return
  folders = [path] if _is_run(path) else sorted(filter(_is_run, path.glob('*')))
  if not folders:
    raise ValueError(f'{path} holds no run: neither it nor a folder in it has a config.json.')
  for folder in folders:
    summary = folder / 'summary.json'
    if summary.exists():
      yield folder.name, from_summary(folder.name, json.loads(summary.read_text()))
    else:
      yield folder.name, 'unfinished or diverged: it has no summary.json'


def _is_run(folder):
  return (folder / 'config.json').exists() or (folder / 'summary.json').exists()


def from_summary(name, summary):
  """The `Run` that a summary.json tells of, or the reason why the laws do not speak of it."""
  model, by_kind = summary['config']['model'], summary['parameters']['by_kind']
  sublayers = {sublayer for pattern, _ in model['blocks'] for sublayer in pattern}
  if sublayers == {'attention', 'moe'}:
    granularity, expansion_rate = model['moe']['granularity'], model['moe']['expansion_rate']
  elif sublayers == {'attention', 'mlp'}:
    granularity, expansion_rate = laws.DENSE, 1
  else:
    return f'its blocks are of {", ".join(sorted(sublayers))}: neither all dense nor all sparse'
  d_model, blocks = model['d_model'], sum(repeats for _, repeats in model['blocks'])
  tokens, loss = summary['tokens_seen'], summary['validation']['loss']
  config = json.dumps(summary['config'], sort_keys=True)
  return Run(
    name=name,
    params=sum(by_kind.get(kind, 0) for kind in _WEIGHTS),
    tokens=tokens,
    granularity=granularity,
    expansion_rate=expansion_rate,
    flops=laws.flops_per_token(d_model, blocks, expansion_rate, granularity) * tokens,
    loss=math.nan if loss is None else loss,
    data=f'{summary["corpus"]}/{summary["tokenizer"]}',
    config_hash=hashlib.sha256(config.encode()).hexdigest()[:12],
  )


def _read_table(path, expansion_rate):
  with path.open(newline='') as file:
    rows = csv.DictReader(file)
    missing = [name for name in _NEEDED if name not in (rows.fieldnames or ())]
    if missing:
      raise ValueError(f'{path}: its first line names no column {", ".join(missing)}.')
    for number, row in enumerate(rows, start=2):
      name = row.get('name') or f'{path.name}:{number}'
      try:
        yield name, _from_row(name, row, expansion_rate)
      except ValueError as error:
        raise ValueError(f'{path}, line {number}: {error}.') from error


def _from_row(name, row, expansion_rate):
  params, tokens = float(row['params']), float(row['tokens'])
  granularity = int(row['granularity'])
  rate = float(row.get('expansion_rate') or expansion_rate)
  if granularity == laws.DENSE:
    rate = 1
  elif not rate:
    raise ValueError('there is no expansion_rate; add the column, or give --expansion_rate')
  return Run(
    name=name,
    params=params,
    tokens=tokens,
    granularity=granularity,
    expansion_rate=rate,
    flops=float(row.get('flops') or _usual_flops(params, tokens, rate, granularity)),
    loss=float(row['loss'] or 'nan'),
    data=row.get('data') or '',
    config_hash=row.get('config_hash') or '',
  )


def _usual_flops(params, tokens, expansion_rate, granularity):
  """Training FLOPs of a model of the shape that budgets are planned for."""
  d_model = (params * laws.WIDTH_PER_BLOCK / laws.total_params(1, 1, expansion_rate)) ** (1 / 3)
  blocks = d_model / laws.WIDTH_PER_BLOCK
  return laws.flops_per_token(d_model, blocks, expansion_rate, granularity) * tokens


def write_table(runs, path):
  """Writes runs as CSV, one column per field."""
  with files.atomic_output(path) as temporary, temporary.open('w', newline='') as file:
    table = csv.DictWriter(file, _COLUMNS)
    table.writeheader()
    table.writerows(map(dataclasses.asdict, runs))


def _check_names(runs):
  names = [run.name for run in runs]
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise ValueError(f'several runs are called {", ".join(twice)}; rename their folders or rows.')


def _check_data(runs):
  groups = {}
  for run in runs:
    groups.setdefault(run.data, []).append(run.name)
  if len(groups) > 1:
    raise ValueError(
      'the runs differ in corpus or tokenizer, so their losses do not compare:\n'
      + '\n'.join(f'{data or "unknown"}: {", ".join(names)}' for data, names in groups.items())
    )


def by_kind(runs):
  """The sparse runs, and the dense ones.

  Raises:
    ValueError: the sparse runs have different expansion rates.
  """
  dense = [run for run in runs if run.granularity == laws.DENSE]
  sparse = [run for run in runs if run.granularity != laws.DENSE]
  rates = {run.expansion_rate: [] for run in sparse}
  for run in sparse:
    rates[run.expansion_rate].append(run.name)
  if len(rates) > 1:
    raise ValueError(
      'a law holds for one expansion rate, but the runs have several:\n'
      + '\n'.join(f'{rate:g}: {", ".join(names)}' for rate, names in rates.items())
    )
  return sparse, dense
