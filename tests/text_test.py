"""Numbers, sizes and durations for humans."""

import pytest

from moejax import text


@pytest.mark.parametrize(
  ('made', 'expected'),
  [
    (text.short(0), '0'),
    (text.short(999), '999'),
    (text.short(999.6), '1k'),
    (text.short(4.369e9), '4.37B'),
    (text.short(2.5e15), '2.5e+03T'),
    (text.size(0), '0 B'),
    (text.size(1000), '0.977 KiB'),
    (text.size(1.5 * 2**30), '1.5 GiB'),
    (text.size(2.0**41), '2048 GiB'),
    (text.duration(59.6), '1m00s'),
    (text.duration(0.2), '0s'),
    (text.duration(7500), '2h05m'),
    (text.duration(4 * 86400 + 3 * 3600), '4d03h'),
    (text.short_time(0.0125), '12.5 ms'),
    (text.short_time(3.21), '3.21 s'),
    (text.did_you_mean('expets', ['experts', 'mixtures']), "; did you mean 'experts'?"),
    (text.did_you_mean('zzz', ['experts']), '.'),
  ],
)
def test_text(made, expected):
  assert made == expected


@pytest.mark.parametrize(
  ('written', 'expected'),
  [('16GiB', 2**34), ('24 GB', 24e9), ('1.5kb', 1500), ('1TiB', 2**40), ('7B', 7)],
)
def test_sizes_are_read(written, expected):
  assert text.num_bytes(written) == expected


@pytest.mark.parametrize('written', ['16', 'GiB', '0GiB', '-1GB', '1e9B', '1.2.3GB', '5PB'])
def test_no_size(written):
  with pytest.raises(ValueError, match='expected a size, such as 16GiB'):
    text.num_bytes(written)
