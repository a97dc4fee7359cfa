"""docs/architecture.md and its picture speak of files and names that exist."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / 'docs' / 'architecture.md').read_text()
PICTURE = (ROOT / 'docs' / 'architecture.svg').read_text()


def _names(path):
  """What a module defines: functions, classes, constants."""
  for node in ast.parse((ROOT / path).read_text()).body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      yield node.name
    elif isinstance(node, ast.Assign):
      yield from (target.id for target in node.targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
      yield node.target.id


def _pairs(page):
  """(file, name) of every `file`: `name`, and of `NAME` in `file`."""
  yield from re.findall(r'`([\w/]+\.py)`:\s+`(\w+)`', page)
  yield from ((path, name) for name, path in re.findall(r'`(\w+)`\s+in\s+`([\w/]+\.py)`', page))


def test_files_exist():
  files = re.findall(r'`([\w/]+(?:\.py|/))`', PAGE)
  files += [f'moejax/{path}' for path in re.findall(r'[\w/]+\.py\b', PICTURE)]
  assert len(files) > 40
  places = (ROOT, ROOT / 'moejax')  # in tables, only the first file of a row has its folder
  missing = [path for path in files if not any((place / path).exists() for place in places)]
  assert missing == []


def test_every_file_has_its_place_in_the_table():
  table = PAGE.partition('## Files')[2]
  missing = [
    p.name for p in (ROOT / 'moejax').glob('*.py') if not re.search(rf'[`/]{p.name}`', table)
  ]
  assert missing == []


@pytest.mark.parametrize('path', sorted({path for path, _ in _pairs(PAGE)}))
def test_names_exist(path):
  wanted = {name for other, name in _pairs(PAGE) if other == path}
  assert wanted <= set(_names(path)), f'docs/architecture.md speaks of {path}: mend the page'


def test_links_lead_somewhere():
  for link in re.findall(r'\]\(([^)#]+)', PAGE):
    assert (ROOT / 'docs' / link).exists(), link
