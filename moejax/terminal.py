"""The terminal of moejax.generate: prompts from files and lines, and text as it is generated."""

import contextlib
import json
import pathlib
import statistics
import sys
import time

_LINE = f'\n{"-" * 40}'


def read_prompts(path):
  """The prompts in a file: one per line, or in a `.jsonl` file the field `prompt` of every line.

  Raises:
    ValueError: the file holds no prompt, or a line that is none; `--prompts` and line are named.
  """
  lines = pathlib.Path(path).read_text('utf-8', 'surrogateescape').splitlines()
  is_json = pathlib.Path(path).suffix == '.jsonl'
  numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
  if not numbered:
    raise ValueError(f'--prompts={path}: expected one prompt per line, but the file is empty.')
  return [_field(path, number, line) if is_json else line for number, line in numbered]


def _field(path, number, line):
  with contextlib.suppress(ValueError):
    match json.loads(line):
      case {'prompt': str(prompt)}:
        return prompt
  raise ValueError(
    f'--prompts={path}: line {number} must be a JSON object with a string "prompt", as in '
    f'{{"prompt": "def "}}; got {line[:60]}'
  )


class Screen:
  """Prints texts, the first of a batch while it grows, and measures the speed.

  Args:
    step: of the checkpoint, for JSON lines in place of texts; None: texts.
    is_answer: the prompt stands above already.
    is_visible: False in all processes but one.
  """

  def __init__(self, step, is_answer=False, is_visible=True):
    self.text = ''  # the newest, as far as it was shown
    self._step, self._is_answer, self._is_visible = step, is_answer, is_visible
    self._prompts, self._tokens = [], 0
    self._time, self._gaps = 0.0, []

  def begin(self, prompts):
    """Before a batch; returns what `generate.complete` calls after every token."""
    self._prompts, self.text, self._time = prompts, '', 0.0
    if self._step is None and not self._is_answer:
      self._print(prompts[0], end='')
    return self._watch

  def _watch(self, texts):
    now = time.perf_counter()
    if self._time:  # the first position read the prompts
      self._gaps.append((now - self._time) / len(texts))
    self._time = now
    settled = texts[0].settled
    if self._step is None:
      self._print(settled[len(self.text) :], end='')
    self.text = settled

  def end(self, texts):
    """After a batch."""
    self._tokens += sum(text.tokens for text in texts)
    if self._step is None:
      self._print('' if self._is_answer else _LINE)
      for prompt, text in zip(self._prompts[1:], texts[1:], strict=True):
        self._print(f'{prompt}{text.text}{_LINE}')
      return
    for prompt, text in zip(self._prompts, texts, strict=True):
      names = ('text', 'tokens', 'seed', 'finish_reason')
      record = {name: getattr(text, name) for name in names}
      self._print(json.dumps({'prompt': prompt, **record, 'step': self._step}))

  def note(self, message):
    """Prints a message to the other stream, unless it is ''."""
    if message and self._is_visible:
      print(message, file=sys.stderr)

  @property
  def speed(self):
    """'300 tokens, 1250 tokens/s': by the median time of a position, so compiling is left out."""
    rate = f', {1 / statistics.median(self._gaps):.0f} tokens/s' if self._gaps else ''
    return f'{self._tokens} tokens{rate}'

  def _print(self, text, end='\n'):
    if self._is_visible:
      print(text, end=end, flush=True)


def converse(answer, keep_context):
  """Answers lines until the input ends (Ctrl-D).

  Args:
    answer: prints the continuation of a text and returns it, as far as it came before Ctrl-C.
    keep_context: every line continues the text so far; an empty line begins a new one.
  """
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401  (input() edits lines with it)
  asks = sys.stdin.isatty()
  if asks:
    what = 'Each line continues the text; an empty line begins a new one.' if keep_context else ''
    print(f'Ctrl-C ends an answer, Ctrl-D the program. {what}'.rstrip(), file=sys.stderr)
  text = ''
  while True:
    try:
      line = input('> ' if asks else '')
    except EOFError:
      return
    except KeyboardInterrupt:
      print()
      continue
    if not line or not keep_context:
      text = ''
    if line:
      text += f'\n{line}' if text else line
      text += answer(text)
