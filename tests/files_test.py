"""Atomic writing."""

import errno

import pytest

from moejax import files


def test_parent_folders_are_created(tmp_path):
  files.write(tmp_path / 'a' / 'b' / 'text', 'é\n')
  assert (tmp_path / 'a' / 'b' / 'text').read_bytes() == b'\xc3\xa9\n'
  files.write(tmp_path / 'a' / 'b' / 'text', b'\0')
  with files.atomic_output(tmp_path / 'new' / 'folder') as temporary:
    temporary.mkdir()
    files.write(temporary / 'x', '1')
  assert sorted(p.name for p in tmp_path.rglob('*')) == ['a', 'b', 'folder', 'new', 'text', 'x']


@pytest.mark.parametrize('folder', [False, True])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, folder):
  files.write(tmp_path / 'x', 'before')
  with pytest.raises(KeyboardInterrupt):
    with files.atomic_output(tmp_path / 'x') as temporary:
      if folder:
        files.write(temporary / 'part', '')
      else:
        temporary.write_text('half')
      raise KeyboardInterrupt
  assert [p.name for p in tmp_path.iterdir()] == ['x']
  assert (tmp_path / 'x').read_text() == 'before'


def test_a_full_disk_is_said_of_the_file(tmp_path):
  with pytest.raises(OSError) as raised:
    with files.atomic_output(tmp_path / 'x'):
      raise OSError(errno.ENOSPC, 'No space left on device')
  assert raised.value.filename == str(tmp_path / 'x')
