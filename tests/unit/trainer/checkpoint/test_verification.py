"""Verification reads all blocks, names what is damaged, and tells how far it is."""

from __future__ import annotations

import dataclasses
import re

import pytest

from pipelines.formats import format_bytes
from tests.unit.trainer.checkpoint.handmade import upload
from tests.unit.trainer.checkpoint.stores import MemoryStore, count_operations
from trainer.checkpoint.content import ReadProgress, damaged_objects
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.objects import block_hash
from trainer.storage.errors import StoreUnreachable

RANKS, SIZE, BLOCK = 3, 16, 4


def checkpoint(store: MemoryStore) -> Manifest:
    """Three objects of four blocks."""
    manifest = upload(store, run="run", images=8, attempt="good", ranks=RANKS)
    objects = [
        dataclasses.replace(
            entry,
            block_sha256=tuple(
                block_hash(store.objects[entry.key][start : start + BLOCK])
                for start in range(0, SIZE, BLOCK)
            ),
        )
        for entry in manifest.objects
    ]
    return dataclasses.replace(manifest, block_bytes=BLOCK, objects=tuple(objects))


def test_every_block_is_read_once() -> None:
    store, lines = MemoryStore(), list[str]()
    manifest = checkpoint(store)
    progress = ReadProgress(RANKS * SIZE, report=lines.append)
    read = count_operations(store, lambda watched: damaged_objects(watched, manifest, progress))
    assert read == ["get_range"] * (RANKS * SIZE // BLOCK)
    assert damaged_objects(store, manifest, ReadProgress(1, report=lines.append)) == {}
    assert progress.done == RANKS * SIZE
    assert lines[0].startswith("48 B of 48 B (100%)  ")


@pytest.mark.parametrize("position", range(0, SIZE, 3))
def test_any_changed_byte_is_found_and_the_rest_is_read_on(position: int) -> None:
    store = MemoryStore()
    manifest = checkpoint(store)
    _, second, third = (entry.key for entry in manifest.objects)
    data = bytearray(store.objects[second])
    data[position] ^= 1
    store.objects[second] = bytes(data)
    del store.objects[third]
    progress = ReadProgress(RANKS * SIZE, report=lambda line: None)
    damage = damaged_objects(store, manifest, progress)
    start = position // BLOCK * BLOCK
    assert damage.keys() == {second, third}
    assert f"bytes {start} to {start + BLOCK}" in damage[second]
    assert "is missing" in damage[third]
    assert progress.done == RANKS * SIZE


def test_a_store_that_fails_damages_nothing() -> None:
    class Failing(MemoryStore):
        def get_range(self, key: str, start: int, size: int) -> bytes:
            raise StoreUnreachable("for a moment")

    manifest = checkpoint(MemoryStore())
    with pytest.raises(StoreUnreachable):
        damaged_objects(Failing(), manifest, ReadProgress(1, report=lambda line: None))


def test_progress_is_told_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = [100.0], list[str]()
    monkeypatch.setattr("pipelines.progress.time.monotonic", lambda: now[0])
    progress = ReadProgress(400 * 2**20, report=lines.append)
    for _ in range(8):
        now[0] += 1.0
        progress.add(50 * 2**20)
    assert lines == [
        "250 MiB of 400 MiB (62%)  50.0 MiB/s  ETA 3s",
        "400 MiB of 400 MiB (100%)  50.0 MiB/s  ETA 0s",
    ]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (123 * 2**20, "123 MiB"),
        (2**30, "1.0 GiB"),
        (5 * 2**50, "5120 TiB"),
    ],
)
def test_sizes_are_for_people(size: int, text: str) -> None:
    assert format_bytes(size) == text
    assert re.fullmatch(r"[0-9.]+ ([KMGT]i)?B", format_bytes(size))
