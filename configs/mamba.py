"""Mamba without feed-forward layers or positions: MoE-Mamba's baseline (arXiv:2401.04081).

  python -m moejax.main --config=configs/mamba.py
  python -m moejax.main --config=configs/mamba.py:25M

Two Mamba layers replace a block of attention and feed-forward. Final log-perplexity in the paper
(table 1): 25M 3.34, 100M 2.99. 3M is our own miniature.

The paper's runs apply weight decay to every parameter. The authors of Mamba exempt the recurrence
(--config.optimizer.decay=matrices) and keep the residual stream in float32
(--config.model.residual_float32). The variant `hf` is a model that transformers has too
(docs/convert.md). The variant `mamba2` has Mamba-2 layers (arXiv:2405.21060) of as many channels,
in that paper's heads of 64 channels with 128 states (16 and 16 at laptop size).
"""

from moejax import variants


def get_config(arg=None):
  arg = variants.parse_arg(arg, sizes=('laptop', *variants.MOE_MAMBA_SIZES), hf=False, mamba2=False)
  c = variants.moe_mamba_run(arg.size)
  ((_, blocks),) = c.model.blocks
  c.model.blocks = ((('mamba',), 2 * blocks),)
  c.model.positions = 'none'
  if arg.size != 'laptop':
    c.optimizer.peak_lr = 1e-3
  if arg.mamba2:
    variants.mamba2(c, narrow=arg.size == 'laptop')
  if arg.hf:
    variants.like(c, 'mamba2' if arg.mamba2 else 'mamba')
  return variants.shrink(c) if arg.debug else c
