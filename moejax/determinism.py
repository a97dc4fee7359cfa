"""`train.deterministic`: what GPUs need, before the devices start, to compute the same bits.

docs/reliability.md lists the operations that are meant, with sources.
"""

import os

import jax
from jax._src import xla_bridge

_XLA = '--xla_gpu_deterministic_ops'
_NVLS = 'NCCL_NVLS_ENABLE'  # sums in the switch, in any order


def require() -> None:
  """Has GPUs compute deterministically from now on; CPUs and TPUs do.

  Raises:
    ValueError: the environment says the opposite, or the GPUs are in use already.
  """
  flags = os.environ.get('XLA_FLAGS', '').split()
  set_here = [flag.partition('=')[2].lower() for flag in flags if flag.partition('=')[0] == _XLA]
  if set_here and set_here[-1] not in ('', 'true', '1'):
    raise ValueError(f'train.deterministic: XLA_FLAGS sets {_XLA}={set_here[-1]}. Remove it.')
  if os.environ.get(_NVLS, '0') != '0':
    raise ValueError(f'train.deterministic: {_NVLS} is {os.environ[_NVLS]}. Remove it.')
  if (set_here and _NVLS in os.environ) or _is_too_late():
    return
  os.environ['XLA_FLAGS'] = ' '.join([*flags, f'{_XLA}=true'])
  os.environ[_NVLS] = '0'


def _is_too_late():
  """Whether the devices have started, which are no GPUs."""
  if not xla_bridge.backends_are_initialized():
    return False
  if jax.default_backend() == 'gpu':
    raise ValueError(
      'train.deterministic: the GPUs are in use already, so that nothing can be set. Start the '
      f"program with XLA_FLAGS='{_XLA}=true' {_NVLS}=0."
    )
  return True
