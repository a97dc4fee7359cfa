"""The machine for a planned run: the smallest slice on which it fits, its mesh, the hours."""

from moejax import config as config_lib, estimate, hardware, sharding
from moejax.aot import step, topologies
from moejax.sharding import platform
from moejax.text import duration, short, short_time, size

COMPILED = "the compiler's bound on a step; real steps are slower"
ESTIMATED = 'a rough estimate of a step'


def kind_of(name):
  """The kind of slice or node, such as 'v5e', of the chip that a user names in any spelling.

  Raises:
    ValueError: there is none.
  """
  chip = hardware.find(name)
  if chip is None:
    raise ValueError(f'--chip={name}: unknown chip; known ones are {", ".join(hardware.CHIPS)}.')
  for kind in topologies.KINDS:
    if hardware.find(kind) is chip:
      return kind
  raise ValueError(
    f'--chip={name}: no machines with it are known, only with {", ".join(topologies.KINDS)}. '
    '--mfu=0.4 estimates hours from its peak alone.'
  )


def find(config, kind, days=None, compiles=True):
  """The smallest machine on which a config fits and, with `days`, ends in time, as a dict.

  Args:
    config: a ConfigDict.
    kind: of `kind_of`.
    days: the most that the run may take; None: any time.
    compiles: compile the step for it, if the compiler is installed.

  Returns:
    topology, type (Google Cloud's name), chips, mesh (flags), memory and capacity (bytes per
    chip), step_seconds, hours, chip_hours, and basis: what memory and time rest on. If no machine
    is large enough, None.
  """
  run_config = config_lib.resolve(step.without_data(config))
  for topology, choice, seconds in _fitting(run_config, topologies.of_kind(kind)):
    if days and _hours(run_config, seconds) > 24 * days:
      continue
    memory, basis = sum(choice.memory.values()), ESTIMATED
    if compiles and topologies.can_compile(topology):
      report = step.compile_step(_with_mesh(config, choice), topology)
      if not report.fits or (days and _hours(run_config, report.step_seconds) > 24 * days):
        continue
      memory, seconds, basis = sum(report.memory.values()), report.step_seconds, COMPILED
    hours = _hours(run_config, seconds)
    return {
      'topology': str(topology),
      'type': topology.cloud_name,
      'chips': topology.num_chips,
      'mesh': choice.flags,
      'memory': memory,
      'capacity': choice.capacity,
      'step_seconds': seconds,
      'hours': hours,
      'chip_hours': hours * topology.num_chips,
      'basis': basis,
    }
  return None


def step_seconds(config, machines):
  """Estimated seconds of a step of a config, by topology, on those where it fits."""
  run_config = config_lib.resolve(step.without_data(config))
  return {topology: seconds for topology, _, seconds in _fitting(run_config, machines)}


def _fitting(run_config, machines):
  """Yields the topologies on which a config fits, the `estimate.Choice` there, and its seconds."""
  with platform.compiling_for('tpu'):
    estimator = estimate.Estimator(run_config)
  for topology in machines:
    try:
      choice = step.choose_mesh(run_config, topology, estimator)
    except ValueError:  # the batch cannot be split so
      continue
    if choice.fits:
      mesh = sharding.abstract_mesh(choice.run_config.mesh)
      seconds = estimate.seconds(choice.run_config, mesh, topology.chip, topology.detour)
      yield topology, choice, seconds


def _hours(run_config, seconds):
  return run_config.train.steps * seconds / 3600


def _with_mesh(config, choice):
  config = config.copy_and_resolve_references()
  for axis in sharding.AXES:
    config.mesh[axis] = getattr(choice.run_config.mesh, axis)
  return config


def describe(found, kind):
  """Rows of text: (name, text)."""
  if found is None:
    return [('machine', f'no {kind} of any size: see --days, or another --chip')]
  mesh = found['mesh'].replace('--config.mesh.', '').replace('=', ' ') or 'one device'
  memory = f'{size(found["memory"])} of {size(found["capacity"])} per chip'
  rows = [
    ('machine', f'{found["topology"]}, mesh {mesh}: {memory}'),
    (
      'time',
      f'{duration(3600 * found["hours"])}, {short(found["chip_hours"])} {kind} hours: '
      f'{short_time(found["step_seconds"])} per step is {found["basis"]}',
    ),
  ]
  if found['basis'] == ESTIMATED and found['type'] != found['topology']:  # a TPU
    rows.append(('', "pip install '.[tpu-aot]' for the compiler's memory and time"))
  return rows
