"""The checkpoints that a URI means, and what is said of URIs that mean none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.trainer.checkpoint.handmade import upload
from trainer.checkpoint.index import CheckpointIndex
from trainer.config.reading import ConfigError
from trainer.evaluation.choice import choose_checkpoints
from trainer.storage.errors import CheckpointError
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run of three checkpoints, in a folder whose own name is misleading."""
    runs = f"{tmp_path}/checkpoints/runs"
    store = open_store(runs, StoreConfig())
    for images in (100, 200, 300):
        CheckpointIndex(store, run="a").commit(
            upload(store, run="a", images=images, attempt="good")
        )
    return f"{runs}/a"


def test_one_or_the_newest_or_all(run: str) -> None:
    def chosen(uri: str, which: str) -> list[int]:
        found = choose_checkpoints(uri, which=which, config=StoreConfig())  # type: ignore[arg-type]
        assert f"{found.runs}/a" == run
        return [manifest.images for manifest in found.manifests]

    for end in ("", "/", "/checkpoints", "/checkpoints/"):
        assert chosen(run + end, "newest") == [300]
        assert chosen(run + end, "all") == [100, 200, 300]
    assert chosen(f"{run}/checkpoints/000000000200/", "newest") == [200]
    with pytest.raises(ConfigError, match=f"is one checkpoint; give checkpoint={run}$"):
        chosen(f"{run}/checkpoints/000000000200", "all")
    with pytest.raises(ConfigError, match="no valid checkpoint"):
        chosen(f"{run}x", "newest")


@pytest.mark.parametrize("rest", ["p", "runs/a", "runs/a/checkpoints/000000000100"])
def test_credentials_are_not_repeated(rest: str) -> None:
    with pytest.raises(CheckpointError, match="no credentials") as caught:
        choose_checkpoints(
            f"s3://AKIDXX:SEKRET@bucket/{rest}", which="newest", config=StoreConfig()
        )
    assert "AKID" not in str(caught.value)
    assert "SEKRET" not in str(caught.value)
