"""Specifications of accelerators, for MFU, training plans and ahead-of-time estimates.

Sources: Google Cloud's pages on each TPU version (docs.cloud.google.com/tpu/docs/v4 and so on) and
NVIDIA's data sheets. A TPU's link is the stated bidirectional bandwidth per chip over its ports and
directions (v4: from the bisection bandwidth of its pod); the network between slices is the stated
data-center bandwidth per chip (v4 states none: v5e's). The two devices of a 7x chip are taken to
share its links and its network. NVLink bandwidths of NVIDIA count both directions.
"""

import dataclasses
import re

_GIB, _GB, _TERA = 2**30, 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
  """One JAX device: half a chip of TPU v2, v3 and 7x.

  Memory (bytes) and bandwidths (bytes per second) are 0 for chips without ahead-of-time estimates.
  """

  flops: float  # per second, of 16-bit matmuls without sparsity
  memory: float = 0
  memory_bandwidth: float = 0
  link: float = 0  # one direction, of one torus link or of all NVLinks
  network: float = 0  # between slices or nodes


_V5E = Chip(197 * _TERA, 16 * _GIB, 800 * _GIB, 50 * _GB, 3.125 * _GB)
_V5P = Chip(459 * _TERA, 95 * _GIB, 2765 * _GB, 100 * _GB, 6.25 * _GB)
_V7X = Chip(2307 / 2 * _TERA, 96 * _GIB, 7380 / 2 * _GB, 100 / 2 * _GB, 12.5 / 2 * _GB)
_V6E = Chip(918 * _TERA, 32 * _GIB, 1600 * _GB, 100 * _GB, 12.5 * _GB)

# By a word in `jax.Device.device_kind`, the most specific first. V100 and T4 have float16 only.
CHIPS = {
  'v2': Chip(45 / 2 * _TERA),
  'v3': Chip(123 / 2 * _TERA),
  'v4': Chip(275 * _TERA, 32 * _GIB, 1200 * _GB, 50 * _GB, 3.125 * _GB),
  'v5 lite': _V5E,
  'v5e': _V5E,
  'v5p': _V5P,
  'v5': _V5P,
  'v6 lite': _V6E,
  'v6e': _V6E,
  'TPU7x': _V7X,
  'V100-PCIE': Chip(112 * _TERA),
  'V100': Chip(125 * _TERA),
  'T4': Chip(65 * _TERA),
  'A100': Chip(312 * _TERA, 80 * _GIB, 2039 * _GB, 300 * _GB, 25 * _GB),
  'L4': Chip(121 * _TERA),
  'H100 PCIe': Chip(756 * _TERA),
  'H100 NVL': Chip(835 * _TERA),
  'H100': Chip(989 * _TERA, 80 * _GIB, 3350 * _GB, 450 * _GB, 50 * _GB),
  'H200 NVL': Chip(835 * _TERA),
  'H200': Chip(989 * _TERA, 141 * _GB, 4800 * _GB, 450 * _GB, 50 * _GB),
  'B200': Chip(2250 * _TERA),
}


def find(kind):
  """The Chip of a kind such as 'TPU v5 lite', 'v5e' or 'NVIDIA H100 80GB HBM3'; None if unknown.

  Slices of a partitioned GPU (MIG) are unknown.
  """
  for name, chip in CHIPS.items():
    if re.search(rf'\b{name}\b', kind, re.IGNORECASE) and 'MIG' not in kind:
      return chip
  return None
