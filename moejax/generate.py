"""Text from a trained model: incremental decoding with a cache, as a function and as a program.

  python -m moejax.generate --workdir=DIR --prompt="def "
  python -m moejax.generate --workdir=DIR --prompt="def " --mode=unmixed

All sequences of a batch advance position by position together, because Mixture-of-Tokens layers mix
the sequences of a group at equal positions, in decoding as in training. Requests in one group
therefore influence each other, unless `--mode=unmixed` decodes each by itself.
"""

import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from moejax import cli, fields, model as model_lib, run_folder, sharding
from moejax.distributed import is_process_0
from moejax.evaluate import decoding
from moejax.layers.common import TokenInfo


def generate(model_config, params, prompts, length, *, temperature=0.8, key=None):
  """Continues prompts together, past the model's context if necessary.

  When prompt and continuation fill the context, their newest half becomes the new prompt. A prompt
  longer than the context is cut in the same way.

  Args:
    prompts: sequences of token ids; at least one token each.
    length: tokens to generate after each prompt.
    temperature: of sampling; 0 is greedy.
    key: of sampling; may be None if greedy.

  Returns:
    One int32 array per prompt: its continuation of `length` tokens.

  Raises:
    ValueError: a prompt is empty, the length is below 1, or the temperature is no such number.
  """
  if not len(prompts) or min(map(len, prompts)) < 1:
    raise ValueError('generate: every prompt must have at least one token.')
  if length < 1:
    raise ValueError(f'generate: length must be at least one token, got {length}.')
  if not 0 <= temperature < math.inf:
    raise ValueError(f'generate: temperature must be finite and at least 0, got {temperature}.')
  key = jax.random.key(0) if key is None else key
  context = model_config.max_length
  texts = [np.asarray(prompt, np.int32) for prompt in prompts]
  outputs = [np.zeros(0, np.int32)] * len(prompts)
  while length:
    if max(map(len, texts)) > context:
      texts = [text[-max(1, context // 2) :] for text in texts]
    fitting = min(length, context + 1 - max(map(len, texts)))
    key, key_now = jax.random.split(key)
    new = _within_context(model_config, params, texts, fitting, temperature, key_now)
    texts, outputs = (list(map(_join, before, new)) for before in (texts, outputs))
    length -= fitting
  return outputs


def _join(before, after):
  return np.concatenate([before, after])


def _within_context(model_config, params, prompts, length, temperature, key):
  lengths = np.array([len(p) for p in prompts])
  # Sequences that fill up the last group are padding: segment 0 keeps them out of every mixture.
  B = _full_groups(model_config, len(prompts))
  prompts_BS = np.zeros((B, lengths.max()), np.int32)
  for i, prompt in enumerate(prompts):
    prompts_BS[i, : len(prompt)] = prompt
  prompt_lengths_B = np.ones(B, np.int32)
  prompt_lengths_B[: len(prompts)] = lengths
  valid_B = np.arange(B) < len(prompts)
  common, steps = int(lengths.min()), int(lengths.max()) + length - 1
  out_BS = _decode(
    model_config,
    common,
    steps,
    params,
    prompts_BS,
    prompt_lengths_B,
    valid_B,
    np.float32(temperature),
    key,
  )
  out_BS = sharding.fetch(out_BS)
  # out_BS[:, j] is the token after position common - 1 + j.
  return [out_BS[i, n - common : n - common + length] for i, n in enumerate(lengths)]


def _full_groups(model_config, num_sequences):
  """The number of sequences, rounded up to full groups."""
  M = model_config.mixed_sequences
  return -(-num_sequences // M) * M


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(config, common, steps, params, prompts_BS, prompt_lengths_B, valid_B, temperature, key):
  """The tokens after positions common - 1 ... steps - 1; inside a prompt, the prompt's own.

  The first `common` positions, which all prompts have, are prefilled in parallel; the others are
  decoded one after the other.
  """
  model = model_lib.bind(config, params)
  B, S = prompts_BS.shape
  segments_B = valid_B.astype(jnp.int32)

  def choose(logits_BV, position):
    sampled_B = _sample(logits_BV, temperature, jax.random.fold_in(key, position))
    forced_B = prompts_BS[:, jnp.minimum(position + 1, S - 1)]
    return jnp.where(position + 1 < prompt_lengths_B, forced_B, sampled_B)

  def advance(carry, position):
    token_B, state = carry
    logits_BV, state = model.step(token_B, state, TokenInfo(segments_B, jnp.full(B, position)))
    next_B = choose(logits_BV, position)
    return (next_B, state), next_B

  ones = jnp.ones((B, common), jnp.int32)
  prefix = TokenInfo(segments_B[:, None] * ones, jnp.arange(common)[None] * ones)
  logits_BV, state = model.prefill(prompts_BS[:, :common], prefix, steps)
  first_B = choose(logits_BV, common - 1)
  _, rest = jax.lax.scan(advance, (first_B, state), jnp.arange(common, steps))
  return jnp.concatenate([first_B[:, None], rest.T], axis=1)


def _sample(logits_BV, temperature, key):
  noise_BV = jax.random.gumbel(key, logits_BV.shape)
  return jnp.argmax(logits_BV + temperature * noise_BV, axis=-1).astype(jnp.int32)


def continuations(model_config, params, tokenizer, prompts, length, *, temperature=0.8, seed=0):
  """One continuation of each text in `prompts`, as text.

  If the prompts do not fill the groups of a mixing model, further continuations of them do: a
  mixture of fewer tokens than in training would be out of distribution.
  """
  ids = [tokenizer.encode(text) for text in prompts]
  repeated = [ids[i % len(ids)] for i in range(_full_groups(model_config, len(prompts)))]
  key = jax.random.key(seed)
  out = generate(model_config, params, repeated, length, temperature=temperature, key=key)
  return [tokenizer.decode(_until_end(o, tokenizer)) for o in out[: len(prompts)]]


def _until_end(ids, tokenizer):
  ends = np.flatnonzero(ids == tokenizer.eos_id)
  return ids[: ends[0]] if len(ends) else ids


def _beyond_context(context, longest, length):
  """A note for the user if prompts of up to `longest` tokens and `length` new ones do not fit."""
  half = max(1, context // 2)
  if longest > context:
    return (
      f'warning: a prompt of {longest} tokens is longer than the context of {context} '
      f'(data.sequence_length): only its last {half} are read.'
    )
  if longest + length > context + 1:
    return (
      f'note: {longest} + {length} tokens exceed the context of {context} (data.sequence_length): '
      f'when it is full, only the newest {half} become the new prompt.'
    )
  return ''


def main(overrides):
  args = flags.FLAGS
  cli.join_processes()
  run_config, _, params, mesh = run_folder.load_run(args.workdir, overrides)
  model = decoding(run_config.model, args.mode, args.group_size)
  prompts = [prompt for prompt in args.prompt for _ in range(args.samples)]
  longest = max(len(run_config.tokenizer.encode(prompt)) for prompt in args.prompt)
  if is_process_0() and (note := _beyond_context(model.max_length, longest, args.length)):
    print(note, file=sys.stderr)
  with jax.set_mesh(mesh):
    texts = continuations(
      model,
      params,
      run_config.tokenizer,
      prompts,
      args.length,
      temperature=args.temperature,
      seed=args.seed,
    )
  for prompt, text in zip(prompts, texts, strict=True):
    print(f'{prompt}{text}\n{"-" * 40}')
  return cli.OK


if __name__ == '__main__':
  cli.define_process_flags()
  cli.define_path('workdir', None, 'Folder of the run to generate from.', required=True)
  flags.DEFINE_multi_string('prompt', ['def '], 'Text to continue; may be repeated.')
  flags.DEFINE_integer('length', 100, 'Tokens to generate.')
  flags.DEFINE_integer('samples', 1, 'Continuations of each prompt.', lower_bound=1)
  flags.DEFINE_float('temperature', 0.8, 'Of sampling; 0 is greedy.', lower_bound=0)
  flags.DEFINE_integer('seed', 0, 'Of sampling.', lower_bound=0, upper_bound=fields.MAX_SEED)
  flags.DEFINE_enum(
    'mode',
    'mixed',
    ['mixed', 'unmixed', 'discrete'],
    'How mixed requests see each other; moejax.evaluate compares the losses.',
  )
  flags.DEFINE_integer('group_size', 0, 'Requests per mixing group; 0: as in training.')
  cli.run(main, needs_config=False, takes_overrides=True)
