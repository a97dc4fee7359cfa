"""What a training step needs of a machine, and how it is told."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Exchange:
  """Collectives of one kind along the same mesh axes, in one step."""

  kind: str
  axes: str
  count: int
  bytes: float  # that a chip sends
  seconds: float


@dataclasses.dataclass(frozen=True)
class Report:
  """What a step needs; bytes and FLOPs are of one chip."""

  topology: str
  chips: int
  mesh: dict[str, int]  # axes of several devices
  remat: str
  accumulation: int
  params: int
  active_params: int
  memory: dict[str, float]  # kind -> bytes
  capacity: float  # bytes
  fits: bool
  needed: str  # what the compiler said, where it does not fit
  tokens: int  # of a step, on all chips
  model_flops: float
  flops: float  # done, with what is computed again
  memory_traffic: float
  exchanges: list[Exchange]
  seconds: dict[str, float]  # compute, memory, interconnect
  compile_seconds: float

  @property
  def step_seconds(self):
    return max(self.seconds.values())

  @property
  def bound(self):
    return max(self.seconds, key=self.seconds.__getitem__)

  @property
  def mfu(self):
    """Model FLOPs over what the chip could do in the time of the step."""
    if not self.seconds['compute']:
      return 0.0
    done = self.model_flops / self.flops
    return done * self.seconds['compute'] / self.step_seconds

  def describe(self):
    """The report for people."""
    rows = [
      ('topology', f'{self.topology}, {self.chips} chips'),
      ('mesh', ', '.join(f'{axis} {n}' for axis, n in self.mesh.items()) or 'one device'),
      ('remat', f'{self.remat}, accumulation {self.accumulation}'),
      ('parameters', f'{_short(self.params)}, {_short(self.active_params)} active'),
      ('memory of a chip', f'{_gib(self.capacity)}'),
      *((f'  {kind}', _gib(number)) for kind, number in self.memory.items()),
    ]
    if self.needed:
      rows.append(('', self.needed))
    if self.flops:
      redone = f'{self.flops / self.model_flops:.2f} of the model'
      rows += [
        ('a step of a chip', f'{_short(self.tokens / self.chips)} tokens'),
        ('  products', f'{_time(self.seconds["compute"])}: {self.flops:.3g} FLOPs, {redone}'),
        ('  memory', f'{_time(self.seconds["memory"])}: {_gib(self.memory_traffic)}'),
        ('  interconnect', _time(self.seconds['interconnect'])),
        *(
          (
            f'    {exchange.kind}',
            f'{_time(exchange.seconds)}: {exchange.count} along {exchange.axes}, '
            f'{_gib(exchange.bytes)}',
          )
          for exchange in self.exchanges
        ),
        (
          'estimate',
          f'{_time(self.step_seconds)}, bound by {self.bound}, if all three go on at once; '
          f'{_time(sum(self.seconds.values()))} one after the other',
        ),
        (
          '',
          f'MFU at most {100 * self.mfu:.0f}%, '
          f'{_short(self.tokens / self.step_seconds)} tokens per second',
        ),
      ]
    rows += [
      ('compiled in', f'{self.compile_seconds:.0f} s'),
      ('fits', 'yes' if self.fits else 'NO'),
    ]
    return '\n'.join(f'{name:20} {text}'.rstrip() for name, text in rows)

  def advice(self, config):
    """What to change so that a step fits, what saves most for the least time first."""
    memory = self.memory
    state = memory['parameters'] + memory['optimizer']
    spread = self.mesh.get('fsdp', 1) * self.mesh.get('expert', 1) * self.mesh.get('tensor', 1)
    if spread < self.chips:
      yield (
        f'mesh.fsdp (now {config.mesh.fsdp}), or mesh.expert: parameters and optimizer take '
        f'{_gib(state)} on each chip, of which {_gib(state * spread / self.chips)} stay if every '
        'chip holds a part of its own (mesh.fsdp=-1 with mesh.data=1).'
      )
    if config.model.remat != 'full':
      yield (
        f'model.remat=full (now {config.model.remat}): keeps about '
        f'{_gib(memory["saved activations"])} less of activations, for about a third more FLOPs.'
      )
    shards = math.prod(n for axis, n in self.mesh.items() if axis != 'tensor')
    passes = config.data.batch_size // config.optimizer.accumulation
    if passes >= 2 * shards:
      yield (
        f'optimizer.accumulation={2 * config.optimizer.accumulation} (now '
        f'{config.optimizer.accumulation}): half of the activations and temporaries.'
      )
    if not config.model.loss_chunk:
      yield f'model.loss_chunk={config.data.sequence_length // 8}: an eighth of the logits at once.'
    yield 'more chips, or chips with more memory; --search tries meshes, remat and accumulation.'


def _gib(num_bytes):
  for unit, size in (('GiB', 2**30), ('MiB', 2**20), ('KiB', 2**10)):
    if num_bytes >= size:
      return f'{num_bytes / size:.3g} {unit}'
  return f'{num_bytes:.0f} B'


def _short(number):
  for unit, size in (('T', 1e12), ('B', 1e9), ('M', 1e6), ('k', 1e3)):
    if number >= size:
      return f'{number / size:.4g}{unit}'
  return f'{number:.4g}'


def _time(seconds):
  return f'{1e3 * seconds:.3g} ms' if seconds < 1 else f'{seconds:.3g} s'
