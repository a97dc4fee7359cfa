"""What is compared: models, what is done with them, and by which contenders.

A model is a config.json of transformers, which moejax reads as `moejax.convert` does.
"""

from typing import NamedTuple

from moejax import config as config_lib, flops, hf

BASE = 'moejax'  # the contender that others are compared with


class Contender(NamedTuple):
  """A program, and fields of its own config."""

  name: str
  module: str  # whose `prepare` makes its steps
  environment: str = ''  # a file of `environments`; '': this Python's
  changes: dict = {}


class Case(NamedTuple):
  """A task and who does it.

  `task`: for training 'kind', 'model', 'batch', 'length'; for decoding also 'prompt', how many of
  the `length` tokens are given; for a product of square matrices 'kind' and 'size'. 'changes' are
  fields of moejax that no config.json has.
  """

  task: dict
  contenders: tuple[Contender, ...]

  @property
  def work(self):
    """Tokens of a step that count, or products."""
    task = self.task
    if task['kind'] == 'product':
      return 1
    return task['batch'] * (task['length'] - task.get('prompt', 0))

  @property
  def flops(self):
    """Model FLOPs of each of them, as in moejax/flops.py."""
    task = self.task
    if task['kind'] == 'product':
      return 2 * task['size'] ** 3
    model = run_config(task).model
    training = flops.training_flops_per_token(model, task['length'])['model']
    return training if task['kind'] == 'train' else training / 3


_HERE = 'benchmarks.peers.contenders'
_TORCH = Contender('transformers', f'{_HERE}.transformers', 'transformers')
_MAXTEXT = Contender('MaxText', f'{_HERE}.maxtext', 'maxtext')
_OURS = Contender(BASE, f'{_HERE}.moejax')
_DROPS = 1.25  # of a capacity factor; without it, no contender drops tokens


def product(tiny=False):
  """What this machine can do at most: a product in jax, and one in torch."""
  jax, torch = _OURS._replace(name='jax'), _TORCH._replace(name='torch')
  return Case({'kind': 'product', 'size': 64 if tiny else 1024}, (jax, torch))


def cases(tiny=False):
  """By name; `tiny`: at sizes at which there is nothing to measure."""
  width, blocks, heads = (32, 1, 2) if tiny else (256, 4, 4)
  batch, length, prompt, grown = (8, 16, 4, 8) if tiny else (8, 256, 32, 128)
  shared = {'vocab_size': 512, 'hidden_size': width, 'eos_token_id': None, 'bos_token_id': None}
  attention = {
    'num_hidden_layers': blocks,
    'num_attention_heads': heads,
    'num_key_value_heads': heads,
    'max_position_embeddings': length,
    'rms_norm_eps': 1e-5,
    'tie_word_embeddings': False,
  }
  dense = {'model_type': 'llama', 'intermediate_size': 4 * width, **shared, **attention}
  experts = {'num_local_experts': 8, 'num_experts_per_tok': 2, 'sliding_window': None}
  moe = dense | {'model_type': 'mixtral', 'intermediate_size': 2 * width} | experts
  mamba = {'model_type': 'mamba', 'num_hidden_layers': 2 * blocks, **shared}
  train = {'kind': 'train', 'batch': batch, 'length': length}
  wide = {'hidden_size': 2 * width, 'intermediate_size': 8 * width}
  fine = {'intermediate_size': width // 4, 'num_local_experts': 64, 'num_experts_per_tok': 16}
  # Experts as large as a Mamba layer: about 6 D^2 parameters.
  in_turn = {'model.blocks': ((('mamba', 'moe'), blocks),), 'model.d_ff': 3 * width}
  drops = (
    _OURS._replace(name=f'{BASE}, drops', changes={'model.moe.capacity_factor': _DROPS}),
    _MAXTEXT._replace(name='MaxText, drops', changes={'capacity_factor': _DROPS}),
  )
  found = {
    'train dense': Case(train | {'model': dense}, (_OURS, _TORCH, _MAXTEXT)),
    'train moe': Case(train | {'model': moe}, (_OURS, _TORCH, *drops)),
    'train mamba': Case(train | {'model': mamba}, (_OURS, _TORCH)),
    'train wide dense': Case(train | {'model': dense | wide}, (_OURS, _TORCH)),
    'train fine moe': Case(train | {'model': moe | fine}, (_OURS, _TORCH)),
    'train moe mamba': Case(train | {'model': mamba, 'changes': in_turn}, (_OURS,)),
  }
  for number in (1, 32):
    task = {'kind': 'decode', 'batch': number, 'length': grown, 'prompt': prompt}
    for name, model in (('dense', dense), ('moe', moe)):
      found[f'decode {name} {number}'] = Case(task | {'model': model}, (_OURS, _TORCH))
  return found


def run_config(task):
  """The RunConfig of a task."""
  config = config_lib.baseline()
  fields = hf.of_options(task['model']).read(task['model'], task['length'])
  fields |= {'data.batch_size': task['batch'], 'data.sequence_length': task['length']}
  fields |= {'model.moe.group_size': min(8, task['batch'])}
  config.update_from_flattened_dict(fields | task.get('changes', {}))
  return config_lib.resolve(config)
