"""Changes that damage a file, or that somebody makes to do harm."""

import json
import pathlib
import random as random_lib
import re
import shutil

from benchmarks.hostile_files.loaders import Loader

# What stands in place of a value of JSON.
_VALUES = [None, True, False, 0, -1, 1, 2**31, 2**32, 2**63, 10**12, 10**400, 0.5, 1e308, -0.0]
_VALUES += [float('nan'), float('inf'), '', 'x', 'O', '<O8', '\ud800', '\0', '../../etc/passwd']
_VALUES += ['9' * 5000, [], {}, [[]], [None], {'': None}, ['x'] * 1000]
_CONTENTS = [
  b'',
  b'null',
  b'[]',
  b'{}',
  b'0',
  b'"x"',
  b'[' * 3000,
  b'{"a":' * 3000,
  b'9' * 5000,
]
_CONTENTS += [b'\xff\xfe{\0}\0', b'\0' * 1000]
_INTEGERS = [0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
_NUMBER = re.compile(rb'\d+')


def damage(content: bytes, random: random_lib.Random) -> bytes:
  """Returns a file's content with one to three changes."""
  for _ in range(random.choice((1, 1, 2, 3))):
    content = random.choice(_CHANGES)(content, random)
  return content


def _flip(content, random):
  result = bytearray(content)
  for _ in range(random.choice((1, 1, 8)) if content else 0):
    result[random.randrange(len(result))] ^= 1 << random.randrange(8)
  return bytes(result)


def _cut(content, random):
  return content[: random.randint(0, len(content))]


def _repeat(content, random):
  start, end = sorted(random.randint(0, len(content)) for _ in range(2))
  return content[:end] + content[start:end] * random.choice((0, 1, 1, 3)) + content[end:]


def _remove(content, random):
  start = random.randint(0, len(content))
  return content[:start] + content[start + random.choice((1, 2, 4, 8, 64)) :]


def _insert(content, random):
  start = random.randint(0, len(content))
  return content[:start] + random.randbytes(random.choice((1, 4, 100))) + content[start:]


def _integer(content, random):
  """Overwrites bytes by a number, as headers hold them."""
  size = random.choice((1, 2, 4, 8))
  start = random.randint(0, min(len(content), random.choice((16, 10**9))))
  number = random.choice(_INTEGERS) % 256**size
  order = random.choice(('little', 'big'))
  return content[:start] + number.to_bytes(size, order) + content[start + size :]


def _number(content, random):
  """Replaces a number in text, by one of as many digits or of any."""
  found = [*_NUMBER.finditer(content)]
  if not found:
    return content
  match = random.choice(found)
  size = len(match[0])
  new = random.choice((b'9' * size, b'0' * size, b'1'.ljust(size, b'0'), b'-1', b'1000000000000'))
  return content[: match.start()] + new + content[match.end() :]


def _value(content, random):
  """Replaces, removes or copies something in JSON."""
  try:
    root = {'': json.loads(content)}
  except (ValueError, RecursionError):
    return content
  places = list(_places(root))
  container, key = random.choice(places)
  other, its_key = random.choice(places)
  action = random.randrange(8)
  if action == 0:
    del container[key]
  elif action == 1:
    container[key] = json.loads(json.dumps(other[its_key]))
  else:
    container[key] = random.choice(_VALUES)
  return json.dumps(root.get('')).encode()


def _places(value):
  for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
    yield value, key
    if isinstance(inner, dict | list):
      yield from _places(inner)


def _other(content, random):
  return random.choice(_CONTENTS)


_CHANGES = (
  _flip,
  _cut,
  _repeat,
  _remove,
  _insert,
  *(_integer, _number) * 2,
  *(_value,) * 5,
  _other,
)


def damage_one(loader: Loader, good: pathlib.Path, bad: pathlib.Path, random) -> int:
  """Makes a copy of a folder in which one file is damaged or missing; returns its bytes."""
  shutil.rmtree(bad, ignore_errors=True)
  shutil.copytree(good, bad)
  path = random.choice(sorted(bad.glob(loader.damaged)))
  content = damage(path.read_bytes(), random)
  path.unlink()
  kind = random.randrange(100)
  if kind == 0:
    path.mkdir()
  elif kind > 1:
    path.write_bytes(content)
  return len(content)
