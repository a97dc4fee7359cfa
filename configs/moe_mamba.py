"""MoE-Mamba (arXiv:2401.04081): a Switch layer follows every Mamba layer.

  python -m moejax.main --config=configs/moe_mamba.py
  python -m moejax.main --config=configs/moe_mamba.py:25M
  python -m moejax.main --config=configs/moe_mamba.py:25M,experts=16

Parameters without embeddings and final log-perplexity in the paper (table 1), with its baselines
configs/mamba.py and configs/moe.py of the same sizes:

          MoE-Mamba  total  active   Mamba  Transformer-MoE  Transformer   fewer steps than Mamba
  25M          3.19   542M     26M    3.34             3.23         3.43   1.76x
  100M         2.81  2439M    117M    2.99             2.88                2.35x

Experts (table 4; all on 1B tokens, Mamba 3.72):  E=1 3.75, 4 3.72, 8 3.70, 16 3.67, 32 3.67.

Further variants of the paper. Its ablations train on 1B tokens:
`--config.train.steps=15000 --config.optimizer.warmup_steps=150`.
  parallel       Mamba and Switch layers in parallel (table 7, E=1 to 32): 3.79 3.77 3.74 3.72 3.70
                 3.69, against 3.76 3.74 3.71 3.69 3.67 3.66 in sequence
  ratio=4x2      active parameters of Mamba to those of an expert (table 2): 1x5 to 5x1, with the
                 total width of 96 experts; more Mamba helps, little beyond 3x3
  inner=conv+out experts in place of projections of Mamba: any of conv, gate, out; in all layers,
                 or with every_other in every other layer. 24 experts per layer on average, split
                 evenly among projections (table 3; all layers / every other):
                 conv 3.79/3.71, gate 3.89/3.70, out 4.05/3.70, conv+gate 3.95/3.72,
                 conv+out 4.17/3.76, gate+out 4.16/3.88, conv+gate+out 4.39/3.88
  mamba2         Mamba-2 layers (arXiv:2405.21060) in place of Mamba's, with any of the variants
                 above; not in the paper
3M is our own miniature. The laptop size has 12 experts as large as a Mamba layer. Smaller
models with more tokens per parameter show the order of table 4 (docs/results.md).

What configs/moe.py says of groups and of differences from the paper holds here too; the state of
Mamba starts anew at every document (model.document_mask), and its recurrence is float32.
"""

from moejax import variants


def get_config(arg=None):
  arg = variants.parse_arg(
    arg,
    sizes=('laptop', *variants.MOE_MAMBA_SIZES),
    experts=0,
    parallel=False,
    ratio='',
    inner='',
    every_other=False,
    mamba2=False,
  )
  c = variants.moe_mamba_run(arg.size)
  c.model.positions = 'none'
  if arg.size == 'laptop':
    c.optimizer.peak_lr = variants.LAPTOP_SPARSE_LR
  else:
    c.optimizer.peak_lr = 5e-4
    c.model.moe.capacity_factor = 1.0
  if arg.every_other and not arg.inner:
    raise ValueError('--config=...:every_other needs experts inside Mamba, e.g. inner=conv+out.')
  if arg.inner:
    _inner(c, arg)
  else:
    _outer(c, arg)
  if arg.mamba2:
    variants.mamba2(c, narrow=arg.size == 'laptop')
  return variants.shrink(c) if arg.debug else c


def _outer(c, arg):
  """Mamba and expert layers, alternating or in parallel."""
  ((_, blocks),) = c.model.blocks
  c.model.blocks = ((('mamba+moe',) if arg.parallel else ('mamba', 'moe'), blocks),)
  # An expert is as large as a Mamba layer: 6 d^2 plus small terms that matter at d = 64.
  c.model.d_ff = (4 if arg.size == 'laptop' else 3) * c.model.d_model
  c.model.moe.expansion_rate = arg.experts or (12 if arg.size == 'laptop' else 42)
  if arg.ratio:
    mamba, expert = _ratio(arg.ratio)
    c.model.mamba.expand = 2 * mamba / 3
    c.model.d_ff = c.model.d_ff * expert // 3
    c.model.moe.expansion_rate = arg.experts or 96 // expert


_RATIOS = {f'{n}x{6 - n}': (n, 6 - n) for n in range(1, 6)}


def _ratio(text):
  if text not in _RATIOS:
    raise ValueError(
      f'--config=...:ratio={text}: expected MAMBAxEXPERT, sixths of the active parameters, from '
      '1x5 to 5x1.'
    )
  return _RATIOS[text]


def _inner(c, arg):
  """Experts inside Mamba."""
  if arg.parallel or arg.ratio:
    raise ValueError('--config=...:inner= has no Switch layers; remove parallel and ratio=.')
  ((_, blocks),) = c.model.blocks
  every_other, all_layers = (('mamba', 'moe_in_mamba'), blocks), (('moe_in_mamba',), 2 * blocks)
  c.model.blocks = (every_other if arg.every_other else all_layers,)
  c.model.mamba.moe_in = arg.inner
  projections = len(arg.inner.split('+'))
  experts = arg.experts or (48 if arg.every_other else 24)
  if experts % projections:
    raise ValueError(
      f'--config=...:experts={experts}: the experts of a layer are split evenly among its '
      f'{projections} projections; give a multiple.'
    )
  c.model.moe.expansion_rate = experts // projections
  c.model.d_ff = 11 * c.model.d_model // 16  # about the parameters of the projection it replaces
