"""A model with experts under another router: its config and its state, with the same experts.

Mixture-of-Tokens layers and sparse ones have the same parameters: experts, and a matrix of scores.
"""

import re

import jax

from moejax import config as config_lib
from moejax.differences import by_name
from moejax.layers import moe

MIXING = {'mot': 'softmax', 'discrete': 'discrete'}  # `model.mot.routing`, by name
# Experts of a router with parameters of its own (`relu`) are of no use to others.
_SPARSE = tuple(
  name for name in moe.ROUTERS if not moe.MoEConfig(router=name).rule.parameters(moe.MoEConfig())
)
ROUTERS = (*_SPARSE, *MIXING)

# What layers of the other kind lack, so that only these values can get a router of that kind:
# further parameters, changing temperatures, weights that are no softmax.
PLAIN_MOT = {
  'emit': 'same',
  'separate_controllers': False,
  'temperature_mode': 'fixed',
  'expert_norm': False,
}
_PLAIN_MOE = {'shared_width': 0, 'output_norm': False, 'scores': 'softmax', 'balance_bias': False}


def router_of(config) -> str:
  """The router of all experts of a model, by a ConfigDict; one of ROUTERS.

  Raises:
    ValueError: it has none, or several.
  """
  model = config_lib.resolve(config).model
  kinds = {kind for pattern, _ in model.blocks for kind in pattern}
  if len(kinds & {'mot', 'moe'}) != 1:
    raise ValueError(
      '--from: expected a model with mot layers or with moe layers; model.blocks of this run has '
      f'{", ".join(sorted(kinds))}.'
    )
  if 'moe' in kinds:
    return model.moe.router
  return 'discrete' if model.mot.routing == 'discrete' else 'mot'


def with_router(config, router) -> None:
  """Turns the ConfigDict of a model into that of one with the same experts and another router.

  A token keeps its FLOPs.

  Raises:
    ValueError: no layer with this router has such experts.
  """
  own = router_of(config)
  if own not in ROUTERS:
    raise ValueError(
      f'--from: experts of model.moe.router = {own} fit no other router; expected one of '
      f'{", ".join(ROUTERS)}.'
    )
  mixed = own in MIXING
  if router in MIXING and not mixed:
    make_mixing(config)
  if router in MIXING:
    config.model.mot.routing = MIXING[router]
  elif mixed:
    make_sparse(config, router)
  elif router != config.model.moe.router:
    sparse_fields(config, router)


def make_sparse(config, router) -> None:
  """Turns the ConfigDict of a Mixture-of-Tokens model into that of a sparse one, same experts.

  A token gets m of k * m experts of width d_ff / m (on average with expert choice): the FLOPs of a
  dense layer, as before.

  Raises:
    ValueError: no sparse layer has such experts.
  """
  router_of(config)
  model, mot = config.model, config_lib.resolve(config).model.mot
  _check_plain('mot', mot, PLAIN_MOT)
  width = mot.width(model.d_ff)
  if model.d_ff % width or mot.num_experts * width % model.d_ff:
    raise ValueError(
      f'--from: {mot.num_experts} experts of width {width} are not granularity * expansion_rate '
      f'experts of width d_ff / granularity (model.d_ff = {model.d_ff}).'
    )
  rename(model, 'mot', 'moe')
  model.moe.update(
    granularity=model.d_ff // width,
    expansion_rate=mot.num_experts * width // model.d_ff,
    experts_per_token=0,  # granularity
    group_size=mot.group_size,
  )
  sparse_fields(config, router)


def make_mixing(config) -> None:
  """Turns the ConfigDict of a sparse model into that of a Mixture-of-Tokens one, same experts.

  Raises:
    ValueError: no Mixture-of-Tokens layer has such experts.
  """
  model, sparse = config.model, config_lib.resolve(config).model.moe
  _check_plain('moe', sparse, _PLAIN_MOE)
  if sparse.num_experts % sparse.top_k:
    raise ValueError(
      f'--from: {sparse.top_k} of {sparse.num_experts} experts per token are the FLOPs of no whole '
      'number of mixed tokens.'
    )
  rename(model, 'moe', 'mot')
  model.mot.update(
    num_experts=sparse.num_experts,
    group_size=sparse.num_experts // sparse.top_k,
    expert_width=sparse.expert_width(model.d_ff),
    temperature=1.0,
    **PLAIN_MOT,
  )


def _check_plain(kind, section, plain):
  for name, value in plain.items():
    if getattr(section, name) != value:
      other = 'sparse' if kind == 'mot' else 'Mixture-of-Tokens'
      raise ValueError(
        f'--from: a {other} layer has no model.{kind}.{name} = {getattr(section, name)}; only '
        f'models with {value} can become one.'
      )


def rename(model, old, new) -> None:
  """Gives every sublayer `old` in the blocks of a model's ConfigDict the kind `new`."""
  model.blocks = tuple(
    (tuple(new if kind == old else kind for kind in pattern), repeats)
    for pattern, repeats in model.blocks
  )


def sparse_fields(config, router) -> None:
  """Sets the fields of a sparse layer that depend on its router."""
  fills_slots = moe.MoEConfig(router=router).rule.fills_slots
  config.model.moe.update(
    router=router,
    scores='softmax',
    renormalize=False,
    balance_bias=False,
    capacity_factor=1.0 if fills_slots else 1.25,
    balance_loss=0.0 if fills_slots else 0.01,
  )


def convert(source, fresh, temperature=1.0):
  """The train state of a model as that of one with the same experts and another router.

  Args:
    source: the state, or a part of it, as a pytree of arrays.
    fresh: a state of the new model; arrays that `source` lacks (an output norm, say) stay.
    temperature: of the softmax of `source`, for the scale of the router and its moments.

  Raises:
    ValueError: an array of `source` is missing in `fresh`, or has another shape there.
  """
  wanted = by_name(fresh)

  def change(name, leaf):
    name = name if name in wanted else _other_name(name)
    if name.endswith(('/router', '/controller')):
      leaf = leaf * scale(name, 1 / temperature, temperature)
    return name, leaf

  return carry_over(source, fresh, change)


def scale(name, parameter, gradient) -> float:
  """Factor of an array in a train state, from that of its parameter and of the latter's gradient.

  Optimizers keep a mean of the gradients of a parameter, and one of their squares.
  """
  factors = {'params': parameter, 'mu': gradient, 'trace': gradient, 'nu': gradient**2}
  return next((factors[part] for part in name.split('/') if part in factors), 1.0)


def carry_over(source, fresh, change):
  """A train state with the arrays of another one.

  Args:
    source: the other one, or a part of it, as a pytree of arrays.
    fresh: a state of the new model; arrays that `source` lacks stay.
    change: a function of a name in `source` and its array: name in `fresh`, new array.

  Raises:
    ValueError: an array has no place in `fresh`, or another shape there.
  """
  wanted, taken = by_name(fresh), {}
  for old_name, old_leaf in by_name(source).items():
    name, leaf = change(old_name, old_leaf)
    if name not in wanted or wanted[name].shape != leaf.shape:
      place = f'is {wanted[name].shape}' if name in wanted else 'does not exist'
      raise ValueError(f'--from: {name} is {leaf.shape} there and {place} in the new model.')
    taken[name] = leaf.astype(wanted[name].dtype)
  leaves = [taken.get(name, leaf) for name, leaf in wanted.items()]
  return jax.tree.unflatten(jax.tree.structure(fresh), leaves)


def _other_name(name):
  """The name of an array in a layer of the other kind."""
  kinds, scores = ('moe', 'mot'), ('router', 'controller')
  if not re.search(r'/\d+_moe/|/router$', name):
    kinds, scores = kinds[::-1], scores[::-1]
  name = re.sub(rf'(/\d+)_{kinds[0]}/', rf'\1_{kinds[1]}/', name)
  return re.sub(rf'/{scores[0]}$', f'/{scores[1]}', name)
