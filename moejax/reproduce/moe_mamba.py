"""MoE-Mamba (arXiv:2401.04081) in miniature: table 4, and the signs of table 1."""

from moejax.reproduce import criteria
from moejax.reproduce.design import Claim, Design, Model, fields

_SAYS = """\
A Switch layer after every Mamba layer makes Mamba learn faster: at 25M active parameters and
9.8B tokens of C4, log-perplexity 3.19 against 3.34 and 1.76 times fewer steps; at 100M and 31B
tokens 2.35 times. On 1B tokens, 38 per active parameter (table 4): Mamba 3.72; with 1, 4, 8, 16
and 32 experts 3.75, 3.72, 3.70, 3.67, 3.67. Smoothed training loss, one seed, d_model 512 and
768, context 1024, GPT-2's tokenizer."""
_ORDER = '3.75 with one expert, 3.72 Mamba (table 4)'
_RATIO = '1.23x, by the loss in mid-schedule'
_GROWS = '1.23x on 1B tokens, 1.76x on 9.8B'
_RATES = (6e-3, 1.2e-2, 2.4e-2)
_MAMBA = {'model.d_ff': '96'}  # an expert is as large as a Mamba layer
_ONE = _MAMBA | {'model.blocks': "((('mamba','mlp'),4),)"}
_TRANSFORMER = {'model.d_ff': '64', 'model.num_heads': '2'}
_E32, _TRANSFORMER_E32 = 'configs/moe_mamba.py:experts=32', 'configs/moe.py:experts=32'


def design(scale: str, quick: bool, u: int) -> Design:
  return _gpu(u) if scale == 'gpu' else _quick(u) if quick else _laptop(u)


def _fields(source):
  return fields(
    *(16, 64, source),
    model__d_model=16,
    model__moe__capacity_factor=0.0,
    model__moe__group_size=16,
  )


def _laptop(u):
  short, long = 4 * u, 20 * u
  lengths = (u, 2 * u, short, 6 * u, 8 * u, 12 * u, long, 30 * u, 40 * u)
  return Design(
    setting='d_model 16, 8 layers (about 27,000 active parameters; with feed-forward layers or '
    "experts 0.96 of Mamba's, and 0.87 of its FLOPs), bytes of Python source code seen once, "
    'context 64, batches of 16, no token dropped; 150 tokens per active parameter at '
    f'{short:,} steps and 760 at {long:,}.',
    fields=_fields('environment'),
    models=(
      Model('mamba', 'configs/mamba.py', _RATES, lengths, 35e3, _MAMBA),
      Model('mamba-mlp', 'configs/moe_mamba.py', _RATES, (short,), 42e3, _ONE),
      Model('moe-mamba-8', 'configs/moe_mamba.py:experts=8', _RATES, (short,), 40e3, _MAMBA),
      Model('moe-mamba-32', _E32, _RATES, (u, 2 * u, short, long), 35e3, _MAMBA),
      Model('transformer', 'configs/moe.py:dense', _RATES, (short,), 80e3, _TRANSFORMER),
      Model('transformer-moe-32', _TRANSFORMER_E32, _RATES, (short,), 65e3, _TRANSFORMER),
    ),
    rate_steps=short,
    comparisons={
      'mamba': ('mamba', 'mamba-mlp', 'moe-mamba-8', 'moe-mamba-32'),
      'transformer': ('transformer', 'transformer-moe-32', 'mamba', 'moe-mamba-32'),
    },
    criteria=(
      criteria.leads('mamba', 'mamba-mlp', (short,), _ORDER),
      criteria.leads('moe-mamba-32', 'mamba', (short,), '3.67 and 3.72 (table 4)'),
      criteria.leads('moe-mamba-8', 'mamba-mlp', (short,), '3.70 and 3.75 (table 4)'),
      criteria.leads('moe-mamba-32', 'moe-mamba-8', (short,), '3.67 and 3.70 (table 4)'),
      criteria.ratio_above('moe-mamba-32', 'mamba', short, 1.1, _RATIO),
      criteria.ratio_grows('moe-mamba-32', 'mamba', short, long, _GROWS),
      criteria.leads('transformer-moe-32', 'transformer', (short,), '3.23 and 3.43 (25M)'),
      criteria.leads('moe-mamba-32', 'transformer-moe-32', (short,), '3.19 and 3.23 (25M)'),
    ),
  )


def _quick(u):
  steps, rate = 3 * u, (1.2e-2,)
  return Design(
    setting=f'd_model 16, 8 layers, bytes of the standard library, {steps:,} steps of 16 x 64: '
    '115 tokens per active parameter; one learning rate.',
    fields=_fields('stdlib'),
    models=(
      Model('mamba', 'configs/mamba.py', rate, (steps, 3 * steps // 2), 35e3, _MAMBA),
      Model('mamba-mlp', 'configs/moe_mamba.py', rate, (steps,), 42e3, _ONE),
      Model('moe-mamba-32', _E32, rate, (steps,), 35e3, _MAMBA),
    ),
    rate_steps=steps,
    comparisons={'mamba': ('mamba', 'mamba-mlp', 'moe-mamba-32')},
    criteria=(
      criteria.leads('mamba', 'mamba-mlp', (steps,), _ORDER),
      criteria.leads('moe-mamba-32', 'mamba', (steps,), '3.67 and 3.72 (table 4)'),
      criteria.ratio_above('moe-mamba-32', 'mamba', steps, 1.1, _RATIO),
    ),
  )


def _gpu(u):
  steps, rate = 4 * u // 5, (6e-3,)
  more = {'model.d_ff': '384'}
  return Design(
    setting=f'd_model 64, 8 layers, bfloat16, context 256, {steps:,} batches of 128: 125 tokens '
    'per active parameter; one learning rate.',
    fields=fields(
      *(128, 256, 'environment'),
      model__d_model=64,
      model__dtype='bfloat16',
      model__moe__capacity_factor=0.0,
      model__moe__group_size=128,
    ),
    models=(
      Model('mamba', 'configs/mamba.py', rate, (steps,), 1e6, more),
      Model('moe-mamba-32', _E32, rate, (steps,), 1e6, more),
    ),
    rate_steps=steps,
    seeds=(0, 1),
    comparisons={'mamba': ('mamba', 'moe-mamba-32')},
    criteria=(criteria.leads('moe-mamba-32', 'mamba', (steps,), '3.67 and 3.72 (table 4)'),),
  )


CLAIM = Claim(
  'MoE-Mamba: experts make Mamba learn faster',
  _SAYS,
  design,
  (
    'configs/mamba.py:25M',
    'configs/moe_mamba.py:25M',
    'configs/moe.py:25M,dense',
    'configs/moe.py:25M',
    'configs/mamba.py:100M',
    'configs/moe_mamba.py:100M',
    'configs/moe.py:100M',
  ),
  ('MoE-Mamba, against Mamba', 'mamba'),
)
