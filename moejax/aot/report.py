"""What a training step needs of a machine, as data and as text."""

import dataclasses
import math

from moejax.sharding import describe
from moejax.text import short, short_time, size


@dataclasses.dataclass(frozen=True)
class Exchange:
  """Collectives of one kind along the same mesh axes, in one step."""

  kind: str
  axes: str
  count: int
  bytes: float  # sent by one chip
  seconds: float


@dataclasses.dataclass(frozen=True)
class Report:
  """What a step needs; bytes and FLOPs are per chip."""

  topology: str
  chips: int  # devices of JAX: half a chip each on tpu7x
  mesh: dict[str, int]  # axes larger than 1
  remat: str
  accumulation: int
  params: int
  active_params: int
  memory: dict[str, float]  # in a training step: kind -> bytes
  evaluation: float  # bytes in an evaluation step, with the idle optimizer state
  sampling: float  # the same while text is sampled at the end of the run; 0: none is
  capacity: float  # bytes
  fits: bool
  needed: str  # the compiler's message, if it does not fit
  better_mesh: str  # flags of a mesh that takes less memory, if it does not fit
  better_state: float  # bytes of parameters and optimizer on it
  tokens: int  # per step, on all chips
  model_flops: float
  flops: float  # executed, recomputation included
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
    """Model FLOPs over peak FLOPs during a step."""
    if not self.seconds['compute']:
      return 0.0
    useful = self.model_flops / self.flops
    return useful * self.seconds['compute'] / self.step_seconds

  def describe(self):
    """The report as text."""
    rows = [
      ('topology', f'{self.topology}, {self.chips} devices'),
      ('mesh', describe(self.mesh)),
      ('remat', f'{self.remat}, accumulation {self.accumulation}'),
      ('parameters', f'{short(self.params)}, {short(self.active_params)} active'),
      ('memory per chip', f'{size(self.capacity)}'),
      *((f'  {kind}', size(number)) for kind, number in self.memory.items()),
    ]
    if self.evaluation:
      rows.append(('  evaluation', f'{size(self.evaluation)}, separately'))
    if self.sampling:
      rows.append(('  sampling', f'{size(self.sampling)}, separately'))
    if self.needed:
      rows.append(('', self.needed))
    if self.flops:
      ratio = f'{self.flops / self.model_flops:.2f}x the model'
      rows += [
        ('step, per chip', f'{short(self.tokens / self.chips)} tokens'),
        (
          '  matmuls',
          f'{short_time(self.seconds["compute"])}: {self.flops:.3g} FLOPs, {ratio}',
        ),
        ('  memory', f'{short_time(self.seconds["memory"])}: {size(self.memory_traffic)}'),
        ('  interconnect', short_time(self.seconds['interconnect'])),
        *(
          (
            f'    {exchange.kind}',
            f'{short_time(exchange.seconds)}: {exchange.count} along {exchange.axes}, '
            f'{size(exchange.bytes)}',
          )
          for exchange in self.exchanges
        ),
        (
          'estimate',
          f'{short_time(self.step_seconds)}, bound by {self.bound}, if all three overlap; '
          f'{short_time(sum(self.seconds.values()))} if none do',
        ),
        (
          '',
          f'MFU at most {100 * self.mfu:.0f}%, '
          f'{short(self.tokens / self.step_seconds)} tokens per second',
        ),
      ]
    rows += [
      ('compiled in', f'{self.compile_seconds:.0f} s'),
      ('fits', 'yes' if self.fits else 'NO'),
    ]
    return '\n'.join(f'{name:20} {text}'.rstrip() for name, text in rows)

  def advice(self, config):
    """Changes that make a step fit, the most memory for the least time first."""
    memory = self.memory
    others_fit = not self.needed and max(self.evaluation, sum(memory.values())) <= self.capacity
    if others_fit or self.needed.startswith('sampling:'):
      yield 'train.sample_length=0: only the sample at the end of the run does not fit.'
      return
    state = memory['parameters'] + memory['optimizer']
    if self.better_mesh:
      yield (
        f'{self.better_mesh} (now {describe(self.mesh)}): parameters and optimizer take '
        f'{size(self.better_state)} on each chip, now {size(state)}.'
      )
    if config.model.remat != 'full':
      yield (
        f'model.remat=full (now {config.model.remat}): saves about '
        f'{size(memory["saved activations"])} of activations for about a third more FLOPs.'
      )
    shards = math.prod(n for axis, n in self.mesh.items() if axis != 'tensor')
    microbatch = config.data.batch_size // config.optimizer.accumulation
    if microbatch >= 2 * shards:
      yield (
        f'optimizer.accumulation={2 * config.optimizer.accumulation} (now '
        f'{config.optimizer.accumulation}): halves activations and temporaries.'
      )
    if config.model.loss_chunk <= 0:
      yield f'model.loss_chunk={config.data.sequence_length // 8}: 1/8 of the logits at a time.'
    yield 'more chips, or chips with more memory; --search tries meshes, remat and accumulation.'
