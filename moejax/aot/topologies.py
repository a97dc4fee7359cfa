"""TPU slices and GPU nodes, as targets of ahead-of-time compilation.

The specifications of their chips are in moejax/hardware.py.
"""

import dataclasses
import importlib.util
import math
import os

import numpy as np

from moejax import hardware
from moejax.text import did_you_mean

_SQUARES = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = (
  *('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8'),
  *('8x8x16', '8x16x16', '16x16x16'),
)
_SHAPES = {'v4': _CUBES, 'v5e': _SQUARES, 'v5p': _CUBES, 'v6e': _SQUARES, 'tpu7x': _CUBES}
# JAX devices of a chip, and the bandwidth between them over that of a link of the torus
# (docs.cloud.google.com/tpu/docs/tpu7x).
_HALVES, _BETWEEN_HALVES = {'tpu7x': 2}, 6
# Known to the launcher only: their devices are cores, and libtpu does not compile for them.
_OLD = {'v2': (8, 32, 128, 256, 512), 'v3': (8, 32, 64, 128, 256, 512, 1024, 2048)}
# Names that Google Cloud gives to slices, and the images of their hosts.
_CLOUD_NAMES = {'v5e': 'v5litepod'}
_IMAGES = {
  'v5e': 'v2-alpha-tpuv5-lite',
  'v5p': 'v2-alpha-tpuv5',
  'v6e': 'v2-alpha-tpuv6e',
}
_OLD_IMAGE = 'tpu-ubuntu2204-base'
_GPUS = ('a100', 'h100', 'h200')
_NODE = 8  # GPUs
_GPU_COUNTS = (1, 2, 4, *(_NODE * 2**i for i in range(9)))
KINDS = (*_SHAPES, *_GPUS)  # that moejax.aot compiles for


@dataclasses.dataclass(frozen=True)
class Topology:
  """Equal TPU slices, or GPUs in nodes of 8."""

  kind: str
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def chip(self):
    chip = hardware.find(self.kind)
    assert chip
    return chip

  @property
  def platform(self):
    return 'gpu' if self.kind in _GPUS else 'tpu'

  @property
  def detour(self):
    """Time of an all-to-all of all chips over that of one link with the same bytes."""
    if self.platform == 'gpu':
      nodes = -(-self.num_chips // _NODE)
      return 1 + (nodes - 1) / nodes * self.chip.link / self.chip.network
    across = (n / (2 if ring else 1) for n, ring in zip(self.shape, self.wraps(), strict=True))
    return max(across) / 4

  @property
  def accelerator_type(self):
    """Google Cloud's name of a slice; `parse` takes it too."""
    return (
      f'{_CLOUD_NAMES.get(self.kind, self.kind)}-{_per_chip(self.kind) * math.prod(self.shape)}'
    )

  @property
  def cloud_name(self):
    """The type of a slice on Google Cloud; of GPUs, their name here."""
    return str(self) if self.platform == 'gpu' else self.accelerator_type

  @property
  def cloud_names(self):
    """`cloud_name`, and of TPUs the software version of their hosts.

    Raises:
      ValueError: Google Cloud has no virtual machines with these TPUs.
    """
    if self.kind == 'tpu7x':
      raise ValueError(f'--topology={self}: these TPUs are on GKE only: docs/launch.md.')
    image = () if self.platform == 'gpu' else (_IMAGES.get(self.kind, _OLD_IMAGE),)
    return self.cloud_name, *image

  @property
  def num_chips(self):
    return self.slices * math.prod(self.shape)

  @property
  def num_devices(self):
    """JAX's devices: chips, or their halves."""
    return self.num_chips * _HALVES.get(self.kind, 1)

  def __str__(self):
    if self.platform == 'gpu':
      return f'{self.kind}x{self.num_chips}'
    times = f'{self.slices} slices of ' if self.slices > 1 else ''
    if self.kind in _OLD:
      return times + self.accelerator_type
    return f'{times}{self.kind}:{"x".join(map(str, self.shape))}'

  def wraps(self):
    """Whether each dimension has wraparound links.

    On v5e and v6e a full side of the pod has them; v4, v5p and 7x consist of cubes of 4 x 4 x 4
    chips, whose outer faces are joined by optical switches.
    """
    if self.kind in ('v5e', 'v6e'):
      return tuple(n == 16 for n in self.shape)
    return (all(n % 4 == 0 for n in self.shape),) * len(self.shape)


def parse(name, slices=1):
  """The Topology of a name: the only reader of such names, for every program and the launcher.

  Args:
    name: such as v5e:4x4 or, as Google Cloud counts, v5litepod-16 or v5e-16 (chips), v5p-128 and
      v4-512 (cores), tpu7x-8 (half chips); h100x8 (GPUs). Upper or lower case.
    slices: TPU slices, connected by the data-center network.

  Raises:
    ValueError: the name is unknown.
  """
  if slices < 1:
    raise ValueError(f'--slices must be at least 1, got {slices}.')
  known = _names()
  if name.lower() not in known:
    raise ValueError(_unknown(name, known))
  topology = dataclasses.replace(known[name.lower()], slices=slices)
  if topology.platform == 'gpu' and slices > 1:
    raise ValueError(f'--slices={slices}: only TPUs have slices; for more GPUs set --topology.')
  return topology


def of_kind(kind):
  """All topologies of one of KINDS, the smallest first."""
  return dict.fromkeys(topology for topology in _names().values() if topology.kind == kind)


def _names():
  names = {}
  for kind, shapes in _SHAPES.items():
    for text in shapes:
      topology = Topology(kind, tuple(map(int, text.split('x'))))
      count = _per_chip(kind) * topology.num_chips
      names[f'{kind}:{text}'] = names[f'{kind}-{count}'] = names[topology.accelerator_type] = (
        topology
      )
  for kind, counts in _OLD.items():
    names |= {f'{kind}-{n}': Topology(kind, (n,)) for n in counts}
  for kind in _GPUS:
    names |= {f'{kind}x{n}': Topology(kind, (n,)) for n in _GPU_COUNTS}
  return names


def _per_chip(kind):
  """What the number in the name of a slice counts of a chip: itself, or its two cores."""
  return 2 if kind in ('v4', 'v5p', 'tpu7x') else 1


def _unknown(name, known):
  """One line: the closest name, and all names of its kind, or all kinds."""
  hint = did_you_mean(name.lower(), known, cutoff=0.6)
  kind = next((kind for start, kind in _kinds().items() if name.lower().startswith(start)), None)
  if kind:
    sizes = dict.fromkeys(
      topology.accelerator_type if topology.platform == 'tpu' else str(topology)
      for topology in known.values()
      if topology.kind == kind
    )
    shape = f', or by shape, such as {kind}:{_SHAPES[kind][2]}' if kind in _SHAPES else ''
    return f'--topology={name}: there is no such {kind}{hint} There are {", ".join(sizes)}{shape}.'
  return (
    f'--topology={name}: unknown{hint} Expected a size of {", ".join((*_SHAPES, *_OLD, *_GPUS))}, '
    'such as v5e:4x4, v5litepod-16, v5p-128 or h100x8.'
  )


def _kinds():
  """Kinds by the beginnings of their names."""
  kinds = (*_SHAPES, *_OLD, *_GPUS)
  return {name: kind for kind, name in _CLOUD_NAMES.items()} | dict(zip(kinds, kinds, strict=True))


# Devices.

# XLA's target description of a GPU, without the fields that our programs do not depend on.
_GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {optin} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
  l2_cache_size: {cache} memory_bandwidth: {bandwidth} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: {cuda} }}
device_description_str: "NVIDIA {name}"
"""
_HOPPER = dict(shared=233472, optin=232448, cores=132, units=128, clock=1.98, major=9)
_GPU_SIZES = {
  'a100': dict(
    shared=167936, optin=166912, cores=108, units=64, clock=1.41, major=8, cache=41943040
  ),
  'h100': _HOPPER | {'cache': 52428800},
  'h200': _HOPPER | {'cache': 62914560},
}


def devices(topology):
  """Abstract devices of a topology, to compile for.

  Raises:
    ValueError: their compiler is not installed.
  """
  return _tpus(topology) if topology.platform == 'tpu' else _gpus(topology)


def can_compile(topology):
  """Whether the compiler for these TPUs is installed; for GPUs False: theirs needs 4 GB."""
  return topology.platform == 'tpu' and importlib.util.find_spec('libtpu') is not None


def _tpus(topology):
  if topology.kind in _OLD:
    raise ValueError(
      f'--topology={topology}: libtpu compiles ahead of time for {", ".join(_SHAPES)} only.'
    )
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(
      "--topology: compiling for a TPU needs libtpu: pip install 'moejax[tpu-aot]' "
      '(Linux, 700 MB). No TPU is needed.'
    )
  # What libtpu would ask a TPU machine for; it opens no device, so it needs no lock.
  os.environ |= {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_LOG_DIR': 'disabled',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }
  from jax.experimental import topologies

  options = {}
  if topology.kind == 'v4':
    options['chip_config_name'] = 'megacore'  # one device per chip, as on later TPUs
  if math.prod(topology.shape) == 1:
    options['chips_per_host_bounds'] = [1, 1, 1]
  if topology.slices > 1:
    options['num_slices'] = topology.slices
  name = f'{topology.kind}:{"x".join(map(str, topology.shape))}'
  return topologies.get_topology_desc(name, 'tpu', **options).devices


def _gpus(topology):
  plugin = next((v for v in (13, 12) if importlib.util.find_spec(f'jax_cuda{v}_plugin')), None)
  if plugin is None:
    raise ValueError(
      "--topology: compiling for a GPU needs JAX's CUDA packages: pip install 'moejax[cuda]' "
      '(Linux, 4 GB). No GPU is needed.'
    )
  os.environ['CUDA_VISIBLE_DEVICES'] = '-1'
  from jax.experimental import topologies

  chip = topology.chip
  target = _GPU_TARGET.format(
    **_GPU_SIZES[topology.kind],
    cuda=plugin,
    name=topology.kind.upper(),
    bandwidth=int(chip.memory_bandwidth),
    memory=int(chip.memory),
  )
  nodes = -(-topology.num_chips // _NODE)
  return topologies.get_topology_desc(
    platform='cuda', target_config=target, topology=f'1x{nodes}x{topology.num_chips // nodes}'
  ).devices


# Interconnect.


def collective_seconds(topology, kind, num_bytes, group):
  """Time of a collective at full bandwidth.

  Rings run in both directions along every torus dimension that the group spans; an all-to-all is
  bound by the links across the middle of the longest one. Between slices or nodes each chip sends
  its share of what the other slices lack.

  Args:
    topology: a Topology.
    kind: its name in HLO.
    num_bytes: the larger of a device's input and output.
    group: the devices of one group.
  """
  places = np.array([_place(topology, device) for device in group])
  outer = len(np.unique(places[:, 0]))  # slices or nodes
  inner = len(group) // outer
  passes = 2 if kind == 'all-reduce' else 1
  if 'all-to-all' in kind:
    far = num_bytes * (outer - 1) / outer / topology.chip.network
  else:
    far = passes * num_bytes / inner * (outer - 1) / outer / topology.chip.network
  return far + passes * _inside(topology, kind, num_bytes, places[places[:, 0] == places[0, 0], 1:])


def _place(topology, device):
  if topology.platform != 'tpu':
    return device.id // _NODE, device.id % _NODE
  coords = device.coords[: len(topology.shape)]
  return getattr(device, 'slice_index', 0), *coords


def _inside(topology, kind, num_bytes, places):
  """Seconds inside a slice or node."""
  size = len(places)
  share = num_bytes * (size - 1) / size
  if topology.platform != 'tpu' or size == 1:
    return share / topology.chip.link
  links, middle, detour = 0, 0.0, 1
  for column, side, wraps in zip(places.T, topology.shape, topology.wraps(), strict=True):
    extent = len(np.unique(column))
    if extent == 1:
      continue
    apart = math.ceil((np.ptp(column) + 1) / extent)  # chips between are in other groups
    ways = 2 if wraps and extent * apart == side else 1
    links += ways
    middle = max(middle, extent * apart / ways)
    detour = max(detour, apart)
  if not links and (halves := _HALVES.get(topology.kind)):  # of one chip
    return share / (_BETWEEN_HALVES * halves * topology.chip.link)
  if 'all-to-all' in kind:
    return num_bytes * middle / 4 / topology.chip.link
  if kind == 'collective-permute':
    return num_bytes * detour / topology.chip.link
  return share * detour / links / topology.chip.link
