"""Compiles the papers' models for TPU slices ahead of time, and writes docs/pods.md.

python benchmarks/pods.py              all rows missing from docs/pods.json; hours of compiling
python benchmarks/pods.py --only=MoT   only those with this text in their keys
python benchmarks/pods.py --write      only regenerate the tables from docs/pods.json

Needs the extra tpu-aot. Every row is a run of moejax.aot, whose command is in docs/pods.json.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import threading

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_RESULTS = _ROOT / 'docs' / 'pods.json'
_PAGE = _ROOT / 'docs' / 'pods.md'

# Configurations of the papers.
PAPERS = {
  'dense medium': 'dense.py:medium',
  'dense base': 'dense.py:base',
  'MoT-Medium 32E/1': 'mot.py:medium,experts=32',
  'MoT-Medium 32E/16': 'mot.py:medium,experts=32,mixtures=16',
  'MoT-Base 32E/1': 'mot.py:base,experts=32',
  'MoT-Base 32E/16': 'mot.py:base,experts=32,mixtures=16',
  'MoT mini 32E/16': 'mot.py:mini',
  '64x3M G=8': 'fine_grained.py:3M',
  '64x13M G=8': 'fine_grained.py:13M',
  '64x25M G=8': 'fine_grained.py:25M',
  '64x49M G=8': 'fine_grained.py:49M',
  '64x85M G=4': 'fine_grained.py:85M,granularity=4',
  'Mamba 25M': 'mamba.py:25M',
  'Mamba 100M': 'mamba.py:100M',
  'Mamba-2 25M': 'mamba.py:25M,mamba2',
  'MoE-Mamba 25M': 'moe_mamba.py:25M',
  'MoE-Mamba-2 25M': 'moe_mamba.py:25M,mamba2',
  'MoE-Mamba 100M': 'moe_mamba.py:100M',
  'Transformer-MoE 25M': 'moe.py:25M',
  'Transformer-MoE 100M': 'moe.py:100M',
}
_WRITING = threading.Lock()
# Slices to try for each, smallest first.
_V5E = ('v5e-1', 'v5e-4', 'v5e-8', 'v5e-16', 'v5e-32', 'v5e-64')

# Configurations and slices of the larger runs.
SLICES = ('v5e-16', 'v5e-256', 'v5p-128', 'v4-512')
LARGE = {
  'MoT-Base 32E/1': 'mot.py:base,experts=32',
  'MoE-Mamba 100M': 'moe_mamba.py:100M',
  **{
    f'64x{size} G={granularity}': f'fine_grained.py:{size},granularity={granularity}'
    for size in ('25M', '1B', '3B')
    for granularity in (8, 16)
  },
}

# Weak scaling: batch per chip, mesh without data.
WEAK = {
  'MoT-Base 32E/1, fsdp 8': ('mot.py:base,experts=32', 64, {'fsdp': 8}),
  'MoE-Mamba 100M, expert 2, fsdp 4': ('moe_mamba.py:100M', 32, {'fsdp': 4, 'expert': 2}),
}
WEAK_CHIPS = (8, 16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Row:
  """One run of moejax.aot."""

  table: str
  name: str
  topology: str
  arguments: tuple[str, ...]

  @property
  def key(self):
    return f'{self.table} | {self.name} | {self.topology}'

  @property
  def command(self):
    return ['-m', 'moejax.aot', f'--topology={self.topology}', *self.arguments]

  def run(self):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'report.json'
      args = [sys.executable, *self.command, f'--json={path}']
      done = subprocess.run(args, cwd=_ROOT, capture_output=True, text=True)
      if not path.exists():
        print(f'{self.key} failed: {done.stderr[-2000:]}', file=sys.stderr)
        return None
      return json.loads(path.read_text()) | {'command': ' '.join(['python', *self.command])}


def _config(config):
  """The flags of a config; small routing groups, which devices with few sequences can hold."""
  groups = ['--config.model.moe.group_size=8'] if config.startswith('moe') else []
  return [f'--config=configs/{config}', *groups]


def _rows():
  for name, config in LARGE.items():
    for topology in SLICES:
      args = *_config(config), '--search', '--num_compiled=1'
      yield [Row('large', name, topology, args)]
  for name, (config, per_chip, mesh) in WEAK.items():
    for chips in WEAK_CHIPS:
      sizes = mesh | {'data': -1}
      args = [*_config(config), f'--config.data.batch_size={per_chip * chips}']
      args += [f'--config.mesh.{axis}={n}' for axis, n in sizes.items()]
      args += ['--config.model.remat=full', '--config.optimizer.accumulation=1']
      yield [Row('weak', name, f'v5e-{chips}', tuple(args))]
  for name, config in PAPERS.items():
    args = *_config(config), '--search', '--num_compiled=1'
    yield [Row('papers', name, topology, args) for topology in _V5E]


def _run_until_one_fits(rows, results):
  """Adds the reports of rows to results, until one fits."""
  for row in rows:
    if row.key not in results:
      print(row.key, flush=True)
      report = row.run()
      if report is None:
        return
      with _WRITING:
        results[row.key] = report
        _RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True))
    if results[row.key]['fits']:
      break


# The page.


def _gib(num_bytes):
  return f'{num_bytes / 2**30:.2f}'


def _milliseconds(report):
  return [f'{1e3 * report["seconds"][kind]:.3g}' for kind in ('compute', 'memory', 'interconnect')]


def _line(name, report):
  mesh = ' '.join(f'{axis} {n}' for axis, n in report['mesh'].items()) or '-'
  if not report['fits']:
    needed = report['needed'] or 'needs more memory'
    return [name, report['topology'], mesh, '', 'no', needed, '', '', '', '', '']
  return [
    name,
    report['topology'],
    mesh,
    f'{report["remat"]}, {report["accumulation"]}',
    f'{report["params"] / 1e9:.3g}B / {report["active_params"] / 1e9:.3g}B',
    f'{_gib(sum(report["memory"].values()))} of {report["capacity"] / 2**30:.0f}',
    *_milliseconds(report),
    report['bound'],
    f'{100 * report["mfu"]:.0f}',
  ]


_HEADER = [
  'model',
  'slice',
  'mesh',
  'remat, accumulation',
  'parameters / active',
  'GiB per chip',
  'matmul ms',
  'memory ms',
  'interconnect ms',
  'bound by',
  'max MFU %',
]


def _table(header, lines):
  rows = [header, ['---'] * len(header), *lines]
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)


def _of_table(results, table):
  for key, report in results.items():
    kind, name, topology = key.split(' | ')
    if kind == table:
      yield name, topology, report


def _papers(results):
  lines = [_line(name, r) for name, _, r in _of_table(results, 'papers') if r['fits']]
  return _table(_HEADER, sorted(lines, key=lambda line: list(PAPERS).index(line[0])))


def _large(results):
  found = {(name, topology): r for name, topology, r in _of_table(results, 'large')}
  lines = [
    _line(name, found[name, topology])
    for name in LARGE
    for topology in SLICES
    if (name, topology) in found
  ]
  return _table(_HEADER, lines)


def _weak(results):
  found = {(name, topology): r for name, topology, r in _of_table(results, 'weak')}
  lines = []
  for name in WEAK:
    series = [(n, found[name, f'v5e-{n}']) for n in WEAK_CHIPS if (name, f'v5e-{n}') in found]
    for chips, report in series:
      sent = [sum(e['bytes'] for e in r['exchanges']) for r in (report, series[0][1])]
      lines.append(
        [
          name,
          str(chips),
          f'{sent[0] / 2**30:.2f}',
          f'{sent[0] / sent[1]:.3f}',
          *_milliseconds(report),
          f'{report["step_seconds"] / series[0][1]["step_seconds"]:.3f}',
        ]
      )
  header = ['model, mesh', 'chips', 'GiB sent', 'vs. 8 chips']
  header += ['matmul ms', 'memory ms', 'interconnect ms', 'step vs. 8 chips']
  return _table(header, lines)


def write_page(results):
  """Replaces the tables between the markers of docs/pods.md."""
  text = _PAGE.read_text()
  for marker, make in (('papers', _papers), ('large', _large), ('weak', _weak)):
    start, end = f'<!-- {marker} -->\n', f'<!-- end of {marker} -->'
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    text = f'{before}{start}\n{make(results)}\n\n{end}{after}'
  _PAGE.write_text(text)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--only', default='', help='only rows with this text in their keys')
  parser.add_argument('--jobs', type=int, default=2, help='number of parallel compilations')
  parser.add_argument('--write', action='store_true', help='only regenerate the tables')
  args = parser.parse_args()
  results = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
  if not args.write:
    groups = [rows for rows in _rows() if args.only in rows[0].key]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
      list(pool.map(lambda rows: _run_until_one_fits(rows, results), groups))
  write_page(results)


if __name__ == '__main__':
  main()
