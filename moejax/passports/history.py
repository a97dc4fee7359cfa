"""What a run logged of its experts while it was trained."""

import re
from typing import NamedTuple

from moejax import metrics

# By kind of layer: what is shown of its training, and what that means.
SHOWN = {
  'moe': {
    'entropy': 'entropy of router scores (1: uniform)',
    'load_max': 'largest load (1: fair share)',
    'dead': 'experts without a token in a batch',
    'dropped': 'choices without a slot',
  },
  'mot': {
    'entropy': 'entropy of mixtures (1: all tokens alike)',
    'max_weight': 'largest weight in a mixture',
    'temperature': 'temperature of the softmax',
  },
}
_NAME = re.compile(r'(validation/)?(moe|mot)/([a-z_]+)/(\d+)(?:/(\d+))?')


class History(NamedTuple):
  """Curves of (step, value).

  `layers`: of means over steps, by (kind, index of the layer, name). `loads`: of the loads of
  experts at evaluations, by (index, expert).
  """

  layers: dict
  loads: dict

  @property
  def dead(self):
    """{index: curve} of the fraction of experts without a token in a batch."""
    return {i: curve for (kind, i, name), curve in self.layers.items() if name == 'dead'}


def read(workdir) -> History:
  """The History of the run in a folder."""
  history = History({}, {})
  for entry in metrics.read_metrics(workdir):
    for name, value in entry.items():
      if value is None or not (match := _NAME.fullmatch(name)):
        continue
      evaluated, kind, what, index, expert = match.groups()
      point = entry['step'], value
      if expert is not None and evaluated and what == 'load':
        history.loads.setdefault((int(index), int(expert)), []).append(point)
      elif expert is None and not evaluated:
        history.layers.setdefault((kind, int(index), what), []).append(point)
  return history


def fell(curve, threshold):
  """The first step of a curve from which on it stayed below a threshold; None: it did not."""
  since = None
  for step, value in curve:
    if value >= threshold:
      since = None
    elif since is None:
      since = step
  return since


def rose(curve, threshold):
  """The first step from which on it stayed at a threshold or above; None: it did not."""
  return fell([(step, -value) for step, value in curve], -threshold * (1 - 1e-9))
