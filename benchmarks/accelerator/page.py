"""The results as a page for people."""

from benchmarks.accelerator import parts, tables
from moejax.text import size


def render(content):
  """Markdown of the content of a `results.Results`."""
  sections = [_head(content)]
  for name, cases in content['cases'].items():
    sections.append(_section(parts.PARTS[name], cases, _rows(content, name)))
  return '\n\n'.join(sections) + '\n'


def _rows(content, part):
  return [row for row in content['rows'] if row['part'] == part]


def _head(content):
  memory = f', {size(content["memory"])}' if content['memory'] else ''
  versions = ', '.join(f'{name} {version}' for name, version in content['versions'].items())
  rows = content['rows']
  failed = sum('error' in row for row in rows)
  wanted = sum(map(len, content['cases'].values()))
  lines = [
    f'# {content["chip"]}, {content["date"]}',
    '',
    f'`{content["command"]}`, with {versions}{memory}. Measured: {len(rows) - failed} of {wanted} '
    f'cases, in {sum(row["took"] for row in rows):.0f} s; failed: {failed}. How to read this: '
    'docs/accelerator.md.',
  ]
  if content['tiny']:
    lines += ['', 'Tiny sizes: only to try the program out. No time here means anything.']
  if 'stopped' in content:
    lines += ['', f'It ended early: {content["stopped"]}.']
  return '\n'.join(lines)


def _table(part, rows):
  try:
    return part.table(rows)
  except Exception as error:  # the numbers are in the JSON file
    return f'No table: {type(error).__name__}: {error}.'


def _section(part, cases, rows):
  lines = [f'## {part.TITLE}', '', part.ABOUT, '']
  good = [row for row in rows if 'error' not in row]
  if good:
    lines += [_table(part, good), '']
  failed = [[row['case'], f'{row["took"]:.1f}', row['error']] for row in rows if 'error' in row]
  if failed:
    lines += [tables.markdown(['failed', 'after s', 'error'], failed), '']
  if missing := [case for case in cases if case not in {row['case'] for row in rows}]:
    lines += [f'Not reached: {"; ".join(missing)}.', '']
  return '\n'.join(lines).rstrip()
