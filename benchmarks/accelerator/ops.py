"""Ops beside their floors, and beside what else is installed for the same computation."""

import functools

import jax

from benchmarks.accelerator import forms, peers, tables, timing

TITLE = 'Ops and their floors'
ABOUT = (
  'Forward, and with all gradients. The floor is the least time by the limits above: of products '
  'at the rate of bf16, of bytes that must be read or written once, of exponentials. `ours` is the '
  'form that layers use here.'
)


def cases(tiny):
  """By name, functions of a `limits.Limits` that return a row."""
  sizes = forms.TINY if tiny else forms.FULL
  found = {}
  for passes in ('with gradients', 'forward'):
    for name, make in forms.OPS.items():
      for form in make(sizes).forms:
        found[f'{name}: {form}, {passes}'] = functools.partial(_ours, make, form, passes, sizes)
      for form, peer in peers.installed(name).items():
        found[f'{name}: {form}, {passes}'] = functools.partial(_peer, make, peer, passes, sizes)
  return dict(sorted(found.items(), key=lambda item: _worth(item[0])))


def _worth(name):
  """Our forms first, then others; forward passes alone last."""
  return name.endswith('forward'), ': ours' not in name


def table(rows):
  def key(row):
    op, _, form = row['case'].partition(': ')
    return list(forms.OPS).index(op), form.endswith('forward'), not form.startswith('ours')

  lines = [
    [
      row['case'],
      tables.ms(row['time'][0]),
      tables.spread(row['time']),
      tables.ms(row['floor_seconds']),
      tables.ratio(row['over_floor']),
      row['bound'],
      tables.size(row.get('peak_bytes')),
    ]
    for row in sorted(rows, key=key)
  ]
  header = ['op: form, pass', 'ms', 'spread', 'floor ms', 'over floor', 'bound by', 'memory']
  return tables.markdown(header, lines)


def _ours(make, form, passes, sizes, limits):
  op = make(sizes)
  function = op.forms[form]
  if passes == 'with gradients':
    function = timing.with_gradients(function, op.differentiated)
  program = timing.program(function, *jax.jit(op.args)())
  time = program.time(tables.seconds(limits.tiny, 0.3))
  return _row(time, op.work(passes), limits) | program.costs()


def _peer(make, peer, passes, sizes, limits):
  call, wait = peer(sizes, passes == 'with gradients')
  time = timing.measure(call, wait, tables.seconds(limits.tiny, 0.3))
  return _row(time, make(sizes).work(passes), limits)


def _row(time, work, limits):
  floor, bound = limits.floor(work)
  over = floor and time.median / floor
  return {'time': time, 'floor_seconds': floor, 'bound': bound, 'over_floor': over}
