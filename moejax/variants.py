"""What the bundled config files share: sizes, variants and training recipes.

The variants after the colon of `--config=configs/mot.py:medium,experts=32,debug` apply before other
fields are derived from them; `--config.section.field=value` overrides single fields afterwards.
"""

import types

from moejax import hf
from moejax.config import baseline
from moejax.text import did_you_mean

# name: d_model, blocks, heads, peak learning rate of the dense model; d_ff is 4 * d_model.
SIZES = {
  'laptop': (32, 4, 2, 1.2e-2),
  'mini': (256, 4, 4, 4e-3),
  'small': (512, 4, 8, 1e-3),
  'medium': (512, 8, 8, 7e-4),
  'base': (768, 12, 12, 4e-4),
  'large': (1024, 24, 16, 2e-4),
}
# The same for the runs behind the scaling laws (arXiv:2402.07871, appendix A), named by active
# parameters. 1B and 3B are from table 2, which gives no shapes: these shapes are ours.
SCALING_SIZES = {
  '3M': (256, 4, 4, 2e-4),
  '6M': (256, 8, 4, 2e-4),
  '7M': (384, 4, 6, 2e-4),
  '13M': (512, 4, 8, 2e-4),
  '25M': (512, 8, 8, 2e-4),
  '49M': (640, 10, 10, 2e-4),
  '85M': (768, 12, 12, 2e-4),
  '1B': (2048, 20, 16, 2e-4),
  '3B': (3072, 26, 24, 2e-4),
}
# The peak learning rate of laptop models with experts, half of the dense ones' (docs/results.md).
LAPTOP_SPARSE_LR = 6e-3
# The runs that MoE-Mamba is compared with (arXiv:2401.04081, tables 5 and 6):
# name: d_model, blocks, heads, peak learning rate of Transformer-MoE, batch, steps. 3M is our own
# miniature, trained on the billion tokens of the paper's ablations.
MOE_MAMBA_SIZES = {
  '3M': (256, 4, 4, 5e-4, 64, 15_000),
  '25M': (512, 8, 8, 5e-4, 64, 150_000),
  '100M': (768, 16, 12, 2.5e-4, 1024, 30_000),
}


def parse_arg(arg, sizes=SIZES, **options):
  """Parses 'medium,experts=32,debug' into a namespace with `size`, `debug` and the given options.

  Args:
    arg: the part of --config after the colon, or None.
    sizes: names of the sizes.
    **options: defaults of further `name=value` variants, which set their type. A variant whose
      default is False, like `debug`, is given by its name alone. 0 and '' cannot be given.

  Raises:
    ValueError: a variant is unknown, has an invalid value, or is given twice.
  """
  options = {'debug': False, **options}
  given = {}
  for variant in filter(None, (arg or '').split(',')):
    name, equals, _ = variant.partition('=')
    if name in sizes and not equals:
      name, value = 'size', name
    elif options.get(name) is False and not equals:
      value = True
    elif name in options and options[name] is not False and equals:
      value = _value(variant, type(options[name]))
    else:
      known = [*sizes, *(o if default is False else f'{o}=' for o, default in options.items())]
      hint = did_you_mean(variant, known)
      raise ValueError(f'--config=...:{variant}: not one of {", ".join(known)}{hint}')
    if name in given:
      raise ValueError(f'--config=...:{variant}: {name} is already {given[name]}.')
    given[name] = value
  return types.SimpleNamespace(**{'size': 'laptop', **options, **given})


def _value(variant, kind):
  """The value of a variant name=value: a non-empty string or a positive integer."""
  name, _, text = variant.partition('=')
  try:
    value = kind(text)
  except ValueError:
    value = None
  if not value or (kind is int and value < 1):
    what = {int: 'a positive integer', str: 'a string'}[kind]
    raise ValueError(f'--config=...:{variant}: expected {name}=<{what}>, got {text!r}.')
  return value


def sized(name):
  """The dense model of a size; all sizes but `laptop` follow the papers' runs on C4."""
  c = baseline()
  shape = (SIZES | SCALING_SIZES)[name]
  c.model.d_model, blocks, c.model.num_heads, c.optimizer.peak_lr = shape
  c.model.d_ff = 4 * c.model.d_model
  c.model.blocks = ((('attention', 'mlp'), blocks),)
  if name != 'laptop':
    c4(c)
  if name == 'mini':
    c.train.steps = 250_000  # the proof of concept in the first version of the MoT paper
    c.model.init_scale = 1.0  # of its MoT model; that of its dense one is not published
  if name in SCALING_SIZES:
    scaling_law_run(c)
  return c


def c4(c):
  """C4, context 256, batch 256, 150k steps: the runs of the second version of the MoT paper."""
  c.model.positions = 'learned'
  c.model.init_scale = 0.1
  c.model.dtype = 'bfloat16'
  c.model.document_mask = True  # packed sequences; the papers concatenate documents without a mask
  c.model.loss_chunk = 32
  c.model.remat = 'full'
  c.data.source = 'seqio'
  c.data.task = 'c4_en'
  c.data.tokenizer = 'gpt2:gpt2'  # a folder gpt2/ with vocab.json and merges.txt
  c.data.sequence_length = 256
  c.data.batch_size = 256
  c.optimizer.warmup_steps = 2500
  c.train.steps = 150_000
  c.train.eval_interval = 1000
  c.train.eval_batches = 10
  c.train.checkpoint_interval = 1000


def scaling_law_run(c):
  """Batches of half a million tokens, 33B in all; warm-up 1 % (arXiv:2402.07871, appendix A)."""
  c.data.batch_size = 2048
  c.optimizer.accumulation = 8  # a routing group is 256 sequences
  c.train.steps = 62_500
  c.optimizer.warmup_steps = 625


def moe_mamba_run(size):
  """The dense Transformer of MoE-Mamba's runs: C4, context 1024, rotary positions."""
  if size == 'laptop':
    return baseline()
  d_model, blocks, heads, peak_lr, batch_size, steps = MOE_MAMBA_SIZES[size]
  c = baseline()
  c4(c)
  c.model.positions = 'rope'
  c.model.d_model, c.model.num_heads, c.model.d_ff = d_model, heads, 4 * d_model
  c.model.blocks = ((('attention', 'mlp'), blocks),)
  c.data.sequence_length = 1024
  c.data.batch_size = batch_size
  # The tokens of a device of the paper share an expert's slots; 100M ran on several.
  c.model.moe.group_size = min(batch_size, 256)
  c.optimizer.accumulation = batch_size // c.model.moe.group_size
  c.optimizer.peak_lr = peak_lr
  c.optimizer.warmup_steps = steps // 100
  c.train.steps = steps
  return c


def like(c, architecture):
  """Sets what a model of transformers of this kind (`hf.ARCHITECTURES`) needs; returns c."""
  for name, value in hf.ARCHITECTURES[architecture].needs.items():
    c.update_from_flattened_dict({name: value[0] if isinstance(value, tuple) else value})
  return c


def mamba2(c, narrow=False):
  """Replaces Mamba by Mamba-2, of as many channels; `narrow`: with small heads and few states."""
  c.model.blocks = tuple(
    (tuple(name.replace('mamba', 'mamba2') for name in pattern), repeats)
    for pattern, repeats in c.model.blocks
  )
  c.model.mamba2.expand, c.model.mamba2.moe_in = c.model.mamba.expand, c.model.mamba.moe_in
  if narrow:
    c.model.mamba2.head_width = c.model.mamba2.state_size = 16


def shrink(c):
  """Shrinks a config to run in seconds: tiny sizes, every code path, the stdlib corpus."""
  c.model.d_model, c.model.num_heads, c.model.d_ff = 16, 2, 64
  c.model.blocks = tuple((pattern, min(repeats, 2)) for pattern, repeats in c.model.blocks)
  c.model.loss_chunk = 12
  c.model.mot.num_experts, c.model.mot.group_size = 8, 4
  c.model.moe.expansion_rate, c.model.moe.group_size = 4, 4
  c.model.moe.granularity = min(c.model.moe.granularity, 2)
  c.model.mamba2.head_width, c.model.mamba2.state_size = 8, 8
  c.data.source, c.data.tokenizer = 'stdlib', 'bytes'
  c.data.sequence_length, c.data.batch_size = 32, 16
  c.optimizer.accumulation = 2
  c.optimizer.warmup_steps = 2
  c.train.steps = 6
  c.train.log_interval = 1
  c.train.eval_interval = c.train.checkpoint_interval = 3
  c.train.eval_batches = c.train.final_eval_batches = 2
  c.train.sample_length = 8
  return c
