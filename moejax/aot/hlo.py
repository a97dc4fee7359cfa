"""Cost of one run of a compiled program, from its HLO text: FLOPs, memory traffic, collectives.

The compiler's own cost analysis counts a loop body once, however often it runs, and models do
nearly all their work in loops over layers. Here every computation counts as often as it runs.

- FLOPs are those of matmuls and convolutions as compiled: recomputed and replicated work counts
  every time. Kernels of other compilers (custom calls) count as 0, but for those of attention.
- Memory traffic is what instructions read and write after fusion; of an indexed array, only the
  elements accessed. Buffers in on-chip memory (`S(1)` in a TPU's layout) cost nothing.
- A collective that the compiler splits into steps, between computations, counts once.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Instruction(NamedTuple):
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool


class Collective(NamedTuple):
  """A collective operation; `groups` is the HLO text of its device groups."""

  kind: str
  groups: str
  bytes: int  # the larger of a device's input and output


@dataclasses.dataclass(frozen=True)
class Cost:
  """Per device."""

  flops: float = 0
  memory_bytes: float = 0
  collectives: Mapping[Collective, int] = dataclasses.field(default_factory=dict)  # -> count

  def __add__(self, other):
    collectives = collections.Counter(self.collectives)
    collectives.update(other.collectives)
    memory_bytes = self.memory_bytes + other.memory_bytes
    return Cost(self.flops + other.flops, memory_bytes, collectives)

  def __mul__(self, times):
    collectives = {collective: times * n for collective, n in self.collectives.items()}
    return Cost(self.flops * times, self.memory_bytes * times, collectives)


def cost(text):
  """The Cost of one run of a scheduled HLO module."""
  return _Program(text).cost_of_entry()


_COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-permute',
  'ragged-all-to-all',
  'reduce-scatter',
)
# These move and compute nothing: names of values, views, constants.
_FREE = (
  'after-all',
  'bitcast',
  'constant',
  'get-tuple-element',
  'iota',
  'opt-barrier',
  'parameter',
  'partition-id',
  'recv',
  'replica-id',
  'tuple',
)
# The device group of transfers over the data-center network, which a TPU's host makes.
SLICES = 'one chip of every slice'
_INDEXING = ('dynamic-slice', 'slice', 'gather')


class _Program:
  def __init__(self, text):
    self.computations, self.entry = _parse(text)
    self.shapes = {
      name: {i.name: i.shape for i in instructions}
      for name, instructions in self.computations.items()
    }
    self._cost = functools.cache(self._cost)
    self._read = functools.cache(self._read)

  def cost_of_entry(self):
    return self._cost(self.entry)

  def _cost(self, computation):
    total = Cost()
    for instruction in self.computations[computation]:
      total += self._cost_of(computation, instruction)
    return total

  def _cost_of(self, computation, i):
    called = _called(i)
    kind = i.opcode.removesuffix('-start')
    if i.opcode in _FREE or i.opcode.endswith(('-done', '-update')):
      return Cost()
    if i.opcode == 'while':
      return (self._cost(called['body']) + self._cost(called['condition'])) * self._trips(i, called)
    if i.opcode in ('call', 'async-start'):
      return self._cost(called.get('to_apply') or called['calls'])
    if i.opcode == 'conditional':  # the most expensive branch
      return max((self._cost(branch) for branch in called.values()), key=lambda c: c.memory_bytes)
    if i.opcode == 'send':
      return Cost(collectives=self._sent_to_slices(computation, i))
    if kind in _COLLECTIVES:
      return Cost(collectives={self._collective(computation, i, kind): 1})
    if i.opcode == 'fusion':
      inner = self._cost_in_fusion(called['calls'])
      return dataclasses.replace(inner, memory_bytes=self._fusion_bytes(computation, i, called))
    return Cost(_flops(i, self.shapes[computation]), self._bytes(computation, i))

  def _cost_in_fusion(self, computation):
    """FLOPs and collectives; values inside a fusion do not go through memory."""
    instructions = self.computations[computation]
    starts = any('"AsyncCollectiveStart"' in i.attributes for i in instructions)
    scatters = computation.startswith('all-reduce-scatter')  # a TPU's reduce-scatter
    total = Cost()
    for i in instructions:
      if i.opcode == 'fusion':
        total += self._cost_in_fusion(_called(i)['calls'])
      elif i.opcode in _COLLECTIVES:
        if 'chain_id=' in i.attributes and not starts:
          continue  # a later step of a collective that was counted at its start
        kind = 'reduce-scatter' if scatters and i.opcode == 'all-reduce' else i.opcode
        total += Cost(collectives={self._collective(computation, i, kind): 1})
      else:
        total += Cost(_flops(i, self.shapes[computation]))
    return total

  def _collective(self, computation, i, kind):
    shapes = self.shapes[computation]
    arrays = _arrays(i.shape) if i.opcode == kind else _arrays(i.shape)[1:]  # start: (in, out, ..)
    out = sum(a.payload for a in arrays)
    into = sum(a.payload for name in i.operands for a in _arrays(shapes[name]))
    if i.opcode.endswith('-start'):
      out = 0 if kind != 'all-gather' else max(a.payload for a in _arrays(i.shape))
    return Collective(kind, _groups_text(i), max(into, out))

  def _sent_to_slices(self, computation, i):
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
    if not transfer:
      return {}
    sent = sum(a.payload for a in _arrays(self.shapes[computation][i.operands[0]]))
    return {Collective(transfer[1].lower().replace('_', '-'), SLICES, sent): 1}

  def _trips(self, i, called):
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.attributes)
    if known:
      return int(known[1])
    # A counter from 0 is compared with the largest constant of the condition.
    condition = self.computations[called['condition']]
    end = max(_constants(condition).values(), default=1)
    counters = [_index(c) for c in condition if c.opcode == 'get-tuple-element']
    return -(-end // self._step(called['body'], counters[0])) if counters else end

  def _step(self, body, counter):
    """The increment of a loop's counter; the compiler unrolls some loops."""
    by_name = {i.name: i for i in self.computations[body]}
    root = next(i for i in by_name.values() if i.is_root)
    update = by_name.get(root.operands[counter]) if root.opcode == 'tuple' else None
    constants = _constants(by_name.values())
    if update is not None and update.opcode == 'add':
      return next((constants[name] for name in update.operands if name in constants), 1)
    return 1

  def _bytes(self, computation, i):
    shapes = self.shapes[computation]
    if i.opcode in _INDEXING:
      return 2 * _bytes(i.shape)
    if i.opcode == 'dynamic-update-slice':
      return 2 * _bytes(shapes[i.operands[1]])
    if i.opcode in ('copy-start', 'slice-start'):  # from one memory to another: (in, out, context)
      ends = [a for a in _arrays(i.shape) if a.payload > 4]
      return min((a.bytes for a in ends), default=0) * sum(not a.on_chip for a in ends)
    if i.opcode == 'custom-call' and _is_free(i):
      return 0
    return _bytes(i.shape) + sum(_bytes(shapes[name]) for name in i.operands)

  def _fusion_bytes(self, computation, i, called):
    shapes = self.shapes[computation]
    read = 0
    for number, name in enumerate(i.operands):
      size = _bytes(shapes[name])
      read += min(size, self._read(called['calls'], number)) if size else 0
    return read + self._written(called['calls'], i.shape)

  def _read(self, computation, number):
    """Bytes that a fused computation reads of a parameter."""
    instructions = self.computations[computation]
    parameter = next(
      i for i in instructions if i.opcode == 'parameter' and i.operands == (str(number),)
    )
    names, total = {parameter.name}, 0
    for i in instructions:
      if names.intersection(i.operands):
        accessed = self._accessed(i, names)
        if accessed is None:
          return _bytes(parameter.shape, anywhere=True)
        total += accessed
        if i.opcode == 'bitcast':
          names.add(i.name)
    return total

  def _accessed(self, i, names):
    """Bytes that an instruction reads of the array with these names; None: all of it."""
    first = i.operands[0] in names
    if i.opcode in ('bitcast', 'tuple'):
      return 0
    if i.opcode in _INDEXING and first:
      return _bytes(i.shape, anywhere=True)
    if i.opcode == 'dynamic-update-slice' and first and i.operands[1] not in names:
      return 0  # written in place
    if i.opcode == 'fusion':
      fused = _called(i)['calls']
      return sum(self._read(fused, n) for n, name in enumerate(i.operands) if name in names)
    return None

  def _written(self, computation, shape):
    """Bytes that a fused computation writes, given the shape of its result in the caller."""
    by_name = {i.name: i for i in self.computations[computation]}
    root = next(i for i in by_name.values() if i.is_root)
    outputs = [by_name[n] for n in root.operands] if root.opcode == 'tuple' else [root]
    arrays = _arrays(shape)
    if len(arrays) != len(outputs):
      return sum(a.bytes for a in arrays if not a.on_chip)
    total = 0
    for output, array in zip(outputs, arrays, strict=True):
      while output.opcode == 'bitcast' and output.operands[0] in by_name:
        output = by_name[output.operands[0]]
      if array.on_chip or output.opcode == 'parameter':
        continue
      if output.opcode == 'dynamic-update-slice':
        total += min(array.bytes, _bytes(by_name[output.operands[1]].shape, anywhere=True))
      else:
        total += array.bytes
    return total


def sent_bytes(collective, size):
  """Bytes that each of `size` devices sends in a collective."""
  if collective.kind == 'collective-permute':
    return collective.bytes
  passes = 2 if collective.kind == 'all-reduce' else 1
  return passes * collective.bytes * (size - 1) / size


# Parsing.

_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_NAME = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = ')


def _parse(text):
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if current is None:
      header = _HEADER.match(line)
      if header:
        current = computations.setdefault(header[2], [])
        entry = header[2] if header[1] else entry
    elif line.startswith('}') and line[1:2] != '}':  # that ends attributes of several lines
      current = None
    else:
      name = _NAME.match(line)
      if name:
        current.append(_instruction(line, name))
  return computations, entry


def _instruction(line, name):
  start = name.end()
  end = _closing(line, start) if line[start] == '(' else line.index(' ', start)
  shape, rest = line[start:end], line[end:].lstrip()
  opcode, _, rest = rest.partition('(')
  end = _closing('(' + rest, 0) - 1
  inside, attributes = rest[: end - 1], rest[end:]
  operands = tuple(re.findall(r'%([\w.\-]+)', inside))
  if opcode in ('parameter', 'constant'):
    operands = (inside,)
  return Instruction(name[2], shape, opcode, operands, attributes, bool(name[1]))


def _closing(text, start):
  """The position after the parenthesis that closes the one at `start`."""
  depth = 0
  for position in range(start, len(text)):
    depth += (text[position] == '(') - (text[position] == ')')
    if not depth:
      return position + 1
  raise ValueError(f'unbalanced: {text[:80]}')


def _constants(instructions):
  return {
    i.name: int(i.operands[0])
    for i in instructions
    if i.opcode == 'constant' and i.operands[0].isdigit()
  }


def _index(i):
  return int(_match(r'.*index=(\d+)', i.attributes)[0])


def _called(i):
  names = dict(re.findall(r'(body|condition|calls|to_apply)=%?([\w.\-]+)', i.attributes))
  branches = re.search(r'branch_computations=\{([^}]*)\}', i.attributes)
  if branches:
    names = {n: n for n in re.findall(r'%?([\w.\-]+)', branches[1])}
  names |= dict(re.findall(r'((?:true|false)_computation)=%?([\w.\-]+)', i.attributes))
  return names


# Custom calls that only name or view buffers.
_FREE_CALLS = ('AllocateBuffer', 'ConcatBitcast', 'AssumeGatherIndicesInBound', 'Sharding')


def _is_free(i):
  target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
  return bool(target) and target[1] in _FREE_CALLS


# Arrays.


class _Array(NamedTuple):
  dtype: str
  dims: tuple[int, ...]
  bytes: int  # with tile padding
  payload: int  # without padding
  on_chip: bool


_ARRAY = re.compile(r'(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?')


@functools.cache
def _arrays(shape):
  return tuple(_array(*match) for match in _ARRAY.findall(shape))


def _array(dtype, dims, layout):
  dims = tuple(int(n) for n in dims.split(',') if n)
  bits = 8 if dtype == 'pred' else int(_match(r'\D+(\d+)', dtype)[0])
  order, _, tiling = layout.partition(':')
  padded = list(dims)
  tile = re.search(r'T\(([\d,]+)\)', tiling)
  if tile and dims:
    sizes = [int(n) for n in tile[1].split(',')][::-1]
    for position, size in zip(map(int, order.split(',')), sizes, strict=False):
      padded[position] = -(-padded[position] // size) * size
  return _Array(
    dtype,
    dims,
    math.prod(padded) * bits // 8,
    math.prod(dims) * bits // 8,
    'S(' in tiling,  # other memories hold semaphores and scalars
  )


def _bytes(shape, anywhere=False):
  return sum(a.bytes for a in _arrays(shape) if anywhere or not a.on_chip)


# FLOPs.


# Products of positions by positions in the kernels of attention for TPUs.
_ATTENTION = {'fwd': 2, 'dq': 3, 'dkv': 4}


def _flops(i, shapes):
  if i.opcode == 'custom-call':
    return _attention_flops(i, shapes)
  if i.opcode not in ('dot', 'convolution'):
    return 0
  left, right = (_arrays(shapes[name])[0].dims for name in i.operands[:2])
  out = _arrays(i.shape)[0].dims
  if i.opcode == 'dot':
    contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.attributes)
    sizes = [left[int(d)] for d in contracted[1].split(',') if d] if contracted else []
    return 2 * math.prod(out) * math.prod(sizes)
  return _convolution_flops(left, right, out, i.attributes)


def _attention_flops(i, shapes):
  """Those of pairs of positions of which the later one sees the earlier one."""
  kernel = re.match(r'splash_m[hq]a_(fwd|dq|dkv)_', i.name)
  if not kernel:
    return 0
  arrays = (_arrays(shapes[name])[0] for name in i.operands)
  B, H, L, P = next(a.dims for a in arrays if len(a.dims) == 4)  # queries, after the mask
  return _ATTENTION[kernel[1]] * B * H * L * L * P


def _convolution_flops(left, right, out, attributes):
  """Products with values, not padding: TPUs express batched matmuls as such convolutions."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', attributes)
  assert labels, attributes
  image, kernel, result = (
    dict(zip(label, dims, strict=True))
    for label, dims in zip(labels.groups(), (left, right, out), strict=True)
  )
  groups = re.search(r'feature_group_count=(\d+)', attributes)
  batches = re.search(r'batch_group_count=(\d+)', attributes)
  products = result['b'] * result['f'] * kernel['i']
  if batches:
    products //= int(batches[1])
  if groups:
    assert image['f'] == kernel['i'] * int(groups[1])
  window = re.search(r'window=\{([^}]*)\}', attributes)
  fields = dict(part.split('=') for part in window[1].split()) if window else {}
  for dim in filter(str.isdigit, kernel):
    field = lambda name, default, dim=int(dim): (
      fields[name].split('x')[dim] if name in fields else default
    )
    low = int(field('pad', '0_0').split('_')[0])
    products *= _valid_positions(
      image[dim],
      kernel[dim],
      result[dim],
      stride=int(field('stride', 1)),
      low=low,
      image_dilation=int(field('lhs_dilate', 1)),
      kernel_dilation=int(field('rhs_dilate', 1)),
    )
  return 2 * products


@functools.cache
def _valid_positions(image, kernel, result, *, stride, low, image_dilation, kernel_dilation):
  """Pairs of a result and a kernel position that hit a value of the image, not padding."""
  at = np.arange(result)[:, None] * stride + np.arange(kernel)[None] * kernel_dilation - low
  return int(np.sum((at >= 0) & (at <= (image - 1) * image_dilation) & (at % image_dilation == 0)))


# Groups of devices.


def _groups_text(i):
  pairs = re.search(r'source_target_pairs=\{(\{.*?\})\}', i.attributes)
  if pairs:
    return pairs[1]
  groups = re.search(r'replica_groups=(.*?)(?:, (?!device_ids)[a-z_]+=|$)', i.attributes)
  return groups[1] if groups else '{}'


@functools.cache
def device_groups(text, num_devices):
  """The device groups of a collective: an array [groups, devices per group] of mesh positions.

  Reads lists ({{0,1},{2,3}}), reshaped ranges ([2,4]<=[4,2]T(1,0)) and axes of a mesh
  (mesh['a'=2,'b'=4] {'b'}, parts of axes as 'b':(1)2), whose device order may be a reshaped range
  (mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}).
  """
  devices = np.arange(num_devices)
  if text in ('', '{}'):
    return devices[None]
  if text.startswith('{'):
    return np.array([[int(n) for n in g.split(',')] for g in re.findall(r'\{([\d,]+)\}', text)])
  if text.startswith('['):
    shape, numbers = text.split('<=')
    return _reordered(numbers, devices).reshape(_ints(shape[1:-1]))
  return _groups_of_mesh(text, devices)


def _reordered(text, devices):
  """[4,2]T(1,0): reshaped, and transposed."""
  dims, order = _match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  numbers = devices.reshape(_ints(dims))
  return numbers.transpose(_ints(order)) if order else numbers


def _groups_of_mesh(text, devices):
  """Groups along axes of a mesh: mesh['x'=2,'y'=4] {'x'} are [[0, 4], [1, 5], [2, 6], [3, 7]].

  Every axis is split into [before, spanned, after]: all of y above is before; a part of an axis,
  mesh['x'=8] {'x':(2)2}, is the middle of [2, 2, 2]: [[0, 2], [1, 3], [4, 6], [5, 7]].
  """
  pattern = r"mesh\[(.*?)\](?:, device_ids=\((.*)\))? \{('.*)\}"
  sizes_text, order, axes_text = _match(pattern, text)
  if order:
    devices = _reordered(order, devices).reshape(-1)
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes_text)}
  parts = {name: (size, 1, 1) for name, size in sizes.items()}
  for name, before, spanned in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes_text):
    before, spanned = int(before or 1), int(spanned or sizes[name])
    parts[name] = (before, spanned, sizes[name] // before // spanned)
  shape = [size for name in sizes for size in parts[name]]
  dims = range(len(shape))
  outside = [dim for dim in dims if dim % 3 != 1]
  numbers = devices.reshape(shape).transpose(*outside, *dims[1::3])
  return numbers.reshape(-1, math.prod(shape[1::3]))


def _match(pattern, text):
  found = re.match(pattern, text)
  if not found:
    raise ValueError(f'unknown HLO syntax: {text}')
  return found.groups()


def _ints(text):
  return [int(n) for n in text.split(',')]
