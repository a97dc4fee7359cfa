"""Makes the .ipynb files from their sources: `python notebooks/build.py` (or `make notebooks`)."""

import pathlib

import jupytext
import nbformat

FOLDER = pathlib.Path(__file__).parent
SOURCES = sorted(path for path in FOLDER.glob('*.py') if path.name != 'build.py')


def notebook(source):
  """The notebook of a source in percent format, without outputs and with fixed cell ids."""
  book = jupytext.read(source)
  for number, cell in enumerate(book.cells):
    cell.id = f'cell-{number}'
  return book


def text(source):
  """The content of the .ipynb file."""
  return nbformat.writes(notebook(source)) + '\n'


if __name__ == '__main__':
  for source in SOURCES:
    source.with_suffix('.ipynb').write_text(text(source))
