"""Restoring by blocks: every wanted value, each block once, nothing unverified."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.trainer.checkpoint.stores import MemoryStore, WatchedStore
from tests.unit.trainer.checkpoint.worlds import (
    RUN,
    empty_state,
    even_cuts,
    random_state,
    same_bits,
    save,
    split,
)
from trainer.checkpoint import objects, saver
from trainer.checkpoint.content import ReadProgress, damaged_objects, fill
from trainer.checkpoint.errors import DamagedCheckpoint
from trainer.checkpoint.objects import blocks_of
from trainer.checkpoint.reader import CheckpointReader

QUIET = ReadProgress(1, report=lambda _line: None)
BLOCKS = st.sampled_from([4, 8, 12, 64, 100, 1000])


def saved(block_bytes: int, *, world: int) -> MemoryStore:
    store = MemoryStore()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "BLOCK_BYTES", block_bytes)
        patch.setattr(saver, "BLOCK_BYTES", block_bytes)
        save(store, random_state(1), images=64, world=world)
    return store


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(block_bytes=BLOCKS, before=st.integers(1, 4), after=st.integers(1, 4))
def test_blocks_of_any_size_restore_any_world(block_bytes: int, before: int, after: int) -> None:
    store = saved(block_bytes, world=before)
    manifest = CheckpointReader(store, run=RUN).newest_valid()
    assert manifest is not None
    assert manifest.block_bytes == block_bytes
    assert damaged_objects(store, manifest, QUIET) == {}
    loaded = empty_state()
    for mine in split(loaded, even_cuts(after)):
        reads: Counter[tuple[str, int]] = Counter()

        def watch(_number: int, verb: str, key: str, when: str) -> None:
            if when == "before":
                reads[verb, hash(key)] += 1  # noqa: B023

        fill(WatchedStore(store, watch), manifest, mine)
        at_most = sum(len(entry.block_sha256) for entry in manifest.objects)
        assert sum(reads.values()) <= at_most
    assert same_bits(loaded, random_state(1))


def test_a_rank_reads_the_blocks_of_its_slices_alone() -> None:
    """One of four needs a quarter of every kind, and at most two blocks more of each run."""
    store = saved(8, world=1)
    manifest = CheckpointReader(store, run=RUN).newest_valid()
    assert manifest is not None
    total = len(manifest.objects[0].block_sha256)
    read: list[int] = []
    for mine in split(empty_state(), even_cuts(4)):
        count = [0]

        def watch(_number: int, _verb: str, _key: str, when: str) -> None:
            count[0] += when == "before"  # noqa: B023

        fill(WatchedStore(store, watch), manifest, mine)
        read.append(count[0])
    values = manifest.content_bytes(manifest.objects[0]) // 8
    assert max(read) <= values // 4 + 2 * 4 + 4
    assert sum(read) < total


SAVED_BY_TWO = saved(64, world=2)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_noticed_by_all_who_read_it(data: st.DataObject) -> None:
    store = MemoryStore()
    store.objects.update(SAVED_BY_TWO.objects)
    manifest = CheckpointReader(store, run=RUN).newest_valid()
    assert manifest is not None
    entry = data.draw(st.sampled_from(manifest.objects))
    content = bytearray(store.objects[entry.key])
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    store.objects[entry.key] = bytes(content)
    damage = damaged_objects(store, manifest, QUIET)
    assert damage.keys() == {entry.key}
    assert "changed after it was saved" in damage[entry.key]
    if position >= len(content) - manifest.content_bytes(entry):
        with pytest.raises(DamagedCheckpoint, match="changed after it was saved"):
            fill(store, manifest, split(empty_state(), [])[0])


def test_blocks_make_up_the_whole() -> None:
    data = memoryview(bytes(range(256)) * 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "BLOCK_BYTES", 1000)
        assert [len(block) for block in blocks_of(data)] == [1000, 1000, 560]
        assert b"".join(blocks_of(data)) == data
