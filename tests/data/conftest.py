import pytest

from moejax import data


@pytest.fixture
def make_config():
  """Returns a function that makes a small DataConfig from a few fields."""

  def make(**changes):
    fields = {
      'source': 'stdlib',
      'files': '',
      'field': 'text',
      'task': '',
      'tfds_data_dir': '',
      'tokenizer': 'bytes',
      'sequence_length': 7,
      'batch_size': 4,
      'seed': 0,
    }
    return data.DataConfig(**(fields | changes))

  return make


@pytest.fixture(scope='session')
def sentencepiece_file(tmp_path_factory):
  """A SentencePiece model from the package's own trainer."""
  from moejax import tokenizer

  texts = [f'def f_{i}(x):\n\treturn x + {i}\n    # naïve\n'.encode() for i in range(200)]
  path = tmp_path_factory.mktemp('tokenizer') / 'small.model'
  path.write_bytes(tokenizer.train_sentencepiece(texts, 320))
  return path


@pytest.fixture(scope='session')
def train_foreign():
  """Returns a function that trains a model with SentencePiece's defaults, or given special ids."""

  def train(path, **options):
    import sentencepiece

    text = ['the quick brown fox jumps', 'over the lazy dog again', 'pack my box with jugs'] * 20
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(text),
      model_prefix=str(path.with_suffix('')),
      **{'vocab_size': 45, 'model_type': 'bpe', 'minloglevel': 2} | options,
    )
    return path

  return train


@pytest.fixture(scope='session')
def foreign_file(train_foreign, tmp_path_factory):
  """A model without padding, whose unknown is 0, beginning 1 and end 2."""
  return train_foreign(tmp_path_factory.mktemp('foreign') / 'foreign.model')


@pytest.fixture
def text_folder(tmp_path):
  """A folder of 60 small text files, some in a subfolder; the hash splits them."""
  folder = tmp_path / 'texts'
  (folder / 'below').mkdir(parents=True)
  for i in range(60):
    path = folder / ('below' if i % 3 else '') / f'{i}.txt'
    path.write_text(f'document {i}\n' + 'abc déf ' * i)
  return folder
