"""The baseline: every field that exists, its default, and what it means.

A config file takes `baseline()`, changes what differs, and hands it out locked: an unknown field is
an error. Words after the colon of `--config=configs/mot.py:medium,experts=32,debug` choose sizes
and variants here, before the fields are derived; `--config.section.field=value` overrides single
fields afterwards.
"""

import types

from ml_collections import ConfigDict

from moejax.text import did_you_mean

# name: d_model, blocks, heads, peak learning rate of the dense model; d_ff is 4 * d_model.
SIZES = {
  'laptop': (64, 4, 2, 6e-3),
  'mini': (256, 4, 4, 4e-3),
  'small': (512, 4, 8, 1e-3),
  'medium': (512, 8, 8, 7e-4),
  'base': (768, 12, 12, 4e-4),
  'large': (1024, 24, 16, 2e-4),
}
# The same of the runs behind the scaling laws (arXiv:2402.07871, appendix A), named by the
# parameters that a token uses. 1B and 3B are of its table 2, which gives no shapes: these are ours.
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
# Those of the runs that MoE-Mamba was compared with (arXiv:2401.04081, tables 5 and 6):
# name: d_model, blocks, heads, peak learning rate of Transformers with experts, batch, steps. The
# smallest is ours: a miniature on the billion tokens of the paper's ablations.
MOE_MAMBA_SIZES = {
  '3M': (256, 4, 4, 5e-4, 64, 15_000),
  '25M': (512, 8, 8, 5e-4, 64, 150_000),
  '100M': (768, 16, 12, 2.5e-4, 1024, 30_000),
}


def baseline():
  """All fields with their defaults: a small dense model on the embedded corpus."""
  c = ConfigDict()

  c.model = ConfigDict()
  # Patterns of sublayers and how often each repeats: (((sublayer, ...), repeats), ...). Names
  # joined by + ('mamba+moe') are one sublayer: their sum, on the same input.
  c.model.blocks = ((('attention', 'mlp'), 4),)
  c.model.vocab_size = 0  # 0: the tokenizer's; more pads the embedding
  c.model.d_model = 64
  c.model.num_heads = 2
  c.model.d_ff = 256  # hidden width of a dense feed-forward
  c.model.activation = 'relu'  # relu, gelu, swiglu: of dense feed-forwards
  c.model.positions = 'rope'  # rope, learned (absolute), none
  c.model.document_mask = False  # True: attention stays inside packed documents
  c.model.norm = 'layer_norm'  # layer_norm, rms_norm
  c.model.final_norm = False  # a norm before the output projection
  c.model.tie_embeddings = False  # True: the output projection is the embedding
  c.model.init = 'truncated_normal'  # truncated_normal, truncated_normal_fixed, kaiming_uniform
  c.model.init_scale = 1.0
  # Of activations. Routing and norms are as wide as their parameters, the loss is float32.
  c.model.dtype = 'float32'
  c.model.residual_float32 = False  # True: the stream between sublayers is float32 in any dtype
  # Of parameters and, by default, optimizer moments. Both bfloat16: no float32 copy of anything.
  c.model.param_dtype = 'float32'
  # What the backward pass computes again: none, dots (all but matmul results), save_moe (all but
  # outputs of experts and what other devices sent: nothing is exchanged twice), full.
  c.model.remat = 'none'
  c.model.loss_chunk = 0  # positions whose logits exist at once; 0: all
  c.model.mot = ConfigDict()  # the Mixture-of-Tokens sublayer
  c.model.mot.num_experts = 64
  c.model.mot.group_size = 8  # sequences that are mixed with each other
  c.model.mot.expert_width = (
    0  # 0: FLOPs per token of a dense layer, d_ff * group_size / num_experts
  )
  c.model.mot.routing = 'softmax'  # softmax, discrete (one token per expert), uniform (all alike)
  # Weights of outputs on their way back: same (as merged), softmax_over_experts, raw (1), top_1.
  c.model.mot.emit = 'same'
  c.model.mot.separate_controllers = False  # True: emit has scores of its own
  c.model.mot.temperature = 1.0  # of the softmax; where it changes, the initial one
  c.model.mot.temperature_mode = 'fixed'  # fixed, annealed, learned (per layer), learned_per_expert
  c.model.mot.separate_temperatures = False  # True: emit learns a temperature of its own
  c.model.mot.expert_norm = False  # layer norm before and after the experts
  c.model.mot.grouping = 'batch'  # consecutive sequences; random: shuffled in every layer and step

  c.model.moe = ConfigDict()  # the sparse mixture-of-experts sublayer
  c.model.moe.router = 'token_choice'  # token_choice, expert_choice
  c.model.moe.expansion_rate = 8  # parameters of all experts over those of a dense layer
  c.model.moe.granularity = 1  # experts are d_ff / granularity wide, this many times as many
  c.model.moe.experts_per_token = 0  # 0: granularity, the FLOPs per token of a dense layer
  c.model.moe.capacity_factor = 1.25  # slots of an expert over its fair share; 0: nobody is dropped
  c.model.moe.group_size = 8  # sequences that are routed together
  c.model.moe.group_by = 'auto'  # sequence (all their tokens), position; auto: what is causal
  c.model.moe.scores = 'softmax'  # softmax, sigmoid (token choice), softmax_over_tokens (expert's)
  c.model.moe.renormalize = False  # weights of a token sum to 1: the softmax after the choice
  c.model.moe.balance_loss = 0.01  # weight of the load-balancing loss
  c.model.moe.balance_convention = 'uniform_is_1'  # uniform_is_k: k times as much, as in the papers
  c.model.moe.balance_bias = False  # balance by a bias instead (optimizer.balance_bias_rate)
  c.model.moe.z_loss = 0.0  # weight of the mean squared logsumexp of router scores
  c.model.moe.jitter = 0.0  # noise of the router's input in training: uniform in 1 +- jitter
  c.model.moe.shared_width = 0  # hidden width of an expert that every token passes; 0: none
  c.model.moe.output_norm = False  # layer norm of the output
  c.model.moe.impl = 'auto'  # loop (over experts), rows (all at once); auto: by device

  c.model.mamba = ConfigDict()  # the Mamba sublayer
  c.model.mamba.expand = 2.0  # channels per unit of d_model
  c.model.mamba.state_size = 16  # states per channel
  c.model.mamba.conv_width = 4  # positions that its convolution sees
  c.model.mamba.moe_in = 'conv+gate+out'  # projections with experts, in the sublayer moe_in_mamba

  c.data = ConfigDict()
  c.data.source = 'stdlib'  # stdlib, text, jsonl, tokens, seqio
  c.data.files = ''  # text, jsonl: a glob; tokens: the folder that moejax.tokenize wrote
  c.data.field = 'text'  # jsonl: the field that holds the text
  c.data.task = ''  # seqio: a registered task or mixture
  c.data.tfds_data_dir = ''  # seqio: where prepared tensorflow-datasets lie; '' is their default
  c.data.tokenizer = 'bytes'  # bytes, a SentencePiece .model file, gpt2:FOLDER
  c.data.sequence_length = 64
  c.data.batch_size = 32  # sequences per step, over all devices
  c.data.seed = 0

  c.optimizer = ConfigDict()
  c.optimizer.peak_lr = 6e-3
  c.optimizer.warmup_steps = 50
  c.optimizer.final_lr_fraction = (
    0.1  # the cosine ends at this fraction of the peak, at train.steps
  )
  c.optimizer.schedule_start = 0  # step at which warm-up begins; later in a run that goes on anew
  c.optimizer.b1 = 0.9
  c.optimizer.b2 = 0.999
  c.optimizer.eps = 1e-8
  # Of the first moment: float32, bfloat16; '' is that of the parameters, as of the second always.
  c.optimizer.moment_dtype = ''
  c.optimizer.weight_decay = 0.1
  c.optimizer.decay = 'all'  # all, matrices (not norms, biases and Mamba's a and skip)
  c.optimizer.clip_norm = 0.5  # of the gradient of all parameters together
  c.optimizer.balance_bias_rate = 1e-3  # step of the biases that balance routers
  c.optimizer.anneal_from = 0  # step from which annealed temperatures fall, to 0 at train.steps
  c.optimizer.accumulation = 1  # passes a batch is split into; MoT groups lie within one pass

  c.mesh = ConfigDict()  # devices along each axis; -1: the rest
  c.mesh.data = -1
  c.mesh.fsdp = 1
  c.mesh.expert = 1
  c.mesh.tensor = 1

  c.train = ConfigDict()
  c.train.steps = 3000
  c.train.seed = 0  # of the parameters
  c.train.log_interval = 10
  c.train.eval_interval = 250
  c.train.eval_batches = 32
  c.train.checkpoint_interval = 250
  c.train.keep_checkpoints = 3
  c.train.sample_prompt = 'def '
  c.train.sample_length = 120  # tokens generated at the end of a run; 0: none
  return c.lock()


def parse_arg(arg, sizes=SIZES, **options):
  """Reads 'medium,experts=32,debug' into a namespace with `size`, `debug` and the given options.

  Args:
    arg: the part of --config after the colon, or None.
    sizes: names that are a size.
    **options: name=default of further `name=value` words, of the default's type; a word of default
      False, as `debug`, is true by its name alone.

  Raises:
    ValueError: a word is neither a size nor an option.
  """
  options = {'debug': False, **options}
  values = {'size': 'laptop', **options}
  for word in filter(None, (arg or '').split(',')):
    name, equals, text = word.partition('=')
    if name in sizes and not equals:
      values['size'] = name
    elif options.get(name) is False and not equals:
      values[name] = True
    elif name in options and options[name] is not False and equals:
      try:
        values[name] = type(options[name])(text)
      except ValueError as error:
        kind = type(options[name]).__name__
        raise ValueError(f'--config=...:{word}: expected {name}=<{kind}>, got {text!r}.') from error
    else:
      known = [*sizes, *(o if default is False else f'{o}=' for o, default in options.items())]
      hint = did_you_mean(word, known)
      raise ValueError(f'--config=...:{word}: not one of {", ".join(known)}{hint}.')
  return types.SimpleNamespace(**values)


def sized(name):
  """The dense model of a size; all but the laptop's follow the papers' runs on C4."""
  c = baseline()
  shape = (SIZES | SCALING_SIZES)[name]
  c.model.d_model, blocks, c.model.num_heads, c.optimizer.peak_lr = shape
  c.model.d_ff = 4 * c.model.d_model
  c.model.blocks = ((('attention', 'mlp'), blocks),)
  if name != 'laptop':
    c4(c)
  if name == 'mini':
    c.train.steps = 250_000  # the proof of concept in the first version of the MoT paper
  if name in SCALING_SIZES:
    scaling_law_run(c)
  return c


def c4(c):
  """C4, context 256, batch 256, 150k steps: the runs of the second version of the MoT paper."""
  c.model.positions = 'learned'
  c.model.init_scale = 0.1
  c.model.dtype = 'bfloat16'
  c.model.document_mask = True  # packed rows; the papers concatenate documents without a mask
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
  """The dense Transformer in the runs of MoE-Mamba: C4, context 1024, rotary positions."""
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
  c.optimizer.peak_lr = peak_lr
  c.optimizer.warmup_steps = steps // 100
  c.train.steps = steps
  return c


def shrink(c):
  """The same program in seconds: tiny sizes, every code path; corpora to download become stdlib."""
  c.model.d_model, c.model.num_heads, c.model.d_ff = 16, 2, 64
  c.model.blocks = tuple((pattern, min(repeats, 2)) for pattern, repeats in c.model.blocks)
  c.model.loss_chunk = 12
  c.model.mot.num_experts, c.model.mot.group_size = 8, 4
  c.model.moe.expansion_rate, c.model.moe.group_size = 4, 4
  c.model.moe.granularity = min(c.model.moe.granularity, 2)
  c.data.source, c.data.tokenizer = 'stdlib', 'bytes'
  c.data.sequence_length, c.data.batch_size = 32, 16
  c.optimizer.accumulation = 2
  c.optimizer.warmup_steps = 2
  c.train.steps = 6
  c.train.log_interval = 1
  c.train.eval_interval = c.train.checkpoint_interval = 3
  c.train.eval_batches = 2
  c.train.sample_length = 8
  return c
