"""Numbers and tables of the page, and how long to measure."""

from moejax import text


def seconds(tiny, full):
  """Of measuring one program."""
  return 0.01 if tiny else full


def markdown(header, lines):
  """A table."""
  rows = [header, ['---'] * len(header), *lines]
  escaped = ([str(cell).replace('|', '\\|') for cell in row] for row in rows)
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in escaped)


def ms(seconds):
  return '' if seconds is None else f'{1e3 * seconds:.3g}'


def ratio(number):
  return '' if number is None else f'{number:.2f}'


def share(number):
  """Per cent."""
  return '' if number is None else f'{100 * number:.3g}%'


def size(num_bytes):
  return '' if num_bytes is None else text.size(num_bytes)


def spread(time):
  """Half the distance of the quartiles over the median: ±."""
  median, low, high = time
  return f'±{50 * (high - low) / median:.0f}%'


def compiled(row):
  """Seconds that compiling took."""
  return f'{row["compile_seconds"]:.1f}' + (' (cache)' if row['cached'] else '')
