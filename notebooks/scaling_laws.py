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
# # Scaling laws for fine-grained experts
#
# From a table of runs to a law, from a law to a plan, and a run of your own against its
# prediction. The law is that of [arXiv:2402.07871](https://arxiv.org/abs/2402.07871):
#
# $$L(N, D, G) = c + (g G^{-\gamma} + a) N^{-\alpha} + b D^{-\beta}$$
#
# N counts all parameters except embeddings and router, D the training tokens; the granularity G
# says how many times narrower than a dense layer the experts are.

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
RUNS = ''  # a table of runs, or folders of them; '': the 45 runs that come with moejax
D_MODEL = 64
STEPS = 1000
STARTS = 8  # of the fit
SAMPLES = 100  # bootstrap samples of its intervals
FOLDER = 'runs/law'

# %% [markdown]
# ## A table of runs
#
# One line per run: N, D, G, the expansion rate E (parameters of all experts over those of a dense
# layer; 1 is dense) and the loss. `collect` reads such tables, and folders of runs.

# %%
import pathlib
import urllib.request

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, display

import moejax
from moejax.scaling_laws import collect, fit, laws, optimal, plots, report

pathlib.Path(FOLDER).mkdir(parents=True, exist_ok=True)
table = 'docs/laptop_grid/runs.csv'
if not RUNS:  # of the checkout around this folder
  folders = [pathlib.Path.cwd(), *pathlib.Path.cwd().parents]
  RUNS = next((str(f / table) for f in folders if (f / table).exists()), '')
if not RUNS:
  RUNS = f'{FOLDER}/laptop_grid.csv'
  urllib.request.urlretrieve(f'{REPOSITORY}/raw/main/{table}', RUNS)

runs, excluded = collect.collect([RUNS])
sparse, dense = collect.by_kind(runs)
print(f'{len(sparse)} sparse runs, {len(dense)} dense runs, {len(excluded)} left out')
for run in runs[:3]:
  print(run)

# %%
figure, axes = plt.subplots(figsize=(7, 4))
for kind, color in (('dense', 'C3'), (1, 'C0'), (2, 'C1'), (4, 'C2'), (8, 'C4')):
  chosen = [run for run in runs if run.granularity == (laws.DENSE if kind == 'dense' else kind)]
  label = kind if kind == 'dense' else f'G = {kind}'
  axes.scatter([r.flops for r in chosen], [r.loss for r in chosen], s=14, color=color, label=label)
axes.set(xscale='log', xlabel='training FLOPs', ylabel='validation loss (nats per byte)')
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## The fit
#
# Least squares of the losses, robust against outliers, from several starting points; intervals by
# bootstrap. Runs that a fit without the best fifth of them fails to predict would show in the
# second error.

# %%
fits = fit.fit_moe_and_dense(sparse, dense, starts=STARTS, repeats=SAMPLES)
print(report.describe(fits, excluded))
(rate,) = fits.keys() - {1}
law = {r: one.coefficients for r, one in fits.items()}

# %%
for path in plots.plot(law, rate, runs, FOLDER):
  print(path.stem)
  display(Image(path, width=620))

# %% [markdown]
# ## Plans
#
# The best model for a budget, under the law that was fitted here (tiny models, bytes of Python) and
# under the published one (C4, E = 64). Far beyond its largest run, a law is a guess.

# %%
published = laws.PUBLISHED['printed']
print(f'the largest run had {max(run.flops for run in runs):.1e} FLOPs')
for name, coefficients, e, budgets in (
  ('fitted here', law[rate], rate, (1e12, 1e13, 1e14)),
  ('published', published[64], 64, (1e19, 1e20, 1e21)),
):
  print(f'{name}, E = {e:g}')
  for flops in budgets:
    best = optimal.best(coefficients, e, flops)
    print(
      f'  {flops:.0e} FLOPs: N {best.params:.3g} ({best.active_params:.3g} active), '
      f'D {best.tokens:.3g}, G {best.granularity}, loss {best.loss:.3f}'
    )

# %% [markdown]
# `python -m moejax.scaling_laws plan --flops=1e21 --chip=v5e` prints the same with a command that
# trains it.
#
# ## A run of your own
#
# A prediction first, then the run, on the device of this notebook.

# %%
config = moejax.get_config(f'fine_grained:granularity=2,expansion_rate={rate:g}')
config.model.d_model, config.model.d_ff, config.model.num_heads = D_MODEL, 4 * D_MODEL, 2
config.model.blocks = ((('attention', 'moe'), 2),)
config.data.batch_size, config.data.sequence_length = 16, 64
config.train.steps = STEPS
config.train.eval_interval = config.train.checkpoint_interval = STEPS
config.train.sample_length = 0

params = laws.total_params(D_MODEL, 2, rate)
tokens = STEPS * config.data.batch_size * config.data.sequence_length
predicted = laws.loss(law[rate], params, tokens, 2)
print(f'N {params}, D {tokens}: predicted {predicted:.3f} nats per byte')

# %%
run = moejax.fit(config, f'{FOLDER}/own')
(own,), _ = collect.collect([f'{FOLDER}/own'])
error = own.loss - predicted
print(f'measured {own.loss:.3f}, {error:+.3f} from the prediction')
print(f'on the runs of the table, the law is off by {fits[rate].rmse:.3f}')
assert np.isfinite(error)

# %% [markdown]
# The corpus is the standard library of this Python, which differs between versions, so a difference
# of some hundredths is no news. `python -m moejax.sweep` trains grids of your own, and
# `docs/scaling_laws.md` says what the law is good for, and where it missed.
