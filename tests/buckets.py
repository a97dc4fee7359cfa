"""Storage services in this process, with one bucket, `bucket`; without them, tests are skipped."""

import contextlib
import http.server
import io
import logging
import sys
import threading
import urllib.parse

import pytest


@contextlib.contextmanager
def gcs(monkeypatch):
  """Cloud Storage; yields its memory, a `gcp_storage_emulator.storage.Storage`."""
  # Asks another service, from the import on.
  monkeypatch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
  pytest.importorskip('gcsfs', reason='gcsfs is not installed')
  pytest.importorskip('gcp_storage_emulator.server', reason='gcp-storage-emulator is not installed')
  logging.getLogger('gcp_storage_emulator').setLevel(logging.CRITICAL)
  logging.getLogger('api').setLevel(logging.CRITICAL)
  server, storage = _gcs_server()
  with server:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f'http://localhost:{server.server_address[1]}'
    monkeypatch.setenv('STORAGE_EMULATOR_HOST', url)
    monkeypatch.setenv('TENSORSTORE_GCS_HTTP_URL', url)
    monkeypatch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'a token')
    _forget('gcsfs', 'GCSFileSystem')
    yield storage
    server.shutdown()
    thread.join()


def _gcs_server():
  """The emulator, with what clients rely on: generations, conditions, any number of connections."""
  from gcp_storage_emulator import server, storage
  from gcp_storage_emulator.handlers import buckets

  class Changed(Exception):
    """The object is not of the generation that a request wants."""

  class Storage(storage.Storage):
    wanted = None  # the generation, '0' if there must be no object

    def generation(self, bucket, name):
      return self.objects.get(bucket, {}).get(name, {}).get('generation', '0')

    def create_file(self, bucket_name, file_name, *rest):
      self._check(bucket_name, file_name)
      super().create_file(bucket_name, file_name, *rest)

    def delete_file(self, bucket_name, file_name):
      self._check(bucket_name, file_name)
      super().delete_file(bucket_name, file_name)

    def _check(self, bucket, name):
      if self.wanted not in (None, self.generation(bucket, name)):
        raise Changed

    def _bucket_soft_delete_retention_seconds(self, bucket_name):
      return 0

    def _write_config_to_file(self):
      pass

  class Handler(server.RequestHandler):
    def parse_request(self):
      if not super().parse_request():
        return False
      size = int(self.headers.get('Content-Length', 0))
      self.rfile = io.BytesIO(self.rfile.read(size))
      return len(self.rfile.getvalue()) == size  # else the client was killed

    def _handle(self):
      parts = urllib.parse.urlparse(self.path)
      query = urllib.parse.parse_qs(parts.query)
      bucket, _, name = parts.path.partition('/b/')[2].partition('/o/')
      with lock:
        self.generation = memory.generation(bucket, urllib.parse.unquote(name))
        if query.get('ifGenerationNotMatch') == [self.generation] and self.command == 'GET':
          return self._answer(304)
        memory.wanted, *_ = query.get('ifGenerationMatch', [None])
        try:
          server.Router(self).handle(self.command)
        except Changed:
          self._answer(412)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _handle

    def _answer(self, code):
      self.send_response(code)
      self.send_header('Content-Length', '0')
      self.end_headers()

    def end_headers(self):
      self.send_header('x-goog-generation', self.generation)
      super().end_headers()

  class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 1024

    def handle_error(self, request, client_address):
      pass  # clients close connections

  memory, lock = Storage(use_memory_fs=True), threading.Lock()
  buckets.create_bucket('bucket', memory)
  return Server(('localhost', 0), lambda *args: Handler(memory, *args)), memory


@contextlib.contextmanager
def s3(monkeypatch):
  """S3."""
  pytest.importorskip('s3fs', reason='s3fs is not installed')
  moto = pytest.importorskip('moto.server', reason='moto is not installed')
  server = moto.ThreadedMotoServer('localhost', 0, verbose=False)
  server.start()
  for name, value in {
    'AWS_ENDPOINT_URL': f'http://localhost:{server.get_host_and_port()[1]}',
    'AWS_ACCESS_KEY_ID': 'x',
    'AWS_SECRET_ACCESS_KEY': 'x',
    'AWS_DEFAULT_REGION': 'us-east-1',
    'AWS_REGION': 'us-east-1',
  }.items():
    monkeypatch.setenv(name, value)
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
