"""Draws the pictures of docs/concepts/: `python docs/concepts/pictures.py`.

What can be computed is: weights, states and placements come from moejax's own functions.
"""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use('svg')
matplotlib.rcParams.update(
  {'svg.fonttype': 'none', 'svg.hashsalt': 'moejax', 'font.size': 10, 'axes.titlesize': 10}
)
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyArrowPatch, Rectangle  # noqa: E402

from moejax import model, sharding  # noqa: E402, F401 (model declares its parameters)
from moejax.ops import mixing, selective_scan  # noqa: E402
from moejax.scaling_laws import laws  # noqa: E402
from moejax.sharding import rules  # noqa: E402

FOLDER = pathlib.Path(__file__).parent
COLORS = [f'C{i}' for i in range(8)]


def save(figure, name):
  figure.savefig(FOLDER / f'{name}.svg', metadata={'Date': None})
  plt.close(figure)


def bare(axes, title=''):
  axes.set(xticks=[], yticks=[])
  axes.set_title(title, loc='left')
  axes.spines[:].set_visible(False)


def box(axes, x, y, width, height, text='', color='white', **options):
  axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor='0.3', **options))
  axes.text(x + width / 2, y + height / 2, text, ha='center', va='center')


def arrow(axes, start, end, **options):
  axes.add_patch(
    FancyArrowPatch(start, end, arrowstyle='-|>', mutation_scale=9, color='0.3', **options)
  )


def mixture_of_tokens():
  """A group of four tokens, three experts: the batch, the weights, the mixtures, the output."""
  M, E, D = 4, 3, 8
  keys = jax.random.split(jax.random.key(3), 2)
  x_CMD = jax.random.normal(keys[0], (1, M, D))
  weights_CME = jax.nn.softmax(1.5 * jax.random.normal(keys[1], (1, M, E)), axis=1)
  mixtures_ECD = mixing.merge(x_CMD, weights_CME)
  y_CMD = mixing.emit(jax.nn.relu(mixtures_ECD), weights_CME)
  figure, axes = plt.subplots(
    1, 5, figsize=(10, 2.8), width_ratios=[1.2, 1.6, 1, 1.6, 1.6], layout='constrained'
  )
  letters = np.array([list('def f('), list('x = 1 '), list('import'), list('return')])
  batch = axes[0]
  batch.set(xlim=(-0.6, 5.6), ylim=(3.6, -0.6))
  for row, text in enumerate(letters):
    for column, letter in enumerate(text):
      batch.text(column, row, letter, ha='center', va='center', family='monospace')
  batch.add_patch(Rectangle((1.5, -0.5), 1, 4, facecolor='none', edgecolor='C3', linewidth=2))
  bare(batch, 'one position of four\nsequences is a group')
  panels = (
    (x_CMD[0], 'its tokens\nx [M, D]', 'M', 'coolwarm'),
    (weights_CME[0], 'merge weights:\nsoftmax over M', 'M', 'Greens'),
    (mixtures_ECD[:, 0], 'mixtures, one for\neach expert [E, D]', 'E', 'coolwarm'),
    (y_CMD[0], 'outputs, returned by\nthe same weights [M, D]', 'M', 'coolwarm'),
  )
  for panel, (values, title, rows, colors) in zip(axes[1:], panels, strict=True):
    limits = dict(vmin=0, vmax=1) if colors == 'Greens' else dict(vmin=-2, vmax=2)
    panel.imshow(np.asarray(values), cmap=colors, aspect='auto', **limits)
    bare(panel, title)
    panel.set_ylabel(rows, rotation=0, labelpad=8)
    if colors == 'Greens':
      for (row, column), value in np.ndenumerate(np.asarray(values)):
        color = 'white' if value > 0.6 else 'black'
        panel.text(column, row, f'{value:.2f}', ha='center', va='center', color=color)
  save(figure, 'mixture_of_tokens')


def granularity():
  """Equal active width by coarse and fine experts, and the loss that the law predicts."""
  figure, (experts, curve) = plt.subplots(
    1, 2, figsize=(10, 3.4), width_ratios=[1.3, 1], layout='constrained'
  )
  rng = np.random.default_rng(1)
  rows = ((None, 'dense'), (1, 'G = 1, 4 experts'), (2, 'G = 2, 8 experts'), (4, 'G = 4, 16'))
  for y, (G, label) in enumerate(rows):
    experts.text(-0.1, -y, label, ha='right', va='center')
    number, width = (1, 1.0) if G is None else (4 * G, 1 / G)
    chosen = set(rng.choice(number, size=G or 1, replace=False).tolist())
    for e in range(number):
      color = 'C0' if e in chosen else '0.92'
      patch = Rectangle((e * width, -y - 0.3), width, 0.6, facecolor=color, edgecolor='white')
      experts.add_patch(patch)
  experts.set(xlim=(-1.6, 4.1), ylim=(-3.6, 0.6))
  bare(experts, 'hidden units of a layer, E = 4; blue: what one token activates')
  G = 2.0 ** np.arange(8)
  for exponent in (19, 20, 21):
    d_model, blocks = {19: (512, 8), 20: (1024, 16), 21: (1536, 24)}[exponent]
    tokens = 10.0**exponent / laws.flops_per_token(d_model, blocks, 64, G)
    params = laws.total_params(d_model, blocks, 64)
    loss = laws.loss(laws.PUBLISHED['printed'][64], params, tokens, G)
    label = f'$10^{{{exponent}}}$ FLOPs, d {d_model}'
    (line,) = curve.plot(G, loss, marker='o', markersize=3, label=label)
    best = int(np.argmin(loss))
    curve.plot(G[best], loss[best], marker='o', markersize=8, color=line.get_color())
  curve.set_xscale('log', base=2)
  curve.set(xlabel='granularity G', ylabel='predicted loss (nats per token)')
  curve.set_title('at equal FLOPs, router included', loc='left')
  curve.legend(frameon=False, fontsize=8)
  curve.grid(color='0.9')
  curve.spines[['top', 'right']].set_visible(False)
  save(figure, 'granularity')


def selective_scan_states():
  """States of one channel with constant and with selected step sizes, and the chunks."""
  L, N, chunk = 64, 8, 16
  x_BLI = np.zeros((1, L, 1), np.float32)
  x_BLI[0, [3, 37], 0] = 1.0
  constant, selected = np.full((1, L, 1), -1.0, np.float32), np.full((1, L, 1), -5.0, np.float32)
  selected[0, [3, 37], 0] = 1.5
  a_IN = -np.arange(1, N + 1, dtype=np.float32)[None] / 4
  figure, axes = plt.subplots(3, 1, figsize=(10, 4), sharex=True, layout='constrained')
  axes[0].stem(np.arange(L), x_BLI[0, :, 0], basefmt='0.8', markerfmt='C3o', linefmt='C3-')
  axes[0].set_ylabel('x')
  titles = ('constant step sizes: every state fades', 'selected: large at x, then small')
  for panel, delta_BLI, title in zip(axes[1:], (constant, selected), titles, strict=True):
    state_BNI, states = jnp.zeros((1, N, 1)), []
    for t in range(L):
      ones = np.ones((1, N), np.float32)
      _, state_BNI = selective_scan.step(
        x_BLI[:, t], delta_BLI[:, t], a_IN, ones, ones, np.ones(1), np.ones((1, 1)), np.zeros(1),
        state_BNI, np.zeros(1, bool),
      )  # fmt: skip
      states.append(np.asarray(state_BNI)[0, :, 0])
    image = np.array(states).T
    panel.imshow(image / image.max(), aspect='auto', cmap='Purples', interpolation='nearest')
    panel.set_ylabel('state n')
    panel.set_yticks([])
    panel.set_title(title, loc='left')
    for edge in range(chunk, L, chunk):
      panel.axvline(edge - 0.5, color='C1', linewidth=1.2, linestyle='--')
  axes[2].set_xlabel('position; dashed: states that are saved, one per chunk')
  axes[0].spines[['top', 'right']].set_visible(False)
  axes[0].set_yticks([])
  save(figure, 'selective_scan')


def expert_parallelism():
  """Two devices, four experts: capacity slots by all-to-all, ragged rows by all-gather."""
  figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout='constrained')
  steps = (
    ('with a capacity: two all-to-alls', 'slots', 'all-to-all', 'all-to-all'),
    ('without (ragged): all-gather, reduce-scatter', 'rows', 'all-gather', 'reduce-scatter'),
  )
  for panel, (title, what, there, back) in zip(axes, steps, strict=True):
    panel.set(xlim=(0, 10), ylim=(0, 10))
    bare(panel, title)
    for device, x in enumerate((0.3, 5.2)):
      color = COLORS[device]
      panel.add_patch(
        Rectangle((x, 0.1), 4.5, 9.6, facecolor='none', edgecolor=color, linestyle='--')
      )
      panel.text(x + 0.15, 9.3, f'device {device}', color=color)
      box(panel, x + 0.4, 8.1, 3.7, 0.8, f'its tokens, scores, {"plan" if what == "slots" else ""}'
          .rstrip(', '), color='0.95')  # fmt: skip
      experts = f'experts {2 * device}, {2 * device + 1}'
      if what == 'slots':
        for e in range(4):
          box(panel, x + 0.4 + 0.93 * e, 6.4, 0.9, 0.8, f'E{e}', color=COLORS[e // 2], alpha=0.35)
      else:
        box(panel, x + 0.4, 6.4, 3.7, 0.8, 'all tokens of both;\nplans for its own experts',
            color='0.95')  # fmt: skip
      box(panel, x + 0.4, 3.9, 3.7, 0.8, experts, color=COLORS[device], alpha=0.35)
      box(panel, x + 0.4, 1.0, 3.7, 0.8, 'combine: its tokens', color='0.95')
    for start, end in ((0.3, 0.3), (0.3, 5.2), (5.2, 0.3), (5.2, 5.2)):
      high, low = (6.4, 4.7) if what == 'slots' else (8.1, 7.2)
      arrow(panel, (start + 2.2, high), (end + 2.3, low))
      arrow(panel, (start + 2.2, 3.9), (end + 2.3, 1.8))
    if what == 'rows':
      for x in (0.3, 5.2):
        arrow(panel, (x + 2.25, 6.4), (x + 2.25, 4.7))
    else:
      for x in (0.3, 5.2):
        arrow(panel, (x + 2.25, 8.1), (x + 2.25, 7.2))
    style = dict(ha='center', va='center', bbox=dict(facecolor='white', edgecolor='none', pad=2))
    panel.text(5.0, 5.5 if what == 'slots' else 7.65, there, **style)
    panel.text(5.0, 2.85, back, **style)
  save(figure, 'expert_parallelism')


def meshes():
  """Which device holds which part of a parameter, and of the batch, on three meshes."""
  shapes = {
    'batch': (8, 64),
    'embedding': (512, 256),
    'mlp/w_in': (256, 1024),
    'experts/w_in': (8, 256, 1024),
  }
  mesh_configs = (
    ('data=8', dict(data=8, fsdp=1, expert=1, tensor=1)),
    ('data=2, fsdp=4', dict(data=2, fsdp=4, expert=1, tensor=1)),
    ('fsdp=2, expert=4', dict(data=1, fsdp=2, expert=4, tensor=1)),
    ('data=4, tensor=2', dict(data=4, fsdp=1, expert=1, tensor=2)),
  )
  figure, axes = plt.subplots(
    len(mesh_configs), len(shapes), figsize=(10, 7.5), layout='constrained'
  )
  for row, (label, sizes) in zip(axes, mesh_configs, strict=True):
    mesh = sharding.make_mesh(sharding.MeshConfig(**sizes))
    for panel, (name, shape) in zip(row, shapes.items(), strict=True):
      with jax.set_mesh(mesh):
        spec = sharding.BATCH if name == 'batch' else rules.spec(f'layer/{name}', shape)
      placed = jax.sharding.NamedSharding(mesh, spec).devices_indices_map(shape)
      draw_placement(panel, shape, placed)
      bare(panel, f'{name} {list(shape)}' if sizes['data'] == 8 else '')
      if name == 'batch':
        panel.set_ylabel(label, fontsize=11)
  save(figure, 'meshes')


def draw_placement(panel, shape, placed):
  """One rectangle per distinct part, with the devices that hold it."""
  parts = {}
  for device, index in placed.items():
    bounds = tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))
    parts.setdefault(bounds, []).append(device.id)
  last = shape[-1]
  panel.set(xlim=(0, 1), ylim=(1, 0))
  for bounds, devices in parts.items():
    # Experts [E, D, F] are drawn as E rows, of D rows each.
    top, height = 0.0, 1.0
    for (start, end), n in zip(bounds[:-1], shape[:-1], strict=True):
      top, height = top + height * start / n, height * (end - start) / n
    left, right = (edge / last for edge in bounds[-1])
    color = plt.get_cmap('viridis')(min(devices) / 8)
    text = ','.join(map(str, sorted(devices))) if len(devices) < 8 else 'all'
    panel.add_patch(
      Rectangle((left, top), right - left, height, facecolor=color, alpha=0.45, edgecolor='white')
    )
    panel.text((left + right) / 2, top + height / 2, text, ha='center', va='center', fontsize=8)


if __name__ == '__main__':
  mixture_of_tokens()
  granularity()
  selective_scan_states()
  expert_parallelism()
  meshes()
