"""A checkpoint saved by one process, at once; and a manifest of none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.index import CheckpointIndex
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.saver import CheckpointSaver
from trainer.config.job import config_fingerprint
from trainer.host_group import HostGroup
from trainer.state import Fragment
from trainer.storage.store import Store


def save_now(
    store: Store,
    *,
    run: str,
    images: int,
    fragments: Sequence[Fragment],
    science: Mapping[str, Any],
    train_state: Mapping[str, Any] | None = None,
    config_fingerprint: str = "x",
) -> None:
    """Saves a state and waits until it is committed."""
    saver = CheckpointSaver(
        store,
        index=CheckpointIndex(store, run=run),
        config=CheckpointConfig(keep_last=100),
        ranks=HostGroup(alone=True),
        aside=HostGroup(alone=True),
    )
    saver.save(
        images=images,
        fragments=fragments,
        train_state=train_state or {},
        science=science,
        config_fingerprint=config_fingerprint,
    )
    saver.finish()
    assert saver.is_saved(images)


def manifest_of(
    science: Mapping[str, Any], *, train_state: Mapping[str, Any] | None = None
) -> Manifest:
    """What a checkpoint of no parameters says of its run, after 100 images."""
    settings = all(isinstance(group, Mapping) for group in science.values())
    return Manifest(
        run="run",
        images=100,
        attempt="a",
        saved_at="",
        world_size=1,
        config_fingerprint=config_fingerprint(science) if settings else "x",
        science=science,
        train_state=train_state or {},
        kinds=(),
        parameters={},
        cuts={},
        block_bytes=4,
        objects=(),
        versions={},
    )
