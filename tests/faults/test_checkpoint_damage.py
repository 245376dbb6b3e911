"""Whatever is damaged in the store is noticed, named, and passed over; the last good one stays."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.remote_store import RemoteStore, load_state, save_state
from tests.unit.trainer.checkpoint.worlds import (
    RUN,
    empty_state,
    even_cuts,
    random_state,
    same_bits,
    split,
)
from trainer.checkpoint import layout
from trainer.checkpoint.content import ReadProgress, damaged_objects
from trainer.checkpoint.errors import DamagedCheckpoint, InvalidManifest
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.storage.open import open_store
from trainer.storage.store import Store, StoreConfig

pytestmark = pytest.mark.slow

OLD, NEW, NEXT = 10, 20, 30
CUTS = even_cuts(2)
FLIPS_LOCAL, FLIPS_REMOTE = 120, 16  # of each object


def saved(store: Store) -> Manifest:
    """Two checkpoints of two ranks each; returns the newer."""
    for images in (OLD, NEW):
        save_state(store, random_state(images), images=images, cuts=CUTS)
    manifest = CheckpointReader(store, run=RUN).manifest(NEW)
    assert manifest
    return manifest


def manifest_key(images: int) -> str:
    return layout.manifest_key(RUN, images)


def replace(store: Store, key: str, data: bytes) -> None:
    store.delete(key)  # what another object stands on is not written over on any store
    store.put(key, data)


def damage(store: Store, manifest: Manifest) -> dict[str, str]:
    return damaged_objects(store, manifest, ReadProgress(1, report=lambda line: None))


def flipped(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << position % 8
    return bytes(changed)


def check_flips(store: Store, *, count: int) -> None:
    """A flipped byte is noticed by verification, by a restore, or by a look at the manifest."""
    manifest = saved(store)
    reader = CheckpointReader(store, run=RUN)
    positions = random.Random(0)
    for key in (manifest_key(NEW), *(entry.key for entry in manifest.objects)):
        data = store.get(key)
        # The length of the header, the header, values; a manifest's first and last sign.
        for position in {0, 7, 8, len(data) - 1, *positions.sample(range(len(data)), count)}:
            store.put(key, flipped(data, position))
            if key == manifest_key(NEW):
                with pytest.raises(InvalidManifest, match=key):
                    reader.index.examine(NEW)
                continue
            assert list(damage(store, manifest)) == [key], position
            with pytest.raises(DamagedCheckpoint, match=f"{store.uri(key)} changed after it was"):
                reader.restore(manifest, split(empty_state(), [])[0])
        store.put(key, data)
    assert damage(store, manifest) == {}
    reader.restore(manifest, split(empty_state(), [])[0])


def test_a_flip_of_any_byte_is_noticed(tmp_path: Path) -> None:
    check_flips(open_store(str(tmp_path), StoreConfig()), count=FLIPS_LOCAL)


def test_a_flip_of_any_byte_of_a_remote_object_is_noticed(remote: RemoteStore) -> None:
    check_flips(remote.store, count=FLIPS_REMOTE)


def first(store: Store, images: int = NEW) -> str:
    return contents(store, images)[0]


def contents(store: Store, images: int) -> list[str]:
    keys = store.list(layout.checkpoint_key(RUN, images) + "/")
    return [key for key in keys if key.endswith(".safetensors")]


def described(store: Store, **changes: object) -> None:
    """Change fields of the manifest."""
    key = manifest_key(NEW)
    replace(store, key, json.dumps(json.loads(store.get(key)) | changes).encode())


def of_other_run(store: Store, key: str) -> None:
    """Have an object come from a save of the same shapes with other values."""
    state = random_state(99)
    save_state(store, state, images=NEW + 1, cuts=CUTS, keep_last=9)
    data = store.get(first(store, NEW + 1))
    for each in store.list(layout.checkpoint_key(RUN, NEW + 1) + "/"):
        store.delete(each)
    replace(store, key, data)


DAMAGES: dict[str, tuple[Callable[[Store], object], str]] = {
    "shorter by a byte": (
        lambda store: replace(store, first(store), store.get(first(store))[:-1]),
        "rank-00000.safetensors has",
    ),
    "longer by a byte": (
        lambda store: replace(store, first(store), store.get(first(store)) + b"\0"),
        "rank-00000.safetensors has",
    ),
    "empty": (
        lambda store: replace(store, first(store), b""),
        "rank-00000.safetensors has 0 bytes",
    ),
    "zeros": (
        lambda store: replace(store, first(store), bytes(len(store.get(first(store))))),
        "rank-00000.safetensors changed after it was saved",
    ),
    "missing": (lambda store: store.delete(first(store)), "rank-00000.safetensors is missing"),
    "all content missing": (
        lambda store: [store.delete(key) for key in contents(store, NEW)],
        "rank-00000.safetensors is missing",
    ),
    "object of another rank": (
        lambda store: replace(store, first(store), store.get(contents(store, NEW)[1])),
        "rank-00000.safetensors ",
    ),
    "object of another checkpoint": (
        lambda store: replace(store, first(store), store.get(first(store, OLD))),
        "rank-00000.safetensors changed after it was saved",
    ),
    "object of another save": (
        lambda store: of_other_run(store, first(store)),
        "rank-00000.safetensors changed after it was saved",
    ),
    "manifest of another checkpoint": (
        lambda store: replace(store, manifest_key(NEW), store.get(manifest_key(OLD))),
        f"belongs to run '{RUN}' at {OLD} images",
    ),
    "manifest cut": (
        lambda store: replace(store, manifest_key(NEW), store.get(manifest_key(NEW))[:-9]),
        "it is not JSON",
    ),
    "manifest empty": (
        lambda store: replace(store, manifest_key(NEW), b""),
        "it is not JSON",
    ),
    "manifest edited": (
        lambda store: described(store, train_state={"images": 7}),
        "it was changed after it was written",
    ),
    "manifest of before": (
        lambda store: described(store, format_version=1),
        "it has format 1, which this code no longer reads; finish its run with the version",
    ),
    "manifest to come": (
        lambda store: described(store, format_version=4),
        "has format 4, and this code reads up to 3: use the newer version",
    ),
}


@pytest.mark.parametrize(("strike", "said"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_named_and_passed_over(
    remote: RemoteStore,
    strike: Callable[[Store], object],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = remote.store
    manifest = saved(store)
    whole = {key: store.get(key) for key in store.list(layout.checkpoint_key(RUN, OLD) + "/")}
    strike(store)
    left = store.list(layout.checkpoint_key(RUN, NEW) + "/")
    told: list[str] = []
    found = load_state(store, report=told.append)
    assert found
    images, state, index = found
    assert images == OLD
    assert same_bits(state, random_state(OLD))
    # What, where, and what to do.
    told += [line for line in caplog.messages if line.startswith("passing over checkpoint")]
    assert f"passing over checkpoint {store.uri(layout.checkpoint_key(RUN, NEW))}" in told[-1]
    assert said in told[0]
    assert re.search("Use an older checkpoint|Resume from another|use the newer version", told[0])
    if damage(store, manifest):
        assert said in " ".join(damage(store, manifest).values()) or "has" in said
    # The checkpoints that follow take away neither the evidence nor the last good one.
    outcomes = save_state(
        store, random_state(NEXT), images=NEXT, cuts=CUTS, index=index, keep_last=2
    )
    assert outcomes == [store.uri(layout.checkpoint_key(RUN, NEXT))] * 2
    assert store.list(layout.checkpoint_key(RUN, NEW) + "/") == left
    assert {key: store.get(key) for key in whole} == whole
