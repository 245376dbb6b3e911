"""Checkpoints of a few bytes, committed without a model and a saver."""

from __future__ import annotations

from trainer.checkpoint import layout
from trainer.checkpoint.manifest import Manifest, ObjectEntry
from trainer.checkpoint.objects import BLOCK_BYTES, block_hash
from trainer.checkpoint.slices import Run
from trainer.storage.store import Store

SAVED_AT = "2026-02-19T12:00:00+00:00"


def upload(store: Store, *, run: str, images: int, attempt: str, ranks: int = 1) -> Manifest:
    """Writes the objects of a checkpoint and returns the manifest that would commit it."""
    objects = []
    for rank in range(ranks):
        data = f"{images:012d}{rank:04d}".encode()
        key = layout.object_key(run, images, attempt, rank)
        store.put(key, data)
        objects.append(
            ObjectEntry(rank=rank, key=key, size_bytes=len(data), block_sha256=(block_hash(data),))
        )
    return Manifest(
        run=run,
        images=images,
        attempt=attempt,
        saved_at=SAVED_AT,
        world_size=ranks,
        config_fingerprint="a1b2",
        science={},
        train_state={},
        kinds=("ema",),
        parameters={"weight": (ranks,)},
        cuts={"weight": (Run(0, 1, 0, parts=ranks),)},
        block_bytes=BLOCK_BYTES,
        objects=tuple(objects),
        versions={},
    )
