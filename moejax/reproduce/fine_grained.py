"""Fine-grained experts (arXiv:2402.07871) in miniature: loss falls with granularity, by a law."""

from moejax.reproduce import criteria, law
from moejax.reproduce.design import Claim, Design, Model, fields

_SAYS = """\
At equal FLOPs, experts of a width of 1/G of a dense layer, G of them for a token, are better the
finer they are (G from 1 to 16), by L = c + (g / G^0.58 + a) / N^0.115 + b / D^0.147; the fit's
error is 0.015 and 0.019 on the fifth of the runs with the lowest loss, held out. Dense models
need 20 times the FLOPs at 1e20. Expert choice, 64 times the parameters of a dense layer, 3M to
85M active ones, 16B to 130B tokens of C4 (N counts all parameters: 5 to 480 tokens for each),
context 256, one seed."""
_FALLS = 'loss falls with G from 1 to 16 at all sizes'
_DENSE = 'all sparse models are better than dense ones'
_EXTRAPOLATES = 'error 0.015 of the fit, 0.019 held out'
_LOW, _HIGH = (6e-3, 1.2e-2, 2.4e-2), (1.2e-2, 2.4e-2, 4.8e-2)
# Tokens per second of a core at d_model 16, dense; and how much of it models with experts reach.
_SPEED, _SPARSE = 110e3, {1: 0.9, 2: 0.85, 4: 0.8, 8: 0.7}


def design(scale: str, quick: bool, u: int) -> Design:
  return _gpu(u) if scale == 'gpu' else _quick(u) if quick else _laptop(u)


def _models(d_model, granularities, rates, steps, **more):
  """A dense model and sparse ones of a size."""
  shape = {'model.d_model': str(d_model), 'model.d_ff': str(4 * d_model), 'model.num_heads': '2'}
  kind = lambda layer: shape | {'model.blocks': f"((('attention','{layer}'),2),)"}
  speed = _SPEED * (16 / d_model) ** 0.6
  yield Model(f'd{d_model}-dense', 'configs/dense.py', rates, steps, speed, kind('mlp'), **more)
  for granularity in granularities:
    yield Model(
      f'd{d_model}-g{granularity}',
      f'configs/fine_grained.py:granularity={granularity},expansion_rate=8',
      *(rates, steps, speed * _SPARSE[granularity], kind('moe')),
      **more,
    )


def _laptop(u):
  steps = dict.fromkeys((16, 24, 32), (u, 3 * u, 8 * u)) | {48: (2 * u, 4 * u, 8 * u)}
  rates = {16: _HIGH, 24: _HIGH, 32: _LOW, 48: _LOW}
  by_size = {d: tuple(_models(d, (1, 2, 4, 8), rates[d], steps[d])) for d in steps}
  held_out = tuple(_models(64, (1, 4), _LOW, (12 * u,), is_predicted=True))
  names = lambda models: tuple(model.name for model in models)
  return Design(
    setting='2 blocks of d_model 16, 24, 32 and 48, 8 times the parameters of a dense layer, '
    'expert choice, bytes of Python source code seen once, context 64, batches of 16: 6 to '
    '240 tokens per parameter. Held out: d_model 64, of 1.8 times the parameters, for 1.5 '
    'times the steps.',
    fields=fields(16, 64, 'environment'),
    models=(*(model for models in by_size.values() for model in models), *held_out),
    rate_steps=u,
    comparisons={f'd{d}': names(models) for d, models in by_size.items()}
    | {'d64': names(held_out)},
    criteria=(
      *(criteria.leads(f'd{d}-g8', f'd{d}-g1', steps[d], _FALLS, spreads=2) for d in steps),
      *(criteria.leads(f'd{d}-g4', f'd{d}-dense', steps[d], _DENSE) for d in steps),
      law.extrapolates(held_out, _EXTRAPOLATES),
    ),
  )


def _quick(u):
  steps = 3 * u
  models = tuple(_models(16, (1, 4, 8), _HIGH, (steps,)))
  return Design(
    setting=f'2 blocks of d_model 16, bytes of the standard library, {steps:,} steps of 16 x 64: '
    '90 tokens per parameter of sparse models.',
    fields=fields(16, 64, 'stdlib'),
    models=models,
    rate_steps=u,
    comparisons={'d16': tuple(model.name for model in models)},
    criteria=(
      criteria.leads('d16-g8', 'd16-g1', (steps,), _FALLS, spreads=2),
      criteria.leads('d16-g4', 'd16-dense', (steps,), _DENSE),
    ),
  )


def _gpu(u):
  more = {'model__dtype': 'bfloat16', 'model__moe__group_size': 256}
  models = tuple(model._replace(speed=4e6) for model in _models(64, (1, 8), (4e-3,), (u,)))
  return Design(
    setting=f'2 blocks of d_model 64, bfloat16, context 256, {u:,} batches of 256: 120 tokens '
    'per parameter of sparse models; one learning rate.',
    fields=fields(256, 256, 'environment', **more),
    models=models,
    rate_steps=u,
    seeds=(0, 1),
    comparisons={'d64': tuple(model.name for model in models)},
    criteria=(
      criteria.leads('d64-g8', 'd64-g1', (u,), _FALLS, spreads=2),
      criteria.leads('d64-g8', 'd64-dense', (u,), _DENSE),
    ),
  )


CLAIM = Claim(
  'Fine-grained experts: loss falls with granularity, by a law',
  _SAYS,
  design,
  (
    'configs/dense.py:3M',
    'configs/fine_grained.py:3M,granularity=8',
    'configs/fine_grained.py:25M,granularity=8',
    'configs/dense.py:85M',
    'configs/fine_grained.py:85M,granularity=4',
  ),
  ('Fine-grained experts, against dense', 'd32'),
)
