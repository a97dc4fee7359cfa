"""The same ops in PyTorch, transformers and mamba_ssm, where they are installed."""

import functools
import importlib.util

import numpy as np

from benchmarks.accelerator import forms


def installed(op):
  """By name, functions of `forms.Sizes` and of whether there are gradients.

  They return a call, and a function that waits for its result.
  """
  return {
    name: functools.partial(_prepared, make)
    for (name, package), make in _FORMS.get(op, {}).items()
    if all(importlib.util.find_spec(p) for p in ('torch', package))
  }


def _prepared(make, sizes, gradients):
  import torch

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  generator = torch.Generator(device).manual_seed(0)

  def normal(*shape, dtype=torch.bfloat16, scale=1.0):
    x = scale * torch.randn(shape, generator=generator, device=device)
    return x.to(dtype).requires_grad_(gradients)

  inputs, run = make(sizes, normal, device)

  def call():
    with torch.set_grad_enabled(gradients):
      y = run(*inputs)
      return torch.autograd.grad(y, inputs, torch.ones_like(y)) if gradients else y

  def wait(_):
    if device == 'cuda':
      torch.cuda.synchronize()

  return call, wait


def _attention(sizes, normal, device):
  from torch.nn.functional import scaled_dot_product_attention

  B, L, H, P = sizes.attention
  inputs = [normal(B, H, L, P) for _ in range(3)]
  return inputs, functools.partial(scaled_dot_product_attention, is_causal=True)


def _head(sizes, normal, device):
  import torch
  from torch.nn import functional

  B, L, D, V = sizes.head
  targets = torch.randint(V, (B * L,), device=device)

  def loss(x, head):
    logits = (x @ head.to(x.dtype)).float()
    return functional.cross_entropy(logits, targets, reduction='sum')

  return [normal(B * L, D), normal(D, V, dtype=torch.float32, scale=D**-0.5)], loss


def _grouped(sizes, normal, device):
  import torch
  from torch.nn import functional

  T, D, F, E, K = sizes.experts
  ends = torch.tensor(np.cumsum(forms.group_sizes(sizes)), dtype=torch.int32, device=device)
  product = getattr(functional, 'grouped_mm', None) or torch._grouped_mm  # public since 2.10
  return [normal(T * K, D), normal(E, D, F, scale=D**-0.5)], functools.partial(product, offs=ends)


def _token_plan(sizes, normal, device):
  """The k best experts of every token, and the order of rows by expert."""
  import torch

  T, _, _, E, K = sizes.experts

  def plan(logits):
    weights, experts = torch.topk(torch.softmax(logits, -1), K)
    order = torch.argsort(experts.flatten(), stable=True)
    return weights.flatten()[order]

  return [normal(T, E, dtype=torch.float32)], plan


def _expert_plan(sizes, normal, device):
  import torch

  T, _, _, E, K = sizes.experts
  group = min(256, T // 4)

  def plan(logits):
    return torch.topk(torch.softmax(logits, -1).mT, K * group // E)[0]

  return [normal(T // group, group, E, dtype=torch.float32)], plan


def _scan(sizes, normal):
  """Arguments of both scans."""
  import torch

  B, L, I, N = sizes.scan
  x, delta, gate = (normal(B, I, L) for _ in range(3))
  b, c = (normal(B, N, L) for _ in range(2))
  a, skip, bias = (normal(*shape, dtype=torch.float32) for shape in ((I, N), (I,), (I,)))
  return [x, delta, a, b, c, skip, gate, bias]


def _mamba_ssm(sizes, normal, device):
  from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

  def scan(x, delta, a, b, c, skip, gate, bias):
    return selective_scan_fn(x, delta, -a.exp(), b, c, skip, gate, bias, delta_softplus=True)

  return _scan(sizes, normal), scan


_LONGEST = 256  # positions with gradients, whose time is quadratic in them


def _transformers(sizes, normal, device):
  from transformers.models.mamba import modeling_mamba

  inputs = _scan(sizes, normal)
  if inputs[0].requires_grad and inputs[0].shape[2] > _LONGEST:
    raise RuntimeError('not measured: its gradient takes time quadratic in the length')

  def scan(x, delta, a, b, c, skip, gate, bias):
    y = modeling_mamba.mamba_selective_scan(
      x, delta, -a.exp(), b, c, skip, gate, delta_bias=bias, delta_softplus=True
    )
    return y[0] if isinstance(y, tuple) else y

  return inputs, scan


# By op: (name, package that it needs besides PyTorch) -> arguments and a function of them.
_FORMS = {
  'selective scan': {
    ('mamba_ssm', 'mamba_ssm'): _mamba_ssm,
    ('transformers', 'transformers'): _transformers,
  },
  'grouped matmul': {('torch', 'torch'): _grouped},
  'attention': {('torch, causal', 'torch'): _attention},
  'cross-entropy': {('torch', 'torch'): _head},
  'plan of token choice': {('torch', 'torch'): _token_plan},
  'plan of expert choice': {('torch', 'torch'): _expert_plan},
}
