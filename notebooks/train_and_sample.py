# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#   jupytext:
#     cell_metadata_filter: cellView,tags,-all
#     notebook_metadata_filter: accelerator,colab,-all
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train and sample
#
# A Mixture-of-Tokens model and a dense model of equal active FLOPs, trained side by side on the
# source code of Python's standard library; then text, groups of other sizes, and transition
# tuning to a sparse model that serves single requests.
#
# Sized for about ten minutes on one TPU v5e: compiled ahead of time for it, a step takes at least
# 0.045 to 0.058 s.

# %% cellView="form"
# @title Install moejax { display-mode: "form" }
# @markdown In Colab, this takes about a minute. Elsewhere, moejax must be installed already.
REPOSITORY = 'https://github.com/OWNER/moejax'  # @param {type: "string"}

import glob
import subprocess
import sys

if 'google.colab' in sys.modules:
  # Before jax is imported: Colab's libtpu is older than its jax needs.
  extra = '[tpu]' if glob.glob('/dev/accel*') + glob.glob('/dev/vfio/*') else ''
  pip = [sys.executable, '-m', 'pip', 'install', '--quiet']
  subprocess.run([*pip, f'moejax{extra} @ git+{REPOSITORY}'], check=True)

import jax

print(f'{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}')

# %% tags=["parameters"]
# For some minutes on a CPU: 500 steps, width 64, 4 blocks, batch 32, context 64.
STEPS = 2000
D_MODEL = 512
BLOCKS = 8
BATCH = 64
CONTEXT = 256
SAMPLE = 200
FOLDER = 'runs/notebook'

# %% [markdown]
# ## Two configs
#
# `moejax.get_config` returns the config of a bundled file; every field may be changed. The two
# models differ in one thing: the feed-forward layers are dense, or a Mixture of Tokens of 32
# experts, which together cost as much per token.

# %%
import matplotlib.pyplot as plt
from IPython.display import display

import moejax
from moejax import trackers


def make_config(name):
  config = moejax.get_config(name)
  config.model.d_model = D_MODEL
  config.model.d_ff = 4 * D_MODEL
  config.model.num_heads = max(D_MODEL // 64, 1)
  ((pattern, _),) = config.model.blocks
  config.model.blocks = ((pattern, BLOCKS),)
  config.data.batch_size = BATCH
  config.data.sequence_length = CONTEXT
  config.train.steps = STEPS
  config.train.log_interval = max(STEPS // 200, 1)
  config.train.eval_interval = max(STEPS // 10, 1)
  config.train.checkpoint_interval = STEPS
  config.train.sample_length = 0
  if jax.default_backend() != 'cpu':
    config.model.dtype = 'bfloat16'  # parameters and moments stay float32
  return config


configs = {name: make_config(name) for name in ('dense', 'mot')}
mot = configs['mot'].model.mot
mot.group_size, mot.num_experts = 8, 32  # sequences; experts of width d_ff / 4

# %% [markdown]
# ## Training, with live curves
#
# Trackers receive the metrics of a run as it trains. This one, of our own, redraws a figure;
# registered under a name, it is one more value of `train.trackers`, beside `tensorboard` and
# `wandb`.

# %%
curves = {}
figure, axes = plt.subplots(figsize=(8, 4))
plt.close(figure)
view = display(figure, display_id=True)


class LiveCurves:
  """Draws the losses of all runs so far."""

  def __init__(self, workdir, config, start_step):
    self.curves = curves.setdefault(workdir.name, {'loss': [], 'validation/loss': []})

  def write(self, step, metrics):
    for name, points in self.curves.items():
      if name in metrics:
        points.append((step, metrics[name]))
    if 'validation/loss' in metrics:  # a redraw at every evaluation
      self.draw()

  def draw(self):
    axes.clear()
    for color, (run, named) in enumerate(curves.items()):
      for name, points in named.items():
        style = dict(alpha=0.3) if name == 'loss' else dict(marker='o', label=f'{run}, validation')
        axes.plot(*zip(*points, strict=True), color=f'C{color}', **style)
    axes.set(xlabel='step', ylabel='loss (nats per byte)')
    axes.legend(frameon=False)
    view.update(figure)

  def close(self):
    pass


trackers.TRACKERS['live'] = LiveCurves

# %%
runs = {}
for name, config in configs.items():
  config.train.trackers = ('live',)
  runs[name] = moejax.fit(config, f'{FOLDER}/{name}')

# %% [markdown]
# The same experts, the same data in the same order, the same FLOPs per token. What is a
# difference, and what is noise? Change `config.train.seed` and train again before you believe it.

# %%
for name, run in runs.items():
  summary = run.summary
  total = summary['parameters']['total']
  print(
    f'{name:6} {total / 1e6:6.2f}M parameters, validation {summary["validation"]["loss"]:.3f} nats '
    f'per byte, {summary["seconds"]:.0f} s'
  )

# %% [markdown]
# ## Samples

# %%
prompt = 'def read_lines(path):\n'
for name, run in runs.items():
  print(f'--- {name}\n{prompt}{run.generate(prompt, SAMPLE, temperature=0.7, seed=1)}')

# %% [markdown]
# ## Groups of other sizes
#
# The parameters do not depend on the group size: the same model can be evaluated in groups of one,
# where no request influences another, of half as many sequences, of twice as many. It was trained
# in one size, and that is where it is good.

# %%
sizes = [size for size in (2, 4, 8, 16, 32) if BATCH % size == 0]
mixed = runs['mot'].evaluate(['mixed'], sizes, batches=4)
(alone,) = runs['mot'].evaluate(['unmixed'], batches=4)
figure, axes = plt.subplots(figsize=(6, 3))
losses = [alone['loss'], *(result['loss'] for result in mixed)]
axes.plot([1, *sizes], losses, marker='o')
axes.axvline(runs['mot'].config.model.mot.group_size, color='0.7', linestyle='--')
axes.set_xscale('log', base=2)
axes.set(xlabel='sequences in a group (dashed: in training)', ylabel='loss (nats per byte)')
plt.show()

# %% [markdown]
# ## Transition tuning
#
# For single requests, the model becomes a sparse one: the same experts, with the controller as
# their router. A tenth more training repairs most of what the change costs.

# %%
from moejax import transition_tuning

transition_tuning.tune(
  f'{FOLDER}/mot', f'{FOLDER}/tuned', 'token_choice', fields={'train.trackers': "('live',)"}
)
sparse = moejax.load(f'{FOLDER}/tuned')
for name, measured in sparse.summary['transition'].items():
  if name != 'from':
    print(f'{name:14} step {measured["step"]}, {measured["loss"]:.3f} nats per byte')

# %% [markdown]
# The tuned model serves one request at the cost of a dense one, and nobody influences it:

# %%
print(prompt + sparse.generate(prompt, SAMPLE, temperature=0.7, seed=1))

# %% [markdown]
# ## More devices
#
# Free Colab has one chip. Eight simulated CPU devices run what a pod runs, and `moejax.aot`
# compiles for a pod that you do not have (docs/pods.md).

# %%
import os

command = [sys.executable, '-m', 'moejax.main', '--config=configs/fine_grained.py:debug']
command += [f'--workdir={FOLDER}/mesh', '--config.mesh.fsdp=2', '--config.mesh.expert=4']
environment = os.environ | {
  'JAX_PLATFORMS': 'cpu',
  'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
}
done = subprocess.run(command, env=environment, capture_output=True, text=True)
print(done.stdout, done.stderr)
assert done.returncode == 0
