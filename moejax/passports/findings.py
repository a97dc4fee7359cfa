"""Experts that died, and experts that compute nearly the same: what is recorded of when and why."""

from typing import NamedTuple

import numpy as np

from moejax.passports import history as history_lib

DEAD = 0.01  # of a fair share of the tokens
SILENT = 0.03  # of the median size of outputs, where all experts mix tokens
TWINS = 0.9  # cosine of outputs
_NEIGHBOURS = 3
_ALIKE = 0.98  # entropy of mixtures, over that of equal weights


class Finding(NamedTuple):
  """About one expert."""

  label: str  # '' if there is nothing to say; 'dead' or 'twin'
  when: str = ''  # sentences
  why: tuple[str, ...] = ()  # likely reasons, as sentences
  neighbours: tuple[tuple[int, float], ...] = ()  # the experts with the highest cosines


def of_layer(layer, model, weight_decay, history) -> list[Finding]:
  """The Finding of every expert of an `observe.Layer`, in a ModelConfig."""
  is_dead_E = dead(layer)
  findings = []
  for expert in range(layer.num_experts):
    cosine_E = layer.cosine_EE[expert].copy()
    cosine_E[expert] = -np.inf
    nearest = np.argsort(-cosine_E, kind='stable')[: min(_NEIGHBOURS, len(cosine_E) - 1)]
    neighbours = tuple((int(other), float(cosine_E[other])) for other in nearest)
    has_twin = bool(neighbours) and neighbours[0][1] >= TWINS
    finding = Finding('twin' if has_twin else '', neighbours=neighbours)
    if is_dead_E[expert]:
      when = _when(layer, expert, int(is_dead_E.sum()), history)
      why = tuple(_why(layer, expert, model, weight_decay, neighbours))
      finding = finding._replace(label='dead', when=when, why=why)
    findings.append(finding)
  return findings


def dead(layer):
  """Which experts of a layer do nothing: no tokens, or, as all mix some, outputs of nothing."""
  lives_E = layer.size_E >= SILENT if layer.kind == 'mot' else layer.load_E >= DEAD
  return ~lives_E  # nan is no size


def _when(layer, expert, number, history):
  if layer.kind == 'mot':
    return 'When is not recorded: runs do not log the outputs of experts.'
  if curve := history.loads.get((layer.index, expert)):
    since = history_lib.fell(curve, DEAD)
    if since is None:
      return f'It had tokens at the last evaluation of the run, step {curve[-1][0]:,}.'
    first = ', the first one' if since == curve[0][0] else ''
    return f'Below {DEAD:.0%} of a fair share since the evaluation at step {since:,}{first}.'
  if not (curve := history.dead.get(layer.index)):
    return 'When is not recorded: this run logged no loads.'
  E = layer.num_experts
  steps = [history_lib.rose(curve, (k - 0.5) / E) for k in range(1, number + 1)]
  known = [f'{k} since step {step:,}' for k, step in enumerate(steps, 1) if step is not None]
  if not known:
    return 'In training it still got some tokens of most batches.'
  return (
    'This run logged how many experts of the layer had no token in a batch, not which: '
    f'{", ".join(known)}.'
  )


def _why(layer, expert, model, weight_decay, neighbours):
  if not np.isfinite(layer.products_EE[expert]).all():
    yield 'Its outputs are not finite.'
    return
  if layer.kind == 'moe' and not layer.parts_E[expert]:
    moe = model.moe
    if not moe.rule.fills_slots and not moe.balance_loss and not moe.balance_bias:
      yield (
        'Nothing balanced the loads: model.moe.balance_loss is 0 and there is no balance_bias, so '
        'that experts with more tokens learn more, and get more.'
      )
    fullest = int(np.argmax(layer.parts_E))
    share = layer.parts_E[fullest] / max(layer.parts_E.sum(), 1)
    if share > 0.5:
      yield f'The router collapsed: expert {fullest} gets {share:.0%} of all choices.'
    distance = -layer.closest_E[expert]
    yield (
      f'No token chose it: its score was never closer than {distance:.2g} nats to the best one '
      f'(mean share of the scores {layer.scores_E[expert] / layer.tokens:.1e}, fair '
      f'{1 / layer.num_experts:.1e}).'
    )
  if layer.kind == 'mot' and layer.entropy_E[expert] > _ALIKE:
    yield (
      f'It mixes all tokens of a group alike (entropy {layer.entropy_E[expert]:.3f}), and the mean '
      'of unrelated tokens says little about any of them.'
    )
  if neighbours and neighbours[0][1] >= TWINS:
    other, cosine = neighbours[0]
    yield (
      f'Expert {other} computes nearly the same (cosine {cosine:.2f}), so that its tokens lost '
      'little there.'
    )
  if layer.size_E[expert] < 0.1:
    decay = ' Weight decay shrinks what earns little gradient.' if weight_decay else ''
    yield f'Its outputs are {layer.size_E[expert]:.1e} of the size of the median expert.{decay}'
