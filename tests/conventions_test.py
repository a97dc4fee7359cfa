"""The rules of the whole repository: who imports whom, what letters mean, what names promise."""

import ast
import functools
import graphlib
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import numpy as np
import pytest

from moejax import model as model_lib
from tests import goldens, shapes, tiny

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = sorted((ROOT / 'moejax').rglob('*.py'))

# A module may import modules of its own rank or below. Whatever is not named is a program, on top.
RANKS = (
  # '' is moejax/__init__.py
  (
    '',
    'allocator',
    'compilation_cache',
    'determinism',
    'exit_codes',
    'differences',
    'fields',
    'buckets',
    'files',
    'imports',
    'hardware',
    'manifest',
    'orbax_leaks',
    'parameterization',
    'parameters',
    'schedule',
    'seeds',
    'signals',
    'text',
    'trackers',
    'group',
    'lease',
    'process_exchange',
  ),
  ('ops', 'sharding'),
  ('layers', 'muon'),
  ('remat',),
  ('model_config',),
  ('model',),
  ('distributed', 'optimizer', 'data', 'metrics', 'report', 'eval_report', 'checkpoint', 'flops')
  + ('hf', 'memory_checkpoint')
  + ('goodput', 'profiling', 'watch'),
  ('config', 'variants'),
  ('cli',),
  ('step', 'run_folder', 'start_page', 'estimate', 'same_experts'),
  ('upcycling',),
  ('another_router',),
  ('evaluate', 'decode', 'terminal'),
  ('generate', 'start'),
  ('progress', 'rewind'),
  ('results',),
  ('train',),
  ('aot', 'compare', 'drill', 'passports', 'runner', 'scaling_laws', 'sweep', 'transfer')
  + ('transition_tuning',),
  ('library', 'reproduce'),
)
HEAVY = {'seqio', 'tensorflow', 'tensorflow_datasets', 'tensorflow_text', 'clu', 't5'}
USES_TENSORFLOW = 'moejax.data.seqio_loader'
LEGEND = {
  'B': 'sequences',
  'L': 'positions',
  'S': 'positions attended to',
  'T': 'tokens of a dispatch group',
  'D': 'model width',
  'F': 'hidden width',
  'E': 'experts',
  'C': 'slots per expert',
  'K': 'experts per token',
  'G': 'groups in MoT, of heads',
  'M': 'tokens per group in MoT',
  'H': 'heads',
  'J': 'heads of keys and values',
  'P': 'head width',
  'Q': 'positions of a chunk',
  'V': 'vocabulary',
  'I': 'Mamba inner width',
  'N': 'state size',
  'R': 'rank of delta',
  'W': 'convolution window',
}


def _module(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


class _WithoutTypes(ast.NodeTransformer):
  """Drops `if TYPE_CHECKING:`, which never runs."""

  def visit_If(self, node):
    return None if ast.unparse(node.test) == 'TYPE_CHECKING' else self.generic_visit(node)


def _parse(path):
  return _WithoutTypes().visit(ast.parse(path.read_text(), str(path)))


MODULES = {_module(path): _parse(path) for path in SOURCES}


def _stage(module):
  return module.split('.')[1] if '.' in module else ''


def _rank(module):
  return next((i for i, names in enumerate(RANKS) if _stage(module) in names), len(RANKS))


def _at_import(node):
  """All nodes that run when a module is imported: not the bodies of functions."""
  yield node
  for child in ast.iter_child_nodes(node):
    if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
      yield from _at_import(child)


def _imported(nodes):
  """Full names of what import statements name: modules, or names in them."""
  for node in nodes:
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'relative import in line {node.lineno}'
      for alias in node.names:
        full = f'{node.module}.{alias.name}'
        yield full if full in MODULES else node.module


def _ours(nodes):
  return {name for name in _imported(nodes) if name.split('.')[0] == 'moejax'}


def _assert_no_module(violations):
  """Fails with all modules for which `violations(name, tree)` yields something."""
  found = {name: list(violations(name, tree)) for name, tree in MODULES.items()}
  assert not any(found.values()), {name: what for name, what in found.items() if what}


def test_imports_point_down():
  def upwards(module, tree):
    return (name for name in _ours(ast.walk(tree)) if _rank(name) > _rank(module))

  _assert_no_module(upwards)


def test_nothing_imports_a_program():
  _assert_no_module(
    lambda _, tree: (name for name in _ours(ast.walk(tree)) if _rank(name) == len(RANKS))
  )


# What the inner house may import of ours; above it, ranks say enough.
INNER = {
  'ops': {'ops'},
  'sharding': {'sharding', 'fields', 'parameters'},
  'layers': {'ops', 'sharding', 'layers', 'fields', 'parameterization', 'parameters'},
}
# What asks where a program runs.
AMBIENT = {'get_abstract_mesh', 'set_mesh', 'shard_map', 'default_backend', 'devices'}
AMBIENT |= {'with_sharding_constraint', 'all_gather', 'all_to_all', 'psum', 'axis_index', 'getenv'}


def test_layers_import_ops_and_sharding_and_these_nothing():
  def others(module, tree):
    allowed = INNER.get(_stage(module))
    return (name for name in _ours(ast.walk(tree)) if allowed and _stage(name) not in allowed)

  _assert_no_module(others)


def test_ops_ask_nothing_of_their_surroundings():
  def ambient(module, tree):
    return (
      f'line {node.lineno}: {node.attr}'
      for node in ast.walk(tree)
      if _stage(module) == 'ops' and isinstance(node, ast.Attribute) and node.attr in AMBIENT
    )

  _assert_no_module(ambient)


def test_no_import_cycle():
  needs = {module: _ours(_at_import(tree)) - {module} for module, tree in MODULES.items()}
  list(graphlib.TopologicalSorter(needs).static_order())  # raises CycleError, which names the cycle


def test_every_package_is_installed():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  folders = {'.'.join(path.parent.relative_to(ROOT).parts) for path in SOURCES}
  assert {*project['tool']['setuptools']['packages']} == folders | {'moejax.configs'}


def test_tensorflow_is_imported_only_where_it_is_used():
  def heavy(module, tree):
    for name in _imported(_at_import(tree)):
      if name.split('.')[0] in HEAVY and module != USES_TENSORFLOW or name == USES_TENSORFLOW:
        yield name

  _assert_no_module(heavy)


def test_tensorflow_stays_out_of_a_plain_run():
  modules = [m for m in MODULES if _rank(m) < len(RANKS) and m != USES_TENSORFLOW]
  program = f'import sys, {", ".join(modules)}; print(*sys.modules)'
  done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert not HEAVY & set(done.stdout.split())


def _names(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.Name):
      yield node.id, node.lineno
    elif isinstance(node, ast.arg):
      yield node.arg, node.lineno
    elif isinstance(node, ast.Attribute):
      yield node.attr, node.lineno


def test_suffixes_use_the_legend():
  def unknown(_, tree):
    for name, line in _names(tree):
      if set(re.sub('[0-9]', '', shapes.suffix(name))) - LEGEND.keys():
        yield f'line {line}: {name}'

  _assert_no_module(unknown)


def _operands(equation):
  return equation.replace(' ', '').partition('->')[0].split(',')


def _einsums(tree):
  """(equation, argument nodes) of every einsum whose equation is written out."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith('einsum'):
      equation, *operands = node.args
      if isinstance(equation, ast.Constant):
        yield equation.value, operands


def _lying_einsums(tree):
  """Einsums that give an array other axes than its name does; '...' stands for leading axes."""
  for equation, nodes in _einsums(tree):
    for term, node in zip(_operands(equation), nodes, strict=True):
      axes = shapes.suffix(node.id) if isinstance(node, ast.Name) else ''
      if axes.isalpha() and not re.fullmatch(term.upper().replace('...', '[A-Z]*'), axes):
        yield f'line {node.lineno}: {ast.unparse(node)} in {equation!r}'


def test_einsums_agree_with_the_names():
  _assert_no_module(lambda _, tree: _lying_einsums(tree))


@pytest.mark.parametrize(
  ('line', 'lies'),
  [
    ("jnp.einsum('bld,df->blf', x_BLD, w_DF)", False),
    ("jnp.einsum('...D,DF->...F', x_BLD, w_DF)", False),
    ("jnp.einsum('bld,df->blf', x_BLD, f(w))", False),
    ("jnp.einsum('bld,df->blf', x_BLD, w_FD)", True),
    ("jnp.einsum('...D,DF->...F', x_BLF, w_DF)", True),
  ],
)
def test_the_einsum_check_finds_lies(line, lies):
  assert bool(list(_lying_einsums(ast.parse(line)))) == lies


@pytest.mark.parametrize(
  ('name', 'axes'),
  [
    ('x_BLD', 'BLD'),
    ('valid_GML1', 'GML1'),
    ('qkv_D3HP', 'D3HP'),
    ('_w_in_EDF', 'EDF'),
    ('BATCH', ''),
    ('MAX_LENGTH', ''),
    ('x_1', ''),
    ('x', ''),
  ],
)
def test_suffix(name, axes):
  assert shapes.suffix(name) == axes


@pytest.mark.parametrize(
  ('variables', 'message'),
  [
    ({'x_BLD': (2, 3, 5), 'w_DF': (5, 7), 'y': (9,), 'B': 2}, None),
    ({'qkv_D3P': (5, 3, 7), 'mask_B1': (2, 1)}, None),
    ({'x_BLD': (2, 3)}, r'x_BLD has shape \(2, 3\)'),
    ({'x_BD': (2, 5), 'w_DF': (7, 5)}, r'w_DF has shape \(7, 5\), but D is 5 in x_BD'),
    ({'x_BD': (3, 5), 'B': 2}, 'B is 2 in B'),
    ({'qkv_D3': (5, 4)}, '3 is 3 in its name'),
  ],
)
def test_contradictions(variables, message):
  variables = {k: np.zeros(v) if isinstance(v, tuple) else v for k, v in variables.items()}
  found = list(shapes.contradictions(variables))
  if message is None:
    assert not found
  else:
    assert re.search(message, '\n'.join(found))


def test_shapes_are_checked_while_code_runs(tmp_path):
  (tmp_path / 'module.py').write_text('def transpose(x_LD):\n  y_LD = x_LD.T\n  return y_LD\n')
  scope = {}
  exec(compile((tmp_path / 'module.py').read_text(), str(tmp_path / 'module.py'), 'exec'), scope)
  with pytest.raises(AssertionError, match='module.py, transpose: y_LD'):
    with shapes.checked(tmp_path):
      scope['transpose'](np.zeros((2, 3)))
  with shapes.checked(tmp_path / 'elsewhere'):
    scope['transpose'](np.zeros((2, 3)))


VARIANT = {
  'blocks': tiny.DENSE,
  'activation': 'swiglu',
  'positions': 'rope',
  'num_kv_heads': 1,
  'head_dim': 6,
  'qk_norm': True,
  'biases': True,
  'document_mask': True,
  'norm': 'rms_norm',
  'loss_chunk': 4,
}


@pytest.mark.parametrize('changes', [{}, VARIANT], ids=['mot', 'variant'])
def test_names_are_true_in_the_model(changes):
  config = tiny.model_config(**changes)
  batch = tiny.batch()

  def loss(params):
    return model_lib.bind(config, params).loss(batch)[0]

  def decode(params):
    model = model_lib.bind(config, params)
    at = lambda where: jax.tree.map(lambda a_BL: a_BL[:, where], tiny.tokens(batch))
    _, state = model.prefill(batch['inputs'][:, :1], at(slice(1)), tiny.L)
    return model.step(batch['inputs'][:, 1], state, at(1))

  with shapes.checked():
    params = jax.eval_shape(functools.partial(model_lib.init_params, config), jax.random.key(0))
    jax.eval_shape(jax.grad(loss), params)
    jax.eval_shape(decode, params)


def test_goldens_notice_a_changed_number(tmp_path):
  numbers = {'loss': [np.float32(5.5), 5.25], 'norm': 0.0}
  record, compare = goldens.Goldens(tmp_path, update=True), goldens.Goldens(tmp_path, update=False)
  with pytest.raises(AssertionError, match='--update-golden'):
    compare('curve', numbers)
  record('curve', numbers)
  compare('curve', numbers)
  compare('curve', {'loss': (5.5, 5.25 * (1 + 1e-6)), 'norm': 0.0})
  with pytest.raises(AssertionError, match=r"\['loss'\]\[1\]: 5.25 recorded, 5.251 now"):
    compare('curve', {'loss': [5.5, 5.251], 'norm': 0.0})
  with pytest.raises(AssertionError, match=r"\['norm'\]: recorded, but not there now"):
    compare('curve', {'loss': [5.5, 5.25]})
