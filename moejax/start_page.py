"""What a run prints before it trains: devices, the model by kind of layer, data, memory."""

import datetime
import os
import sys

import jax

from moejax import estimate, flops, text

# Files that a driver makes, by the extra that lets jax use the device.
_DRIVERS = {
  'cuda': ('an NVIDIA GPU', ('/dev/nvidia0', '/dev/nvidiactl', '/dev/dxg')),
  'tpu': ('a TPU', ('/dev/accel0', '/dev/vfio/0')),
}


def page(run_config, mesh, state, loader, workdir) -> str:
  """At most twenty lines.

  Args:
    run_config: of the run.
    mesh: of its devices.
    state: shapes and dtypes of the train state, a dict with 'params'.
    loader: of the training split.
    workdir: the run's folder.
  """
  lines = [('device', _devices())]
  if hint := hidden_accelerator():
    lines.append(('', hint))
  if mesh.size > 1:
    axes = ', '.join(f'{name} {size}' for name, size in mesh.shape.items() if size > 1)
    lines.append(('mesh', axes))
  lines += zip(['model', *[''] * 99], _table(run_config), strict=False)
  lines += [
    ('steps', _steps(run_config, loader)),
    *zip(['corpus', ''], _corpus(run_config.data, loader), strict=True),
    ('state', _state(state, mesh)),
    ('folder', f'{workdir}'),
  ]
  return '\n'.join(f'{name:8}{what}' for name, what in lines)


def derived(run_config):
  """Yields lines: what follows from a config on any machine."""
  model, data, steps = run_config.model, run_config.data, run_config.train.steps
  yield f'vocabulary: {model.vocab_size:,} ids'
  kinds = '+'.join(model.kinds)
  if 'mot' in kinds:
    width = model.mot.width(model.d_ff)
    yield f'mot: {model.mot.num_experts} experts of width {width} per {model.mot.group_size} tokens'
  if 'moe' in kinds:
    width = model.d_ff // model.moe.granularity
    yield f'moe: {model.moe.num_experts} experts of width {width}, {model.moe.top_k} per token'
  yield from _table(run_config)
  training = flops.training_flops_per_token(model, data.sequence_length)['total']
  total = training * steps * data.tokens_per_step
  yield f'steps: {_steps(run_config, None)}, {total:.3g} training FLOPs'


def time_left(seconds: float) -> str:
  """How long the rest of a run takes, and until when."""
  end = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
  form = '%H:%M' if seconds < 12 * 3600 else '%Y-%m-%d %H:%M'
  return f'time    about {text.duration(seconds)}, until {end:{form}}'


def _devices():
  first, number = jax.devices()[0], jax.device_count()
  name = f'CPU, {os.cpu_count()} cores' if first.platform == 'cpu' else first.device_kind
  hosts = f' on {jax.process_count()} hosts' if jax.process_count() > 1 else ''
  return f'{number} x {name}{hosts}, jax {jax.__version__}'


def hidden_accelerator() -> str:
  """What to install if jax runs on the CPU of a machine that has more; '' if there is nothing."""
  if jax.default_backend() != 'cpu' or os.environ.get('JAX_PLATFORMS'):
    return ''
  for extra, (what, paths) in _DRIVERS.items():
    if any(map(os.path.exists, paths)):
      return (
        f"this machine has {what}, which jax does not use: pip install 'moejax[{extra}]', or "
        f"'.[{extra}]' in a checkout"
      )
  return ''


def _table(run_config):
  """Lines: parameters, active parameters and forward FLOPs per token of every kind of layer."""
  rows = flops.by_layer(run_config.model, run_config.data.sequence_length)
  names = ('params', 'active', 'flops')
  rows['all'] = {name: sum(row[name] for row in rows.values()) for name in names}
  yield f'{"":10}{"parameters":>12}{"active":>10}{"forward FLOPs per token":>25}'
  for kind, row in rows.items():
    numbers = [text.short(row[name]) if row[name] else '-' for name in names]
    if any(row.values()):
      yield '{:10}{:>12}{:>10}{:>25}'.format(kind, *numbers)


def _steps(run_config, loader):
  data, steps = run_config.data, run_config.train.steps
  tokens = data.tokens_per_step
  each = f'{steps:,} of {tokens:,} tokens ({data.batch_size} x {data.sequence_length})'
  sequences = getattr(loader, 'num_sequences', None)  # unknown of a stream
  epochs = f', {steps * data.batch_size / sequences:.2g} epochs' if sequences else ''
  return f'{each}: {text.short(steps * tokens)} tokens{epochs}'


def _corpus(data, loader):
  """Two lines: where it is, and what it is."""
  names = {
    'seqio': data.task,
    'stdlib': "source code of Python's standard library",
    'environment': f"source code of Python's standard library and the packages in {sys.prefix}",
  }
  yield names.get(data.source) or f'{data.source} {data.files or data.task}'
  sequences = getattr(loader, 'num_sequences', None)
  size = f'{text.short(sequences * data.sequence_length)} tokens, ' if sequences else ''
  yield f'{size}tokenizer {data.tokenizer}, fingerprint {loader.fingerprint}'


def _state(state, mesh):
  num_bytes = estimate.state_bytes(state, mesh)
  parts = ', '.join(f'{name} {text.size(number)}' for name, number in num_bytes.items())
  return f'{text.size(sum(num_bytes.values()))} per device: {parts}'
