"""The start of a private cluster: its own token, more patience, and nothing left when it fails."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
from ray._private import node, services

from cluster.contract import ClusterConfig, ClusterUnavailable
from cluster.ray_session import session

pytestmark = pytest.mark.slow


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterConfig]:
    """A private cluster in a short folder, for a user who has never used Ray."""
    home = Path(tempfile.mkdtemp(prefix="h-"))  # short, for the sockets
    monkeypatch.setenv("HOME", str(home))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    before = psutil.Process().children()
    yield ClusterConfig(address="local", workers=1, scratch_dir=str(home / "s"))
    assert [child for child in psutil.Process().children() if child not in before] == []
    assert list((home / "s").iterdir()) == []
    assert not (home / ".ray").exists()
    shutil.rmtree(home)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Has Ray's node come up after so many looks for it, each of which takes half a minute."""

    def slow(looks: float) -> None:
        seen = 0
        look = services.get_node

        def late(*arguments: object) -> object:
            nonlocal seen
            seen += 1
            if seen <= looks:
                raise RuntimeError("the node is not there yet")
            return look(*arguments)

        def monotonic() -> float:
            return time.monotonic() + 31 * seen

        clock = SimpleNamespace(**{**vars(time), "monotonic": monotonic})
        monkeypatch.setattr(services, "get_node", late)
        monkeypatch.setattr(node, "time", clock)
        monkeypatch.setattr("cluster.ray_private.time", clock)

    return slow


def test_its_token_is_its_own_and_nobody_else_can_read_it(config: ClusterConfig) -> None:
    tokens = []
    for _ in range(2):
        with session(config, print) as connected:
            file = connected.scratch / "auth_token"
            assert os.environ["RAY_AUTH_MODE"] == "token"
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            assert stat.S_IMODE(connected.scratch.stat().st_mode) == 0o700
            tokens.append(file.read_text())
            assert ray.get(ray.remote(os.getenv).remote("RAY_AUTH_TOKEN_PATH")) == str(file)
        assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    assert tokens[0] != tokens[1]


def test_a_users_token_is_neither_used_nor_touched(
    config: ClusterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    with session(config, print):
        assert "RAY_AUTH_TOKEN" not in os.environ
    assert os.environ["RAY_AUTH_TOKEN"] == "a" * 64
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ


def test_a_slow_start_is_tried_once_more_with_more_patience(
    config: ClusterConfig, slow: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    slow(3)
    with session(config, print) as connected:
        assert len(connected.nodes) == 1
        sessions = list((connected.scratch / "ray").glob("session_2*"))
        assert len(sessions) == 1  # nothing of the first try
    assert "Ray did not start within its 30 s" in caplog.text
    assert "120 s (cluster.start_timeout_s)" in caplog.text


def test_a_start_that_never_succeeds_is_one_paragraph(
    config: ClusterConfig, slow: Callable[[float], None]
) -> None:
    slow(float("inf"))
    with pytest.raises(ClusterUnavailable) as caught, session(config, print):
        pass
    paragraph, *log = str(caught.value).splitlines()
    assert "No private Ray cluster could be started" in paragraph
    assert "timed out during startup" in paragraph
    assert "cluster.start_timeout_s=120" in paragraph
    assert "cluster.backend=local" in paragraph
    assert any(line.startswith("raylet.out: ") for line in log)  # its folder is gone


def test_a_path_too_long_for_sockets_is_refused_at_once(
    config: ClusterConfig, caplog: pytest.LogCaptureFixture
) -> None:
    deep = Path(config.scratch_dir or "") / ("d" * 60) / ("e" * 60)
    too_long = ClusterConfig(address="local", workers=1, scratch_dir=str(deep))
    with pytest.raises(ClusterUnavailable, match="length of that path"), session(too_long, print):
        pass
    assert "Once more" not in caplog.text
    deep.rmdir()
    deep.parent.rmdir()
