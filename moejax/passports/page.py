"""The page: HTML that needs nothing else. All text of the corpus is escaped."""

import base64
import hashlib
import html
import unicodedata

import numpy as np

from moejax import text as text_lib
from moejax.passports import findings as findings_lib, history as history_lib
from moejax.passports.style import SCRIPT, STYLE

_TOKENS, _CONTEXTS = 12, 6
_POINTS = 120  # of a curve
_SHOWN = {'\n': '⏎', '\t': '⇥'}
# Control and format characters, surrogates, and characters that no font has.
_HIDDEN = {'Cc', 'Cf', 'Cs', 'Co', 'Cn', 'Zl', 'Zp'}


def page(name, facts, layers, findings, text, history) -> str:
  """The whole page.

  Args:
    name: of the run.
    facts: about it, as sentences.
    layers: `observe.Layer`s.
    findings: a list of `findings.Finding` for each.
    text: the `observe.Text` of the pass.
    history: a `history.History`.
  """
  of_layers = list(zip(layers, findings, strict=True))
  sections = ''.join(
    _section(number, layer, found, text, history) for number, (layer, found) in enumerate(of_layers)
  )
  digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
  policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)}: experts</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>Experts of {escape(name)}</h1>
{''.join(f'<p class="soft">{escape(fact)}</p>' for fact in facts)}
{_legend(layers)}
<h2>{_map_title(layers)}</h2>
<div class="map">{''.join(_map_row(i, *of_layer) for i, of_layer in enumerate(of_layers))}</div>
<h2>Dead experts, and experts alike</h2>
{_summary(of_layers)}
<div class="bar"><input id="search" type="search" autocomplete="off"
placeholder="Search tokens, contexts, experts: dead, twin, &quot;expert 3&quot; …"
aria-label="Search"><span id="found" class="soft"></span></div>
{sections}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def escape(text) -> str:
  """Any text as HTML in which every character can be seen."""
  return html.escape(''.join(map(_visible, str(text))))


def _visible(character):
  if character in _SHOWN:
    return _SHOWN[character]
  if unicodedata.category(character) in _HIDDEN:
    return f'‹{ord(character):X}›'
  return character


def _token(text, token):
  """A token as HTML; one that is no text by itself by its id."""
  written = text.tokenizer.decode([token])
  if token == text.tokenizer.eos_id:
    return '‹end of text›'
  if not written or '\ufffd' in written:
    return f'‹id {token}›'
  return escape(written.replace(' ', '␣'))


def _legend(layers):
  kinds = {layer.kind for layer in layers}
  lines = [
    '<b>Most typical tokens</b> are those with the largest lift: how many times as large the '
    "expert's part in this token is as its part in any token (ten average tokens are mixed in, so "
    'that rare ones do not lead by chance). The percentage is the token’s share of what the expert '
    'got.',
    '<b>Contexts</b> are the places of the validation text with the largest weights. The marked '
    'token is the one that the expert reads.',
    '<b>Nearest</b>: the cosine between the outputs of two experts for the same inputs, a sample '
    'of those that the layer had, whichever expert they went to. 1: the same function up to a '
    'factor; 0: unrelated. It is cheap, and does not depend on the order of hidden units, as a '
    f'comparison of weights would. Experts at {findings_lib.TWINS} or above are called twins.',
  ]
  if 'moe' in kinds:
    lines += [
      '<b>Load</b> in this pass: the share of all choices, over a fair share; no token is dropped, '
      f'as in decoding. Below {findings_lib.DEAD:.0%} of a fair share an expert is called dead.',
      '<b>Entropy</b> of the router’s scores, mean over the tokens that the expert got, over the '
      'largest possible one. <b>Weight</b>: what its output is multiplied by, mean.',
    ]
  if 'mot' in kinds:
    lines += [
      'An expert of a <b>Mixture of Tokens</b> reads one mixture of every group, so that all have '
      'the same load; its part in a token is the weight of the token. <b>Entropy</b> of its '
      'mixtures, over the largest possible one: 1 mixes all tokens alike, 0 takes one. Whose '
      f'outputs are below {findings_lib.SILENT:.0%} of the median size is called dead.',
    ]
  items = ''.join(f'<li>{line}</li>' for line in lines)
  return f'<details><summary>How to read this page</summary><ul>{items}</ul></details>'


def _map_title(layers):
  kinds = {'moe': 'Load over a fair share', 'mot': 'Entropy of mixtures'}
  return ', '.join(title for kind, title in kinds.items() if any(x.kind == kind for x in layers))


def _map_row(number, layer, findings):
  values = layer.load_E if layer.kind == 'moe' else layer.entropy_E
  cells = []
  for expert, (value, found) in enumerate(zip(values, findings, strict=True)):
    colour = _colour(layer.kind, value)
    dead = ' dead' if found.label == 'dead' else ''
    shown = '×' if dead else f'{value:.2f}'.removeprefix('0')
    cells.append(
      f'<a class="cell{dead}" href="#l{number}e{expert}" style="background:{colour}" '
      f'title="layer {number}, expert {expert}: {value:.3f}">{shown}</a>'
    )
  return f'<span class="soft">layer {number} ({layer.name})</span><div>{"".join(cells)}</div>'


def _colour(kind, value):
  if not np.isfinite(value):
    return 'transparent'
  if kind == 'mot':
    return f'rgba(47,140,110,{0.75 * float(np.clip(1 - value, 0, 1)):.2f})'
  strength = min(1.0, abs(value - 1)) * 0.65
  return f'rgba({"214,96,50" if value > 1 else "60,120,190"},{strength:.2f})'


def _summary(of_layers):
  parts = []
  for label, what in (('dead', 'dead'), ('twin', 'twins')):
    links = [
      f'<a href="#l{number}e{expert}">layer {number}, expert {expert}</a>'
      for number, (_, findings) in enumerate(of_layers)
      for expert, found in enumerate(findings)
      if found.label == label
    ]
    total = sum(layer.num_experts for layer, _ in of_layers)
    parts.append(
      f'<p>{len(links)} of {total} are {what}{": " if links else "."}{", ".join(links)}</p>'
    )
  nearest = [
    (found.neighbours[0][1], number, expert, found.neighbours[0][0])
    for number, (_, findings) in enumerate(of_layers)
    for expert, found in enumerate(findings)
    if found.neighbours
  ]
  if nearest:
    cosine, number, expert, other = max(nearest)
    parts.append(
      f'<p class="soft">The two nearest experts are {expert} and {other} of layer {number}, with a '
      f'cosine of {cosine:.2f}.</p>'
    )
  return ''.join(parts)


def _section(number, layer, findings, text, history):
  curves = ''.join(
    _curve(meaning, history.layers[layer.kind, layer.index, name])
    for name, meaning in history_lib.SHOWN[layer.kind].items()
    if (layer.kind, layer.index, name) in history.layers
  )
  cards = ''.join(
    _card(number, layer, expert, found, text, history) for expert, found in enumerate(findings)
  )
  missing = '<p class="none">The run logged nothing of this layer in training.</p>'
  return (
    f'<section id="l{number}"><h2>Layer {number} <span class="soft">({layer.name})</span></h2>'
    f'<div class="curves">{curves or missing}</div><div class="cards">{cards}</div></section>'
  )


def _curve(caption, curve):
  """A figure of a curve, its last value, and its range."""
  points = np.array(curve, float)
  if len(points) > _POINTS:  # means of equal parts
    parts = np.array_split(points, _POINTS)
    points = np.array([part.mean(axis=0) for part in parts])
  steps, values = points.T
  width, height = 150, 34
  x = (steps - steps[0]) / (np.ptp(steps) or 1) * width
  y = height - (values - values.min()) / (np.ptp(values) or 1) * height
  path = 'M' + 'L'.join(f'{a:.1f} {b:.1f}' for a, b in zip(x, y, strict=True))
  label = (
    f'{caption}: {values[0]:.3g} at step {steps[0]:.0f}, {values[-1]:.3g} at step {steps[-1]:.0f}, '
    f'between {values.min():.3g} and {values.max():.3g}'
  )
  return (
    f'<figure><svg width="{width}" height="{height}" role="img" aria-label="{label}"><title>{label}'
    f'</title><path d="{path}"/><circle cx="{x[-1]:.1f}" cy="{y[-1]:.1f}" r="2.5"/></svg>'
    f'<figcaption>{caption}<br><b>{values[0]:.3g} → {values[-1]:.3g}</b></figcaption></figure>'
  )


def _card(number, layer, expert, found, text, history):
  """The passport of one expert."""
  tag = f'<span class="tag">{found.label}</span>' if found.label else ''
  facts = [f'size of outputs <b>{layer.size_E[expert]:.2f}</b>']
  parts = layer.parts_E[expert]
  if layer.kind == 'moe':
    facts.insert(0, f'load <b>{layer.load_E[expert]:.2f}</b>')
    if parts:
      facts.insert(1, f'weight <b>{layer.weights_E[expert] / parts:.2f}</b>')
  if np.isfinite(layer.entropy_E[expert]):
    facts.insert(-1, f'entropy <b>{layer.entropy_E[expert]:.2f}</b>')
  curve = ''
  if loads := history.loads.get((layer.index, expert)) if layer.kind == 'moe' else None:
    curve = f'<h4>Load over training</h4>{_curve("at evaluations", loads)}'
  tokens = ''.join(
    f'<span><code>{_token(text, token)}</code><i>×{lift:.1f} · {_percent(share)}</i></span>'
    for token, lift, share in layer.lifts(expert, _TOKENS)
  )
  near = ' '.join(
    f'<span><a href="#l{number}e{other}">expert {other}</a> <span class="soft">{cosine:.2f}</span>'
    '</span>'
    for other, cosine in found.neighbours
  )
  why = ''
  if found.label == 'dead':
    reasons = ''.join(f'<li>{escape(reason)}</li>' for reason in found.why)
    why = f'<h4>Dead</h4><p class="why">{escape(found.when)}</p>'
    why += f'<p class="why">Likely because:</p><ul class="why">{reasons}</ul>' if reasons else ''
  nothing = '<span class="none">none: it got no token</span>'
  return (
    f'<article id="l{number}e{expert}"{" class=dead" if found.label == "dead" else ""}>'
    f'<header><h3>layer {number}, expert {expert}</h3>{tag}</header>'
    f'<div class="facts">{"".join(f"<span>{fact}</span>" for fact in facts)}</div>{why}{curve}'
    f'<h4>Most typical tokens</h4><div class="tokens">{tokens or nothing}</div>'
    f'<h4>Contexts</h4>{_contexts(layer, expert, text) or nothing}'
    f'<h4>Nearest</h4><div class="near">{near or "none"}</div></article>\n'
  )


def _percent(share):
  return f'{share:.0%}' if share >= 0.005 else '&lt;1%'


def _contexts(layer, expert, text):
  lines = []
  for place in text.different(layer.places[expert].places, _CONTEXTS):
    before, token, after = text.around(place)
    is_text = token and '\ufffd' not in token
    token = escape(token) if is_text else _token(text, int(text.ids[place]))
    lines.append(
      f'<div class="context"><span class="before">{escape(before)}</span><mark>{token}</mark>'
      f'<span class="after">{escape(after)}</span></div>'
    )
  return ''.join(lines)


def facts(run_config, step, layers) -> list[str]:
  """Sentences about a run and its pass."""
  model, tokens = run_config.model, layers[0].tokens
  kinds = sorted({layer.kind for layer in layers})
  routers = {'moe': model.moe.router.replace('_', ' '), 'mot': 'Mixture of Tokens'}
  experts = sum(layer.num_experts for layer in layers)
  return [
    f'Step {step:,}: {experts} experts in {len(layers)} layers '
    f'({", ".join(routers[kind] for kind in kinds)}). One pass over {text_lib.short(tokens)} '
    'tokens of validation text.'
  ]
