"""The coordinate check: of every family, of places it must find, and of what it must not miss."""

import csv

import jax
import numpy as np
import pytest

from moejax import model as model_lib
from moejax.transfer import coordinates, observe, sizes
from tests import tiny

pytestmark = [
  pytest.mark.filterwarnings('ignore:the load_module'),  # ml_collections calls it
  pytest.mark.heavy,
]
# Config -> widths, that of the base, and a rate. Narrow models are far from the limit of wide ones,
# most of all with Mixture of Tokens.
FAMILIES = {
  'dense.py:debug': (('32', '128'), 8, 1e-2),
  'moe.py:debug': (('32', '128'), 8, 1e-2),
  'fine_grained.py:debug': (('32', '128'), 8, 1e-2),
  'mamba.py:debug': (('32', '128'), 8, 1e-2),
  'mamba.py:debug,mamba2': (('32', '128'), 8, 1e-2),
  'moe_mamba.py:debug': (('32', '128'), 8, 1e-2),
  'moe_mamba.py:debug,mamba2': (('32', '128'), 8, 1e-2),
  'mot.py:debug': (('128', '512'), 32, 5e-3),
}


def _measure(family, widths, seeds=(0, 1), **fields):
  config = f'configs/{family}'
  axis = sizes.make_axis(config, fields, widths)
  return coordinates.measure(config, coordinates.small_steps(config, fields, 4), axis, list(seeds))


def _powers(measured):
  """Slopes of changes by place."""
  found = coordinates.slopes(measured)
  return {s.place: s.slope.value for s in found if s.what == 'change'}


@pytest.mark.parametrize('family', FAMILIES)
def test_under_mup_nothing_inside_follows_the_width(family):
  widths, base, rate = FAMILIES[family]
  fields = {
    'model.parameterization': 'mup',
    'model.base': f'd_model={base},d_ff={4 * base}',
    'optimizer.peak_lr': f'{rate}',
  }
  powers = _powers(_measure(family, widths, **fields))
  values = np.abs([*powers.values()])
  assert np.median(values) < 0.15, powers  # under standard it is above 0.3


# These have all kinds of sublayers.
@pytest.mark.parametrize(
  'family', ['mot.py:debug', 'moe_mamba.py:debug', 'moe_mamba.py:debug,mamba2']
)
def test_under_standard_changes_follow_the_width(family, tmp_path):
  measured = _measure(family, ('32', '128'), **{'optimizer.peak_lr': '5e-3'})
  powers = [*_powers(measured).values()]
  assert np.median(powers) > 0.3, powers
  slopes = coordinates.slopes(measured)
  assert not all(slope.is_good for slope in slopes)
  text = coordinates.describe(measured, slopes)
  assert 'change grows' in text and '\nnot flat (model.d_model 32 to 128, after 4 steps)' in text
  coordinates.write_csv(measured, tmp_path / 'check.csv')
  with (tmp_path / 'check.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 2 * 2 * 5 * len(measured.places)
  assert {row['change'] for row in rows if row['step'] == '0'} == {'0'}
  coordinates.plot(measured, slopes, tmp_path / 'check.png')
  assert (tmp_path / 'check.png').stat().st_size > 20_000


def _made(size_power, change_power, place='0 mlp output', noise=0.0):
  """Measured at three sizes, as if both followed them by these powers."""
  numbers, rng = np.array([16.0, 32, 64]), np.random.default_rng(0)
  table = lambda power: np.exp(
    power * np.log(numbers)[:, None, None, None] + noise * rng.normal(size=(3, 3, 2, 1))
  )
  where = 'model.d_model', [*numbers], [0, 1, 2], [place]
  return coordinates.Measured(*where, table(size_power), table(change_power))


@pytest.mark.parametrize(
  ('size', 'change', 'place', 'good'),
  [
    (0.05, -0.05, '0 mlp output', True),
    (0.0, 0.2, '0 mlp output', False),
    (0.0, -0.2, '0 mlp output', False),
    (-0.5, 0.0, '0 mlp output', False),
    (-0.5, 0.0, '1 moe scores', True),
    (-0.5, 0.0, 'logits', True),
    (-0.5, -0.5, 'logits', False),
    (0.5, 0.0, 'logits', False),
    (0.0, np.nan, '0 mlp output', False),
  ],
)
def test_what_may_follow_the_size(size, change, place, good):
  found = coordinates.slopes(_made(size, change, place))
  assert all(slope.is_good for slope in found) == good
  verdict = coordinates.verdict(_made(size, change, place), found)
  assert verdict.startswith('flat' if good else 'not flat')


def test_noise_of_seeds_is_no_slope():
  (_, change) = coordinates.slopes(_made(0, 0.15, noise=0.05))
  assert change.is_good and not change.is_within and change.slope.has_interval
  assert 'flat within noise' in coordinates.verdict(_made(0, 0.15, noise=0.05), [change])


def test_depth_is_a_size_and_patterns_are_its_places():
  config = 'configs/dense.py:debug'
  axis = sizes.make_axis(config, {}, depths=['1', '2'])
  assert axis.points == (("((('attention', 'mlp'), 1),)",), ("((('attention', 'mlp'), 2),)",))
  measured = coordinates.measure(config, coordinates.small_steps(config, {}, 1), axis, [0])
  assert (measured.field, measured.sizes) == ('model.blocks', [1, 2])
  inside = ['0 attention output', '0 attention stream', '1 mlp output', '1 mlp stream']
  assert measured.places == ['embedding', *inside, 'logits']


@pytest.mark.parametrize('name', ['mot', 'moe in mamba'])
def test_what_is_observed_is_what_the_model_computes(name):
  config, batch = tiny.model_config(**tiny.MODELS[name]), tiny.batch()
  params = jax.jit(lambda: model_lib.init_params(config, jax.random.key(0)))()
  inside = observe.observe(config, params, batch)
  logits = model_lib.bind(config, params)(batch['inputs'])
  product = inside['logits']
  np.testing.assert_allclose(product.x[0] @ product.w[0], logits, atol=1e-4)
  last = [values for place, values in inside.items() if place.endswith('/stream')][-1]
  np.testing.assert_allclose(last[-1], product.x[0], atol=1e-5)
  scores = [place for place in inside if 'scores' in place]
  assert len(scores) == {'mot': 1, 'moe in mamba': 3}[name]


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ({}, 'give one of --widths, --depths and --zip'),
    ({'widths': ['16'], 'depths': ['2']}, 'give one of --widths'),
    ({'widths': ['16']}, 'at least two sizes'),
    ({'widths': ['16', '16']}, 'expected different integers'),
    ({'widths': ['16', 'x']}, r'--widths: expected different integers, as in 1,2,3; got 16,x'),
    ({'zipped': ['model.width=1,2']}, '--zip model.width: the config has no such field'),
  ],
)
def test_sizes_that_are_none(flags, message):
  with pytest.raises(ValueError, match=message):
    sizes.make_axis('configs/dense.py:debug', {}, **flags)


def test_widths_keep_hidden_layers_in_proportion():
  config = 'configs/moe.py:debug'
  axis = sizes.make_axis(config, {'model.moe.shared_width': '8'}, ['16', '32'])
  assert axis.fields == ('model.d_model', 'model.d_ff', 'model.moe.shared_width')
  assert axis.points == (('16', '64', '8'), ('32', '128', '16'))
  assert sizes.base_of(axis) == 'd_model=16,d_ff=64,moe.shared_width=8'
  with pytest.raises(ValueError, match='model.moe.shared_width = 8 at width 16 has no whole share'):
    sizes.make_axis(config, {'model.moe.shared_width': '8'}, ['16', '17'])
