import pytest


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'source': 'texts'}, r"data\.source: .*'texts'; did you mean 'text'\?"),
    ({'source': 'text'}, r'data\.files: .*needs a glob'),
    ({'source': 'tokens'}, r'data\.files: .*directory written by moejax\.tokenize'),
    ({'files': '*.txt'}, r"data\.files: data\.source='stdlib' reads no files"),
    ({'source': 'jsonl', 'files': 'a', 'field': ''}, r'data\.field'),
    ({'source': 'seqio'}, r'data\.task'),
    ({'tokenizer': ''}, r'data\.tokenizer'),
    ({'sequence_length': 0}, r'data\.sequence_length: expected at least 1, got 0'),
    ({'batch_size': -1}, r'data\.batch_size: expected at least 1, got -1'),
    ({'seed': -1}, r'data\.seed'),
  ],
)
def test_bad_values_name_their_field(make_config, changes, message):
  with pytest.raises(ValueError, match=message):
    make_config(**changes)
