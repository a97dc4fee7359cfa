"""Text from a trained model, as functions and as a program.

  python -m moejax.generate --workdir=DIR --prompt="def " --temperature=0.7 --top_p=0.9
  python -m moejax.generate --workdir=DIR --interactive
  python -m moejax.generate --workdir=DIR --prompts=prompts.jsonl --json
  python -m moejax.generate --workdir=DIR --prompt="def " --mode=unmixed

In a model that mixes sequences, the requests of a group influence each other, in decoding as in
training; a group that the prompts do not fill is filled with further continuations of them. With
`--mode=mixed_with_corpus` or `unmixed`, and in other models, a request's text depends on nothing
but its prompt, its seed and the settings.
"""

import dataclasses

import jax
import numpy as np
from absl import flags

from moejax import cli, decode, fields, run_folder, terminal
from moejax.distributed import is_process_0
from moejax.evaluate import MODES, decoding, describe_modes, training_text


@dataclasses.dataclass(frozen=True)
class Sampling(fields.Section):
  """How the next token is chosen, and what ends a text.

  The settings act in the order of transformers' `generate`: repetition penalty, temperature, top-k,
  top-p, min-p (moejax/ops/sampling.py).
  """

  temperature: float = fields.default(
    0.8, 'divides the logits; 0: greedy, always the likeliest token', minimum=0
  )
  top_k: int = fields.default(0, 'sample among the k likeliest tokens; 0: among all', minimum=0)
  top_p: float = fields.default(
    1.0, 'sample among the likeliest tokens, as few as have this probability', above=0, maximum=1
  )
  min_p: float = fields.default(
    0.0, 'sample among tokens at least this times as likely as the likeliest', minimum=0, maximum=1
  )
  repetition_penalty: float = fields.default(
    1.0, 'divides positive logits of tokens in the context, multiplies negative ones', above=0
  )
  stop: tuple = fields.default((), 'a text ends before the first of these strings')
  stop_at_eos: bool = fields.default(True, 'a text ends where the model ends its document')
  seed: int = fields.default(
    0,
    'of the first request; the next has the next seed',
    minimum=0,
    maximum=fields.MAX_SEED,
  )

  def __post_init__(self):
    for f in fields.of(Sampling):
      value = getattr(self, f.name)
      if isinstance(value, np.generic):  # of np.linspace, for example
        object.__setattr__(self, f.name, value.item())
    if isinstance(self.stop, str):
      object.__setattr__(self, 'stop', (self.stop,))
    super().__post_init__()

  def conflicts(self):
    if not all(isinstance(stop, str) and stop for stop in self.stop):
      yield f'stop must hold strings of at least one character, got {self.stop!r}.'

  @property
  def settings(self):
    """Of `ops.sampling.next_token`."""
    names = ('repetition_penalty', 'temperature', 'top_k', 'top_p', 'min_p')
    return {name: getattr(self, name) for name in names}

  def seeds(self, number):
    """One for every request."""
    return [(self.seed + i) % (fields.MAX_SEED + 1) for i in range(number)]


class Completion:
  """A text that grows token by token.

  Attributes:
    text: the continuation; a stop string is not part of it.
    tokens: how many were generated; the end-of-document token counts.
    seed: reproduces this text alone, if the model does not mix sequences.
    finish_reason: 'length', 'stop', 'end_of_text', or '' while it grows.
  """

  def __init__(self, tokenizer, sampling, seed, length):
    self.text, self.tokens, self.seed, self.finish_reason = '', 0, seed, ''
    self._tokenizer, self._sampling, self._length = tokenizer, sampling, length
    self._undecoded = []  # the beginning of a character

  def add(self, token):
    """Appends a token, unless the text has ended."""
    if self.finish_reason:
      return
    self.tokens += 1
    ends = self._sampling.stop_at_eos and token == self._tokenizer.eos_id
    self._undecoded += [] if ends else [token]
    piece = self._tokenizer.decode(self._undecoded)
    last = ends or self.tokens == self._length
    if last or not piece.endswith('\ufffd'):
      self._append(piece)
    if last and not self.finish_reason:
      self.finish_reason = 'end_of_text' if ends else 'length'

  def _append(self, piece):
    before, self.text, self._undecoded = len(self.text), self.text + piece, []
    stops = self._sampling.stop
    found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in stops]
    if any(place >= 0 for place in found):
      self.text = self.text[: min(place for place in found if place >= 0)]
      self.finish_reason = 'stop'

  @property
  def settled(self):
    """The text without what may turn out to be the beginning of a stop string."""
    if self.finish_reason:
      return self.text
    beginnings = (stop[:n] for stop in self._sampling.stop for n in range(1, len(stop)))
    held = max((len(b) for b in beginnings if self.text.endswith(b)), default=0)
    return self.text[: len(self.text) - held]


def complete(
  model_config,
  params,
  tokenizer,
  prompts,
  length,
  sampling=None,
  watch=lambda texts: None,
  others=None,
):
  """Continues texts together.

  If the prompts do not fill the groups of a mixing model, further continuations of them do: a
  mixture of fewer tokens than in training would be out of distribution.

  Args:
    model_config, params, tokenizer: the model.
    prompts: strings; an empty one is the beginning of a document.
    length: the most tokens to generate after each.
    sampling: a `Sampling`; None: the default.
    watch: called with the list of Completions after every token.
    others: sequences of ids that fill up a group of every prompt's own; None: prompts share groups.

  Returns:
    A Completion per prompt.

  Raises:
    ValueError: there is no prompt, or the length is below 1.
  """
  sampling = sampling or Sampling()
  ids = [tokenizer.encode(prompt) for prompt in prompts]
  ids = [i if len(i) else np.array([tokenizer.eos_id], np.int32) for i in ids]
  _check(ids, length)
  seeds = sampling.seeds(len(ids))
  texts = [Completion(tokenizer, sampling, seed, length) for seed in seeds]
  if others is None:
    number = decode.full_groups(model_config, len(ids))
    rows, seeds = [ids[i % len(ids)] for i in range(number)], sampling.seeds(number)
    text_of = dict(enumerate(texts))
  else:
    rows = [row for i in ids for row in (i, *others)]
    seeds = [seed for seed in seeds for _ in range(1 + len(others))]
    text_of = {i * (1 + len(others)): text for i, text in enumerate(texts)}
  for new in decode.stream(model_config, params, rows, length, seeds, sampling.settings):
    for row, token in new:
      if row in text_of:
        text_of[row].add(token)
    watch(texts)
    if all(text.finish_reason for text in texts):
      break
  return texts


def continuations(model_config, params, tokenizer, prompts, length, **sampling):
  """One continuation of each text in `prompts`, as text; `sampling`: fields of `Sampling`."""
  sampling = fields.make(Sampling, sampling)
  return [
    completion.text
    for completion in complete(model_config, params, tokenizer, prompts, length, sampling)
  ]


def generate(model_config, params, prompts, length, **sampling):
  """Continues sequences of token ids together, past the model's context if necessary.

  Args:
    model_config, params: the model.
    prompts: sequences of token ids; at least one token each.
    length: tokens to generate after each prompt.
    sampling: fields of `Sampling`; nothing ends a sequence early.

  Returns:
    One int32 array per prompt: its continuation of `length` tokens.

  Raises:
    ValueError: a prompt is empty, the length is below 1, or a setting is invalid.
  """
  settings = fields.make(Sampling, sampling)
  _check(prompts, length)
  seeds = settings.seeds(len(prompts))
  outputs = [[] for _ in prompts]
  for new in decode.stream(model_config, params, prompts, length, seeds, settings.settings):
    for i, token in new:
      outputs[i].append(token)
  return [np.array(output, np.int32) for output in outputs]


def _check(prompts, length):
  if not len(prompts) or min(map(len, prompts)) < 1:
    raise ValueError('generate: every prompt must have at least one token.')
  if length < 1:
    raise ValueError(f'generate: length must be at least one token, got {length}.')


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
  values = {f.name: getattr(args, f.name) for f in fields.of(Sampling)}
  sampling = Sampling(**{name: value for name, value in values.items() if value is not None})
  prompts = [*(args.prompt or ()), *(terminal.read_prompts(args.prompts) if args.prompts else ())]
  if args.interactive and (prompts or args.samples > 1):
    raise ValueError('--interactive reads its prompts: leave out --prompt, --prompts, --samples.')
  cli.join_processes()
  if args.interactive and jax.process_count() > 1:
    raise ValueError('--interactive: one process reads the input; start only one.')
  run_config, step, params, mesh = run_folder.load_run(args.workdir, overrides)
  model, tokenizer = decoding(run_config.model, args.mode, args.group_size), run_config.tokenizer
  others = None
  if args.mode == 'mixed_with_corpus':
    others = training_text(run_config.data, model.mixed_sequences - 1)
  screen = terminal.Screen(step if args.json else None, args.interactive, is_process_0())

  def show(prompts, seed):
    with_seed = dataclasses.replace(sampling, seed=seed)
    watch = screen.begin(prompts)
    how = args.length, with_seed, watch, others
    screen.end(complete(model, params, tokenizer, prompts, *how))

  def warn(prompts, length=args.length):
    longest = max(len(tokenizer.encode(prompt)) for prompt in prompts)
    screen.note(_beyond_context(model.max_length, longest, length))

  def answer(prompt):
    warn([prompt], length=1)
    try:
      show([prompt], sampling.seed)
    except KeyboardInterrupt:
      print(flush=True)
    return screen.text

  with jax.set_mesh(mesh):
    if args.interactive:
      warn([''])
      terminal.converse(answer, args.keep_context)
    else:
      prompts = [prompt for prompt in prompts or ['def '] for _ in range(args.samples)]
      warn(prompts)
      size, seeds = decode.full_groups(model, args.batch_size), sampling.seeds(len(prompts))
      for first in range(0, len(prompts), size):
        show(prompts[first : first + size], seeds[first])
  screen.note(screen.speed)
  return cli.OK


def _define_flags():
  cli.define_process_flags()
  cli.define_path(
    'workdir', None, 'Folder of the run to generate from.', required=True, bucket=True
  )
  flags.DEFINE_multi_string(
    'prompt',
    None,
    "Text to continue; may be repeated; '' begins a document. Without prompts: 'def '.",
  )
  cli.define_path('prompts', None, 'File of prompts: one per line, or .jsonl with field "prompt".')
  flags.DEFINE_bool(
    'interactive', False, 'Reads prompts from the terminal or a pipe, line by line.'
  )
  flags.DEFINE_bool(
    'keep_context', False, 'Of --interactive: a line continues the text; an empty line starts over.'
  )
  flags.DEFINE_bool('json', False, 'Prints a JSON object per text, in place of the text.')
  flags.DEFINE_integer('length', 100, 'Most tokens to generate.', lower_bound=1)
  flags.DEFINE_integer('samples', 1, 'Continuations of each prompt.', lower_bound=1)
  flags.DEFINE_integer(
    'batch_size', 32, 'Prompts decoded together, rounded up to full groups.', lower_bound=1
  )
  for f in fields.of(Sampling):
    define = {
      float: flags.DEFINE_float,
      int: flags.DEFINE_integer,
      bool: flags.DEFINE_bool,
      tuple: flags.DEFINE_multi_string,
    }[f.type]
    meaning = f.metadata['meaning']
    define(
      f.name,
      f.default or None if f.type is tuple else f.default,
      f'{meaning[0].upper()}{meaning[1:]}.',
    )
  flags.DEFINE_enum(
    'mode',
    'mixed',
    list(MODES),
    f'Of models that mix sequences. {describe_modes()} moejax.evaluate compares their losses.',
  )
  flags.DEFINE_integer('group_size', 0, 'Requests per mixing group; 0: as in training.')


if __name__ == '__main__':
  _define_flags()
  cli.run(main, needs_config=False, takes_overrides=True)
