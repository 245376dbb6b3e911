"""A proxy of the environment is named by whatever cannot reach its server through it."""

import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipelines.errors import StoreUnreachableError
from pipelines.proxies import proxy_hint
from pipelines.source import Source, SourceConfig
from trainer.metrics.mlflow_backend import TrackerUnreachable, check_tracker
from trainer.metrics.tracker import TrackingConfig
from trainer.storage.errors import StoreError
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

HOST = "storage.internal"
ADDRESS = f"http://{HOST}:9000"
SECRET = "proxy-password-4711"


class Refusal(BaseHTTPRequestHandler):
    """What a company's proxy says of hosts that it does not know."""

    def do_GET(self):
        body = b"<html>access denied by policy</html>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        """Be quiet."""


for method in ("HEAD", "PUT", "POST"):
    setattr(Refusal, f"do_{method}", Refusal.do_GET)


@pytest.fixture(params=["refuses", "is away"])
def proxy(request, monkeypatch):
    with contextlib.ExitStack() as stack:
        if request.param == "refuses":
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Refusal))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            port = server.server_port
        else:
            closed = stack.enter_context(socket.socket())
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
        for name in ("http_proxy", "NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HTTP_PROXY", f"http://me:{SECRET}@127.0.0.1:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("S3_ENDPOINT_URL", ADDRESS)
        yield


def assert_named(error):
    assert "HTTP_PROXY is set" in str(error)
    assert f"add {HOST} to NO_PROXY" in str(error)
    assert SECRET not in str(error)


def test_the_store_of_checkpoints_names_it(proxy):
    store = open_store("s3://bucket/run", StoreConfig(endpoint_url=ADDRESS, retries=1))
    for operation in (lambda: store.get("key"), lambda: store.put("key", b"1")):
        with pytest.raises(StoreError) as caught:
            operation()
        assert_named(caught.value)


def test_the_reader_of_shards_names_it(proxy, tmp_path):
    source = Source("s3://bucket/data", config=SourceConfig(download_patience_s=0))
    with pytest.raises(StoreUnreachableError) as caught:
        source.fetch("index.json", tmp_path / "index.json")
    assert_named(caught.value)


def test_mlflow_names_it(proxy, tmp_path):
    with pytest.raises(TrackerUnreachable) as caught:
        check_tracker(TrackingConfig(uri=ADDRESS), str(tmp_path))
    assert_named(caught.value)


def test_only_a_proxy_that_is_used_is_named(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "NO_PROXY", "S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert proxy_hint(ADDRESS) == ""
    assert "HTTPS_PROXY is set" in proxy_hint(None)
    assert "s3.amazonaws.com to NO_PROXY" in proxy_hint(None)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert "https_proxy is set" in proxy_hint("https://a.example")
    monkeypatch.setenv("NO_PROXY", ".example")
    assert proxy_hint("https://a.example:8443") == ""
    assert proxy_hint("sqlite:////tmp/mlflow.db") == ""
