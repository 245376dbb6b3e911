"""Who may tell a cluster to run something, asked of real servers."""

import http.server
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cluster import doors
from cluster.doors import asks_for_token, is_loopback, open_door, open_door_warning, use_token


@contextmanager
def server(status: int) -> Iterator[str]:
    """Answers everybody alike, and redirects to itself with a code that says so."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{served.server_port}"
        finally:
            served.shutdown()


@pytest.mark.parametrize(
    ("status", "asks"), [(200, False), (401, True), (403, True), (404, None), (500, None)]
)
def test_a_server_asks_for_a_token_or_does_not(status, asks):
    with server(status) as address:
        assert asks_for_token(address) is asks
        assert asks_for_token(f"{address}/") is asks


def test_nobody_answers_where_nobody_is():
    with server(200) as address:
        pass
    assert asks_for_token(address) is None
    assert asks_for_token("nonsense") is None


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("10.0.0.7", False),
        ("fe80::1", False),
        ("", False),
        ("no-such-host.invalid", False),
    ],
)
def test_what_this_machine_alone_can_reach(host, alone):
    assert is_loopback(host) is alone


def test_a_door_is_shut_if_others_cannot_reach_it_or_somebody_guards_it(monkeypatch):
    with server(200) as unguarded, server(401) as guarded, server(500) as sick:
        assert open_door(unguarded) is None
        monkeypatch.setattr(doors, "is_loopback", lambda _: False)
        assert open_door(unguarded) == "asks for no token"
        assert open_door(guarded) is None
        assert open_door(sick) == "does not tell whether it asks for a token"
    assert open_door(sick) == "does not tell whether it asks for a token"  # it is gone


def test_a_guarded_door_behind_a_proxy_is_shut(monkeypatch):
    monkeypatch.setattr(doors, "is_loopback", lambda _: False)
    monkeypatch.setenv("no_proxy", "")
    with server(401) as proxy:
        monkeypatch.setenv("http_proxy", proxy)
        assert open_door("http://no-such-host.invalid:8265") is None


@pytest.mark.parametrize(
    ("hosts", "status", "has_token", "told"),
    [
        (["127.0.0.1"], 200, False, False),
        (["127.0.0.1", "10.0.0.7"], 200, False, True),
        (["10.0.0.7"], 200, True, True),  # whoever has none is let in all the same
        (["10.0.0.7"], 401, True, False),
        (["10.0.0.7"], 401, False, False),
        (["10.0.0.7"], None, True, False),
        (["10.0.0.7"], None, False, True),
    ],
)
def test_a_cluster_that_others_can_use_is_told(hosts, status, has_token, told):
    with server(status or 200) as address:
        place = address.removeprefix("http://") if status else None
        word = open_door_warning(hosts, place, has_token=has_token)
    assert bool(word) == told
    assert not told or "RAY_AUTH_MODE=token" in word


@pytest.mark.parametrize(
    ("variables", "file", "mode"),
    [
        ({}, False, None),
        ({}, True, "token"),
        ({"RAY_AUTH_TOKEN": "x"}, False, "token"),
        ({"RAY_AUTH_TOKEN_PATH": "/x"}, False, "token"),
        ({"RAY_AUTH_MODE": "disabled"}, True, "disabled"),
    ],
)
def test_a_token_that_is_there_is_sent(tmp_path, monkeypatch, variables, file, mode):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", *doors.TOKEN_VARIABLES):
        monkeypatch.setenv(name, "")  # so that the end of the test removes what is set
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if file:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("x")
    use_token()
    assert os.environ.get("RAY_AUTH_MODE") == mode
