import pytest


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'source': 'texts'},
      r"data\.source must be one of .*'texts'; did you mean 'text'\?",
    ),
    ({'source': 'text'}, r'data\.files: .*needs a glob'),
    ({'source': 'tokens'}, r'data\.files: .*directory written by moejax\.tokenize'),
    ({'files': '*.txt'}, r"data\.files: data\.source='stdlib' reads no files"),
    ({'source': 'jsonl', 'files': 'a', 'field': ''}, r'data\.field'),
    ({'source': 'parquet', 'files': 'a', 'field': ''}, r'data\.field'),
    ({'validation_files': '*.txt'}, r"data\.validation_files: data\.source='stdlib' without"),
    ({'source': 'seqio'}, r'data\.task'),
    ({'tokenizer': ''}, r'data\.tokenizer'),
    ({'tokenizer': 'gpt2:az://b/gpt2'}, r"data\.tokenizer: .*got 'gpt2:az://b/gpt2'\. Mount the"),
    ({'source': 'text', 'files': 'az://b/*.txt'}, r'data\.files: expected a local path'),
    ({'sequence_length': 0}, r'data\.sequence_length must be at least 1, got 0'),
    ({'batch_size': -1}, r'data\.batch_size must be at least 1, got -1'),
    ({'seed': -1}, r'data\.seed must be at least 0'),
    ({'eos_id': 2**31}, r'data\.eos_id must be .* at most 2147483646'),
    ({'seed': 2**32}, r'data\.seed must be .* at most 4294967295, got 4294967296'),
  ],
)
def test_bad_values_name_their_field(make_config, changes, message):
  with pytest.raises(ValueError, match=message):
    make_config(**changes)
