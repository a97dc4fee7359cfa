"""The table of chips: names as devices, users and topologies give them."""

import pytest

from moejax import hardware
from moejax.aot import topologies


@pytest.mark.parametrize(
  ('kind', 'name'),
  [
    ('TPU v5 lite', 'v5e'),
    ('TPU v5', 'v5p'),
    ('TPU v6 lite', 'v6e'),
    ('h100', 'H100'),
    ('NVIDIA H100 80GB HBM3', 'H100'),
    ('NVIDIA H100 PCIe', 'H100 PCIe'),
  ],
)
def test_one_chip_has_several_names(kind, name):
  assert hardware.find(kind) is hardware.CHIPS[name]


@pytest.mark.parametrize('kind', ['cpu', '', 'v99', 'L40S', 'NVIDIA A100-SXM4-40GB MIG 1g.5gb'])
def test_what_is_not_known(kind):
  assert hardware.find(kind) is None


def test_chips_of_topologies_have_all_their_numbers():
  for name in ('v4-8', 'v5e-1', 'v5p-8', 'v6e-1', 'a100x1', 'h100x1', 'h200x1'):
    chip = topologies.parse(name).chip
    assert min(chip.flops, chip.memory, chip.memory_bandwidth, chip.link, chip.network) > 0
