"""A config field is defined once; everything else about it is generated from that."""

import dataclasses
import pathlib
import re

import pytest
import yaml

from configs import dense, fine_grained, moe_mamba, mot
from moejax import config as config_lib, fields, run_folder, variants

PAGE = pathlib.Path(__file__).parent.parent / 'docs' / 'configuration.md'


def test_the_page_lists_every_field(request):
  text, heading, listed = PAGE.read_text().partition('## All fields\n\n')
  if request.config.getoption('--update-golden'):
    PAGE.write_text(text + heading + config_lib.reference())
  else:
    assert listed == config_lib.reference(), 'update it with pytest --update-golden'


def test_every_field_has_a_meaning_and_a_default_of_its_type():
  for name, f in config_lib.flat_fields().items():
    assert f.metadata['meaning'] and type(f.default) is f.type, name
  for section in config_lib.SECTIONS.values():
    section(**({'max_length': 8} if section is config_lib.ModelConfig else {}))


@pytest.mark.parametrize(
  ('module', 'words'),
  [
    (dense, None),
    (mot, 'medium,experts=32'),
    (moe_mamba, '25M,inner=conv+out'),
    (fine_grained, '1B'),
  ],
)
def test_a_config_reads_the_same_from_the_yaml_that_is_printed(module, words):
  config = module.get_config(words)
  config.train.sample_prompt = "no: 'x' # \n"
  text = config_lib.as_yaml(config)
  assert run_folder.from_saved(yaml.safe_load(text), 'printed').to_dict() == config.to_dict()
  assert all(': ' in line and '  # ' in line for line in text.splitlines() if line[0] == ' ')


def test_printed_fields_have_their_meaning_and_the_default_that_was_changed():
  config = dense.get_config()
  config.model.norm = 'rms_norm'
  lines = [' '.join(line.split()) for line in config_lib.as_yaml(config).splitlines()]
  assert (
    'norm: rms_norm # [default: layer_norm] before every sublayer (one of layer_norm, rms_norm)'
  ) in lines
  assert 'd_ff: 128 # hidden width of a dense feed-forward (at least 1)' in lines


@pytest.fixture
def toy(monkeypatch):
  """The example section of the page, added to the config."""
  page = {'__name__': 'page'}
  (code,) = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)
  exec(compile(code, 'configuration.md', 'exec'), page)
  monkeypatch.setitem(config_lib.SECTIONS, 'toy', page['ToyConfig'])
  return page['ToyConfig']


def test_a_field_is_one_line(toy):
  c = config_lib.baseline()
  assert c.toy.to_dict() == {'width': 3, 'shape': 'round'}
  c.toy.width = 5
  assert toy(**c.toy) == toy(5, 'round')
  assert (
    '- `width = 3`: hidden width of the toy (at least 1)\n'
    "- `shape = 'round'`: how it looks (one of round, square)"
  ) in config_lib.reference()
  with pytest.raises(AttributeError, match='Did you mean "width"'):
    c.toy.widht = 5


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'width': 0}, 'toy.width must be at least 1, got 0.'),
    ({'width': 2.0}, 'toy.width must be an integer, got 2.0.'),
    ({'width': True}, 'toy.width must be an integer, got True.'),
    (
      {'shape': 'squar'},
      "toy.shape must be one of round, square; got 'squar'; did you mean 'square'?",
    ),
    ({'shape': 3}, 'toy.shape must be a string, got 3.'),
    ({'shape': 'square'}, 'toy.width = 3 must be even with toy.shape = square.'),
    (
      {'width': -1, 'shape': ''},
      "toy.width must be at least 1, got -1.\ntoy.shape must be one of round, square; got ''.",
    ),
  ],
)
def test_an_invalid_value_is_named(toy, values, message):
  with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
    toy(**values)


@pytest.mark.parametrize(
  ('bounds', 'good', 'bad', 'message'),
  [
    ({'minimum': 0, 'maximum': 1}, (0, 1, 0.5), (-0.1, 1.1), 'at least 0 and at most 1'),
    ({'above': 0, 'below': 1}, (0.1,), (0, 1.0), 'positive and below 1'),
    ({}, (-1e30, 7), (float('nan'), float('inf'), '1', None), 'a finite number'),
  ],
)
def test_numbers_have_bounds(bounds, good, bad, message):
  section = dataclasses.make_dataclass(
    'Toy',
    [('x', float, fields.default(0.5, 'a number', **bounds))],
    bases=(fields.Section,),
    namespace={'PATH': 'toy'},
    frozen=True,
  )
  for value in good:
    assert type(section(value).x) is float
  for value in bad:
    with pytest.raises(ValueError, match=f'toy.x must be {message}, got'):
      section(value)


def test_lists_become_tuples_and_mappings_sections():
  model = config_lib.ModelConfig(
    blocks=[[['attention', 'moe'], 2]], vocab_size=9, max_length=8, moe={'granularity': 2}
  )
  assert model.blocks == ((('attention', 'moe'), 2),) and model.moe.num_experts == 16
  with pytest.raises(ValueError, match='model.moe.granularity must be at least 1, got 0'):
    config_lib.ModelConfig(max_length=8, moe={'granularity': 0})


def test_unknown_fields_are_named():
  c = config_lib.baseline().unlock()
  c.model.d_modle, c.model.moe.experts, c.train.step = 3, 4, 5
  with pytest.raises(ValueError) as raised:
    config_lib.resolve(c)
  assert str(raised.value) == (
    "model.d_modle: no such field; did you mean 'd_model'?\n"
    "train.step: no such field; did you mean 'steps'?"
  )
  del c.model.d_modle, c.train.step
  with pytest.raises(ValueError, match="model.moe.experts: .*; did you mean 'experts_per_token'?"):
    config_lib.resolve(c)
  del c.data
  for other in (c, None, c.to_dict()):
    with pytest.raises(ValueError, match='must have the sections model, data, optimizer, mesh, tr'):
      config_lib.resolve(other)


def test_the_page_says_where_every_section_is():
  page = PAGE.read_text()
  sections = [*config_lib.SECTIONS.values()]
  for section in sections:
    sections += [f.type for f in fields.of(section) if fields.is_section(f)]
    assert f'`{section.__name__}`' in page or f'`{section.__name__}`,' in page, section
    folder = section.__module__.replace('.', '/')
    assert f'`{folder}.py`' in page or f'`{pathlib.Path(folder).parent}/`' in page, section


def test_all_problems_are_reported_together():
  c = variants.baseline()
  c.model.d_model, c.model.moe.group_size, c.data.batch_size, c.train.seed = 0, 0, 0, 2**32
  with pytest.raises(ValueError) as raised:
    config_lib.resolve(c)
  lines = str(raised.value).splitlines()
  assert [line.split()[0] for line in lines] == [
    'data.batch_size',
    'model.d_model',
    'model.moe.group_size',
    'train.seed',
  ]
