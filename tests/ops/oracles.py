"""Sparse mixture of experts as loops in float64 numpy: slow, obvious, with hand-written gradients.

Nothing here shares code or tricks with moejax.ops.
"""

import numpy as np


def softmax(logits, axis):
  e = np.exp(logits - logits.max(axis=axis, keepdims=True))
  return e / e.sum(axis=axis, keepdims=True)


def softmax_gradient(p, dp, axis):
  return p * (dp - (p * dp).sum(axis=axis, keepdims=True))


def best_first(scores):
  """Indices from the highest score to the lowest, ties from the lowest index."""
  return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def token_choice(logits_GTE, k, capacity, valid_GT, bias_E, scores, renormalize):
  """Returns [(group, choice, token, expert, weight), ...] of what is kept, the number of choices,
  and a function from the weights' gradients, in the same order, to that of the logits."""
  G, T, E = logits_GTE.shape
  p_GTE = softmax(logits_GTE, 2) if scores == 'softmax' else 1 / (1 + np.exp(-logits_GTE))
  ranking_GTE = logits_GTE if bias_E is None else p_GTE + bias_E
  chosen, weights = {}, {}
  for g in range(G):
    for t in range(T):
      if valid_GT[g, t]:
        experts = best_first(ranking_GTE[g, t])[:k]
        values = p_GTE[g, t, experts]
        if renormalize:
          values = values / values.sum()
        chosen[g, t], weights[g, t] = experts, values
  kept = []
  for g in range(G):
    free = [T if capacity is None else capacity] * E
    for t in range(T):
      for j in range(k):
        if valid_GT[g, t] and free[chosen[g, t][j]]:
          free[chosen[g, t][j]] -= 1
          kept.append((g, j, t, chosen[g, t][j], weights[g, t][j]))

  def backward(d_weights):
    d_chosen = {gt: np.zeros(k) for gt in chosen}
    for (g, j, t, _, _), d in zip(kept, d_weights, strict=True):
      d_chosen[g, t][j] += d
    dp_GTE = np.zeros_like(logits_GTE)
    for (g, t), experts in chosen.items():
      d, w = d_chosen[g, t], weights[g, t]
      if renormalize:
        d = (d - (w * d).sum()) / p_GTE[g, t, experts].sum()
      dp_GTE[g, t, experts] += d
    if scores == 'softmax':
      return softmax_gradient(p_GTE, dp_GTE, 2)
    return dp_GTE * p_GTE * (1 - p_GTE)

  return kept, k * int(valid_GT.sum()), backward


def expert_choice(logits_GTE, capacity, valid_GT, softmax_over):
  """As `token_choice`; the second entry of each tuple is the token's rank with the expert."""
  G, T, E = logits_GTE.shape
  p_GTE = np.zeros_like(logits_GTE)
  for g in range(G):
    v = valid_GT[g]
    if v.any():
      p_GTE[g, v] = softmax(logits_GTE[g, v], 1 if softmax_over == 'experts' else 0)
  kept = []
  for g in range(G):
    valid = [t for t in range(T) if valid_GT[g, t]]
    for e in range(E):
      for j, i in enumerate(best_first(p_GTE[g, valid, e])[:capacity]):
        kept.append((g, j, valid[i], e, p_GTE[g, valid[i], e]))

  def backward(d_weights):
    dp_GTE, dlogits_GTE = np.zeros_like(p_GTE), np.zeros_like(p_GTE)
    for (g, _, t, e, _), d in zip(kept, d_weights, strict=True):
      dp_GTE[g, t, e] += d
    for g in range(G):
      v = valid_GT[g]
      if v.any():
        axis = 1 if softmax_over == 'experts' else 0
        dlogits_GTE[g, v] = softmax_gradient(p_GTE[g, v], dp_GTE[g, v], axis)
    return dlogits_GTE

  return kept, len(kept), backward


def relu(logits_GTE, capacity, valid_GT):
  """As `token_choice`; a token takes all experts of positive score, and the score is the weight."""
  G, T, E = logits_GTE.shape
  kept, number = [], 0
  for g in range(G):
    free = [T if capacity is None else capacity] * E
    for t in range(T):
      for e in range(E):
        if valid_GT[g, t] and logits_GTE[g, t, e] > 0:
          number += 1
          if free[e]:
            free[e] -= 1
            kept.append((g, e, t, e, logits_GTE[g, t, e]))

  def backward(d_weights):
    dlogits_GTE = np.zeros_like(logits_GTE)
    for (g, _, t, e, _), d in zip(kept, d_weights, strict=True):
      dlogits_GTE[g, t, e] = d
    return dlogits_GTE

  return kept, number, backward


def moe(x_GTD, router_DE, w_in_EDF, w_out_EFD, dy_GTD, route):
  """A layer of ReLU experts and its gradients; `route` is one of the above, applied to logits.

  Returns:
    y_GTD, a dict of the gradients of sum(y * dy) by x, router, w_in and w_out, and what was kept.
  """
  kept, num_choices, route_backward = route(x_GTD @ router_DE)
  y_GTD, dx_GTD = np.zeros_like(dy_GTD), np.zeros_like(x_GTD)
  dw_in_EDF, dw_out_EFD = np.zeros_like(w_in_EDF), np.zeros_like(w_out_EFD)
  d_weights = []
  for g, _, t, e, weight in kept:
    x_D, dy_D = x_GTD[g, t], dy_GTD[g, t]
    before_F = x_D @ w_in_EDF[e]
    h_F = np.maximum(before_F, 0)
    out_D = h_F @ w_out_EFD[e]
    y_GTD[g, t] += weight * out_D
    d_weights.append(out_D @ dy_D)
    dw_out_EFD[e] += np.outer(h_F, weight * dy_D)
    dh_F = (w_out_EFD[e] @ (weight * dy_D)) * (before_F > 0)
    dw_in_EDF[e] += np.outer(x_D, dh_F)
    dx_GTD[g, t] += w_in_EDF[e] @ dh_F
  dlogits_GTE = route_backward(d_weights)
  gradients = {
    'x': dx_GTD + dlogits_GTE @ router_DE.T,
    'router': np.einsum('GTD,GTE->DE', x_GTD, dlogits_GTE),
    'w_in': dw_in_EDF,
    'w_out': dw_out_EFD,
  }
  return y_GTD, gradients, kept, num_choices


def grouped_matmul(x_TD, w_EDF, group_sizes_E, dy_TF):
  """y_TF and the gradients of sum(y * dy) by x and w; rows beyond the groups are 0."""
  x_TD, w_EDF, dy_TF = (a.astype(np.float64) for a in (x_TD, w_EDF, dy_TF))
  y_TF = np.zeros((x_TD.shape[0], w_EDF.shape[2]))
  dx_TD, dw_EDF = np.zeros(x_TD.shape), np.zeros(w_EDF.shape)
  t = 0
  for e, size in enumerate(group_sizes_E):
    for _ in range(size):
      y_TF[t] = x_TD[t] @ w_EDF[e]
      dx_TD[t] = w_EDF[e] @ dy_TF[t]
      dw_EDF[e] += np.outer(x_TD[t], dy_TF[t])
      t += 1
  return y_TF, dx_TD, dw_EDF
