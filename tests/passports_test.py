"""Passports of experts: right where the answer is known, and a page that is safe and complete."""

import dataclasses
import html.parser
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest

from configs import moe
from moejax import config as config_lib, metrics, model as model_lib, sharding
from moejax.passports import findings, history, observe, page

E, HOSTILE = 6, '</script><script>alert(1)</script> & \u202e"<b>\x1b\n'
PROJECTIONS = ('conv', 'gate', 'out')
BLOCKS = ((('moe',), 1), (('mamba+moe', 'moe_in_mamba'), 1), (('mot',), 1))


def _config(folder):
  """Experts of every kind in a model without attention, and text that would like to be HTML."""
  for i in range(12):
    (folder / f'{i}.txt').write_text(f'text {i} of a few words\n' * 9 + HOSTILE * 3)
  config = moe.get_config('debug')
  config.model.update(blocks=BLOCKS, norm='layer_norm')
  config.model.moe.update(expansion_rate=E, balance_loss=0.0)
  config.data.update(source='text', files=f'{folder}/*.txt', sequence_length=24)
  return config_lib.resolve(config)


def _params(model):
  """In layer 0, token v goes to expert v % 5, and none to expert 5; experts 0 and 1 are equal."""
  shapes = jax.eval_shape(lambda: model_lib.init_params(model, jax.random.key(0)))
  rng = np.random.default_rng(0)
  random = lambda p: (rng.standard_normal(p.shape) / p.shape[-1] ** 0.5).astype(p.dtype)
  params = jax.tree.map(random, shapes)
  ids, D = np.arange(model.vocab_size), model.d_model
  params['embedding'] = np.eye(D, dtype=np.float32)[ids % 5] * 3
  block = params['stack_0']['0_moe']
  block['norm'] = {'scale': np.ones((1, D), np.float32), 'bias': np.zeros((1, D), np.float32)}
  layer = block['layer']
  layer['router'] = (np.eye(D, E) * (np.arange(E) < 5))[None].astype(np.float32)
  for weights in layer['experts'].values():
    weights[0, 1] = 2 * weights[0, 0]
  return params


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A run that logged the loads of its experts, and its page; its parameters are on 8 devices."""
  folder = tmp_path_factory.mktemp('passports')
  (folder / 'text').mkdir()
  config = _config(folder / 'text')
  writer = metrics.MetricsWriter(folder / 'run', 0)
  for step, load in ((100, 0.9), (200, 0.0), (300, 0.4), (400, 0.004), (500, 0.0)):
    writer.write(step, {'moe/entropy/00': 1 / step, 'moe/dead/00': 0.0 if step < 300 else 1 / E})
    details = {'moe/load/00/005': load, 'moe/load/00/000': 2 - load}
    writer.write(step, {'loss': 2.0}, prefix='validation', details=details)
  writer.close()
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=-1, expert=1, tensor=1))
  assert mesh.size == 8
  with jax.set_mesh(mesh):
    params = _params(config.model)
    params = jax.device_put(params, sharding.state_shardings(params, mesh))
    layers, text = observe.observe(config, params, mesh)
  logged = history.read(folder / 'run')
  found = [findings.of_layer(layer, config.model, 0.1, logged) for layer in layers]
  facts = page.facts(config, 500, layers)
  return config, layers, text, found, page.page('<run>', facts, layers, found, text, logged)


class _Articles(html.parser.HTMLParser):
  """The texts of what a page has, by tag and class, of every passport."""

  def __init__(self, content):
    super().__init__()
    self.cards, self.tags, self.open, self.urls = {}, [], [], []
    self.feed(content)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    self.tags.append(tag)
    self.urls += [attributes[name] for name in ('src', 'href', 'action') if name in attributes]
    assert not any(name.startswith('on') for name in attributes)
    if tag == 'article':
      self.card = self.cards.setdefault(attributes['id'], {})
    if tag not in ('meta', 'input', 'br', 'path', 'circle'):
      self.open.append((tag, attributes.get('class', '')))

  handle_startendtag = handle_starttag

  def handle_endtag(self, tag):
    if tag not in ('path', 'circle'):
      assert self.open.pop()[0] == tag

  def handle_data(self, data):
    if any(tag == 'article' for tag, _ in self.open):
      tag, of = self.open[-1]
      self.card.setdefault(f'{tag}.{of}' if of else tag, []).append(data)


def test_the_tokens_of_every_expert_are_those_it_was_made_for(made):
  config, layers, text, _, content = made
  layer, cards = layers[0], _Articles(content).cards
  ids = text.ids  # all that was seen, and padding
  assert layer.tokens == layer.tokens_V.sum() == layer.parts_E.sum()
  np.testing.assert_array_equal(layer.parts_VE.sum(axis=1), layer.tokens_V)
  np.testing.assert_array_equal(np.flatnonzero(layer.tokens_V), np.unique(ids[ids > 0]))
  for expert in range(5):
    mine = layer.tokens_V[expert::5].sum()
    assert layer.parts_E[expert] == mine
    assert layer.load_E[expert] == pytest.approx(mine * E / layer.tokens)
    lifts = layer.lifts(expert, 100)
    assert {token % 5 for token, *_ in lifts} == {expert}
    assert sum(share for *_, share in lifts) == pytest.approx(1)
    rates = [lift for _, lift, _ in lifts]
    assert rates == sorted(rates, reverse=True) and rates[0] < layer.tokens / mine
    shown = [token for token in cards[f'l0e{expert}']['code'] if len(token) == 1]
    written = {'␣': ' ', '⏎': '\n'}
    assert {(ord(written.get(token, token)) + 3) % 5 for token in shown} == {expert}
    marked = [token for token in cards[f'l0e{expert}']['mark'] if len(token) == 1]
    assert marked and {(ord(written.get(m, m)) + 3) % 5 for m in marked} == {expert}
  assert not layer.lifts(5, 10)


def test_every_kind_of_layer_has_a_passport_for_every_expert(made):
  config, layers, _, _, content = made
  names = ['block 0, moe', 'block 1, moe', *(f'block 1, moe_in_mamba: {p}' for p in PROJECTIONS)]
  assert [layer.name for layer in layers] == [*names, 'block 2, mot']
  cards = _Articles(content).cards
  assert list(cards) == [
    f'l{number}e{expert}' for number, of in enumerate(layers) for expert in range(of.num_experts)
  ]
  for layer in layers:
    assert layer.tokens == layers[0].tokens
    assert 0 <= np.nanmin(layer.entropy_E) and np.nanmax(layer.entropy_E) <= 1 + 1e-5
    np.testing.assert_allclose(np.diag(layer.cosine_EE), 1, atol=1e-5)
  mot = layers[-1]
  np.testing.assert_allclose(mot.load_E, 1, atol=0.01)
  assert all(
    'contexts' in str(card).lower() and card['mark']
    for name, card in cards.items()
    if name[1] == '5'
  )


PROJECTIONS = ('conv', 'gate', 'out')


def test_what_died_when_and_why(made):
  _, layers, _, found, content = made
  of_layer = found[0]
  assert [f.label for f in of_layer] == ['twin', 'twin', '', '', '', 'dead']
  assert of_layer[0].neighbours[0] == (1, pytest.approx(1, abs=1e-5))
  dead = of_layer[5]
  assert 'since the evaluation at step 400.' in dead.when
  assert 'balance_loss is 0' in dead.why[0] and 'No token chose it' in dead.why[1]
  card = _Articles(content).cards['l0e5']
  assert card['span.tag'] == ['dead'] and 'step 400' in card['p.why'][0]
  assert 'none: it got no token' in card['span.none'] and 'Load over training' in card['h4']


def test_when_experts_died_is_told_as_far_as_it_is_logged(made):
  _, layers, *_ = made
  layer = layers[0]
  fractions = [(50, 1 / E), (100, 0.0), (150, 0.8 / E), (200, 1 / E), (250, 2 / E)]
  counted = history.History({('moe', 0, 'dead'): fractions}, {})
  assert 'not which: 1 since step 150.' in findings._when(layer, 5, 1, counted)
  assert '1 since step 150, 2 since step 250.' in findings._when(layer, 5, 2, counted)
  nothing = history.History({}, {})
  assert 'logged no loads' in findings._when(layer, 5, 1, nothing)
  assert 'In training it still got' in findings._when(
    layer, 5, 1, history.History({('moe', 0, 'dead'): [(50, 0.0)]}, {})
  )
  assert 'had tokens at the last evaluation' in findings._when(
    layer, 5, 1, history.History({}, {(0, 5): [(50, 0.5)]})
  )


def test_the_page_loads_nothing_and_shows_hostile_text_as_text(made):
  *_, content = made
  parsed = _Articles(content)
  assert parsed.tags.count('script') == 1
  assert all(url.startswith('#') for url in parsed.urls)
  assert {url[1:] for url in parsed.urls} <= parsed.cards.keys()
  assert not re.search(r'(?i)https?:|url\(|@import|<link|<img|<iframe', content)
  assert "default-src 'none'" in content and 'alert(1)' not in content.split('<main>')[0]
  assert 'Experts of &lt;run&gt;' in content and '\u202e' not in content and '\x1b' not in content
  assert page.escape(HOSTILE) == (
    '&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt; &amp; ‹202E›&quot;&lt;b&gt;‹1B›⏎'
  )
  assert len(content.encode()) < 2e6
  shown = ''.join(
    text for card in parsed.cards.values() for texts in card.values() for text in texts
  )
  assert '<script' in shown


def test_places_are_those_of_the_highest_weights():
  rng = np.random.default_rng(0)
  ids, weights = rng.integers(0, 40, 900), rng.random(900).astype(np.float32)
  weights[weights < 0.1] = 0
  places, order = observe.Places(), np.argsort(-weights)
  for part in np.split(np.arange(900), 9):
    places = places.with_more(ids[part], part, weights[part])
  ranks = [np.sum(ids[order[:i]] == ids[place]) for i, place in enumerate(order)]
  expected = [place for place, rank in zip(order, ranks, strict=True) if rank < observe.ALIKE]
  np.testing.assert_array_equal(places.places, expected[: observe.KEPT])
  np.testing.assert_array_equal(places.ids, ids[places.places])


def test_contexts_of_one_token_leave_room_for_others():
  tokenizer = config_lib.resolve(moe.get_config('debug')).tokenizer
  rows = tokenizer.encode('aabacadb aeaf').reshape(1, -1)
  text = observe.Text(tokenizer, rows)
  a = np.flatnonzero(rows[0] == tokenizer.encode('a')[0])
  chosen = text.different([*a, 7], 4)
  assert chosen == [0, 1, 7, 3]
  assert text.around(3) == ('aab', 'a', 'cadb aeaf')


def test_a_model_without_experts_is_refused(made):
  config, *_ = made
  dense = dataclasses.replace(
    config, model=dataclasses.replace(config.model, blocks=((('mlp',), 2),))
  )
  with pytest.raises(ValueError, match='expected a model with experts .* has mlp'):
    observe.observe(dense, None, None)


@pytest.mark.skipif(not shutil.which('chromium'), reason='needs chromium')
def test_the_search_finds_experts_in_a_browser(made, tmp_path):
  *_, content = made
  (tmp_path / 'page.html').write_text(content)
  command = [
    'chromium',
    '--headless',
    '--no-sandbox',
    '--disable-gpu',
    '--virtual-time-budget=2000',
  ]
  command += [f'--user-data-dir={tmp_path}/profile', '--dump-dom']
  url = f'file://{tmp_path}/page.html#search=DEAD%20"layer%200,"'
  done = subprocess.run([*command, url], capture_output=True, text=True, timeout=120, check=True)
  cards = re.findall(r'<article id="(\w+)"([^>]*)>', done.stdout)
  assert [card for card, attributes in cards if 'hidden' not in attributes] == ['l0e5']
  assert re.search(r'1 of \d+ experts', done.stdout)
