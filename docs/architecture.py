"""Draws docs/architecture.svg: `python docs/architecture.py`."""

import pathlib

import matplotlib

matplotlib.use('svg')
matplotlib.rcParams.update({'svg.fonttype': 'none', 'svg.hashsalt': 'moejax', 'font.size': 10})
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

FILE = '#1f4e79'
# The path of a batch, from the top: what happens, where.
BATCH = (
  ('flags and config file to a checked config', 'main.py, cli.py, config.py'),
  ('lock the folder, restore, start the loop', 'train.py, run_folder.py'),
  ('load a batch: a function of seed and step', 'data/loader.py'),
  ('shard its sequences over the devices', 'sharding/arrays.py'),
  ('microbatches; gradients are summed', 'step.py'),
  ('embedding, stack of blocks, head', 'model.py'),
  ('sublayers: attention, mlp, moe, mot, mamba', 'layers/'),
  ('their mathematics: arrays in, arrays out', 'ops/'),
  ('loss in nats, by chunks of positions', 'layers/loss.py'),
  ('the update', 'optimizer.py'),
  ('metrics, checkpoint, summary', 'metrics.py, checkpoint.py, report.py'),
)
# The path of a routed token: what, where; on two devices along the expert axis.
TOKEN = (
  ('groups', 'sharding/groups.py'),
  ('scores', 'ops/routing.py'),
  ('plan', 'ops/routing.py'),
  ('dispatch', 'ops/dispatch.py'),
  ('experts', 'layers/experts.py'),
  ('combine', 'ops/dispatch.py'),
)


def box(ax, x, y, width, height, what, where, color):
  style = 'round,pad=0,rounding_size=0.08'
  ax.add_patch(
    FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor='#555555')
  )
  middle = x + width / 2
  ax.text(middle, y + height * 0.67, what, ha='center', va='center')
  ax.text(middle, y + height * 0.28, where, ha='center', va='center', color=FILE, fontsize=8.5)


def arrow(ax, start, end, **style):
  ax.annotate('', end, start, arrowprops={'arrowstyle': '-|>', 'color': '#333333', **style})


def path_of_a_batch(ax):
  ax.set_title('A batch', loc='left', fontweight='bold')
  for i, (what, where) in enumerate(BATCH):
    y = -i * 1.0
    color = '#fdebd0' if where in ('layers/', 'ops/', 'layers/loss.py') else '#eaf2f8'
    box(ax, 0, y, 5, 0.72, what, where, color)
    if i:
      arrow(ax, (2.5, y + 1), (2.5, y + 0.72))
  ax.set(xlim=(-0.1, 5.1), ylim=(-10.2, 0.9))


def path_of_a_token(ax):
  ax.set_title('A routed token (layers/moe.py)', loc='left', fontweight='bold')
  for i, (what, where) in enumerate(TOKEN):
    for device, x in enumerate((0, 4.2)):
      y = -i * 1.55
      box(ax, x, y, 2.6, 0.85, what, where, '#fdebd0' if i else '#eaf2f8')
      if i:
        crossing = what in ('experts', 'combine')
        arrow(ax, (x + 1.3, y + 1.55), (x + 1.3, y + 0.85))
        if crossing:
          arrow(ax, (x + 1.3, y + 1.55), (5.5 - x, y + 0.85), linestyle='--')
      if i == 0:
        ax.text(x + 1.3, 1.05, f'device {device}', ha='center', color='#555555')
  text = dict(ha='left', va='center', fontsize=8.5, color='#555555')
  ax.text(7.0, -5.0, 'all-to-all of slots\n(sharding/exchange.py)', **text)
  ax.text(7.0, -6.55, 'all-to-all back', **text)
  ax.text(7.0, -2.7, 'a Plan: which token\ngoes to which expert', **text)
  ax.text(
    0,
    -9.6,
    'Without a capacity, tokens travel instead of slots: an all-gather before the plan\n'
    'and a reduce-scatter after combine. On a CPU, dispatch, experts and combine are\n'
    'one loop (ops/expert_loop.py). On one device there are no collectives.',
    ha='left',
    va='center',
    fontsize=9,
  )
  ax.set(xlim=(-0.1, 9.2), ylim=(-10.2, 1.4))


def main():
  widths = {'width_ratios': (5.2, 9.3)}
  _, (left, right) = plt.subplots(1, 2, figsize=(11, 7.6), gridspec_kw=widths, layout='tight')
  for ax, draw in ((left, path_of_a_batch), (right, path_of_a_token)):
    draw(ax)
    ax.axis('off')
  path = pathlib.Path(__file__).with_suffix('.svg')
  plt.savefig(path, metadata={'Date': None})


if __name__ == '__main__':
  main()
