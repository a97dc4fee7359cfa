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
# # Follow a batch
#
# Eight tokens go through an embedding, a Mixture-of-Tokens layer, a sparse layer with two
# experts, the loss, and back. Every array on the way is a picture, and is computed twice: by
# moejax, and by a line of numpy beside it. The names of arrays end in their axes: B sequences, L
# positions, D model width, E experts, M tokens of a group, F hidden width, V vocabulary.

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

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from moejax import layers

jax.config.update('jax_default_matmul_precision', 'highest')  # a TPU's default is bfloat16


def show(*arrays, **named):
  """Draws matrices side by side, with their numbers; titles are the names of the arguments."""
  named = {**{f'array {i}': a for i, a in enumerate(arrays)}, **named}
  matrices = {name: np.atleast_2d(np.asarray(a, float)) for name, a in named.items()}
  widths = [max(m.shape[-1], 2) for m in matrices.values()]
  rows = max(len(m) for m in matrices.values())
  size = (0.62 * sum(widths) + 0.6 * len(widths), 0.42 * rows + 0.7)
  figure, axes = plt.subplots(1, len(matrices), figsize=size, width_ratios=widths, squeeze=False)
  for panel, (name, matrix) in zip(axes[0], matrices.items(), strict=True):
    limit = np.abs(matrix).max() or 1
    panel.imshow(matrix, cmap='coolwarm', vmin=-1.3 * limit, vmax=1.3 * limit, aspect='auto')
    for (row, column), value in np.ndenumerate(matrix):
      panel.text(column, row, f'{value:.3g}', ha='center', va='center', fontsize=7)
    panel.set_title(f'{name} {list(np.shape(named[name]))}', fontsize=8)
    panel.set(xticks=[], yticks=[])
  figure.tight_layout()
  plt.show()


def same(ours, by_hand):
  np.testing.assert_allclose(np.asarray(ours), np.asarray(by_hand), rtol=1e-5, atol=1e-5)


# %% [markdown]
# ## The batch
#
# Two sequences of four tokens, B = 2 and L = 4, over an alphabet of six. The target of a token
# is its successor.

# %%
ALPHABET = ' abcde'
texts = ['abcab', 'dad d']
ids = np.array([[ALPHABET.index(letter) for letter in text] for text in texts])
inputs_BL, targets_BL = ids[:, :-1], ids[:, 1:]
B, L, D, F, E, V = 2, 4, 4, 8, 2, len(ALPHABET)
show(inputs_BL=inputs_BL, targets_BL=targets_BL)

# %% [markdown]
# ## Embedding
#
# A row of a table for every token: the same letter is the same row, wherever it stands.

# %%
embedding_VD = jax.random.normal(jax.random.key(0), (V, D))
x_BLD = embedding_VD[inputs_BL]
show(embedding_VD=embedding_VD, first_sequence_LD=x_BLD[0], second_sequence_LD=x_BLD[1])
assert x_BLD.shape == (B, L, D)
same(x_BLD[0, 0], x_BLD[0, 3])  # both are an a

# %% [markdown]
# ## Mixture of Tokens
#
# The two tokens at one position, one of each sequence, form a group: M = 2. The controller scores
# them for each of the two experts, and a softmax **over the tokens of the group** makes weights
# of the scores.

# %%
mot = layers.MixtureOfTokens(d_model=D, d_ff=F, num_experts=E, group_size=B, rngs=nnx.Rngs(1))
y_BLD, metrics = mot(x_BLD)

controller_DE = np.asarray(mot.controller[...])
x_LMD = np.swapaxes(x_BLD, 0, 1)  # groups first: one for every position
scores_LME = x_LMD @ controller_DE
weights_LME = np.exp(scores_LME) / np.exp(scores_LME).sum(axis=1, keepdims=True)
show(
  group_at_position_0_MD=x_LMD[0],
  controller_DE=controller_DE,
  scores_ME=scores_LME[0],
  weights_ME=weights_LME[0],
)
same(weights_LME.sum(axis=1), np.ones((L, E)))

# %% [markdown]
# Each expert sees one mixture of the group. At position 2 (letters c and d) and position 3 (a and
# a space):

# %%
mixtures_LED = np.einsum('LME,LMD->LED', weights_LME, x_LMD)
show(
  tokens_MD=x_LMD[2],
  weights_ME=weights_LME[2],
  mixtures_ED=mixtures_LED[2],
  next_tokens_MD=x_LMD[3],
  next_weights_ME=weights_LME[3],
  next_mixtures_ED=mixtures_LED[3],
)

# %% [markdown]
# The experts are two small networks. Their outputs return to the tokens by the same weights.
# Nothing moves along positions, so the layer is causal, but a sequence sees its neighbour at the
# same position.

# %%
w_in_EDF, w_out_EFD = (np.asarray(w[...]) for w in (mot.experts.w_in, mot.experts.w_out))
hidden_LEF = np.maximum(np.einsum('LED,EDF->LEF', mixtures_LED, w_in_EDF), 0)
outputs_LED = np.einsum('LEF,EFD->LED', hidden_LEF, w_out_EFD)
emitted_LMD = np.einsum('LME,LED->LMD', weights_LME, outputs_LED)
show(hidden_EF=hidden_LEF[2], outputs_ED=outputs_LED[2], back_to_tokens_MD=emitted_LMD[2])
same(y_BLD, np.swapaxes(emitted_LMD, 0, 1))
print({name: round(float(value), 3) for name, value in metrics.items()})

# %% [markdown]
# What leaks: changing the second sequence at its last position changes the first one's output
# there, and nowhere else. Alone in its group (`group_size=1`), a sequence is not influenced by
# any other.

# %%
neighbour_BLD = x_BLD.at[1, 3].set(1.0)
changed_BLD = mot(neighbour_BLD)[0]
show(change_of_the_first_sequence_LD=np.abs(changed_BLD - y_BLD)[0])
same(changed_BLD[0, :3], y_BLD[0, :3])
assert np.abs(changed_BLD[0, 3] - y_BLD[0, 3]).max() > 1e-3

# %% [markdown]
# ## A sparse layer
#
# Two experts again, but every token takes **one**: the one with the higher probability, a softmax
# over the experts. The layer gets the residual stream, what came in plus what the layer before
# added.

# %%
moe = layers.MixtureOfExperts(
  d_model=D, d_ff=F, expansion_rate=E, capacity_factor=0.0, group_size=B, rngs=nnx.Rngs(2)
)
x2_BLD = x_BLD + y_BLD
y2_BLD, metrics = moe(x2_BLD)

logits_BLE = np.asarray(x2_BLD) @ np.asarray(moe.router[...])
probabilities_BLE = np.exp(logits_BLE) / np.exp(logits_BLE).sum(axis=-1, keepdims=True)
choice_BL = probabilities_BLE.argmax(axis=-1)
show(
  x_LD=x2_BLD[0],
  router_DE=moe.router[...],
  probabilities_LE=probabilities_BLE[0],
  choice_L1=choice_BL[0][:, None],
)

# %% [markdown]
# **Dispatch** sorts the tokens by their expert, the experts compute on their rows only, and
# **combine** brings every output back to its token, multiplied by the token's probability.

# %%
tokens_TD, choice_T = np.asarray(x2_BLD).reshape(B * L, D), choice_BL.reshape(-1)
order_T = np.argsort(choice_T, kind='stable')
rows_TD, expert_T = tokens_TD[order_T], choice_T[order_T]
w_in_EDF, w_out_EFD = (np.asarray(w[...]) for w in (moe.experts.w_in, moe.experts.w_out))
hidden_TF = np.maximum(np.einsum('TD,TDF->TF', rows_TD, w_in_EDF[expert_T]), 0)
out_TD = np.einsum('TF,TFD->TD', hidden_TF, w_out_EFD[expert_T])
combined_TD = np.zeros_like(out_TD)
combined_TD[order_T] = out_TD
combined_TD *= probabilities_BLE.reshape(B * L, E)[np.arange(B * L), choice_T][:, None]
show(
  tokens_TD=tokens_TD,
  expert_T1=choice_T[:, None],
  rows_TD=rows_TD,
  expert_of_row_T1=expert_T[:, None],
  combined_TD=combined_TD,
)
same(y2_BLD.reshape(B * L, D), combined_TD)

load_E = np.bincount(choice_T, minlength=E) / (B * L) * E
show(load_E=load_E, of_moejax_E=metrics['moe/load'])
same(metrics['moe/load'], load_E)

# %% [markdown]
# ## Loss
#
# The output projection makes scores of all letters; the loss is the mean negative log-probability
# of the targets, in nats. A model that guesses pays log V.

# %%
head_DV = jax.random.normal(jax.random.key(3), (D, V)) / np.sqrt(D)
final_BLD = x2_BLD + y2_BLD
logits_BLV = np.asarray(final_BLD @ head_DV)
log_probabilities_BLV = logits_BLV - np.log(np.exp(logits_BLV).sum(axis=-1, keepdims=True))
nats_BL = -np.take_along_axis(log_probabilities_BLV, targets_BL[..., None], axis=-1)[..., 0]
show(
  probabilities_LV=np.exp(log_probabilities_BLV[0]),
  targets_L1=targets_BL[0][:, None],
  nats_BL=nats_BL,
)
print(f'loss {nats_BL.mean():.4f} nats per token; log V is {np.log(V):.4f}')

# %% [markdown]
# ## Gradient
#
# All of it as one function of the parameters, differentiated. In the sparse layer only the chosen
# experts get a gradient from a token; in the Mixture of Tokens all experts get one from every
# token of the group.


# %%
class Model(nnx.Module):
  """The parameters of all that was above."""

  def __init__(self, embedding_VD, mot, moe, head_DV):
    self.embedding, self.head = nnx.Param(embedding_VD), nnx.Param(head_DV)
    self.mot, self.moe = mot, moe


def loss(model):
  x_BLD = model.embedding[...][inputs_BL]
  x_BLD += model.mot(x_BLD)[0]
  x_BLD += model.moe(x_BLD)[0]
  log_probabilities_BLV = jax.nn.log_softmax(x_BLD @ model.head[...])
  return -jnp.take_along_axis(log_probabilities_BLV, targets_BL[..., None], axis=-1).mean()


model = Model(embedding_VD, mot, moe, head_DV)
value, gradients = nnx.value_and_grad(loss)(model)
same(value, nats_BL.mean())
d_embedding_VD = gradients.embedding[...]
show(
  d_embedding_VD=d_embedding_VD,
  d_head_DV=gradients.head[...],
  d_controller_DE=gradients.mot.controller[...],
)

# %% [markdown]
# A gradient is a prediction: a small step along one number changes the loss by that number's
# gradient. Letters that do not occur in the inputs have none.

# %%
a = ALPHABET.index('a')
high, low = (
  loss(Model(embedding_VD.at[a, 0].add(step), mot, moe, head_DV)) for step in (1e-2, -1e-2)
)
measured = float(high - low) / 2e-2
print(f'gradient {float(d_embedding_VD[a, 0]):.5f}, measured {measured:.5f}')
np.testing.assert_allclose(d_embedding_VD[a, 0], measured, rtol=0.02, atol=2e-4)
unused = [i for i in range(V) if i not in inputs_BL]
same(d_embedding_VD[np.array(unused, int)], np.zeros((len(unused), D)))

# %% [markdown]
# One step of gradient descent lowers the loss:

# %%
nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model), gradients))
print(f'loss before {float(value):.4f}, after {float(loss(model)):.4f}')
assert loss(model) < value
