"""Reads the runs to fit a law to, from summary.json files or CSV tables."""

import csv
import dataclasses
import hashlib
import io
import json
import math

from moejax import files, report, run_folder
from moejax.scaling_laws import laws


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run, in the quantities of laws.py."""

  name: str
  params: float
  tokens: float
  granularity: int  # laws.DENSE for a dense model
  expansion_rate: float  # 1 for a dense model
  flops: float  # of training
  loss: float  # validation, nats per token
  active_params: float = 0.0
  data: str = ''  # corpus and tokenizer
  config_hash: str = ''


_COLUMNS = [field.name for field in dataclasses.fields(Run)]
_REQUIRED = ('params', 'tokens', 'granularity', 'loss')
_INSTEAD = {'params': 'active_params', 'granularity': 'experts'}  # of a required column
_PARAMS = ('params', 'active_params')
_MOST = 1e40  # of any number; more is a mistake, whose square is no float
_WEIGHTS = ('attention', 'mlp', 'experts')  # kinds of parameters that N of the law counts


def collect(paths, expansion_rate=0.0):
  """Reads runs.

  Args:
    paths: folders of runs, folders of such folders, and CSV files as written by `write_table`. The
      columns params, tokens, granularity and loss are required; active_params may stand for params,
      and experts, 1 for a dense model, for granularity and expansion_rate.
    expansion_rate: of sparse runs in CSV files without this column; 0: not given.

  Returns:
    The runs, and a dict of excluded ones: name -> reason.

  Raises:
    ValueError: a path holds no run or a damaged one, two runs have the same name or config, or the
      runs differ in data.
  """
  runs, excluded = [], {}
  for path in map(files.path, paths):
    for name, found in _read(path, expansion_rate):
      if isinstance(found, str):
        excluded[name] = found
      elif not math.isfinite(found.loss):
        excluded[name] = 'diverged: its loss is not finite'
      else:
        runs.append(found)
  _check_data(runs)
  _check_distinct(runs)
  return runs, excluded


def _read(path, expansion_rate):
  """Yields (name, Run or the reason to exclude it)."""
  if not files.exists(path):
    raise ValueError(f'{path} does not exist.')
  if files.is_file(path):
    if path.suffix.lower() != '.csv':
      raise ValueError(f'{path} is neither a folder of runs nor a .csv file.')
    yield from _read_table(path, expansion_rate)
    return
  inside = [path / name for name in sorted(files.children(path))]
  folders = [path] if _is_run(path) else [folder for folder in inside if _is_run(folder)]
  if not folders:
    raise ValueError(f'{path} holds no run: no config.json in it or its subfolders.')
  for folder in folders:
    summary = folder / 'summary.json'
    if not files.exists(summary):
      yield folder.name, 'unfinished or diverged: no summary.json'
      continue
    fields = run_folder.read_json(summary)
    if not report.is_finished(fields):
      yield folder.name, f'unfinished: at step {fields.get("steps")}'
      continue
    try:
      yield folder.name, from_summary(folder.name, fields)
    except KeyError as error:
      raise ValueError(f'{summary} has no field {error}, which fitting needs.') from error
    except (ArithmeticError, AttributeError, TypeError) as error:
      raise ValueError(f'{summary} is not a valid run summary: {error}.') from error
    except ValueError as error:
      raise ValueError(f'{summary}: {error}.') from error


def _is_run(folder):
  return files.exists(folder / 'config.json') or files.exists(folder / 'summary.json')


def from_summary(name, summary):
  """The `Run` of a summary.json, or the reason why the laws do not cover it."""
  model, by_kind = summary['config']['model'], summary['parameters']['by_kind']
  sublayers = {sublayer for pattern, _ in model['blocks'] for sublayer in pattern}
  if sublayers == {'attention', 'moe'}:
    granularity = _granularity(model['moe']['granularity'])
    expansion_rate = _expansion_rate(granularity, model['moe']['expansion_rate'], 0)
  elif sublayers == {'attention', 'mlp'}:
    granularity, expansion_rate = laws.DENSE, 1
  else:
    return f'its sublayers are {", ".join(sorted(sublayers))}: expected attention with mlp or moe'
  d_model = _positive('d_model', model['d_model'])
  blocks = _positive('blocks', sum(repeats for _, repeats in model['blocks']))
  tokens = _positive('tokens_seen', summary['tokens_seen'])
  weights = {kind: by_kind.get(kind) and _positive(kind, by_kind[kind]) or 0 for kind in _WEIGHTS}
  config = json.dumps(summary['config'], sort_keys=True)
  return Run(
    name=name,
    params=_positive('parameters', sum(weights.values())),
    active_params=sum(weights.values()) - weights['experts'] * (1 - 1 / expansion_rate),
    tokens=tokens,
    granularity=granularity,
    expansion_rate=expansion_rate,
    flops=float(laws.flops_per_token(d_model, blocks, expansion_rate, granularity) * tokens),
    loss=_loss('validation.loss', summary['validation']['loss']),
    data='/'.join(filter(None, (summary.get('corpus'), summary.get('tokenizer')))),
    config_hash=hashlib.sha256(config.encode()).hexdigest()[:12],
  )


def _read_table(path, expansion_rate):
  rows = csv.DictReader(io.StringIO(_text(path), newline=None), skipinitialspace=True, strict=True)
  try:
    rows.fieldnames = _columns(rows.fieldnames)
    for row in rows:
      if any(row.values()):  # spreadsheets write empty lines of commas
        name = row.get('name') or f'{path.name}:{rows.line_num}'
        yield name, _from_row(name, row, expansion_rate)
  except (ArithmeticError, ValueError, csv.Error) as error:
    raise ValueError(f'{path}, line {max(1, rows.line_num)}: {error}.') from error
  if rows.line_num < 2:
    raise ValueError(f'{path} has no rows below the header.')


def _text(path):
  """The text of a file, without the byte order mark that Excel writes."""
  content = files.read(path)
  try:
    text = content.decode('utf-8-sig')
    if '\0' not in text:
      return text
    position = text.index('\0')
  except UnicodeDecodeError as error:
    position = error.start
  line = content[:position].count(b'\n') + 1
  raise ValueError(f'{path}, line {line}: not UTF-8 text; save it as UTF-8.')


def _columns(names):
  """The validated column names of a table."""
  names = [name.strip() for name in names or ()]
  duplicates = [name for name in _COLUMNS if names.count(name) > 1]
  if duplicates:
    raise ValueError(f'two columns are named {duplicates[0]}; remove one')
  missing = [name for name in _REQUIRED if not {name, _INSTEAD.get(name)} & set(names)]
  if missing:
    hint = '; columns are separated by commas' if len(names) == 1 else ''
    raise ValueError(f'no column {", ".join(missing)} in {", ".join(names) or "nothing"}{hint}')
  return names


def _from_row(name, row, expansion_rate):
  if None in row or None in row.values():
    raise ValueError('more or fewer values than columns in the header')
  tokens = _positive('tokens', row['tokens'])
  granularity, rate = _experts(row, expansion_rate)
  params, active_params = _params(row, rate)
  flops = row.get('flops')
  flops = _positive('flops', flops) if flops else _default_flops(params, tokens, rate, granularity)
  return Run(
    name=name,
    params=params,
    active_params=active_params,
    tokens=tokens,
    granularity=granularity,
    expansion_rate=rate,
    flops=float(flops),
    loss=_loss('loss', row['loss'] or 'nan'),
    data=row.get('data') or '',
    config_hash=row.get('config_hash') or '',
  )


def _number(value):
  """A table's text or a JSON value as an int or a float; NaN if it is not a number."""
  try:
    number = math.nan if isinstance(value, bool) else float(value)
  except (OverflowError, TypeError, ValueError):
    return math.nan
  if abs(number) > _MOST:
    return math.inf
  return int(number) if number.is_integer() else number


def _positive(field, value):
  number = _number(value)
  if not 0 < number < math.inf:
    raise ValueError(f'{field} = {value!r}: expected a finite number above 0')
  return number


def _params(row, expansion_rate):
  """All and active parameters; of the laws' shapes where a table has only one of them."""
  ratio = laws.total_params(1, 1, expansion_rate) / laws.active_params(1, 1)
  given = {name: _positive(name, row[name]) for name in _PARAMS if row.get(name)}
  if not given:
    raise ValueError(f'params = {row.get("params", "")!r}: expected a finite number above 0')
  params = given.get('params') or given['active_params'] * ratio
  return params, given.get('active_params') or params / ratio


def _experts(row, default):
  """The granularity and the expansion rate; `default` is --expansion_rate, 0 if not given."""
  if 'granularity' in row:
    granularity, experts = _granularity(row['granularity']), row.get('experts')
    rate = row.get('expansion_rate')
    if experts and not rate:
      rate = _positive('experts', experts) / (granularity or 1)
    return granularity, _expansion_rate(granularity, rate, default)
  experts = _positive('experts', row['experts'])
  return (laws.DENSE, 1) if experts == 1 else (1, _expansion_rate(1, experts, default))


def _granularity(value):
  number = _number(value)
  if not (isinstance(number, int) and number >= 0):
    raise ValueError(f'granularity = {value!r}: expected an integer, 0 for a dense model')
  return number


def _expansion_rate(granularity, value, default):
  """The expansion rate of a row; `default` is --expansion_rate, 0 if not given."""
  if granularity == laws.DENSE:
    if value and _number(value) != 1:
      raise ValueError(
        f'expansion_rate = {value!r}, but granularity 0 means dense, whose rate is 1'
      )
    return 1
  if not value and not default:
    raise ValueError('no expansion_rate; add the column or set --expansion_rate')
  rate = _number(value) if value else default
  if not 1 <= rate < math.inf:
    raise ValueError(f'expansion_rate = {value or default!r}: expected a finite number >= 1')
  return rate


def _loss(field, value):
  """The loss; NaN for a diverged run: no value, NaN or infinity."""
  if value is None or str(value).strip().lower() in ('nan', 'inf', 'infinity'):
    return math.nan
  return _positive(field, value)


def _default_flops(params, tokens, expansion_rate, granularity):
  """Training FLOPs of a model of compute-optimal shape."""
  d_model = (params * laws.WIDTH_PER_BLOCK / laws.total_params(1, 1, expansion_rate)) ** (1 / 3)
  blocks = d_model / laws.WIDTH_PER_BLOCK
  return laws.flops_per_token(d_model, blocks, expansion_rate, granularity) * tokens


def write_table(runs, path):
  """Writes runs as CSV, one column per field."""
  with files.atomic_output(path) as temporary, temporary.open('w', newline='') as file:
    table = csv.DictWriter(file, _COLUMNS)
    table.writeheader()
    table.writerows(map(dataclasses.asdict, runs))


def _check_distinct(runs):
  names, configs = set(), {}
  for run in runs:
    if run.name in names:
      raise ValueError(f'several runs are named {run.name}; rename their folders or rows.')
    names.add(run.name)
    if run.config_hash and run.config_hash in configs:
      raise ValueError(
        f'{configs[run.config_hash]} and {run.name} have the same configuration; '
        'remove one of them.'
      )
    configs[run.config_hash] = run.name


def _check_data(runs):
  groups = {}
  for run in runs:
    groups.setdefault(run.data, []).append(run.name)
  if len(groups) > 1:
    raise ValueError(
      'the runs differ in corpus or tokenizer, so their losses are not comparable:\n'
      + '\n'.join(f'{data or "unknown"}: {", ".join(names)}' for data, names in groups.items())
    )


def unsplit(runs):
  """Dense runs and those of any number of experts of full width, and the others: name -> reason.

  They are what the joint law is of.
  """
  reason = 'granularity above 1: the joint law is of experts of full width'
  others = {run.name: reason for run in runs if run.granularity > 1}
  return [run for run in runs if run.name not in others], others


def by_kind(runs):
  """The sparse runs and the dense runs.

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
