"""Storage services in this process, with one bucket, `bucket`; without them, tests are skipped."""

import contextlib
import logging
import socket
import sys

import pytest


@contextlib.contextmanager
def gcs(monkeypatch):
  """Cloud Storage; yields its memory, a `gcp_storage_emulator.storage.Storage`."""
  pytest.importorskip('gcsfs', reason='gcsfs is not installed')
  server_lib = pytest.importorskip(
    'gcp_storage_emulator.server', reason='gcp-storage-emulator is not installed'
  )
  logging.getLogger('gcp_storage_emulator').setLevel(logging.CRITICAL)
  port = _free_port()
  monkeypatch.setenv('STORAGE_EMULATOR_HOST', f'http://localhost:{port}')
  monkeypatch.setenv('TENSORSTORE_GCS_HTTP_URL', f'http://localhost:{port}')
  monkeypatch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'a token')
  monkeypatch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')  # asks another service
  server = server_lib.create_server('localhost', port, True, 'bucket')
  server.start()
  _forget('gcsfs', 'GCSFileSystem')
  yield server._storage
  server.stop()


@contextlib.contextmanager
def s3(monkeypatch):
  """S3."""
  pytest.importorskip('s3fs', reason='s3fs is not installed')
  moto = pytest.importorskip('moto.server', reason='moto is not installed')
  port = _free_port()
  for name, value in {
    'AWS_ENDPOINT_URL': f'http://localhost:{port}',
    'AWS_ACCESS_KEY_ID': 'x',
    'AWS_SECRET_ACCESS_KEY': 'x',
    'AWS_DEFAULT_REGION': 'us-east-1',
    'AWS_REGION': 'us-east-1',
  }.items():
    monkeypatch.setenv(name, value)
  server = moto.ThreadedMotoServer('localhost', port, verbose=False)
  server.start()
  _forget('s3fs', 'S3FileSystem')
  import s3fs

  s3fs.S3FileSystem().mkdir('bucket')
  yield server
  server.stop()


def _forget(package, name):
  """Clears what fsspec and epath know of an earlier server."""
  from etils.epath import backend

  getattr(sys.modules[package], name).clear_instance_cache()
  backend._FileSystemSpecBackend._get_filesystem.cache_clear()


def _free_port():
  with socket.socket() as found:
    found.bind(('localhost', 0))
    return found.getsockname()[1]
