"""The index commits only what is there, and clears away what nobody can commit any more."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.unit.trainer.checkpoint.handmade import upload
from tests.unit.trainer.checkpoint.stores import MemoryStore, WatchedStore, count_operations
from trainer.checkpoint import layout
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.index import CheckpointIndex
from trainer.storage.errors import StoreError
from trainer.storage.open import open_store
from trainer.storage.store import Store, StoreConfig

RUN = "night-1"
POLICY = CheckpointConfig(keep_last=2)


def commit(store: Store, images: int, *, attempt: str = "good") -> None:
    index = CheckpointIndex(store, run=RUN)
    manifest = upload(store, run=RUN, images=images, attempt=attempt, ranks=2)
    index.prune(index.commit(manifest), policy=POLICY, scores={})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (None, r"rank-00001.*with 16 bytes but is not there; another process may have deleted it"),
        (b"half", r"rank-00001.*with 16 bytes but has 4 bytes there; another process"),
    ],
)
def test_what_is_not_there_is_not_committed(damage: bytes | None, message: str) -> None:
    store = MemoryStore()
    manifest = upload(store, run=RUN, images=10, attempt="good", ranks=2)
    del store.objects[manifest.objects[1].key]
    if damage is not None:
        store.objects[manifest.objects[1].key] = damage
    with pytest.raises(StoreError, match=message):
        CheckpointIndex(store, run=RUN).commit(manifest)
    assert layout.manifest_key(RUN, 10) not in store.objects


def test_content_deleted_between_upload_and_commit_is_noticed() -> None:
    """A process that was thought dead comes back with a save that a later one has superseded."""
    store = MemoryStore()
    late = upload(store, run=RUN, images=10, attempt="late")
    commit(store, 20)
    with pytest.raises(StoreError, match="only one process trains run=night-1"):
        CheckpointIndex(store, run=RUN).commit(late)
    assert CheckpointIndex(store, run=RUN).listing().manifests.keys() == {20}


def test_two_processes_of_a_run_are_told_to_the_user(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    commit(store, 10, attempt="first")
    second = upload(store, run=RUN, images=10, attempt="second")
    with caplog.at_level(logging.WARNING):
        assert CheckpointIndex(store, run=RUN).commit(second).attempt == "first"
    assert "stop one of them, or give it another run=NAME" in caplog.text


def test_what_a_save_does_in_the_store() -> None:
    store = MemoryStore()
    for images in (10, 20):
        commit(store, images)
    expected = (
        "put put list create "  # objects, a look whether they are there, the manifest
        "list get get "  # what there is, and whether it is whole
        "delete delete delete "  # the oldest manifest and its objects
        "abort_unfinished"  # unfinished uploads
    )
    assert count_operations(store, lambda watched: commit(watched, 30)) == expected.split()


def test_a_manifest_goes_before_its_objects() -> None:
    """Else a process that dies in between would leave a damaged checkpoint."""
    store = MemoryStore()
    for images in (10, 20):
        commit(store, images)
    deleted = []

    def watch(number: int, verb: str, key: str, when: str) -> None:
        if (verb, when) == ("delete", "before"):
            deleted.append(key)

    commit(WatchedStore(store, watch), 30)
    content = [layout.object_key(RUN, 10, "good", rank) for rank in range(2)]
    assert deleted == [layout.manifest_key(RUN, 10), *content]


def test_a_damaged_checkpoint_that_stays_keeps_what_is_left_of_it() -> None:
    store = MemoryStore()
    for images in (10, 20):
        commit(store, images)
    missing, left = (layout.object_key(RUN, 20, "good", rank) for rank in range(2))
    del store.objects[missing]
    commit(store, 30)
    assert CheckpointIndex(store, run=RUN).listing().damaged.keys() == {20}
    assert left in store.objects
    commit(store, 40)
    assert {layout.images_of(RUN, key) for key in store.objects} == {30, 40}


def test_what_dead_writers_left_is_swept_and_what_may_be_alive_is_not(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), StoreConfig())
    left = [
        tmp_path / layout.attempt_prefix(RUN, images, "dead") / ".tmp-4711"
        for images in (5, 10, 15)
    ]
    for path in left:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half of")
    commit(store, 10)
    assert [path.exists() for path in left] == [False, True, True]
    assert not left[0].parent.exists()


def test_an_inventory_tells_whole_damaged_and_unfinished_apart() -> None:
    store = MemoryStore()
    for images in (10, 20):
        commit(store, images)
    del store.objects[layout.object_key(RUN, 10, "good", 1)]
    upload(store, run=RUN, images=30, attempt="underway")
    listing = CheckpointIndex(store, run=RUN).listing()
    assert listing.manifests.keys() == {20}
    assert listing.newest_valid == listing.manifests[20]
    assert listing.damaged.keys() == {10}
    assert "rank-00001.safetensors is missing" in listing.damaged[10]
    assert [*listing.folders] == [10, 20, 30]
