"""Compiles the programs of a run ahead of time and reports what they need."""

import collections
import dataclasses
import re
import sys
import textwrap
import time

import jax
import numpy as np

from moejax import (
  buckets,
  cli,
  config as config_lib,
  data,
  decode,
  estimate,
  flops,
  generate,
  model as model_lib,
  sharding,
  step as step_lib,
)
from moejax.aot import hlo, topologies
from moejax.aot.report import Exchange, Report
from moejax.data import tokenizer
from moejax.sharding import platform

_USUALLY = 'half a minute to 5 minutes'  # on two idle cores: docs/pods.json


def compile_step(config, topology: topologies.Topology, sample=True):
  """The Report of a config on a Topology.

  Without `sample`, that of training and evaluation, which `with_sample` completes.

  Raises:
    ValueError: the config is invalid there, or its compiler is not installed.
  """
  devices = topologies.devices(topology)
  choice = choose_mesh(config_lib.resolve(without_data(config)), topology)
  run_config = choice.run_config
  mesh = sharding.make_mesh(run_config.mesh, devices)
  config_lib.check_mesh(run_config, mesh)
  platforms = _platforms(topology)
  with jax.set_mesh(mesh), platform.compiling_for(topology.platform):
    state = sharding.abstract(step_lib.fresh_state(run_config), mesh)
    microbatch = run_config.data.batch_size // run_config.optimizer.accumulation
    saved = estimate.saved_bytes(run_config, microbatch) / sharding.batch_shards(mesh)
    training = step_lib.lower_train_step(run_config, state, mesh, platforms)
    evaluations = [
      step_lib.lower_eval_step(evaluated, state['params'], mesh, platforms)
      for evaluated in _evaluated(run_config)
    ]
  started = time.monotonic()
  machine = f'{topology}, {sharding.describe(mesh.shape)}'
  with cli.waiting_for(f'compiling the training step for {machine}, {_USUALLY}', sys.stderr):
    compiled, needed = _compile(training)
  memory = _memory(state, mesh, saved, compiled)
  evaluation = 0.0
  for lowered in evaluations if compiled else ():
    with cli.waiting_for('compiling the evaluation step, half as long', sys.stderr):
      compiled_evaluation, error = _compile(lowered)
    needed = needed or error and f'evaluation: {error}'
    if compiled_evaluation:
      evaluation = max(evaluation, memory['optimizer'] + peak_bytes(compiled_evaluation))
  report = Report(
    **_sizes(run_config, mesh, topology),
    memory=memory,
    evaluation=evaluation,
    sampling=0.0,
    fits=False,
    needed=needed,
    better_mesh='',
    better_state=0.0,
    **_work(compiled, mesh, topology),
    compile_seconds=time.monotonic() - started,
  )
  return _with_sample(report, choice, topology) if sample else _judged(report, choice, topology)


def with_sample(report, config, topology):
  """A Report that `compile_step` made without a sample, with it."""
  choice = choose_mesh(config_lib.resolve(without_data(config)), topology)
  return _with_sample(report, choice, topology)


def _with_sample(report, choice, topology):
  run_config, started = choice.run_config, time.monotonic()
  if run_config.train.sample_length and report.flops:
    with cli.waiting_for('compiling the sample at the end of the run', sys.stderr):
      sampling, error = _sampling(run_config, topology)
    report = dataclasses.replace(
      report,
      sampling=report.memory['optimizer'] + sampling,
      needed=report.needed or error and f'sampling: {error}',
      compile_seconds=report.compile_seconds + time.monotonic() - started,
    )
  return _judged(report, choice, topology)


def _judged(report, choice, topology):
  """The Report, with whether everything fits, and if not, a better mesh."""
  most = max(report.evaluation, report.sampling, sum(report.memory.values()))
  fits = not report.needed and most <= topology.chip.memory
  better = None if fits else _better_mesh(choice, topology)
  return dataclasses.replace(
    report,
    fits=fits,
    better_mesh=better.flags if better else '',
    better_state=better.state_bytes if better else 0.0,
  )


def _platforms(topology):
  return ('cuda' if topology.platform == 'gpu' else topology.platform,)


def choose_mesh(run_config, topology, estimator=None):
  """The `estimate.Choice` of a RunConfig on a Topology.

  `estimator`: of the same model and batch, traced for a TPU; for several topologies in a row.

  Raises:
    ValueError: the config is invalid there.
  """
  sizes = topology.num_devices, topology.chip, topology.slices
  with platform.compiling_for('tpu'):  # cuDNN's attention, which saves less, needs a GPU to trace
    choice = estimate.choose(run_config, *sizes, estimator)
  if choice is None:
    shape = run_config.mesh.shape(topology.num_devices)
    raise ValueError('\n'.join(estimate.problems(run_config, shape, topology.slices)))
  return choice


def _better_mesh(choice, topology):
  """The Choice of another mesh that takes less memory for its state, or None."""
  free = dataclasses.replace(choice.run_config, mesh=sharding.MeshConfig())
  best = choose_mesh(free, topology)
  return best if best.state_bytes < choice.state_bytes else None


def _evaluated(run_config):
  """What is evaluated: also the dropless model, if experts drop tokens."""
  models = filter(None, (run_config.model, run_config.model.dropless()))
  return [dataclasses.replace(run_config, model=model) for model in models]


def _sampling(run_config, topology):
  """Bytes per chip while text is sampled, without the optimizer, and the compiler's error or ''.

  The prompt is counted in bytes: its tokenizer may not be here, and its length hardly matters.
  """
  model, train = run_config.model, run_config.train
  prompt = min(len(train.sample_prompt.encode()), model.max_length - 1)
  settings = generate.Sampling().settings
  mesh = sharding.make_mesh(run_config.mesh, topologies.devices(topology))
  with jax.set_mesh(mesh), platform.compiling_for(topology.platform):
    init = lambda: model_lib.init_params(model, jax.random.key(0))
    params = sharding.abstract(init, mesh)
    prepared = sharding.abstract(lambda: model_lib.prepared(model, init()), mesh)
    # The program of a position takes only what it reads; the rest is there, too.
    rest = {name: params[name] for name in prepared if name != 'embedding'}
    held = estimate.state_bytes({'params': rest}, mesh)['parameters']
    how = prompt, train.sample_length, settings
    reading, advancing = decode.trace(model, params, prepared, *how)
    lowered = reading.lower(lowering_platforms=_platforms(topology))
    reads, error = _compile(lowered)
    if not reads:
      return 0.0, error
    peak = peak_bytes(reads)
    of = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    state = jax.tree.map(of, lowered.out_info, reads.output_shardings)
    advances, error = _compile(advancing(state).lower(lowering_platforms=_platforms(topology)))
  if advances:
    peak = max(peak, held + peak_bytes(advances))
  return float(peak), error


def _memory(state, mesh, saved, compiled):
  """Bytes per chip in a training step, by kind."""
  memory = {**estimate.state_bytes(state, mesh), 'saved activations': saved}
  if compiled:
    total = memory['parameters'] + memory['optimizer']
    memory['temporaries'] = max(0.0, peak_bytes(compiled) - total - saved)
  return memory


def _sizes(run_config, mesh, topology):
  """Fields of the Report about model and machine."""
  counts = flops.param_counts(run_config.model)
  tokens = run_config.data.tokens_per_step
  per_token = flops.training_flops_per_token(run_config.model, run_config.data.sequence_length)
  return {
    'topology': str(topology),
    'chips': topology.num_devices,
    'capacity': topology.chip.memory,
    'mesh': {axis: n for axis, n in mesh.shape.items() if n > 1},
    'remat': run_config.model.remat,
    'accumulation': run_config.optimizer.accumulation,
    'params': counts['total'],
    'active_params': counts['active'],
    'tokens': tokens,
    'model_flops': per_token['model'] * tokens / topology.num_devices,
  }


def _work(compiled, mesh, topology):
  """Fields of the Report about the compiled step: work per chip and its roofline times."""
  cost = hlo.cost(compiled.as_text()) if compiled else hlo.Cost()
  exchanges = _exchanges(cost.collectives, mesh, topology)
  chip = topology.chip
  return {
    'flops': cost.flops,
    'memory_traffic': cost.memory_bytes,
    'exchanges': exchanges,
    'seconds': {
      'compute': cost.flops / chip.flops,
      'memory': cost.memory_bytes / chip.memory_bandwidth,
      'interconnect': sum(exchange.seconds for exchange in exchanges),
    },
  }


def without_data(config):
  """The same training step without the run's data files: only sizes matter."""
  config = config.copy_and_resolve_references()
  if not config.model.vocab_size:
    config.model.vocab_size = known_vocab_size(config.data.tokenizer)
  config.data.source, config.data.tokenizer = 'stdlib', 'bytes'
  config.data.files = config.data.validation_files = ''
  return config


def known_vocab_size(name: str) -> int:
  """The vocabulary size of a tokenizer whose files may be missing; none is read from a bucket.

  Raises:
    ValueError: the size is known only from a file that is missing.
  """
  in_bucket = buckets.is_bucket(name.removeprefix(tokenizer.GPT2_PREFIX))
  if not in_bucket and all(path.is_file() for path in tokenizer.tokenizer_files(name)):
    return data.make_tokenizer(data.DataConfig(tokenizer=name)).vocab_size
  if name.startswith(tokenizer.GPT2_PREFIX):
    return 50257 + tokenizer.NUM_SPECIAL  # the published vocabulary
  raise ValueError(
    f'data.tokenizer = {name!r} is not here and its vocabulary size unknown; set model.vocab_size.'
  )


def _compile(lowered):
  """The compiled program and no message, or None and the compiler's error."""
  try:
    return lowered.compile(), ''
  except jax.errors.JaxRuntimeError as error:
    text = str(error)
  for pattern in (
    r'Used ([\d.]+\w) of ([\d.]+\w)',
    r'\(([\d.]+\w)\) exceeds available.*?([\d.]+\w)\)',
  ):
    memory = re.search(pattern, text)
    if memory:
      return None, f'the compiler needs {memory[1]}iB of {memory[2]}iB'
  # On some TPU meshes the compiler cannot route between the chips of a group.
  reason = textwrap.shorten(text.splitlines()[0], 120)  # it can name every chip of a pod
  return None, f'the compiler rejects this mesh: {reason}'


def peak_bytes(compiled):
  """The most memory that a compiled program holds at once, arguments and results included."""
  memory = compiled.memory_analysis()
  peak = getattr(memory, 'peak_memory_in_bytes', 0)
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return peak or held + memory.temp_size_in_bytes


def _exchanges(collectives, mesh, topology):
  """The collectives of a chip, by kind and axes, the slowest first."""
  devices = mesh.devices.reshape(-1)
  total = collections.defaultdict(lambda: np.zeros(3))
  for collective, count in collectives.items():
    groups = _groups(collective, devices)
    if groups.shape[1] == 1:
      continue
    coordinates = np.array(np.unravel_index(groups, mesh.devices.shape))
    varies = (coordinates != coordinates[..., :1]).any(axis=(1, 2))
    axes = ' '.join(axis for axis, v in zip(mesh.axis_names, varies, strict=True) if v)
    args = topology, collective.kind, collective.bytes, devices[groups[0]]
    sent = hlo.sent_bytes(collective, groups.shape[1])
    seconds = topologies.collective_seconds(*args)
    total[collective.kind, axes] += count, count * sent, count * seconds
  exchanges = [
    Exchange(kind, axes, int(count), float(sent), float(seconds))
    for (kind, axes), (count, sent, seconds) in total.items()
  ]
  return sorted(exchanges, key=lambda exchange: -exchange.seconds)


def _groups(collective, devices):
  """Positions in the mesh of the devices of each group: [groups, devices per group]."""
  if collective.groups != hlo.SLICES:
    return hlo.device_groups(collective.groups, devices.size)
  slices = [device.slice_index for device in devices]
  return np.array([np.unique(slices, return_index=True)[1]])
