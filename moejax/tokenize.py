r"""Writes a corpus to flat token files, so that runs need no TensorFlow.

  python -m moejax.tokenize --config=configs/mot.py:medium --output=/data/c4_tokens
  python -m moejax.main --config=configs/mot.py:medium --config.data.source=tokens \
    --config.data.files=/data/c4_tokens
"""

import os
import pathlib
import shlex

from absl import flags

from moejax import cli, data
from moejax.data import token_files, tokenizer as tokenizer_lib


def tokenize(config: data.DataConfig, output: str | os.PathLike) -> str:
  """Writes both splits of a corpus into a new directory and returns a summary of them.

  Raises ValueError, naming the config field or flag, if that is impossible.
  """
  index = token_files.write(config, output)
  counts = ', '.join(
    f'{split["tokens"]} tokens of {split["documents"]} documents for {name}'
    for name, split in index['splits'].items()
  )
  tokenizer = tokenizer_lib.tokenizer_in(index['tokenizer'], pathlib.Path(output))
  fields = {'source': 'tokens', 'files': output, 'tokenizer': tokenizer}
  flags = shlex.join(f'--config.data.{name}={value}' for name, value in fields.items())
  return f'Wrote {output}: {counts}. Read them with {flags}'


def main(config):
  print(tokenize(data.DataConfig(**config.data), flags.FLAGS.output))


if __name__ == '__main__':
  cli.define_path('output', None, 'The directory to write; must not exist.', required=True)
  cli.run(main)
