"""The stores every store test runs on."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from tests.unit.trainer.checkpoint.stores import MemoryStore
from trainer.checkpoint.store import Store, StoreConfig, open_store


@pytest.fixture(params=["memory", "local", pytest.param("s3", marks=pytest.mark.slow)])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Store:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "local":
        return open_store(str(tmp_path / "store"), StoreConfig())
    server = request.getfixturevalue("s3")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = server.make_bucket(f"store-{uuid.uuid4().hex[:12]}")
    return open_store(f"{bucket}/some/prefix", StoreConfig())
