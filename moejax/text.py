"""Text for humans: short numbers, sizes, durations, and did-you-mean hints."""

import datetime
import difflib
import re


def did_you_mean(name: str, known, cutoff: float = 0.5) -> str:
  """The end of a sentence: '; did you mean ...?' with the closest known name, or '.'."""
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
  return f'; did you mean {close[0]!r}?' if close else '.'


def short(number: float) -> str:
  """'4.37B': three digits and a unit."""
  for unit in ('', 'k', 'M', 'B'):
    if number < 999.5:
      return f'{number:.3g}{unit}'
    number /= 1000
  return f'{number:.3g}T'


def size(num_bytes: float) -> str:
  """'1.5 GiB': three digits and a unit."""
  for unit in ('B', 'KiB', 'MiB'):
    if num_bytes < 999.5:
      return f'{num_bytes:.3g} {unit}'
    num_bytes /= 1024
  return f'{num_bytes:.3g} GiB' if num_bytes < 999.5 else f'{num_bytes:.0f} GiB'


def num_bytes(written: str) -> int:
  """'16GiB' or '24 GB' as a number of bytes.

  Raises:
    ValueError: it is not a size.
  """
  match = re.fullmatch(r'(\d+\.?\d*) *([KMGT]?)(i?)B', written.strip(), re.IGNORECASE)
  if not match or not (number := float(match[1])) > 0:
    raise ValueError('expected a size, such as 16GiB or 24GB')
  return round(number * (1024 if match[3] else 1000) ** ' KMGT'.index(match[2].upper() or ' '))


def table(rows) -> str:
  """Rows of texts, in columns that are aligned on the left."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join('  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)


def markdown(rows) -> str:
  """Rows of texts as a Markdown table; the first one is the heading."""
  heading, *body = ([cell.replace('|', '\\|') for cell in row] for row in rows)
  return '\n'.join(f'| {" | ".join(r)} |' for r in (heading, ['---'] * len(heading), *body))


def duration(seconds: float) -> str:
  """'45s', '3m12s', '2h05m' or '4d03h'."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  if days:
    return f'{days}d{hours:02d}h'
  if hours:
    return f'{hours}h{minutes:02d}m'
  return f'{minutes}m{seconds:02d}s' if minutes else f'{seconds}s'


def short_time(seconds: float) -> str:
  """'12.5 ms' or '3.21 s': for something repeated, such as a step."""
  return f'{1e3 * seconds:.3g} ms' if seconds < 1 else f'{seconds:.3g} s'


def split_values(text: str) -> list[str]:
  """Splits at commas, but not within brackets or quotes; around a whole value, quotes are dropped.

  "1,2" -> ['1', '2']; "((('mlp',),2),),()" -> ["((('mlp',),2),)", '()']; "'a,b',c" -> ['a,b', 'c']
  """
  values, depth, quote = [''], 0, ''
  for character in text:
    if quote or character in '\'"':
      quote = '' if character == quote else quote or character
    else:
      depth += (character in '([{') - (character in ')]}')
    if character == ',' and not depth and not quote:
      values.append('')
    else:
      values[-1] += character
  return [re.sub(r'^([\'"])((?:(?!\1).)*)\1$', r'\2', value.strip()) for value in values]


def utc(seconds: float) -> str:
  """A time of time.time() in ISO 8601: '2026-11-26T23:59:59Z', whose order is that of time."""
  return f'{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%dT%H:%M:%SZ}'
