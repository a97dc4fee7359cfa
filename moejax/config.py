"""From a config file's sections to validated dataclasses."""

import dataclasses
import sys
from typing import Any

import jax
import ml_collections

from moejax import fields, flops, optimizer, profiling, schedule
from moejax.data import DataConfig, Tokenizer, make_tokenizer
from moejax.fields import default
from moejax.layers import common, moe
from moejax.layers.mot import MoTConfig
from moejax.model_config import SUBLAYERS, ModelConfig
from moejax.optimizer import OptimizerConfig
from moejax.sharding import MeshConfig, batch_shards, process_part
from moejax.text import did_you_mean, short
from moejax.trackers import TRACKERS

_MOST_PARAMS = 10**14  # more is a mistake, and fails in JAX's own arithmetic


@dataclasses.dataclass(frozen=True)
class TrainConfig(fields.Section):
  """How long a run trains, and how often it logs, evaluates and saves."""

  PATH = 'train'

  steps: int = default(5200, 'length of the run', minimum=1, maximum=10**8)
  seed: int = default(0, 'of initialisation and noise', minimum=0, maximum=fields.MAX_SEED)
  deterministic: bool = default(
    False, 'the same bits on GPUs in every run (slower): docs/reliability.md'
  )
  log_interval: int = default(10, 'steps between log lines', minimum=1)
  eval_interval: int = default(250, 'steps between evaluations', minimum=1)
  eval_batches: int = default(32, 'batches per evaluation during training', minimum=1)
  final_eval_batches: int = default(
    0, 'batches of the evaluation at the end; 0: the whole validation split', minimum=0
  )
  checkpoint_interval: int = default(250, 'steps between checkpoints', minimum=1)
  keep_checkpoints: int = default(3, 'number of latest checkpoints to keep', minimum=1)
  memory_checkpoint: int = default(
    0, 'steps between checkpoints in memory: docs/resuming.md; 0: none', minimum=0
  )
  memory_folder: str = default('/dev/shm', 'for these: a folder in the memory of every host')
  max_skipped: int = default(
    10, 'updates in a row that are not finite and skipped, at which the run stops', minimum=1
  )
  spike_zscore: float = default(
    6.0, 'standard deviations above the last 100 losses at which a loss is a spike', above=0
  )
  on_spike: str = default(
    'log',
    'rewind: back to a checkpoint before it, past the batches in between',
    choices=('log', 'rewind'),
  )
  trackers: tuple = default(
    ('tensorboard',), 'where metrics go beside metrics.jsonl', choices=lambda: TRACKERS
  )
  profile_steps: str = default('', "steps to profile: '10:13' is 10, 11 and 12; '': none")
  sample_prompt: str = default('def ', 'prompt of the sample at the end of a run')
  sample_length: int = default(120, 'tokens of that sample; 0: no sample', minimum=0)

  def conflicts(self):
    if self.sample_length > 0 and not self.sample_prompt:
      yield 'train.sample_prompt must not be empty; for no sample, set train.sample_length = 0.'
    try:
      profiled = profiling.parse(self.profile_steps)
    except ValueError as error:
      yield f'train.profile_steps {error}; got {self.profile_steps!r}.'
    else:
      if profiled and profiled[-1] > self.steps:
        yield (
          f'train.profile_steps = {self.profile_steps!r} goes beyond the last step, train.steps = '
          f'{self.steps}.'
        )


# The sections of a config, by name.
SECTIONS = {
  'model': ModelConfig,
  'data': DataConfig,
  'optimizer': OptimizerConfig,
  'mesh': MeshConfig,
  'train': TrainConfig,
}


def baseline() -> Any:
  """All fields with their defaults: a small dense model on the embedded corpus, locked."""
  sections = {name: fields.baseline(section) for name, section in SECTIONS.items()}
  return ml_collections.ConfigDict(sections).lock()


def flat_fields():
  """All config fields: 'section.field' -> dataclasses.Field."""
  return {name: f for section in SECTIONS.values() for name, f in fields.flat(section).items()}


def registered():
  """What the user's own code may add to or replace: the choices that exist, by name."""
  tables = (SUBLAYERS, moe.ROUTERS, optimizer.OPTIMIZERS, common.ACTIVATIONS)
  tables += (common.NORMS, common.INITIALIZERS, TRACKERS, schedule.SCHEDULES, schedule.DECAYS)
  seqio: Any = sys.modules.get('seqio')  # imported by few programs
  tasks = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()} if seqio else set()
  return [dict(table) for table in tables] + [tasks]


def reference():
  """All fields in Markdown, for `--help` and the end of docs/configuration.md."""
  lines, path = [], None
  for name, f in flat_fields().items():
    if path != (path := name.rpartition('.')[0]):
      lines.append(f'\n### {path}\n')
    values = fields.allowed(f)
    text = f.metadata['meaning'] + (f' ({values})' if values else '')
    lines.append(f'- `{f.name} = {f.default!r}`: {text}')
  return '\n'.join(lines).lstrip() + '\n'


def as_yaml(config):
  """A ConfigDict as YAML, with a comment for every field; `yaml.safe_load` reads it."""
  lines = []
  for name, section in SECTIONS.items():
    lines += [f'{name}:', *fields.as_yaml(section, config[name], '  ')]
  return '\n'.join(lines)


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """The validated configuration of a run."""

  model: ModelConfig
  data: DataConfig
  optimizer: OptimizerConfig
  mesh: MeshConfig
  train: TrainConfig
  tokenizer: Tokenizer


def resolve(config):
  """Turns a ConfigDict into `RunConfig`.

  Raises:
    ValueError: one message with every problem found, each naming its field.
  """
  problems = []

  def attempt(make):
    try:
      return make()
    except ValueError as error:
      problems.append(str(error))

  if not isinstance(config, ml_collections.ConfigDict) or {*config} != {*SECTIONS}:
    raise ValueError(
      f'the config must have the sections {", ".join(SECTIONS)}: start from '
      'moejax.config.baseline() and change what differs.'
    )
  data_config = attempt(lambda: fields.make(DataConfig, config.data))
  tokenizer = data_config and attempt(lambda: make_tokenizer(data_config))
  model = attempt(lambda: _model_config(config.model, data_config, tokenizer))
  optimizer = attempt(lambda: fields.make(OptimizerConfig, config.optimizer))
  mesh = attempt(lambda: fields.make(MeshConfig, config.mesh))
  train = attempt(lambda: fields.make(TrainConfig, config.train))
  if data_config and model and optimizer:
    problems.extend(batch_problems(data_config, model, optimizer))
  if problems:
    raise ValueError('\n'.join(problems))
  assert data_config and tokenizer and model and optimizer and mesh and train
  return RunConfig(model, data_config, optimizer, mesh, train, tokenizer)


def _model_config(section, data_config, tokenizer):
  # If length or tokenizer are invalid, only their own errors are reported, not the follow-ups.
  length = data_config.sequence_length if data_config else sys.maxsize
  needed = tokenizer.vocab_size if tokenizer else 1
  model = fields.make(ModelConfig, {**section, 'max_length': length})
  if tokenizer and 0 < model.vocab_size < needed:
    raise ValueError(
      f'model.vocab_size = {model.vocab_size} is smaller than the {needed} ids of data.tokenizer = '
      f'{data_config.tokenizer!r}. Raise it, or set 0 for as many as needed.'
    )
  model = dataclasses.replace(model, vocab_size=model.vocab_size or needed)
  if (total := flops.param_counts(model)['total']) > _MOST_PARAMS:
    raise ValueError(
      f'model: it would have {short(total)} parameters, more than {short(_MOST_PARAMS)}. Lower '
      'model.d_model, model.d_ff, model.vocab_size, the number of experts or model.blocks.'
    )
  return model


def batch_problems(data_config, model, optimizer):
  """What a batch, its microbatches and the groups of a model have against each other."""
  batch, microbatches = data_config.batch_size, optimizer.accumulation
  if batch % microbatches:
    yield f'optimizer.accumulation = {microbatches} must divide data.batch_size = {batch}.'
    return
  for field, size in model.groups.items():
    if batch // microbatches % size:
      yield (
        f'{field} = {size} must divide the {batch // microbatches} sequences of a microbatch '
        f'(data.batch_size = {batch} / optimizer.accumulation = {microbatches}). Change one of the '
        'three.'
      )


def check_batch(run_config, mesh):
  """Raises ValueError if the batch cannot be split over the devices of the mesh."""
  if problems := list(_batch_mesh_problems(run_config, mesh)):
    raise ValueError('\n'.join(problems))
  num_parts = process_part(mesh, run_config.data.batch_size)['num_parts']
  if run_config.data.source == 'seqio' and num_parts < jax.process_count():
    raise ValueError(
      f'data.source = seqio: every process reads its own part of the batch, but mesh.tensor leaves '
      f'{num_parts} parts for {jax.process_count()} processes. Lower mesh.tensor to the devices of '
      'one process, or write the task to files (python -m moejax.tokenize).'
    )


def check_mesh(run_config, mesh):
  """Raises ValueError if the mesh would leave devices idle or duplicate their work."""
  check_batch(run_config, mesh)
  if problems := list(mesh_problems(run_config, mesh)):
    raise ValueError('\n'.join(problems))


def mesh_problems(run_config, mesh):
  """What a config and a mesh, or an AbstractMesh, have against each other, a message each."""
  if problems := list(_batch_mesh_problems(run_config, mesh)):
    return problems
  return list(_division_problems(run_config, mesh))


def _microbatch_size(run_config):
  """Sequences per microbatch."""
  return run_config.data.batch_size // run_config.optimizer.accumulation


def _batch_mesh_problems(run_config, mesh):
  sequences, shards = _microbatch_size(run_config), batch_shards(mesh)
  if sequences % shards:
    yield (
      f'data.batch_size / optimizer.accumulation = {sequences} sequences cannot be split over the '
      f'{shards} devices of mesh axes data, fsdp and expert {dict(mesh.shape)}. Make the batch a '
      'multiple, lower optimizer.accumulation, or give mesh.tensor more devices.'
    )


def _division_problems(run_config, mesh):
  sequences = _microbatch_size(run_config) // batch_shards(mesh)
  for field, size in run_config.model.whole_groups.items():
    if sequences % size:
      yield (
        f'{field} = {size} must divide the {sequences} sequences of a device, because it routes '
        'groups of whole sequences (data.batch_size / optimizer.accumulation, over mesh axes data, '
        'fsdp and expert). Lower it or optimizer.accumulation, raise data.batch_size, or give '
        'mesh.tensor more devices.'
      )
  experts = {f'experts of a layer ({field})': n for field, n in run_config.model.experts.items()}
  for axis, sizes in (('expert', experts), ('tensor', run_config.model.widths)):
    for what, size in sizes.items():
      if size % (devices := mesh.shape[axis]):
        yield f'mesh.{axis} = {devices} must divide the {size} {what}. Change one of the two.'


def override(config, texts):
  """`set_fields` for the config of a run; MoT experts keep their width when groups change."""
  mot = MoTConfig(**config.model.mot)
  config.model.mot.expert_width = mot.width(config.model.d_ff)
  set_fields(config, texts)


def set_fields(config, texts):
  """Sets fields from the texts of the command line: {'model.mot.group_size': '4'}.

  Raises:
    ValueError: a field is unknown or its value is invalid.
  """
  known = flat_fields()
  for name, text in texts.items():
    if name not in known:
      hint = did_you_mean(name, known, cutoff=0.8)
      raise ValueError(f'--config.{name}: the config has no such field{hint}')
    value = fields.read(f'--config.{name}', known[name], text)
    config.update_from_flattened_dict({name: value})
