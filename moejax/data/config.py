"""The `data` section of a config."""

import dataclasses

from moejax.text import did_you_mean

SOURCES = ('stdlib', 'text', 'jsonl', 'tokens', 'seqio')
_READS_FILES = ('text', 'jsonl', 'tokens')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which text a run reads, how it becomes tokens, and the shape of a batch.

  Raises ValueError, naming the field, for values that cannot work.
  """

  source: str  # 'stdlib' | 'text' | 'jsonl' | 'tokens' | 'seqio'
  files: str  # text, jsonl: a glob; tokens: a directory that moejax.tokenize wrote; otherwise ''
  field: str  # jsonl: the field that holds the text
  task: str  # seqio: 'c4_en', a registered task or mixture, or 'module:task' to import it first
  tfds_data_dir: str  # seqio: where tensorflow-datasets looks; '' means its default
  tokenizer: str  # 'bytes' | a SentencePiece .model | 'gpt2:<folder with vocab.json, merges.txt>'
  sequence_length: int  # L, tokens of a row
  batch_size: int  # B, rows of the global batch
  seed: int  # order of the training data

  def __post_init__(self):
    if self.source not in SOURCES:
      raise ValueError(
        f'data.source: expected one of {", ".join(SOURCES)}, got {self.source!r}'
        f'{did_you_mean(self.source, SOURCES)}.'
      )
    if self.source in _READS_FILES and not self.files:
      what = 'a directory written by moejax.tokenize' if self.source == 'tokens' else 'a glob'
      raise ValueError(f'data.files: data.source={self.source!r} needs {what}, got none.')
    if self.source not in _READS_FILES and self.files:
      raise ValueError(
        f'data.files: data.source={self.source!r} reads no files, got {self.files!r}; '
        f'set data.source to one of {", ".join(_READS_FILES)}, or leave data.files empty.'
      )
    if self.source == 'jsonl' and not self.field:
      raise ValueError('data.field: expected the name of the JSON field that holds the text.')
    if self.source == 'seqio' and not self.task:
      raise ValueError("data.task: data.source='seqio' needs the name of a task, got none.")
    if not self.tokenizer:
      raise ValueError(
        "data.tokenizer: expected 'bytes', a SentencePiece model file or 'gpt2:DIR'."
      )
    for field in ('sequence_length', 'batch_size'):
      if getattr(self, field) < 1:
        raise ValueError(f'data.{field}: expected at least 1, got {getattr(self, field)}.')
    if self.seed < 0:
      raise ValueError(f'data.seed: expected 0 or more, got {self.seed}.')
