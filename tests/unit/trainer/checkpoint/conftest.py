"""The stores every store test runs on."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from tests.unit.trainer.checkpoint.stores import MemoryStore
from trainer.storage.open import open_store
from trainer.storage.store import Store, StoreConfig


@pytest.fixture(params=["memory", "local", pytest.param("s3", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Every kind of store."""
    if request.param != "s3":
        return _store_at_hand(request.param, tmp_path)
    server = request.getfixturevalue("s3")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = server.make_bucket(f"store-{uuid.uuid4().hex[:12]}")
    return open_store(f"{bucket}/some/prefix", StoreConfig())


@pytest.fixture(params=["memory", "local"])
def store_at_hand(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Stores that need no server, for what does not depend on the kind."""
    return _store_at_hand(request.param, tmp_path)


def _store_at_hand(kind: str, folder: Path) -> Store:
    return MemoryStore() if kind == "memory" else open_store(str(folder / "store"), StoreConfig())
