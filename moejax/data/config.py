"""The `data` section of a config."""

import dataclasses

from moejax import buckets
from moejax.fields import MAX_SEED, Section, default

_MOST_TOKENS = 2**31 - 1  # of a step, which are counted in 32 bits
SOURCES = ('stdlib', 'environment', 'text', 'jsonl', 'parquet', 'datasets', 'tokens', 'seqio')
_READS_FILES = ('text', 'jsonl', 'parquet', 'tokens')


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
  """Which text a run reads, how it is tokenised, and the shape of a batch [B, L]."""

  PATH = 'data'

  source: str = default('stdlib', 'where the text comes from', choices=SOURCES)
  files: str = default('', 'a glob; tokens: the folder that moejax.tokenize wrote')
  validation_files: str = default('', "like files, all for validation; '': a twentieth of files")
  field: str = default('text', 'jsonl, parquet, datasets: the field that holds the text')
  task: str = default('', 'datasets: NAME:SUBSET or a folder; seqio: c4_en, a task, MODULE:TASK')
  tfds_data_dir: str = default('', "seqio: folder of tensorflow-datasets; '': its default")
  tokenizer: str = default(
    'bytes', 'bytes, tokenizer.json or its folder, a SentencePiece .model, gpt2:FOLDER'
  )
  eos_id: int = default(
    -1,
    'ends documents and generated texts; -1: the id of the tokenizer',
    minimum=-1,
    maximum=2**31 - 2,
  )
  bos_id: int = default(
    -1, 'of a converted model, kept for moejax.convert to_hf; -1: none', minimum=-1
  )
  pad_id: int = default(-1, 'like bos_id; batches mark padding by segments', minimum=-1)
  sequence_length: int = default(64, 'tokens of a sequence', minimum=1)
  batch_size: int = default(32, 'sequences per step, over all devices', minimum=1)
  seed: int = default(0, 'of the order of the training data', minimum=0, maximum=MAX_SEED)

  @property
  def tokens_per_step(self):
    """Over all devices."""
    return self.batch_size * self.sequence_length

  def conflicts(self):
    if self.tokens_per_step > _MOST_TOKENS:
      yield (
        f'data.batch_size * data.sequence_length = {self.tokens_per_step} tokens of a step; at '
        f'most {_MOST_TOKENS} are possible.'
      )
    if self.source in _READS_FILES and not self.files:
      what = 'a directory written by moejax.tokenize' if self.source == 'tokens' else 'a glob'
      yield f'data.files: data.source={self.source!r} needs {what}, got none.'
    if self.source not in _READS_FILES and self.files:
      yield (
        f'data.files: data.source={self.source!r} reads no files, got {self.files!r}; '
        f'set data.source to one of {", ".join(_READS_FILES)}, or leave data.files empty.'
      )
    if self.validation_files and not self.files:
      yield (
        f'data.validation_files: data.source={self.source!r} without data.files chooses its own '
        'validation text; leave it empty.'
      )
    for name in ('files', 'validation_files', 'tokenizer'):
      value = getattr(self, name)
      if '://' in value and not buckets.is_bucket(value.removeprefix('gpt2:')):
        yield (
          f'data.{name}: expected a local path, or one in gs:// or s3://, got {value!r}. Mount the '
          'bucket (see docs/launch.md).'
        )
    if self.source in ('jsonl', 'parquet', 'datasets') and not self.field:
      yield 'data.field: expected the name of the field that holds the text.'
    if self.source == 'seqio' and not self.task:
      yield "data.task: data.source='seqio' needs the name of a task, got none."
    if self.source == 'datasets' and not self.task:
      yield (
        "data.task: data.source='datasets' needs the name of a dataset (allenai/c4:en) or a "
        'folder, got none.'
      )
    if not self.tokenizer:
      yield "data.tokenizer: expected 'bytes' or the path of a tokenizer."
